"""The arguments of operations, in groups. Most fields are columns, with an entry for each parameter or each layer.

`npc_ext.reference` and `npc_ext.ops` take the groups. The operations in `torch.ops.npc_ext` take their fields, in
order. The columns that the compiled kernels read have the same names. `Written` marks tensors that
operations change.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, NamedTuple, TypeVar

from torch import Tensor

WRITTEN = "written"
Written = Annotated[Tensor, WRITTEN]
WrittenTensors = Annotated[Sequence[Tensor], WRITTEN]
# None where a parameter, or a layer, has no such tensor.
MaybeTensors = Sequence[Tensor | None]
WrittenMaybeTensors = Annotated[Sequence[Tensor | None], WRITTEN]


class Network(NamedTuple):
    """The tensors of each parameter that SGD works on.

    Attributes:
        parameters: changed in place.
        gradients: like the parameters.
        momentum_buffers: like the parameters, changed in place; those of parameters with momentum 0 are ignored, and
            the whole list may be empty if all are.
    """

    parameters: WrittenTensors
    gradients: Sequence[Tensor]
    momentum_buffers: WrittenMaybeTensors = ()


class AdamNetwork(NamedTuple):
    """The tensors of each parameter that Adam works on.

    Attributes:
        parameters: changed in place.
        gradients: like the parameters.
        first_moments: like the parameters, but float32 for halves; changed in place.
        second_moments: like the first moments.
    """

    parameters: WrittenTensors
    gradients: Sequence[Tensor]
    first_moments: WrittenTensors
    second_moments: WrittenTensors


class Steps(NamedTuple):
    """How many steps each parameter has taken, and the seeds of its stochastic rounding.

    Attributes:
        steps: empty, or a float32 number for each parameter, incremented by one; None if its steps are not counted.
        seeds: empty, or for each parameter -1 or a seed. A bfloat16 parameter with a seed and counted steps is rounded
            stochastically. The random bits depend only on the seed, the steps and the element.
    """

    steps: WrittenMaybeTensors = ()
    seeds: Sequence[int] = ()


class Layers(NamedTuple):
    """What is kept of each layer.

    Attributes:
        importances: float32 tensors (N,), the moving averages C, changed in place.
        nonfinite_steps: (L,) int64, how many steps measured an importance that is not finite; changed in place.
    """

    importances: WrittenTensors
    nonfinite_steps: Written


class Connections(NamedTuple):
    """What is kept of the connections of each layer.

    Attributes:
        importances: for each parameter a float32 tensor of its shape, the moving averages C, changed in place; None
            where `layer` is -1.
        nonfinite_steps: as in `Layers`.
        layer: as in `Placement`.
    """

    importances: WrittenMaybeTensors
    nonfinite_steps: Written
    layer: Sequence[int]


class Anchors(NamedTuple):
    """What anchored methods keep of each parameter.

    Attributes:
        stiffness: like the parameters, but float32 for halves; None where there is no penalty. Implicit anchors ignore
            elements whose stiffness is not above 0.
        anchors: like `stiffness`.
        paths: like `stiffness`, changed in place: SI's path integral, from which dL/dw times the weight's movement is
            subtracted; None where none is wanted.
    """

    stiffness: MaybeTensors
    anchors: MaybeTensors
    paths: WrittenMaybeTensors


class Activations(NamedTuple):
    """For each layer the arguments of `npc_ext.ops.importance`.

    Attributes:
        activations: n, samples and neurons and any number of positions.
        activation_gradients: dL/dn, like the activations.
        channel_dim: the dimension that counts neurons.
        batch_dim: the dimension that counts samples.
    """

    activations: Sequence[Tensor]
    activation_gradients: Sequence[Tensor]
    channel_dim: Sequence[int]
    batch_dim: Sequence[int]


class Layer(NamedTuple):
    """A single layer, as `npc_ext.ops.layer_step_` takes it.

    Attributes:
        activation: n, as in `npc_ext.ops.importance`.
        activation_gradient: dL/dn, like the activation.
        importance: (N,) float32, the moving average C, changed in place.
        nonfinite_steps: (1,) int64, changed in place.
        neuron_dim: of each of its parameters, as in `Placement`.
        groups: of each of its parameters, as in `Placement`.
    """

    activation: Tensor
    activation_gradient: Tensor
    importance: Written
    nonfinite_steps: Written
    neuron_dim: Sequence[int]
    groups: Sequence[int]


class Placement(NamedTuple):
    """Which neurons the rows of each parameter belong to.

    Attributes:
        layer: the parameter's layer, or -1 for a parameter that trains at plain `lr`.
        neuron_dim: the dimension that counts neurons.
        groups: 1, or the groups of a grouped transposed convolution's weight.
        first_neuron: the neuron that the first row belongs to, where parameters are shards, blocks of rows of larger
            ones. None: they are whole, as are those with groups.
    """

    layer: Sequence[int]
    neuron_dim: Sequence[int]
    groups: Sequence[int]
    first_neuron: Sequence[int] | None = None

    @classmethod
    def of_layers(cls, layer: Sequence[int]) -> Placement:
        """The placement of parameters that belong to a layer as a whole, or to none."""
        return cls(layer, [0] * len(layer), [1] * len(layer))


class SGDOptions(NamedTuple):
    """Options of each parameter, as in `torch.optim.SGD`.

    `npc_ext.kernels.launch` also takes tensors in device memory in place of learning rates.
    """

    lr: Sequence[float]
    momentum: Sequence[float]
    nesterov: Sequence[bool]
    weight_decay: Sequence[float]
    maximize: Sequence[bool]


class AdamOptions(NamedTuple):
    """Options of each parameter, as in `torch.optim.AdamW`, whose betas are `first_decay` and `second_decay`."""

    lr: Sequence[float]
    first_decay: Sequence[float]
    second_decay: Sequence[float]
    epsilon: Sequence[float]
    weight_decay: Sequence[float]
    maximize: Sequence[bool]


class AnchorOptions(NamedTuple):
    """Options of each parameter's anchor.

    Attributes:
        strength: the penalty's factor.
        implicit: whether the pull to the anchor is implicit, which requires a momentum below 1.
    """

    strength: Sequence[float]
    implicit: Sequence[bool]


class PlasticityOptions(NamedTuple):
    """The constants of each layer.

    Attributes:
        alpha: the scale of eq. 7, in units of lr.
        beta: importance at or above which a neuron is frozen (eq. 7).
        delta: the decay of C per step (eq. 4).
        sigma: "sigmoid", "tanh" or "erf".
        active_only: whether neurons whose measured sum is -0.0 (they received no gradient) take no part: eq. 3's mean
            is over the others, and their importance, weights and momentum stay as they are.
    """

    alpha: Sequence[float]
    beta: Sequence[float]
    delta: Sequence[float]
    sigma: Sequence[str]
    active_only: Sequence[bool]


class LayerStepOptions(NamedTuple):
    """Options of `npc_ext.ops.layer_step_`: those of `importance`, and one value of each SGD and plasticity option."""

    channel_dim: int = 1
    batch_dim: int = 0
    lr: float = 0.1
    momentum: float = 0.0
    nesterov: bool = False
    weight_decay: float = 0.0
    maximize: bool = False
    alpha: float = 0.5
    beta: float = 0.5
    delta: float = 1 - 2e-4
    sigma: str = "sigmoid"
    active_only: bool = False


class Scaler(NamedTuple):
    """What a gradient scaler knows of the gradients.

    Attributes:
        grad_scale: one element by which gradients are divided, or None.
        found_inf: one element; if it is not zero nothing is changed at all.
    """

    grad_scale: Tensor | None = None
    found_inf: Tensor | None = None


NO_STEPS = Steps()
NO_LAYERS = PlasticityOptions((), (), (), (), ())
NO_SCALER = Scaler()
LAYER_STEP = LayerStepOptions()

Columns = TypeVar("Columns", SGDOptions, AdamOptions, AnchorOptions, PlasticityOptions)


def delta_of(options: Mapping[str, Any]) -> float:
    """The decay delta of eq. 4 under options of which either delta or half_life is None: 0.5 ** (1 / half_life)."""
    half_life = options["half_life"]
    return float(options["delta"]) if half_life is None else 0.5 ** (1 / float(half_life))


def columns_of(kind: type[Columns], groups: Sequence[Mapping[str, Any]], **given: Sequence[Any]) -> Columns:
    """Makes columns of what groups, or layers, have under their names; `given` are whole columns."""
    names = (name for name in kind._fields if name not in given)
    return kind(**given, **{name: [group[name] for group in groups] for name in names})
