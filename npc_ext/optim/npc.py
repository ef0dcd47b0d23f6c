"""NPC, neuron-level plasticity control, as a `torch.optim.Optimizer`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from .. import ops, reference
from ..kernels import launch
from .options import ALPHA_IN_UNITS_OF_LR, PLASTIC_OPTIONS, SGD_OPTIONS
from .plan import PlasticPlan
from .plastic import Plastic


class NPC(Plastic):
    """SGD whose learning rate falls, neuron by neuron, with the neuron's importance to what was learned before.

    During back-propagation each neuron's importance |n * dL/dn| is measured (eq. 2), divided by its layer's mean
    (eq. 3) and averaged over time into C (eq. 4). Neuron i then learns at the rate

        eta_i = lr * min(1, alpha * sqrt(max(beta / C_i - 1, 0)))                                         (eq. 7)

    with all its incoming weights and its bias (Algorithm 1), so what mattered stays and the rest is free to learn.
    No data of old tasks, no copies of weights, no notion of a task: one float per neuron. Source: Paik, Oh, Kwak, Kim,
    "Overcoming Catastrophic Forgetting by Neuron-Level Plasticity Control", AAAI 2020, arXiv 1907.13322.

    Use it as `torch.optim.SGD`; nothing else in the training loop changes. It takes the model, because it has to see
    activations: it places taps (hooks) in it. `print(optimizer.neurons)` shows where, and what happens to every
    parameter. Parameters that belong to no neuron train at plain `lr`.

    `delta` sets how long importance lasts: of the importance gathered in one task, delta ** steps is left after
    another of that many steps. Choose delta so that this is about a half or more.

    Args:
        model: the network. Build the optimizer after moving it to its device, and after `fully_shard`.
        lr: the largest learning rate, of neurons without importance and of other parameters; a schedule of it scales
            the rates of all neurons alike. A float32 tensor in GPU memory is read there at each step, so that replays
            of a CUDA graph see it change.
        alpha: scale of eq. 7, in units of the learning rate; greater is more plastic. 0.5 is the paper's 0.05 at its
            largest rate, 0.1.
        beta: importance at or above which a neuron is frozen; the mean importance of a layer is 1.
        delta: decay of the moving average per step, in [0, 1).
        momentum, nesterov, weight_decay, maximize: as in `torch.optim.SGD`, except that a frozen neuron stays
            bit-identical under all of them, and that its momentum is cleared when it freezes.
        sigma: the form of eq. 7: "sigmoid" or "tanh" (the same), or "erf": ln(beta / C) in place of beta / C - 1.
        stochastic_rounding: rounds bfloat16 weights stochastically, so that steps too small for bfloat16 count on
            average. The random bits depend on step, parameter, shard and element only: runs repeat, and processes that
            train one model stay alike.
        params: what to train, as for any torch optimizer: parameters, or groups of them with options of their own.
            Default: all of the model's.
        normalize: the mean of eq. 3 is over "all" neurons of the layer (as in the paper) or over the "active" ones,
            which received a gradient. Then a neuron that received none takes no part in the step: its importance,
            weights and moments stay as they are, also under weight decay, as those of a parameter whose gradient is
            None do. Use "active" for output layers that hold the outputs of several tasks.
        layers: options of single layers, by name or pattern as in a shell: {"head*": {"normalize": "active"}}. All
            that fit count: those under the name win, then those under the pattern given first. Options are alpha,
            beta, delta, sigma, normalize, skip_frozen; consolidate=False (train at plain lr); measure_at="module"
            (where the layer's activation is measured); batch_dim=1 (dimension 1 counts samples, as in sequence-first
            activations, and the tokens of packed sequences).
        others: "train" parameters outside neurons at plain lr, or "freeze" them.
        skip_frozen: whether to leave out the weight gradients of neurons that are certain not to move in the coming
            step, whatever the data: their rows of `weight.grad` are zero (and count as zero in clipping). Nothing else
            changes. Gradients are meant for the step that follows their forward pass. "layers" does so only where all
            neurons of a layer are certain, which changes no bit; True also for parts of a layer that are large enough,
            where another order of summation may change the last bits. Where it is on, the CPU waits for a GPU every 8
            to 32 steps if it is more than a quarter of that ahead. With False no step waits.
        process_group: the processes of torch.distributed that train one model together, whose importance is added up
            over them once a step; "auto": those of the `DistributedDataParallel` that the model is in, or of the mesh
            over which `fully_shard` has sharded it. None: each process trains a model of its own.
        backend: "native" (compiled kernels, or an error), "reference" (plain PyTorch) or "auto".

    Raises:
        ValueError, TypeError: an argument is out of range or does not fit the model; the message says what to change.

    Warns:
        ImportanceWarning: more than half of the elements that are trained belong to no neuron.

    Example:
        >>> optimizer = NPC(model, lr=0.1)
        >>> for images, labels in loader:
        ...     optimizer.zero_grad()
        ...     criterion(model(images), labels).backward()
        ...     optimizer.step()
    """

    _ADDED_KEYS: ClassVar[Mapping[str, str]] = ALPHA_IN_UNITS_OF_LR
    _OPTIONS: ClassVar[tuple[str, ...]] = ("alpha", "beta", "delta", *SGD_OPTIONS, *PLASTIC_OPTIONS)

    def __init__(
        self,
        model: nn.Module,
        lr: float = 0.1,
        alpha: float = 0.5,
        beta: float = 0.5,
        delta: float = 1 - 2e-4,
        momentum: float = 0.0,
        nesterov: bool = False,
        weight_decay: float = 0.0,
        sigma: Literal["sigmoid", "tanh", "erf"] = "sigmoid",
        *,
        params: Iterable[Any] | None = None,
        maximize: bool = False,
        stochastic_rounding: bool = False,
        normalize: Literal["all", "active"] = "all",
        layers: Mapping[str, Mapping[str, Any]] | None = None,
        others: Literal["train", "freeze"] = "train",
        skip_frozen: bool | Literal["layers"] = True,
        process_group: Any = "auto",
        backend: Literal["auto", "native", "reference"] = "auto",
    ) -> None:
        defaults = {
            "lr": lr,
            "alpha": alpha,
            "beta": beta,
            "delta": delta,
            "momentum": momentum,
            "nesterov": nesterov,
            "weight_decay": weight_decay,
            "sigma": sigma,
            "maximize": maximize,
            "normalize": normalize,
            "stochastic_rounding": stochastic_rounding,
        }
        super().__init__(
            model,
            params,
            defaults,
            backend,
            layers=layers,
            others=others,
            skip_frozen=skip_frozen,
            process_group=process_group,
        )

    def _make_plan(self, device: torch.device, members: list[tuple[Any, dict[str, Any]]]) -> PlasticPlan:
        common, groups = self._common(device, members), [group for _, group in members]
        layers, of_parameters, of_layers = self._neuron_options(common["owners"])
        options = (
            *of_parameters,
            common["rates"],
            *([group[name] for group in groups] for name in ("momentum", "nesterov", "weight_decay", "maximize")),
            *of_layers,
        )
        return self._plastic_plan(common, layers, options, launch.Tables)

    def _launch(self, plan: PlasticPlan) -> None:
        gradients, buffers = plan.gradients(), plan.momentum_buffers()
        importances = plan.importances
        measured = [self._consolidated[index].sink.grad for index in plan.layers]
        if plan.tables is not None:
            launch.update_(
                plan.tables,
                plan.parameters,
                gradients,
                buffers,
                importances,
                measured,
                plan.skipped,
                plan.layers,
                None,
                None,
                plan.beside("step") if plan.seeds else (),
                plan.seeds,
            )
            return
        self._update_by_pytorch(plan, gradients, buffers, importances, measured)

    def _update_by_pytorch(
        self,
        plan: PlasticPlan,
        gradients: list[Tensor],
        buffers: list[Tensor],
        importances: list[Tensor],
        measured: list[Tensor | None],
    ) -> None:
        nothing = torch.empty(0, dtype=torch.float32, device=plan.device)
        steps = [nothing if count is None else count for count in plan.beside("step")] if plan.seeds else []
        update: Callable[..., None] = reference.update_ if self._backend == "reference" else ops.update_
        with plan.without_kernels(measured) as (sums, skipped):
            network = (plan.parameters, gradients, buffers, importances, sums, skipped)
            update(*network, *plan.options, None, None, plan.first_neuron, steps, plan.seeds)
