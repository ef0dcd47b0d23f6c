"""Certificates: which neurons of a layer cannot move in the coming steps, and until when.

A certificate lists the rows of a layer's weight that may move. The neurons of all other rows are certain to stay
frozen (bound.py). Certificates are issued every 8 to 32 steps from the importance at that time, and are valid for twice
as long. On a GPU, the importance is copied in the background and read a quarter of that interval (2 to 8 steps) later,
while the previous certificate is still valid. If the CPU is further ahead of the GPU, it waits.

A certificate is only valid as long as no other code changes importance, beta, delta or the parameters. (Code that
changes the parameters may train them, and needs all gradients.) These rules detect every such change, before or after a
forward pass:

1. After each step, the optimizer records each layer's importance, the versions of importance and parameters, and each
   group's beta and delta.
2. A forward pass skips gradients only if its layer has a certificate for the next step and is unchanged since the
   record.
3. Before `step()` moves anything, it compares all layers with the record again. A layer that differs loses its
   certificate, and gets no new one from importance that was read before.
4. A backward pass that skips gradients notes its certificate. If this certificate is no longer valid in `step()`,
   `step()` reads the importance itself, and raises an error if a neuron without a gradient may move.
5. Clearing the gradients clears these notes. A new certificate, a loaded state or a new group does not.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .._torch import in_backward
from ..columns import delta_of
from ..neurons.layer import NeuronLayer
from .bound import least_importance
from .constants import Calls
from .forward import Decision, PartialForward
from .record import Record
from .rows import Rows, rows_to_compute

# Issuing certificates takes time. But the longer they are valid, the fewer neurons are certain for that long. Within
# these limits, they are valid for as many steps as importance needs to decay by the factor DECAY.
FEWEST_STEPS_BETWEEN_ISSUES, MOST_STEPS_BETWEEN_ISSUES = 8, 32
DECAY = 0.95


@dataclass(frozen=True, eq=False)
class Certificate:
    """Until step `until` (counted from the optimizer's first), only `rows` of a layer may move."""

    rows: Rows
    until: int


def steps_between_issues(delta: float) -> int:
    """The number of steps between two issues if importance decays by delta in each step."""
    steps = int(math.log(DECAY) / math.log(delta) / 2) if delta > 0 else 0
    return min(max(steps, FEWEST_STEPS_BETWEEN_ISSUES), MOST_STEPS_BETWEEN_ISSUES)


class Clock:
    """How many steps an optimizer has taken, and after which ones it issues certificates.

    Attributes:
        steps: the number of steps that were taken.
        between: the number of steps from one issue to the next. Certificates are valid twice as long.
    """

    def __init__(self) -> None:
        self.steps, self.between = 0, MOST_STEPS_BETWEEN_ISSUES

    def issues(self) -> bool:
        """Whether certificates are issued after the step that was just taken."""
        return self.steps % self.between == 0

    def reads(self) -> bool:
        """Whether importance copied from a GPU is read, which is at a fixed step so that runs are reproducible.

        This is `between // 4` steps (2 to 8) after the issue, once in `between` steps (8 to 32). If the CPU is further
        ahead of the GPU, it waits until the GPU has completed the step of the issue.
        """
        return self.steps % self.between == self.between // 4

    def validity(self) -> int:
        """The number of steps for which certificates are valid."""
        return 2 * self.between


class CertifiedLayer:
    """A layer, its certificate, and the certificates because of which backward passes skipped gradients.

    Attributes:
        layer: the layer.
        key: the parameter under which the optimizer's state keeps its importance.
        parameters: all its parameters, weight first.
        whole_only: whether its gradients are skipped for all neurons or none.
        certificate: the one that was issued last, or None.
        used: the certificates because of which gradients were skipped since the last step, or since gradients were
            cleared.
        changed: whether other code has changed the layer since its importance was last read.
        may_rest: whether its parameters could be constants in the last call, for a checkpoint.
    """

    def __init__(
        self,
        layer: NeuronLayer,
        key: Tensor,
        options: Mapping[str, Any],
        forward: PartialForward,
        bias: Tensor | None,
        calls: Calls,
        *,
        whole_only: bool,
    ) -> None:
        self.layer, self.key, self.whole_only = layer, key, whole_only
        self.parameters = [part.parameter for part in layer.parameters]
        self._options, self._forward, self._bias, self._calls = options, forward, bias, calls
        self.used: set[Certificate] = set()
        self._forget()

    def bind(self, clock: Clock, record: Record, at: int, group: Mapping[str, Any]) -> None:
        """Sets the layer's place in the record, and the group that holds beta and delta. Ends the certificate."""
        self._clock, self._record, self._at, self._group = clock, record, at, group
        self._forward.rejoin(self)
        self.layer.forget_skipped = self.used.clear
        self._forget()

    def take_over_from(self, before: CertifiedLayer) -> None:
        """Takes over the notes of gradients that backward passes skipped for the same neurons and the next step."""
        self.used = before.used
        self.layer.forget_skipped = self.used.clear

    def _forget(self) -> None:
        self.certificate: Certificate | None = None
        self.changed = self.may_rest = False
        self.layer.gradients_skipped = 0.0

    @property
    def device(self) -> torch.device:
        """The layer's device."""
        return self.parameters[0].device

    def constants(self) -> tuple[float, float]:
        """The layer's beta and delta. Whether eq. 7 is zero does not depend on alpha and sigma."""
        options = {**self._group, **self._options}
        return float(options["beta"]), delta_of(options)

    def importance(self) -> Tensor | None:
        """The current C; None if the state has been cleared."""
        return self._record.importance(self._at)

    def issue(self, importance: Tensor, issued_at: int) -> None:
        """Issues a certificate from C after step `issued_at`, (N,) on the CPU, unless the layer has changed since."""
        if self.changed:
            return
        validity = self._clock.validity()
        certain = importance >= least_importance(*self.constants(), steps=validity)
        rows = rows_to_compute(certain, self.whole_only)
        if rows is None:
            self.certificate = None
            self._forward.release(self)
            return
        before = self.certificate
        if before is not None and torch.equal(before.rows.on_cpu, rows):
            kept = before.rows
        else:
            kept = Rows(rows, len(certain), self.device)
        self.certificate = Certificate(kept, issued_at + validity)
        self._forward.decider = self

    def in_force(self) -> bool:
        """Whether there is a certificate that is valid in the next step."""
        certificate = self.certificate
        return certificate is not None and self._clock.steps < certificate.until and not self._record.differs(self._at)

    def decide(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Decision | None:
        """Which weight gradients a call of the module skips; None if it computes all.

        Nothing is certain about parameters other than the layer's (`torch.func.functional_call`). If several optimizers
        use the module, no gradients are skipped, because each needs the gradients of neurons that it may move.
        """
        certificate = self.certificate
        if (
            certificate is None
            or self._forward.is_shared()
            or weight is not self.parameters[0]
            or bias is not self._bias
            or not self.in_force()
        ):
            return None
        # It holds no layer, so there are no cycles, and it is freed with its optimizer.
        note_use = partial(self.used.add, certificate)
        constants = len(certificate.rows) == 0 and not x.requires_grad and self._can_rest()
        if constants:
            self.layer.note_rest = note_use
        return Decision(certificate.rows, constants, note_use)

    def _can_rest(self) -> bool:
        """Whether the layer's parameters can be constants in this call. A checkpoint repeats what the call did."""
        if in_backward():
            if self.may_rest:
                self._calls.end_after_backward()
        else:
            self.may_rest = self._calls.allow_constants()
        return self.may_rest

    def check_uses(self) -> None:
        """Raises RuntimeError if the gradients of neurons that may move in the next step were skipped."""
        differs = self._record.differs(self._at)
        for certificate in self.used:
            if (differs or self._clock.steps >= certificate.until) and not self._still_holds(certificate):
                raise RuntimeError(
                    f"layer {self.layer.name!r}: gradients were skipped for neurons that could not move in the coming "
                    "step, but can in this one: beta, delta, importance or the optimizer's state was changed between "
                    "the forward pass and step(), or more steps were taken in between than foreseen. Now call the "
                    "optimizer's zero_grad() and start again with a forward pass; make such changes between step() "
                    "and the next forward pass, or build the optimizer with skip_gradients='none'"
                )

    def _still_holds(self, certificate: Certificate) -> bool:
        importance = self.importance()
        if importance is None:
            return False
        certain = importance >= least_importance(*self.constants(), steps=1)
        return bool(certain[certificate.rows.skipped().to(certain.device)].all())

    def after_step(self) -> None:
        """Clears the notes of this step, and stores the share of skipped rows."""
        skipped = [certificate.rows.share_skipped() for certificate in self.used]
        self.layer.gradients_skipped = min(skipped, default=0.0)
        self.used.clear()
        self.may_rest = False

    def gradients_skipped(self) -> float:
        """The share of rows whose gradients were skipped for the last step; 0 without a valid certificate."""
        return self.layer.gradients_skipped if self.in_force() else 0.0

    def __getstate__(self) -> dict[str, Any]:
        # A copy's optimizer binds it again. A copy of the model alone must not skip gradients.
        places = ("_clock", "_record", "_at", "_group")
        kept = {name: value for name, value in self.__dict__.items() if name not in places}
        return {**kept, "used": set[Certificate](), "certificate": None}


class Certificates:
    """Issues certificates for the layers of one optimizer.

    Args:
        layers: the layers by name.
        calls: the calls of the model.
        handles: the handles of what was placed in the model for them.
    """

    def __init__(self, layers: Mapping[str, CertifiedLayer], calls: Calls, handles: Sequence[Any]) -> None:
        self.layers, self._calls, self._handles = dict(layers), calls, handles
        # The clock refers to no layer, so there are no cycles, and everything is freed with its optimizer.
        self.clock = Clock()
        # Most steps of most models skip nothing. These show it quickly.
        self._uses: list[set[Certificate]] = []  # the `used` of all layers
        self._active = False  # whether layers may have something for after_step() to clear
        self._captured = False
        self._on_gpu = any(layer.device.type == "cuda" for layer in layers.values())
        self._arriving: list[_Arriving] = []

    def bind(self, optimizer: torch.optim.Optimizer, group_of: Mapping[int, Mapping[str, Any]]) -> None:
        """Sets the optimizer that holds the importance, and the group of each parameter by its id.

        Ends all certificates.
        """
        self._arriving.clear()
        layers = list(self.layers.values())
        groups = [group_of[id(layer.key)] for layer in layers]
        members = [(layer.key, layer.parameters, group) for layer, group in zip(layers, groups, strict=True)]
        self._record = Record(optimizer, members)
        for at, (layer, group) in enumerate(zip(layers, groups, strict=True)):
            layer.bind(self.clock, self._record, at, group)
        self._uses = [layer.used for layer in layers]
        self._set_pace()

    def take_over_from(self, before: Certificates) -> None:
        """Takes over the notes of skipped gradients when the same optimizer has searched its model again."""
        for name in before.layers.keys() & self.layers.keys():
            layer, same_name = self.layers[name], before.layers[name]
            if layer.parameters[0] is same_name.parameters[0]:  # else it is a new layer, whose gradients were computed
                layer.take_over_from(same_name)
        self._uses = [layer.used for layer in self.layers.values()]

    def remove(self) -> None:
        """Removes everything that was placed in the model for it."""
        for handle in self._handles:
            handle.remove()

    def _set_pace(self) -> None:
        deltas = [layer.constants()[1] for layer in self.layers.values()]
        self.clock.between = min(map(steps_between_issues, deltas), default=MOST_STEPS_BETWEEN_ISSUES)

    def before_step(self) -> None:
        """Ends the certificates of layers that other code has changed.

        Raises:
            RuntimeError: the gradients of neurons that may move in this step were skipped.
        """
        if any(self._uses):
            for layer in self.layers.values():
                layer.check_uses()
        if changed := self._record.compare():
            layers = list(self.layers.values())
            for layer in map(layers.__getitem__, changed):
                layer.changed, layer.certificate = True, None

    def after_step(self) -> None:
        """Counts the step, and issues certificates after some of the steps."""
        self.clock.steps += 1
        self._calls.end()
        if self._active or any(self._uses):
            for layer in self.layers.values():
                layer.after_step()
        self._record.take()
        if self._is_captured():
            return
        if self.clock.issues():
            self._look()
        if self.clock.reads():
            self._read()

    def gradients_dropped(self) -> None:
        """Called when gradients are cleared: what was skipped no longer matters."""
        for layer in self.layers.values():
            layer.used.clear()

    def gradients_skipped(self, name: str) -> float:
        """The share of a layer's rows whose gradients were skipped for the last step."""
        return self.layers[name].gradients_skipped() if name in self.layers else 0.0

    def _is_captured(self) -> bool:
        """Whether a CUDA graph was captured: its replays change importance unnoticed, so nothing is certified."""
        if not self._captured and self._on_gpu and torch.cuda.is_current_stream_capturing():
            self._captured = True
            self._arriving.clear()
            for layer in self.layers.values():
                layer.certificate = None
        return self._captured

    def _look(self) -> None:
        """Reads importance on the CPU, and starts copies from GPUs, except for layers that other code has changed."""
        self._arriving.clear()
        self._set_pace()
        on_gpus: dict[torch.device, list[tuple[CertifiedLayer, Tensor]]] = {}
        for layer in self.layers.values():
            importance, changed, layer.changed = layer.importance(), layer.changed, False
            if importance is None or changed:
                continue
            if importance.is_cuda:
                on_gpus.setdefault(importance.device, []).append((layer, importance))
            else:
                layer.issue(importance.cpu(), self.clock.steps)
        self._arriving.extend(_Arriving(members, self.clock.steps) for members in on_gpus.values())
        self._note_activity()

    def _read(self) -> None:
        for arriving in self._arriving:
            arriving.issue()
        self._arriving.clear()
        self._note_activity()

    def _note_activity(self) -> None:
        self._active = any(layer.certificate or layer.layer.gradients_skipped for layer in self.layers.values())

    def __getstate__(self) -> dict[str, Any]:
        # An event belongs to its process. The next bind() makes the record and collects the layers' uses.
        kept = {name: value for name, value in self.__dict__.items() if name != "_record"}
        return {**kept, "_arriving": [], "_uses": []}


class _Arriving:
    """The importance of the layers on a GPU after a step, on its way to the CPU."""

    def __init__(self, members: Sequence[tuple[CertifiedLayer, Tensor]], step: int) -> None:
        self._layers, self._step = [layer for layer, _ in members], step
        importances = [importance for _, importance in members]
        self._sizes = [importance.numel() for importance in importances]
        with torch.cuda.device(importances[0].device):
            together = torch.cat(importances)
            self._copy = torch.empty(together.shape, dtype=together.dtype, device="cpu", pin_memory=True)
            self._arrived = torch.cuda.Event()
            self._copy.copy_(together, non_blocking=True)
            self._arrived.record()

    def issue(self) -> None:
        """Issues the layers' certificates. Waits for the copy if necessary."""
        self._arrived.synchronize()
        for layer, importance in zip(self._layers, self._copy.split(self._sizes), strict=True):
            layer.issue(importance, self._step)
