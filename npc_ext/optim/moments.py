"""Clears the first moments of neurons and connections that freeze."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


class FirstMoments:
    """Clears first moments that the kernels leave.

    The kernels clear the moments of a neuron in the step in which its C reaches beta. They miss neurons that freeze
    because beta or a tensor of the state was replaced, and parameters without a gradient or momentum in that step.
    """

    def __init__(self) -> None:
        # By parameter: the first moment that is cleared, with the importance and the beta it was cleared for.
        self._cleared: dict[int, tuple[Tensor, Tensor, float]] = {}

    @torch.no_grad()
    def settle(
        self,
        parameter: Tensor,
        moment: Tensor | None,
        importance: Tensor,
        beta: float,
        frozen: Callable[[], Tensor],
    ) -> None:
        """Clears the moments of frozen elements once. Call it whenever other plans are launched.

        Args:
            parameter: a parameter with a learning rate for each neuron or connection.
            moment: its first moment, or this process's shard; None if steps do not use it.
            importance: C of its neurons or connections.
            beta: beta of eq. 7.
            frozen: returns a mask of the frozen elements that broadcasts against `moment`.
        """
        if moment is None:
            self._cleared.pop(id(parameter), None)
            return
        known = self._cleared.get(id(parameter))
        if known is None or known[0] is not moment or known[1] is not importance or known[2] != beta:
            moment.masked_fill_(frozen(), 0)
            self._cleared[id(parameter)] = moment, importance, beta
