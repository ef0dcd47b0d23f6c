"""First moments of neurons and connections that freeze."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    pass


class FirstMoments:
    """Clears the first moments of what is frozen where no kernel saw it freeze.

    The kernels clear them in the step that takes C to beta. They do not see that beta or a tensor of the state was
    replaced, nor the moments of parameters that have no gradient or no momentum in that step.
    """

    def __init__(self) -> None:
        # By parameter: the first moment that is known to be cleared, for which importance and beta.
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
        """To be called whenever other plans are launched.

        Args:
            parameter: one that has a rate for each neuron or connection.
            moment: its first moment, as far as this process holds it; None if steps do not see it.
            importance: C of its neurons or connections.
            beta: the constant of eq. 7.
            frozen: says which elements are frozen, broadcast against `moment`.
        """
        if moment is None:
            self._cleared.pop(id(parameter), None)
            return
        known = self._cleared.get(id(parameter))
        if known is None or known[0] is not moment or known[1] is not importance or known[2] != beta:
            moment.masked_fill_(frozen(), 0)
            self._cleared[id(parameter)] = moment, importance, beta
