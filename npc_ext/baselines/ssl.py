"""SSL, selfless sequential learning, as a `torch.optim.Optimizer`.

SSL adds to MAS a penalty on activations: sparse coding through local neural inhibition and discounting (SLNID).

    R(h) = 1/M sum over m, i != j of exp(-(a_i + a_j)) exp(-(i - j)^2 / (2 scale^2)) h_mi h_mj

Neurons that are active for the same sample cost more the closer their indices are. So few stay active in a
neighbourhood, and the others are left to later tasks. Neurons that earlier tasks need (large a_i) are discounted: they
neither inhibit nor are inhibited. With d_i = exp(-a_i), z = h * d and the symmetric kernel K of the Gaussian weights,
whose diagonal is zero, R is the mean over samples of z K z', and its gradient is

    dR/dh = 2/M (z K) * d
"""

from __future__ import annotations

import inspect
import math
import weakref
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from .._torch import direct_hooks, direct_parameters, guard_hooks
from .._warn import warn
from ..neurons.find import find_neurons
from ..neurons.kinds import is_linear
from ..neurons.layer import NeuronLayer, TapPoint
from ..neurons.tap import TapHook, checked_dims
from ..optim.options import check_number, check_pattern
from ..optim.unknown_options import explains_options
from .consolidation import SensitivityOptions
from .mas import MAS

if TYPE_CHECKING:
    from typing_extensions import Unpack


