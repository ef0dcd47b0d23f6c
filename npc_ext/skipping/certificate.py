"""Certificates: which neurons of a layer cannot change in the coming steps, and until when.

A certificate names the neurons of a layer that are certain to stay frozen (bound.py), and the last step for which they
are. It is issued every 8 to 32 steps, for twice as long, from the importance at that moment. On a GPU the importance is
copied in the background and read a quarter of that interval (2 to 8 steps) later, while the certificate before is still
in force; a CPU that is more steps ahead of the GPU than that waits then.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping, MutableMapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .._torch import in_backward, version_of, versions_of
from ..neurons.layer import NeuronLayer
from .bound import least_importance
from .constants import Calls
from .forward import PartialForward
from .rows import Rows, rows_to_compute

# Issuing takes time, and a certificate that lasts misses neurons which are certain for a shorter time only: those whose
# importance is within DECAY of beta. So it lasts as long as importance may take for that decay, within these limits.
FEWEST_STEPS_BETWEEN_ISSUES, MOST_STEPS_BETWEEN_ISSUES = 8, 32
DECAY = 0.95


@dataclass(frozen=True, eq=False)
class Certificate:
    """Until step `until` (counted from the optimizer's first), only `rows` of a layer may change."""

    rows: Rows
    until: int


def steps_between_issues(delta: float) -> int:
    """How often certificates are issued where importance decays by delta a step."""
    steps = int(math.log(DECAY) / math.log(delta) / 2) if delta > 0 else 0
    return min(max(steps, FEWEST_STEPS_BETWEEN_ISSUES), MOST_STEPS_BETWEEN_ISSUES)


class Clock:
    """How many steps an optimizer has taken, and in which it issues certificates.

    Attributes:
        between: the steps from one issue to the next. Certificates are valid twice as long.
    """

    def __init__(self) -> None:
        self.steps, self.between = 0, MOST_STEPS_BETWEEN_ISSUES

    def issues(self) -> bool:
        """Whether certificates are issued after the step that was just taken."""
        return self.steps % self.between == 0

    def reads(self) -> bool:
        """Whether importance copied from a GPU is read: at a fixed step, so that runs are reproducible.

        That is `between // 4` steps (2 to 8) after the issue, once in `between` steps (8 to 32). A CPU that is more
        steps ahead of its GPU waits until the GPU has done the step of the issue.
        """
        return self.steps % self.between == self.between // 4

    def validity(self) -> int:
        """For how many steps certificates are issued."""
        return 2 * self.between


class Watch:
    """One layer, as certificates see it: what is in force for it, and whether somebody else has interfered.

    A certificate is worth something only as long as nobody but the optimizer changes importance, constants and weights
    (whoever changes the weights trains them by rules of their own, and needs all gradients).

    Attributes:
        all_or_nothing: whether only the whole layer's gradients are left out.
        weight, bias: those the certificates are about; a call with others knows nothing of them.
    """

    def __init__(
        self,
        forward: PartialForward,
        layer: NeuronLayer,
        key: Tensor,
        own: Mapping[str, Any],
        calls: Calls,
        *,
        all_or_nothing: bool,
    ) -> None:
        self.forward, self.layer, self.key, self.all_or_nothing = forward, layer, key, all_or_nothing
        self.weight, self.bias = layer.parameters[0].parameter, forward.bias
        self._own, self._calls = own, calls
        self._used: set[Certificate] = set()  # what backward passes since the last step left gradients out by
        self._forget()

    def bind(self, clock: Clock, states: MutableMapping[Any, Any], group: Mapping[str, Any]) -> None:
        """Says where importance and constants are found; whatever was certified before is void."""
        self._clock, self._states, self._group = clock, states, group
        self.forward.join(self)
        self.layer.forget_left_out = self._used.clear  # holds no watch
        self._forget()

    def go_on_from(self, before: Watch) -> None:
        """Takes over what the coming step must know from a watch of the same neurons, whose certificates are void."""
        self._used = before._used
        self.layer.forget_left_out = self._used.clear

    def remove(self) -> None:
        """Leaves the module alone from now on."""
        self.forward.leave(self)

    def _forget(self) -> None:
        self.certificate: Certificate | None = None
        self.interfered = False  # since the last issue
        self.layer.gradients_skipped = 0.0
        self._importance: Tensor | None = None
        self._seen: tuple[Any, ...] = ()
        self._allowed_constants = False

    def constants(self) -> tuple[float, float]:
        """Beta and delta in force. Alpha and sigma do not matter to whether eq. 7 is zero."""
        own, group = self._own, self._group
        return float(own.get("beta", group["beta"])), float(own.get("delta", group["delta"]))

    def importance(self) -> Tensor | None:
        """C as it is now, None where the state has been cleared."""
        state = self._states.get(self.key)
        return None if state is None else state.get("importance")

    def _versions(self, importance: Tensor) -> tuple[Any, ...]:
        group, parameters = self._group, self.layer.parameters
        versions = versions_of([own.parameter for own in parameters])
        return version_of(importance), versions, group["beta"], group["delta"]

    def record(self) -> None:
        """Called after a step of ours: whatever changes from now on, somebody else did."""
        left_out = [used.rows.share_left_out() for used in self._used]
        self.layer.gradients_skipped = min(left_out, default=0.0)
        self._used.clear()
        self.look()

    def look(self) -> None:
        """Remembers importance, constants and weights as they are: as the last step left them."""
        importance = self._importance = self.importance()
        self._seen = () if importance is None else self._versions(importance)
        self._allowed_constants = False

    def is_idle(self) -> bool:
        """Whether nothing is certified or was left out, so that the coming step needs nothing of it."""
        return not (self.certificate or self._used or self.layer.gradients_skipped)

    def is_untouched(self) -> bool:
        """Whether importance, constants and weights are as the last step left them."""
        importance = self.importance()
        return importance is not None and importance is self._importance and self._versions(importance) == self._seen

    def in_force(self) -> Certificate | None:
        """The certificate for the coming step, if there is one."""
        certificate = self.certificate
        if certificate is None or self._clock.steps >= certificate.until or not self.is_untouched():
            return None
        return certificate

    def is_constant(self, certificate: Certificate, x: Tensor) -> bool:
        """Whether the layer's parameters are constants in this call: it rests; remembers that for its taps.

        Args:
            certificate: the one in force.
            x: the layer's input.
        """
        again = in_backward()
        if not again:
            self._allowed_constants = self._calls.allow_constants() and not self.forward.is_shared()
        if not self._allowed_constants or len(certificate.rows) > 0 or x.requires_grad:
            return False
        self.layer.resting, self.layer.note_rest = True, self.note_use_of(certificate)
        if again:
            self._calls.end_after_backward()
        return True

    def note_use_of(self, certificate: Certificate) -> Callable[[], None]:
        """What a backward pass is to call that leaves gradients out on the strength of a certificate."""
        return partial(self._used.add, certificate)  # holds no watch: without cycles, that dies with its optimizer

    def before_step(self) -> None:
        """Voids the certificate if somebody interfered.

        Raises:
            RuntimeError: gradients were left out of neurons that may move in this step.
        """
        untouched = self.is_untouched()
        for certificate in self._used:
            if not (untouched and certificate.until > self._clock.steps) and not self._still_holds(certificate):
                raise RuntimeError(
                    f"layer {self.layer.name!r}: gradients were left out of neurons that could not move in the coming "
                    "step, but can in this one: beta, delta, importance or the optimizer's state was changed between "
                    "the forward pass and step(), or more steps were taken in between than foreseen. Now call the "
                    "optimizer's zero_grad() and start again with a forward pass; make such changes between step() "
                    "and the next forward pass, or build the optimizer with skip_frozen=False"
                )
        if not untouched and self._seen:
            self.interfered, self.certificate = True, None

    def _still_holds(self, certificate: Certificate) -> bool:
        importance = self.importance()
        if importance is None:
            return False
        certain = importance >= least_importance(*self.constants(), steps=1)
        return bool(certain[certificate.rows.left_out().to(certain.device)].all())

    def issue(self, importance: Tensor, issued_at: int) -> None:
        """Certifies from C of step `issued_at`, (N,) on the CPU, unless somebody has interfered since."""
        if self.interfered:
            return
        validity = self._clock.validity()
        certain = importance >= least_importance(*self.constants(), steps=validity)
        rows = rows_to_compute(certain, self.all_or_nothing)
        if rows is None:
            self.certificate = None
            self.forward.release(self)
            return
        before = self.certificate
        if before is None:  # nobody has looked at an idle watch's layer
            self.look()
        if before is not None and torch.equal(before.rows.on_cpu, rows):
            kept = before.rows
        else:
            kept = Rows(rows, len(certain), self.weight.device)
        self.certificate = Certificate(kept, issued_at + validity)
        self.forward.follow(self)

    def void(self) -> None:
        """Takes back what was certified."""
        self.certificate = None

    def gradients_dropped(self) -> None:
        """Called when gradients are cleared: nothing that was left out matters any more."""
        self._used.clear()

    def gradients_skipped(self) -> float:
        """The share of rows whose gradients the last step did without; 0 where that is over."""
        return 0.0 if self.in_force() is None else self.layer.gradients_skipped

    def __getstate__(self) -> dict[str, Any]:
        # A copy's optimizer binds it again; a copy of the model alone must not go on leaving gradients out.
        places = ("_clock", "_states", "_group")
        kept = {name: value for name, value in self.__dict__.items() if name not in places}
        return {**kept, "_used": set[Certificate](), "certificate": None, "_importance": None, "_seen": ()}


class Certificates:
    """Issues certificates for the layers of one optimizer as its steps go by.

    Most steps of most layers have nothing certified. Such idle watches are not asked one by one; what others may have
    changed is compared for all of them at once.
    """

    def __init__(self, watches: Mapping[str, Watch], calls: Calls) -> None:
        self.watches, self._calls = dict(watches), calls
        # An object of its own: without cycles, watches die with their optimizer.
        self.clock = Clock()
        self._captured = False
        self._on_gpu = any(watch.weight.is_cuda for watch in watches.values())
        self._arriving: list[_Arriving] = []
        self._idle: list[Watch] = []
        self._busy: list[Watch] = []
        self._keys = [watch.key for watch in watches.values()]
        self._parameters = [own.parameter for watch in watches.values() for own in watch.layer.parameters]
        self._left: tuple[list[Tensor | None], list[int]] | None = None  # importance and versions after our last step

    def bind(self, states: MutableMapping[Any, Any], group_of: Mapping[int, Mapping[str, Any]]) -> None:
        """Says where importance is kept, and the group of each parameter by its id; ends all certificates."""
        self._arriving.clear()
        self._states = states
        for watch in self.watches.values():
            watch.bind(self.clock, states, group_of[id(watch.key)])
        self._set_pace()
        self._left = None
        self.sort()

    def sort(self) -> None:
        """Called whenever watches may have become idle, or busy."""
        self._idle = [watch for watch in self.watches.values() if watch.is_idle()]
        self._busy = [watch for watch in self.watches.values() if not watch.is_idle()]

    def _set_pace(self) -> None:
        deltas = [watch.constants()[1] for watch in self.watches.values()]
        self.clock.between = min(map(steps_between_issues, deltas), default=MOST_STEPS_BETWEEN_ISSUES)

    def before_step(self) -> None:
        """Raises RuntimeError if gradients were left out of neurons that may move in this step."""
        for watch in self._idle:
            if watch._used:  # in a backward pass whose certificates were voided before it
                self.sort()
                break
        for watch in self._busy:
            watch.before_step()
        if self._left is None:
            return
        importances, versions = self._left
        now = self._importances()
        if self._versions(now) != versions or not all(map(operator.is_, now, importances)):
            self._find_interference(now)

    def _importances(self) -> list[Tensor | None]:
        get = self._states.get
        return [None if (state := get(key)) is None else state.get("importance") for key in self._keys]

    def _versions(self, importances: list[Tensor | None]) -> list[int]:
        versions = versions_of(self._parameters)
        return versions + [-1 if importance is None else version_of(importance) for importance in importances]

    def _find_interference(self, importances: list[Tensor | None]) -> None:
        """Marks the idle watches of layers that somebody else has changed."""
        assert self._left is not None
        before, was = self._left
        at, own_at = 0, len(self._parameters)
        now = self._versions(importances)
        for index, watch in enumerate(self.watches.values()):
            end = at + len(watch.layer.parameters)
            same = importances[index] is before[index] and now[own_at + index] == was[own_at + index]
            if not same or now[at:end] != was[at:end]:
                watch.interfered = True
            at = end
        self._left = None  # what the coming step leaves is looked at anew

    def after_step(self) -> None:
        """Counts the step, and issues certificates when it is time to."""
        self.clock.steps += 1
        self._calls.end()
        for watch in self._busy:
            watch.record()
        importances = self._importances() if self._left is None else self._left[0]
        self._left = importances, self._versions(importances)
        if self._is_captured():
            return
        if self.clock.issues():
            self._look()
        if self.clock.reads():
            self._read()

    def issue(self) -> None:
        """Issues certificates at once, between two steps; waits for GPUs."""
        self._look()
        self._read()

    def gradients_dropped(self) -> None:
        """Called when gradients are cleared."""
        for watch in self._busy:
            watch.gradients_dropped()

    def _is_captured(self) -> bool:
        """Replays of a CUDA graph change importance unseen: from its capture on, nothing is certified."""
        if not self._captured and self._on_gpu and torch.cuda.is_current_stream_capturing():
            self._captured = True
            self._arriving.clear()
            for watch in self._busy:
                watch.void()
        return self._captured

    def _look(self) -> None:
        """Reads importance on the CPU, and sends for it on GPUs."""
        self._arriving.clear()
        self._set_pace()
        on_device: dict[torch.device, list[tuple[Watch, Tensor]]] = {}
        for watch in self.watches.values():
            importance, undisturbed = watch.importance(), not watch.interfered
            watch.interfered = False
            if importance is not None and undisturbed:
                on_device.setdefault(importance.device, []).append((watch, importance))
        for device, members in on_device.items():
            looks = [_Look(watch, importance, self.clock.steps) for watch, importance in members]
            if device.type == "cuda":
                self._arriving.append(_Arriving(device, looks))
                continue
            for look in looks:
                look.issue(look.importance.cpu())
        self.sort()

    def _read(self) -> None:
        if not self._arriving:
            return
        for arriving in self._arriving:
            arriving.issue()
        self._arriving.clear()
        self.sort()

    def __getstate__(self) -> dict[str, Any]:
        # An event belongs to its process; the rest comes with the next bind().
        kept = {name: value for name, value in self.__dict__.items() if name != "_states"}
        return {**kept, "_arriving": [], "_idle": [], "_busy": [], "_left": None}


@dataclass(frozen=True)
class _Look:
    """A layer's importance after a step."""

    watch: Watch
    importance: Tensor
    step: int

    def issue(self, on_cpu: Tensor) -> None:
        """Issues a certificate, given the importance on the CPU."""
        self.watch.issue(on_cpu, self.step)


class _Arriving:
    """Importance of a GPU's layers, on its way to the CPU."""

    def __init__(self, device: torch.device, looks: list[_Look]) -> None:
        self._looks = looks
        with torch.cuda.device(device):
            together = torch.cat([look.importance for look in looks])
            self._copy = torch.empty(together.shape, dtype=together.dtype, device="cpu", pin_memory=True)
            self._arrived = torch.cuda.Event()
            self._copy.copy_(together, non_blocking=True)
            self._arrived.record()

    def issue(self) -> None:
        """Issues the layers' certificates; waits for the copy, should it not be there yet."""
        self._arrived.synchronize()
        sizes = [look.importance.numel() for look in self._looks]
        for look, importance in zip(self._looks, self._copy.split(sizes), strict=True):
            look.issue(importance)
