"""NPC, neuron-level plasticity control, as a `torch.optim.Optimizer`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal

from torch import Tensor, nn

from ..kernels import launch
from .options import CONSTANTS, SGD_OPTIONS
from .plan import PlasticPlan
from .plastic import Plastic
from .unknown_options import explains_options


class NPC(Plastic):
    """SGD with a learning rate for each neuron that falls with the neuron's importance to earlier tasks.

    During back-propagation each neuron's importance |n * dL/dn| is measured (eq. 2), divided by its layer's mean
    (eq. 3) and averaged over time into C (eq. 4). Neuron i then learns at the rate

        eta_i = lr * min(1, alpha * sqrt(max(beta / C_i - 1, 0)))    (eq. 7)

    with all its incoming weights and its bias (Algorithm 1): important neurons stay, and the others are free to learn.
    It needs no data of earlier tasks, no copies of weights and no task boundaries, only one float per neuron. Source:
    Paik, Oh, Kwak, Kim, "Overcoming Catastrophic Forgetting by Neuron-Level Plasticity Control", AAAI 2020, arXiv
    1907.13322.

    Use it like `torch.optim.SGD`; nothing else in the training loop changes. It takes the model, because it measures
    activations with taps (hooks). `print(optimizer.neurons)` shows the taps and how each parameter is trained.
    Parameters that belong to no neuron train at plain `lr`.

    Keep one optimizer for all tasks, because it holds the importance. `half_life` sets how long importance lasts: set
    it to the number of steps of a task. A schedule scales the rates of all neurons alike.

    Args:
        model: the network. Build the optimizer after moving it to its device, and after `fully_shard`.
        lr: the largest learning rate: that of neurons without importance and of other parameters. A schedule of lr
            scales the rates of all neurons alike. A float32 tensor in GPU memory is read there at each step, so
            replays of a CUDA graph use its current value.
        alpha: scale of eq. 7, in units of the learning rate; greater values are more plastic. 0.5 corresponds to the
            paper's 0.05 at its largest learning rate of 0.1.
        beta: importance at or above which a neuron is frozen; the mean importance of a layer tends to 1.
        delta: decay of the moving average C per step, in [0, 1). Default: the paper's 1 - 2e-4, which is a half-life of
            3,465 steps.
        half_life: the number of steps after which half of the importance is left, in place of delta:
            delta = 0.5 ** (1 / half_life). Groups have both keys, of which one is None.
        momentum, nesterov, weight_decay, maximize: as in `torch.optim.SGD`, except that frozen neurons stay
            bit-identical, and that a neuron's momentum is cleared when it freezes.
        sigma: the form of eq. 7: "sigmoid" or "tanh" (the same), or "erf": ln(beta / C) in place of beta / C - 1.
        stochastic_rounding: rounds bfloat16 weights stochastically, so steps too small for bfloat16 count on average.
            The random bits depend only on step, parameter, shard and element: runs are reproducible, and processes
            that train one model stay equal.
        params: the parameters to train, or groups of them with their options, as for any torch optimizer. Default: all
            parameters of the model.
        normalize: whether eq. 3 takes the mean over "all" neurons of the layer (as in the paper) or over the "active"
            ones, which received a gradient. With "active", a neuron without a gradient takes no part in the step: it
            keeps its importance, weights and moments, even with weight decay, like a parameter without a gradient. Use
            "active" for output layers that hold the outputs of several tasks.
        layers: options of single layers, by name or shell-style pattern: {"head*": {"normalize": "active"}}. All
            matches are merged: the name takes precedence over patterns, and earlier patterns over later ones. The
            options are alpha, beta, delta or half_life, sigma, normalize, skip_gradients; protect=False (train at lr);
            measure_at="module" (the module with the activation to measure); batch_dim=1 (dimension 1 counts samples,
            as in sequence-first activations, or tokens in packed sequences).
        other_parameters: "train" parameters that belong to no neuron at plain lr, or "freeze" them.
        skip_gradients: which weight gradients are not computed, but zero, because their neurons are certain not to move
            in the coming step, whatever the data: "layers", those of layers that are frozen as a whole; "rows", also
            those of single neurons, which is faster, but may change the last bits of the others; "none". What this
            means for `weight.grad` and for clipping: docs/limits.md, "Skipped gradients".
        process_group: the processes of torch.distributed that train the model together; importance is summed over them
            once a step. "auto": the processes of the model's `DistributedDataParallel` or `fully_shard` mesh. None:
            each process trains a separate model. Call `init_process_group` before you pass a group or None: until then,
            `torch.distributed.group.WORLD` is None, so None is the same as "auto".
        backend: "native" (compiled kernels, or an error), "reference" (plain PyTorch) or "auto".

    Raises:
        ValueError: an argument is out of range or does not fit the model; the message says what to change.
        TypeError: an argument has the wrong type, or there is no such option.

    Warns:
        ImportanceWarning: more than half of the elements that are trained belong to no neuron.

    Example:
        >>> optimizer = NPC(model, lr=0.1, half_life=steps_per_task)
        >>> for images, labels in loader:
        ...     optimizer.zero_grad()
        ...     criterion(model(images), labels).backward()
        ...     optimizer.step()
    """

    _OPTIONS = (*CONSTANTS, *SGD_OPTIONS, "stochastic_rounding")

    @explains_options
    def __init__(
        self,
        model: nn.Module,
        lr: float | Tensor = 0.1,
        *,
        alpha: float = 0.5,
        beta: float = 0.5,
        delta: float | None = None,
        half_life: float | None = None,
        momentum: float = 0.0,
        nesterov: bool = False,
        weight_decay: float = 0.0,
        sigma: Literal["sigmoid", "tanh", "erf"] = "sigmoid",
        params: Iterable[Any] | None = None,
        maximize: bool = False,
        stochastic_rounding: bool = False,
        normalize: Literal["all", "active"] = "all",
        layers: Mapping[str, Mapping[str, Any]] | None = None,
        other_parameters: Literal["train", "freeze"] = "train",
        skip_gradients: Literal["layers", "rows", "none"] = "layers",
        process_group: Any = "auto",
        backend: Literal["auto", "native", "reference"] = "auto",
    ) -> None:
        super().__init__(locals())

    def _launch(self, plan: PlasticPlan) -> None:
        plan.launch(launch.update_, self._operations, plan.network(), self._measured(plan))