class SSL(MAS):
    """MAS with a penalty on neighbouring neurons that are active together, which leaves neurons free for later tasks.

    While a task is learned, SSL adds to MAS's penalty the following penalty on the activations h of hidden layers:

        sparsity * 1/M sum over samples and i != j of
            exp(-(a_i + a_j)) exp(-(i - j)^2 / (2 scale^2)) h_i h_j

    Here a_i is the importance of neuron i to the tasks before: MAS's importance of its bias. Source: Aljundi,
    Rohrbach, Tuytelaars, "Selfless Sequential Learning", ICLR 2019, arXiv 1806.05421 (SLNID). Back-propagation adds
    the penalty's gradient to the loss's gradient at the layer, so nothing is added to the loss itself. After
    convolutions h is the mean over positions.

    Use it as `torch.optim.SGD`, and call `consolidate` at the end of each task. If a batch is split (gradient
    accumulation), the penalty counts once for each part.

    Args:
        model: the network. SSL places hooks in it, which act in training mode only. They replace those of an earlier
            SSL, and are removed when the optimizer is deleted.
        lr: the learning rate.
        strength: the factor of MAS's penalty on the distance from the anchors, at least 0.
        sparsity: the factor of the penalty on activations, at least 0. It may be changed later:
            `optimizer.sparsity = 1e-6`.
        momentum, nesterov, weight_decay, maximize: as in `torch.optim.SGD`.
        implicit: if True, the pull is a proximal step, which is stable for every strength. If False, the gradient of
            MAS's penalty is added to the loss's, as in the paper; training then diverges if `lr * strength * W` is too
            large for any weight, see `npc_ext.baselines.anchored.Anchored`.
        scale: standard deviation of the inhibition, in neurons, above 0. Default: a sixth of the layer's neurons.
        inhibited: names of the layers whose neurons inhibit each other, or patterns as in a shell. Default: every fully
            connected layer that is followed by something (an activation, dropout).
        scaler: the `torch.amp.GradScaler` in use, if any. It scales the penalty's gradient like the loss.
        params: what to train, as for any torch optimizer: parameters, or groups of them with their options. Default:
            all of the model's parameters.
        backend: "native" (compiled kernels, or an error), "reference" (plain PyTorch) or "auto" (compiled kernels
            where they are available).

    Raises:
        ValueError: an argument is out of range or does not fit the model; the message says what to change.
        TypeError: an argument has the wrong type, or there is no such option.

    Warns:
        UserWarning: neurons have no bias, so their importance is not known.

    Example:
        >>> optimizer = SSL(model, lr=0.1, strength=1, sparsity=1e-5)
        >>> for task in tasks:
        ...     train(model, optimizer, task)
        ...     optimizer.consolidate(task.loader)
    """

    @explains_options
    def __init__(
        self,
        model: nn.Module,
        lr: float | Tensor = 0.1,
        *,
        strength: float = 1.0,
        sparsity: float = 1e-5,
        momentum: float = 0.0,
        nesterov: bool = False,
        weight_decay: float = 0.0,
        implicit: bool = True,
        scale: float | None = None,
        inhibited: Iterable[str] | None = None,
        scaler: torch.amp.GradScaler | None = None,
        params: Iterable[Any] | None = None,
        maximize: bool = False,
        backend: Literal["auto", "native", "reference"] = "auto",
    ) -> None:
        super().__init__(
            model,
            lr,
            strength=strength,
            momentum=momentum,
            nesterov=nesterov,
            weight_decay=weight_decay,
            implicit=implicit,
            params=params,
            maximize=maximize,
            backend=backend,
        )
        if scale is not None:
            check_number("scale", scale, positive=True)
        if scaler is not None and not callable(getattr(scaler, "scale", None)):
            raise TypeError(f"scaler is {scaler!r}; expected the torch.amp.GradScaler in use, or None")
        self.inhibited = _inhibited_layers(model, inhibited)
        self._inhibition = _Inhibition(scale, scaler, sign=-1.0 if maximize else 1.0)
        self.sparsity = sparsity
        self._warn_of_missing_biases()
        self._discount()
        self._place_hooks()

    @property
    def sparsity(self) -> float:
        """The factor of the penalty on activations. It may be set to another finite number of at least 0."""
        return self._inhibition.sparsity

    @sparsity.setter
    def sparsity(self, sparsity: float) -> None:
        check_number("sparsity", sparsity)
        if sparsity and not self.inhibited:
            raise ValueError(
                "no neurons would inhibit each other: the model has no fully connected layer with something behind it, "
                "or inhibited is empty; name some with inhibited=[...], or use MAS (or sparsity=0)"
            )
        self._inhibition.sparsity = sparsity

    def _bias(self, layer: NeuronLayer) -> Tensor | None:
        bias: Tensor | None = direct_parameters(self._model.get_submodule(layer.name)).get("bias")
        return bias

    def _warn_of_missing_biases(self) -> None:
        without = [layer.name for layer in self.inhibited if self._bias(layer) is None]
        if without:
            warn(
                f"the neurons of {', '.join(map(repr, without))} have no bias, which shows their importance, so "
                "neurons that earlier tasks need are not discounted; give them a bias, or name other layers"
            )

    def _place_hooks(self) -> None:
        guard_hooks()
        self._remove_hooks()  # an earlier SSL's
        for layer in self.inhibited:
            weighted = self._model.get_submodule(layer.name)
            for point in layer.points:
                module = self._model.get_submodule(point.module)
                hook = _InhibitionHook(self._inhibition, layer, point, weighted)
                if point.where == "output":
                    hook.handle = module.register_forward_hook(hook)
                else:
                    hook.handle = module.register_forward_pre_hook(hook)

    def _remove_hooks(self, of: _Inhibition | None = None) -> None:
        """Removes the hooks of one penalty, or of all."""
        for module in self._model.modules():
            for hooks in direct_hooks(module):
                for key, hook in [*hooks.items()]:
                    if isinstance(hook, _InhibitionHook) and (of is None or hook.adds(of)):
                        del hooks[key]

    def _leave_model(self) -> None:
        self._remove_hooks(self._inhibition)

    def consolidate(self, batches: Iterable[Any], **options: Unpack[SensitivityOptions]) -> None:
        """Anchors the weights at their current values, as `MAS.consolidate` does, and discounts important neurons.

        Each call adds a task.

        Args:
            batches: as in `MAS.consolidate`.
            options: as in `MAS.consolidate`: outputs, forward, samples, chunk_size, progress.

        Raises:
            ValueError: as in `MAS.consolidate`. Nothing is changed then.
            TypeError: as in `MAS.consolidate`. Nothing is changed then.
        """
        super().consolidate(batches, **options)
        self._discount()

    @torch.inference_mode(False)  # consolidate may be called in that mode
    @torch.no_grad()
    def _discount(self) -> None:
        """Sets exp(-a) of all neurons, with a the bias's stiffness.

        The importance of the bias is that of the neuron, because the derivative by the bias is the derivative by the
        neuron's input.
        """
        for layer in self.inhibited:
            bias = self._bias(layer)
            state = {} if bias is None else self.state.get(bias, {})
            importance = state["stiffness"] if "stiffness" in state else torch.zeros_like(layer.sink)
            self._inhibition.discounts[layer.name] = torch.exp(-importance.to(torch.float32))

    def _take_over(self, saved: Mapping[int, dict[str, Any]]) -> None:
        super()._take_over(saved)
        self._discount()

    def _take_importance(self, held: Mapping[str, Mapping[str, Tensor]]) -> None:
        super()._take_importance(held)
        self._discount()

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """False. A GradScaler reads this before it takes a step; raises if SSL was built without that scaler."""
        frame = inspect.currentframe()
        caller = frame.f_back.f_locals.get("self") if frame is not None and frame.f_back is not None else None
        if self.sparsity and self._inhibition.scaler is None and isinstance(caller, torch.amp.GradScaler):
            raise RuntimeError(
                "a GradScaler takes this step, but SSL was built without it, so the penalty was not scaled like the "
                "loss; write SSL(model, ..., scaler=scaler)"
            )
        return False

    def _summary(self) -> str:
        names = ", ".join(repr(layer.name) for layer in self.inhibited) or "none"
        return f"{super()._summary()}\nlayers whose neurons inhibit each other: {names}, sparsity {self.sparsity:g}"


