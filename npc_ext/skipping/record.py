"""The state of an optimizer's layers after its last step, which shows what other code has changed since."""

from __future__ import annotations

import operator
import weakref
from collections.abc import Mapping, Sequence
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor

from .._torch import versions_of

_CONSTANTS = operator.itemgetter("beta", "delta", "half_life")


class Record:
    """The state of an optimizer's layers after its last step. If a layer differs from it, other code has changed it.

    It holds the importance of each layer, the versions of importance and parameters, and each group's constants.

    Args:
        optimizer: the optimizer. Its `state` and groups are read each time, because other code may replace them.
        members: for each layer, the parameter under which its importance is stored, all its parameters, and its group.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        members: Sequence[tuple[Tensor, Sequence[Tensor], Mapping[str, Any]]],
    ) -> None:
        self._optimizer = weakref.ref(optimizer)  # so there are no cycles, and everything is freed with it
        self._keys = [key for key, _, _ in members]
        self._parameters = [parameters for _, parameters, _ in members]
        ends = accumulate((1 + len(parameters) for parameters in self._parameters), initial=0)
        self._spans = [slice(*span) for span in pairwise(ends)]  # of the layers, in `_tensors`
        self._groups = list({id(group): group for _, _, group in members}.values())
        indices = {id(group): index for index, group in enumerate(optimizer.param_groups)}
        self._group_indices = [indices[id(group)] for group in self._groups]  # in the optimizer
        places = {id(group): place for place, group in enumerate(self._groups)}
        self._group_of = [places[id(group)] for _, _, group in members]
        self._importances: list[Tensor | None] = []
        self._tensors: list[Tensor] = []  # for each layer: importance (or its key if there is none), then parameters
        self._versions: list[int] = []  # of the tensors; empty while nothing is recorded
        self._constants: list[tuple[Any, ...]] = []

    def importance(self, at: int) -> Tensor | None:
        """The importance of a layer as it is now; None where the state has been cleared."""
        return self._importances_of(self._keys[at : at + 1])[0]

    def _importances_of(self, keys: Sequence[Tensor]) -> list[Tensor | None]:
        optimizer = self._optimizer()
        states: Mapping[Any, Any] = {} if optimizer is None else optimizer.state
        return [None if (state := states.get(key)) is None else state.get("importance") for key in keys]

    def differs(self, at: int) -> bool:
        """Whether a layer differs from the record."""
        importance = self.importance(at)
        if importance is None or not self._versions or importance is not self._importances[at]:
            return True
        span, group = self._spans[at], self._group_of[at]
        return (
            versions_of(self._tensors[span]) != self._versions[span]
            or _CONSTANTS(self._groups[group]) != self._constants[group]
            or self._is_replaced(group)
        )

    def _is_replaced(self, group: int) -> bool:
        """Whether another dictionary has taken the place of a group."""
        optimizer = self._optimizer()
        groups, index = [] if optimizer is None else optimizer.param_groups, self._group_indices[group]
        return index >= len(groups) or groups[index] is not self._groups[group]

    def compare(self) -> list[int]:
        """The layers that differ from the record; none if nothing is recorded. Call `take` after the step."""
        importances = self._importances_of(self._keys)
        constants = list(map(_CONSTANTS, self._groups))
        same = bool(self._versions) and all(map(operator.is_, importances, self._importances))
        changed: list[int] = []
        if self._versions and not (
            same and versions_of(self._tensors) == self._versions and constants == self._constants
        ):
            changed = [at for at in range(len(self._keys)) if self.differs(at)]
        if not same:
            layers = zip(importances, self._keys, self._parameters, strict=True)
            self._tensors = [
                tensor
                for importance, key, parameters in layers
                for tensor in (key if importance is None else importance, *parameters)
            ]
        self._importances, self._constants = importances, constants
        return changed

    def take(self) -> None:
        """Records the versions, and what `compare` has just seen: a step replaces no tensors, and no beta or delta."""
        self._versions = versions_of(self._tensors)