@dataclass(eq=False)
class _Inhibition:
    """The penalty on activations. The optimizer owns it; the hooks in the model refer to it weakly.

    Attributes:
        scale: the standard deviation in neurons; None: a sixth of the layer's neurons.
        scaler: scales the penalty's gradient.
        sign: -1 if steps maximize the loss.
        sparsity: the factor of the penalty.
        discounts: exp(-a) of the neurons of each layer, by the layer's name.
    """

    scale: float | None
    scaler: torch.amp.GradScaler | None
    sign: float
    sparsity: float = 0.0
    discounts: dict[str, Tensor] = field(default_factory=dict)

    def gradient(self, layer: NeuronLayer, activation: Tensor, channel_dim: int, batch_dim: int) -> Tensor:
        """The gradient of the penalty by a layer's activation, in the activation's shape and dtype."""
        h = activation.detach().movedim((batch_dim, channel_dim), (0, 1))
        positions = h.numel() // max(h.shape[0] * h.shape[1], 1)
        means = (h.flatten(2).mean(2) if h.ndim > 2 else h).to(torch.float32)
        scale = layer.neurons / 6 if self.scale is None else self.scale
        gradient = local_inhibition_gradient(means, self.discounts[layer.name], scale)
        gradient *= self.sign * self.sparsity / positions
        if self.scaler is not None:
            gradient = self.scaler.scale(gradient)
        gradient = gradient.view(*gradient.shape, *[1] * (h.ndim - 2)).expand_as(h)
        return gradient.movedim((0, 1), (batch_dim, channel_dim)).to(activation.dtype)


class _AddedGradient(torch.autograd.Function):
    """Identity whose backward adds `gradient_of(activation)`, if it is not None, to the gradient."""

    @staticmethod
    def forward(ctx: Any, activation: Tensor, gradient_of: Callable[[Tensor], Tensor | None]) -> Tensor:
        ctx.save_for_backward(activation)
        ctx.gradient_of = gradient_of
        return activation.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (activation,) = ctx.saved_tensors
        added = ctx.gradient_of(activation)
        return gradient if added is None else gradient + added.to(gradient.dtype), None


class _InhibitionHook(TapHook):
    """Adds the penalty's gradient to the gradient of a module's output, or input, where the layer trains.

    When the penalty goes, which is when its optimizer does, the hook removes itself from the module. So a copy of a
    model without its optimizer has no penalty.
    """

    handle: Any = None

    def __init__(self, inhibition: _Inhibition, layer: NeuronLayer, point: TapPoint, weighted: nn.Module) -> None:
        super().__init__(layer, point, weighted)
        self._refer_to(inhibition)

    def _refer_to(self, inhibition: _Inhibition) -> None:
        own = weakref.ref(self)  # the reference must not keep its hook alive

        def remove(_: Any) -> None:
            hook = own()
            if hook is not None and hook.handle is not None:
                hook.handle.remove()

        self._inhibition = weakref.ref(inhibition, remove)

    def adds(self, inhibition: _Inhibition) -> bool:
        """Whether this hook adds the gradient of that penalty."""
        return self._inhibition() is inhibition

    def _tapped(self, value: Any) -> Tensor | None:
        inhibition = self._inhibition()
        if inhibition is None or inhibition.sparsity == 0:
            return None
        if not self.measures(value) or value.ndim == self.point.unbatched_ndim:
            return None
        dims = checked_dims(value, self.layer, self.point)
        return _AddedGradient.apply(value, lambda h: self._gradient(h, *dims))

    def _gradient(self, activation: Tensor, *dims: int) -> Tensor | None:
        inhibition = self._inhibition()  # weakly, because a graph may live as long as a loss
        return None if inhibition is None else inhibition.gradient(self.layer, activation, *dims)

    # A copy or pickle of model and optimizer contains the penalty once, because both contain it. One of the model alone
    # contains it only until it is complete.

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_inhibition": self._inhibition()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._refer_to(state["_inhibition"])


def _inhibited_layers(model: nn.Module, inhibited: Iterable[str] | None) -> list[NeuronLayer]:
    patterns = None if inhibited is None or isinstance(inhibited, (str, nn.Module)) else list(inhibited)
    if inhibited is not None and (patterns is None or not all(isinstance(pattern, str) for pattern in patterns)):
        raise TypeError(f"inhibited is {inhibited!r}; expected a list of layers' names, as in ['fc1', 'fc2']")
    # The penalty acts on the activations of whole modules.
    layers = [layer for layer in find_neurons(model) if layer.name == layer.module]
    if patterns is None:
        linear = (layer for layer in layers if is_linear(model.get_submodule(layer.name)))
        return [layer for layer in linear if any(point.module != layer.name for point in layer.points)]
    names = [layer.name for layer in layers]
    for pattern in patterns:
        check_pattern("inhibited", pattern, names)
    # A name may contain characters that are special in patterns.
    return [layer for layer in layers if layer.name in patterns or any(fnmatchcase(layer.name, p) for p in patterns)]


def local_inhibition(h: Tensor, discount_factors: Tensor, scale: float) -> Tensor:
    """The penalty R of a layer's activations, to be added to the loss; differentiable in h.

        R = 1/M sum over samples m and i != j of d_i d_j exp(-(i - j)^2 / (2 scale^2)) h_mi h_mj

    with the discount factors d. Source: Aljundi, Rohrbach, Tuytelaars, "Selfless Sequential Learning", ICLR 2019.

    Args:
        h: (B, N) floating-point activations of a ReLU. Negative ones would be rewarded; this is not checked.
        discount_factors: (N,) exp(-a), where a >= 0 is the importance of each neuron to earlier tasks; ones during the
            first task. Treated as constants.
        scale: the Gaussian's standard deviation, in neurons. The authors' scripts pass N / 6 (their option "scale"
            is the divisor). The kernel has N * N elements and is computed in each call.

    Returns:
        A scalar of h's dtype; not divided by the number of neurons.

    Raises:
        ValueError: h is not (B, N) with at least one sample, or not floating-point; discount_factors is not (N,);
            scale is not finite and above 0.
    """
    discount_factors = _checked(h, discount_factors, scale)
    discounted = h * discount_factors
    return (discounted @ _kernel(h, scale) * discounted).sum() / h.shape[0]


def local_inhibition_gradient(h: Tensor, discount_factors: Tensor, scale: float) -> Tensor:
    """The gradient dR/dh of `local_inhibition` in closed form, (B, N), for use without autograd.

    Args:
        h, discount_factors, scale: as for `local_inhibition`.

    Raises:
        ValueError: as for `local_inhibition`.
    """
    discount_factors = _checked(h, discount_factors, scale)
    with torch.no_grad():
        return (h * discount_factors) @ _kernel(h, scale) * discount_factors * (2 / h.shape[0])


def _kernel(h: Tensor, scale: float) -> Tensor:
    """K (N, N), in h's dtype and on its device."""
    dtype = torch.float64 if h.dtype == torch.float64 else torch.float32
    index = torch.arange(h.shape[1], dtype=dtype, device=h.device)
    distance = (index[:, None] - index) / scale
    return (distance.square() * -0.5).exp().fill_diagonal_(0).to(h.dtype)


def _checked(h: Tensor, discount_factors: Tensor, scale: float) -> Tensor:
    """The discount factors as constants, in h's dtype."""
    if h.ndim != 2 or h.shape[0] == 0 or not h.is_floating_point():
        raise ValueError(
            f"h has shape {tuple(h.shape)} and dtype {h.dtype}; expected floating-point activations (samples, neurons) "
            "of at least one sample"
        )
    if discount_factors.shape != h.shape[1:]:
        raise ValueError(
            f"h has {h.shape[1]} neurons, but discount_factors has shape {tuple(discount_factors.shape)}; "
            f"expected ({h.shape[1]},)"
        )
    if not 0 < scale < math.inf:
        raise ValueError(f"scale is {scale}; expected a finite number of neurons above 0")
    return discount_factors.detach().to(h.dtype)
