"""The neurons of models, and their measured importance against eq. 2.

A test names the places in a model where its layers' activations are. The expected importance comes from the activations
at these places, and their gradients, in a float64 copy of the model without taps.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from npc_ext import NPC, find_neurons
from npc_ext.neurons.relu import ReLU
from npc_ext.neurons.table import Neurons

from ..models import Conv1D, DataDependent, ManyHeads, Model, ResNet, SetTask, paper_cnn, transposed_and_not, vgg
from .measuring import attached, take_sinks


def eq_2(activation: Tensor, gradient: Tensor, channel_dim: int = 1, batch_dim: int = 0) -> Tensor:
    """a_i = sum_b |sum_p n dL/dn|, as a loop over samples and neurons."""
    n, g = (t.detach().movedim((batch_dim, channel_dim), (0, 1)) for t in (activation, gradient))
    rows = [[(n[b, i] * g[b, i]).sum().abs() for i in range(n.shape[1])] for b in range(n.shape[0])]
    return torch.tensor(rows).double().sum(0)


def sum_of_squares(output: Tensor) -> Tensor:
    return output.pow(2).sum()


def measured(
    model: nn.Module, *inputs: object, loss: Callable[[Tensor], Tensor] = sum_of_squares, **options: object
) -> tuple[Neurons, dict[str, Tensor]]:
    """Taps the model, runs it forward and backward, and returns the content of the sinks."""
    neurons = attached(model, **options)
    loss(model(*inputs)).backward()
    neurons.detach()
    return neurons, take_sinks(neurons)


def expected(
    model: nn.Module, x: Tensor, at: dict[str, str], loss: Callable[[Tensor], Tensor] = sum_of_squares, **dims: int
) -> dict[str, Tensor]:
    """Importance by eq. 2 from a float64 copy of the model.

    `at` maps the places of activations to layers. A place is the output of the module of that name, or "input of" it.
    """
    exact, activations = copy.deepcopy(model).double(), list[tuple[str, Tensor]]()

    def take(layer: str, activation: Tensor) -> Tensor:
        activations.append((layer, activation))
        return activation.clone()  # what follows may overwrite it

    for place, layer in at.items():
        module = exact.get_submodule(place.removeprefix("input of "))
        if place.startswith("input of "):
            module.register_forward_pre_hook(lambda module, inputs, layer=layer: take(layer, *inputs))
        else:
            module.register_forward_hook(lambda module, inputs, output, layer=layer: take(layer, output))
    output = loss(exact(x.double()))
    gradients = torch.autograd.grad(output, [activation for _, activation in activations])
    importance = dict.fromkeys(at.values(), torch.tensor(0.0))
    for (layer, activation), gradient in zip(activations, gradients, strict=True):
        importance[layer] = importance[layer] + eq_2(activation, gradient, **dims)
    return importance


def assert_same(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    assert got.keys() == want.keys()
    for name, importance in want.items():
        assert importance.max() > 0
        torch.testing.assert_close(got[name].double(), importance, rtol=1e-3, atol=1e-5 * importance.max().item())


def assert_measured(model: nn.Module, x: Tensor, at: dict[str, str], **dims: int) -> Neurons:
    """Asserts that the measured importance is that of the places in `at`, as in `expected`; returns the neurons."""
    want = expected(model, x, at, **dims)
    neurons, got = measured(model, x)
    assert_same(got, want)
    return neurons


def names(named: Iterable[Any]) -> list[str]:
    """The names of layers or parameters."""
    return [each.name for each in named]


def points(neurons: Neurons) -> list[str]:
    """The first measuring point of each layer."""
    return [str(layer.points[0]) for layer in neurons]


def test_the_papers_network_is_measured_behind_its_pooling() -> None:
    at = {"pool1": "conv1", "pool2": "conv2", "relu": "hidden", "output": "output"}
    neurons = assert_measured(paper_cnn(), torch.randn(4, 1, 8, 8), at)
    assert points(neurons) == [f"output of {module}" for module in ("pool1", "pool2", "dropout", "output")]


def test_importance_behind_pooling_equals_importance_behind_the_norm_up_to_the_number_of_positions() -> None:
    model, x = paper_cnn(), torch.randn(4, 1, 8, 8)
    _, pooled = measured(model, x)
    _, normed = measured(model, x, measure_at={"conv1": "norm1", "conv2": "norm2"})
    torch.testing.assert_close(pooled, normed, rtol=1e-3, atol=1e-6)


def test_resnet_with_batch_norm_functional_and_shared_relu_and_residual_additions() -> None:
    at = {"bn": "stem", "fc": "fc"}
    at |= {f"blocks.{block}.bn{k}": f"blocks.{block}.conv{k}" for block in range(2) for k in (1, 2)}
    neurons = assert_measured(ResNet(), torch.randn(4, 3, 6, 6), at)
    parameters = ["blocks.0.conv1.weight", "blocks.0.bn1.weight", "blocks.0.bn1.bias"]
    assert names(neurons["blocks.0.conv1"].parameters) == parameters


def test_vgg_with_in_place_relu() -> None:
    at = {"0.1": "0.0", "0.4": "0.3", "0.8": "0.7", "2.0": "2.0", "2.3": "2.3"}
    assert_measured(vgg(), torch.randn(3, 3, 8, 8), at)


def test_mlp_on_three_dimensional_input_sums_over_the_middle() -> None:
    model = nn.Sequential(nn.Linear(5, 7), nn.GELU(), nn.Linear(7, 3))
    neurons = assert_measured(model, torch.randn(4, 6, 5), {"1": "0", "2": "2"}, channel_dim=2)
    assert str(neurons["0"].points[0]) == "output of 1"


@pytest.mark.parametrize("batch_first", [True, False])
def test_transformer_encoder_with_gelu(batch_first: bool) -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, activation="gelu", batch_first=batch_first)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    for parameter in model.parameters():  # the encoder copies one layer; this makes the copies different
        nn.init.normal_(parameter, std=0.3)
    x, target = (torch.randn(3, 5, 8) for _ in range(2))
    loss = lambda y: (y * target.to(y.dtype)).sum()  # noqa: E731
    at: dict[str, str] = {}
    for block in ("layers.0", "layers.1"):
        at |= {
            f"input of {block}.dropout1": f"{block}.self_attn.out_proj",
            f"input of {block}.linear2": f"{block}.linear1",
            f"{block}.linear2": f"{block}.linear2",
        }
    want = expected(model, x, at, loss, channel_dim=2, batch_dim=0 if batch_first else 1)
    neurons, got = measured(model, x, loss=loss)
    assert all(got.pop(f"layers.{index}.self_attn.in_proj").min() > 0 for index in range(2))
    assert_same(got, want)
    assert {other.name.partition(".")[2].partition(".")[2] for other in neurons.other_parameters} == {
        f"norm{k}.{p}" for k in (1, 2) for p in ("weight", "bias")
    }


def attention(module: nn.MultiheadAttention, inputs: list[Tensor], padding: Tensor | None) -> tuple[list[Tensor], ...]:
    """Queries, keys and values (batch, length, E), and what the module returns, by separate linear layers."""
    weights = [module.q_proj_weight, module.k_proj_weight, module.v_proj_weight]
    if module.in_proj_weight is not None:
        weights = list(module.in_proj_weight.chunk(3))
    biases = [None] * 3 if module.in_proj_bias is None else module.in_proj_bias.chunk(3)
    batched = [x if x.ndim == 3 else x[None] for x in inputs]
    if not module.batch_first and inputs[0].ndim == 3:
        batched = [x.transpose(0, 1) for x in batched]
    projected = [F.linear(x, w, b) for x, w, b in zip(batched, weights, biases, strict=True)]
    q, k, v = projected
    if module.bias_k is not None:
        k, v = (torch.cat([x, b.expand(len(x), 1, -1)], 1) for x, b in ((k, module.bias_k), (v, module.bias_v)))
    if module.add_zero_attn:
        k, v = (torch.cat([x, torch.zeros_like(x[:, :1])], 1) for x in (k, v))
    q, k, v = (x.unflatten(2, (module.num_heads, -1)).transpose(1, 2) for x in (q, k, v))
    scores = q @ k.mT / q.shape[-1] ** 0.5
    if padding is not None:
        scores = scores.masked_fill(padding[:, None, None], -torch.inf)
    weights = scores.softmax(-1)
    output = module.out_proj((weights @ v).transpose(1, 2).flatten(2))
    if inputs[0].ndim == 2:
        return projected, [output[0], weights.mean(1)[0]]
    return projected, [output if module.batch_first else output.transpose(0, 1), weights.mean(1)]


def kinds_of_attention(batch_first: bool) -> dict[str, tuple[dict[str, Any], list[Tensor], Tensor | None]]:
    """Options of the module, its inputs, and the padding of keys."""
    x, y, z = torch.randn(4, 3, 8), torch.randn(5, 3, 8), torch.randn(5, 3, 8)
    sample, other_sample = x[:, 0], y[:, 0]
    if batch_first:
        x, y, z = (t.transpose(0, 1) for t in (x, y, z))
    padding = torch.tensor([[False] * 3 + [True] * 2, [False] * 5, [False] * 4 + [True]])
    widths, of_widths = {"kdim": 6, "vdim": 5}, [x, y[..., :6], z[..., :5]]
    return {
        "self": ({}, [x, x, x], None),
        "cross": ({}, [x, y, y], None),
        "padded": ({}, [x, y, y], padding),
        "all different": ({}, [x, y, z], None),
        "all different, no bias": ({"bias": False}, [x, y, z], None),
        "one sample": ({}, [sample, sample, sample], None),
        "one sample, cross": ({}, [sample, other_sample, other_sample], None),
        "other widths": (widths, of_widths, None),
        "other widths, no bias": ({"bias": False, **widths}, of_widths, None),
        "more keys": ({"add_bias_kv": True, "add_zero_attn": True}, [x, y, z], None),
    }


@pytest.mark.parametrize("need_weights", [True, False], ids=["weights", "no weights"])
@pytest.mark.parametrize("batch_first", [True, False], ids=["samples first", "samples second"])
@pytest.mark.parametrize("kind", kinds_of_attention(False))
def test_queries_keys_and_values_of_attention_are_neurons(kind: str, batch_first: bool, need_weights: bool) -> None:
    options, inputs, padding = kinds_of_attention(batch_first)[kind]
    call = {"key_padding_mask": padding, "need_weights": need_weights}
    model = nn.MultiheadAttention(8, 2, batch_first=batch_first, **options)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.5)
    exact = copy.deepcopy(model).double()
    before = model(*inputs, **call)
    neurons = attached(model)
    tapped = model(*inputs, **call)
    weights = torch.randn_like(before[0])

    def loss(output: Tensor, probabilities: Tensor | None) -> Tensor:
        weighted = (weights.to(output.dtype) * output).sum()
        return weighted + probabilities.pow(2).sum() if need_weights else weighted

    loss(*tapped).backward()
    neurons.detach()
    for tensor, other in zip(tapped, before, strict=True):
        assert tensor is other or torch.equal(tensor, other)
    projected, outputs = attention(exact, [x.double() for x in inputs], padding)
    torch.testing.assert_close(outputs[0].float(), before[0], rtol=1e-4, atol=1e-5)
    gradients = torch.autograd.grad(loss(*outputs), projected)
    want = torch.cat([eq_2(n, g, 2) for n, g in zip(projected, gradients, strict=True)])
    assert neurons["in_proj"].neurons == 24
    assert_same({"in_proj": neurons["in_proj"].sink.grad}, {"in_proj": want})


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("activation", ["relu", ReLU()], ids=["relu", "npc_ext.nn.ReLU"])
def test_a_sequence_without_a_dimension_of_samples_is_one_sample(batch_first: bool, activation: str) -> None:
    model = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, activation=activation, batch_first=batch_first)
    x = torch.randn(5, 8)
    loss = lambda y: y.sin().sum()  # noqa: E731
    _, alone = measured(copy.deepcopy(model), x, loss=loss)
    _, batch_of_one = measured(model, x.unsqueeze(0 if batch_first else 1), loss=loss)
    assert alone.keys() == {"self_attn.in_proj", "self_attn.out_proj", "linear1", "linear2"}
    torch.testing.assert_close(alone, batch_of_one)


def test_attention_modules_that_share_their_weight_are_one_layer() -> None:
    def forward(model: Any, x: Tensor) -> Tensor:
        x = model.a(x, x, x)[0]
        return model.b(x, x, x)[0]

    x = torch.randn(5, 3, 8)
    model = Model(forward, a=nn.MultiheadAttention(8, 2), b=nn.MultiheadAttention(8, 2))
    model.b.in_proj_weight = model.a.in_proj_weight
    single, called_twice = copy.deepcopy(model), copy.deepcopy(model)
    single.b.in_proj_weight = nn.Parameter(single.a.in_proj_weight.detach().clone())
    called_twice.b = called_twice.a
    neurons, got = measured(model, x)
    _, apart = measured(single, x)
    torch.testing.assert_close(got["a.in_proj"], apart["a.in_proj"] + apart["b.in_proj"])
    assert names(neurons["a.in_proj"].parameters) == ["a.in_proj_weight", "a.in_proj_bias", "b.in_proj_bias"]
    assert "shared with b" in neurons["a.in_proj"].note
    assert set(measured(called_twice, x)[1]) == {"a.in_proj", "a.out_proj"}


def test_attention_that_cannot_be_measured_inside_says_why() -> None:
    class Overridden(nn.MultiheadAttention):
        def forward(self, *inputs: Tensor, **options: object) -> tuple[Tensor, Tensor | None]:
            return super().forward(*inputs, **options)

    class Replaced(nn.MultiheadAttention):
        def __init__(self, *sizes: int) -> None:
            super().__init__(*sizes)
            self.forward = super().forward

    for module, reason in (
        (Overridden(8, 2), "its class has a forward of its own"),
        (Replaced(8, 2), "has been replaced"),
    ):
        neurons = find_neurons(nn.Sequential(module))
        assert names(neurons) == ["0.out_proj"]
        assert all(reason in other.reason for other in neurons.other_parameters)
    with pytest.raises(ValueError, match=r"measure_at names '0.in_proj', the input projection of attention"):
        find_neurons(nn.Sequential(nn.MultiheadAttention(8, 2)), measure_at={"0.in_proj": "0"})
    extra = find_neurons(nn.MultiheadAttention(8, 2, add_bias_kv=True)).other_parameters
    assert names(extra) == ["bias_k", "bias_v"]
    assert {other.reason for other in extra} == {"a key and a value that attention adds to every sequence"}


def test_attention_is_measured_where_nothing_but_its_projection_trains() -> None:
    model, x = nn.MultiheadAttention(8, 2), torch.randn(5, 3, 8)
    model.out_proj.requires_grad_(False)
    assert set(measured(model, x, x, x, loss=lambda y: y[0].sin().sum())[1]) == {"in_proj"}
    model.requires_grad_(False)
    x.requires_grad_()
    assert not measured(model, x, x, x, loss=lambda y: y[0].sin().sum())[1]


def test_a_transformer_layer_that_is_the_model_itself_says_where_samples_are() -> None:
    for batch_first, samples in ((True, 0), (False, 1)):
        neurons = find_neurons(nn.TransformerEncoderLayer(8, 2, 12, batch_first=batch_first))
        assert {point.batch_dim for layer in neurons for point in layer.points} == {samples}


def test_two_layers_with_tied_weights_are_one_layer_whose_importance_adds_up() -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 2))
    model[2].weight = model[0].weight
    neurons = assert_measured(model, torch.randn(4, 6), {"1": "0", "3": "0", "4": "4"})
    assert names(neurons["0"].parameters) == ["0.weight", "0.bias", "2.bias"]
    assert "shared with 2" in neurons["0"].note


def test_a_module_called_twice_in_one_forward_pass_adds_up() -> None:
    def forward(model: Any, x: Tensor) -> Tensor:
        return model.out(F.relu(model.layer(F.relu(model.layer(x)))))

    model = Model(forward, layer=nn.Linear(6, 6), out=nn.Linear(6, 2))
    assert_measured(model, torch.randn(4, 6), {"layer": "layer", "out": "out"})


def test_a_call_that_could_be_measured_further_downstream_does_not_count_twice() -> None:
    def forward(model: Any, x: Tensor) -> Tensor:
        """One layer and its ReLU called twice; dropout follows the second call only."""
        y = model.relu(model.layer(x))
        return model.out(model.dropout(model.relu(model.layer(y + 0.5 * y))))

    model = Model(forward, layer=nn.Linear(6, 6), relu=nn.ReLU(), dropout=nn.Dropout(0.0), out=nn.Linear(6, 2))
    assert_measured(model, torch.randn(4, 6), {"relu": "layer", "out": "out"})


def test_channels_last_memory_gives_the_same_importance() -> None:
    model, x = vgg(), torch.randn(3, 3, 8, 8)
    twin = copy.deepcopy(model).to(memory_format=torch.channels_last)
    _, got = measured(model, x)
    _, last = measured(twin, x.contiguous(memory_format=torch.channels_last))
    torch.testing.assert_close(last, got, rtol=1e-3, atol=1e-5)


CONVOLUTIONS = [
    (nn.Conv1d(4, 6, 3), (2, 4, 9)),
    (nn.Conv2d(4, 6, 3, groups=2), (2, 4, 7, 7)),
    (nn.Conv2d(4, 8, 3, groups=4), (2, 4, 7, 7)),
    (nn.Conv3d(2, 5, 2), (2, 2, 4, 4, 4)),
    (nn.ConvTranspose1d(4, 6, 3), (2, 4, 9)),
    (nn.ConvTranspose2d(4, 6, 3, groups=2), (2, 4, 5, 5)),
    (nn.ConvTranspose3d(2, 4, 2, groups=2), (2, 2, 3, 3, 3)),
]


@pytest.mark.parametrize(("layer", "shape"), CONVOLUTIONS, ids=lambda value: str(value).split("kernel")[0])
def test_every_kind_of_convolution(layer: nn.Module, shape: tuple[int, ...]) -> None:
    model = nn.Sequential(copy.deepcopy(layer), nn.Tanh(), nn.Flatten())
    neurons = assert_measured(model, torch.randn(shape), {"1": "0"})
    weight, n = neurons["0"].parameters[0], layer.out_channels
    assert weight.parameter.shape[weight.dim] * weight.groups == n == neurons["0"].neurons


def test_unbatched_input_counts_as_one_sample() -> None:
    model, x = nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU()), torch.randn(2, 6, 6)
    _, got = measured(model, x)
    assert_same(got, expected(model, x[None], {"1": "0"}))


def test_functional_gelu_is_followed_and_measured_at_the_next_layers_input() -> None:
    model = Model(lambda model, x: x + model.down(F.gelu(model.up(x))), up=nn.Linear(4, 9), down=nn.Linear(9, 4))
    neurons = assert_measured(model, torch.randn(5, 4), {"input of down": "up", "down": "down"})
    assert str(neurons["up"].points[0]) == "input of down"


def with_function(function: Callable[[Tensor], Tensor]) -> Model:
    """A model that calls a function behind its convolution."""
    return Model(
        lambda model, x: model.out(function(model.conv(x)).mean((2, 3))), conv=nn.Conv2d(1, 4, 3), out=nn.Linear(4, 2)
    )


def test_a_functional_activation_that_cannot_be_reached_is_noted() -> None:
    note = find_neurons(with_function(F.gelu))["conv"].note
    assert note == "measured before gelu, which is not a module that is used once"


def test_a_layer_before_an_unreachable_normalization_trains_plainly_and_says_why() -> None:
    neurons = find_neurons(with_function(F.instance_norm))
    assert names(neurons) == ["out"]
    assert "a normalization follows" in neurons.other_parameters[0].reason


def test_heads_chosen_by_an_argument_or_an_attribute() -> None:
    x = torch.randn(4, 6)
    for task in (0, 1):
        _, got = measured(ManyHeads(), x, task)
        assert set(got) == {"features.0", f"heads.{task}"}
        model = SetTask()
        neurons = attached(model)
        model.task = task
        model(x).sum().backward()
        assert set(take_sinks(neurons)) == {"hidden", f"heads.{task}"}


def test_heads_that_the_trace_does_not_reach_are_measured_behind_their_normalization() -> None:
    model = SetTask()
    for index in range(2):
        head = (nn.Linear(16, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Linear(12, 3))
        model.heads[index] = nn.Sequential(*head)
    layer = find_neurons(model)["heads.1.0"]
    assert str(layer.points[0]) == "output of heads.1.2"
    assert names(layer.parameters)[2:] == ["heads.1.1.weight", "heads.1.1.bias"]


def test_a_model_that_cannot_be_traced_is_measured_at_the_outputs_of_its_layers() -> None:
    neurons = assert_measured(DataDependent(), torch.randn(4, 3, 5, 5), {"conv": "conv", "fc": "fc"})
    assert neurons["conv"].points[0].copy


def test_in_place_operations_on_measured_tensors_are_met_with_a_copy() -> None:
    def forward(model: Any, x: Tensor) -> Tensor:
        x = model.layer(x)
        x[:, 0] = 0
        return model.out(F.relu_(x.view(-1, 6)))

    model, x = Model(forward, layer=nn.Linear(4, 6), out=nn.Linear(6, 5)), torch.randn(3, 4)
    neurons, got = measured(model, x)
    assert set(got) == {"layer", "out"}
    assert neurons["layer"].points[0].copy
    logits_masked_by_the_user = model(x)
    neurons.attach(model)
    logits_masked_by_the_user = model(x)
    logits_masked_by_the_user[:, 2:] = -1e9
    logits_masked_by_the_user.logsumexp(1).sum().backward()


class Remembers(nn.Module):
    """Changes its attributes, its buffer and the random state in each forward pass."""

    def __init__(self, traceable: bool) -> None:
        super().__init__()
        self.layer, self.traceable = nn.Linear(3, 2), traceable
        self.last, self.seen, self.log, self.calls = None, {}, [], 0
        self.register_buffer("steps", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.steps += 1
        self.last = self.seen["x"] = self.layer(x)
        self.log.append(self.last)
        x = torch.dropout(self.last, 0.5, self.training)
        return x if self.traceable or x.sum() > 0 else -x


@pytest.mark.parametrize("traceable", [True, False])
def test_tracing_leaves_nothing_behind(traceable: bool) -> None:
    model, state = Remembers(traceable).eval(), torch.get_rng_state()
    find_neurons(model)
    assert (model.last, model.seen, model.log, model.calls, model.training) == (None, {}, [], 0, False)
    assert model.steps == 0
    assert torch.equal(torch.get_rng_state(), state)
    assert not model.layer._forward_hooks


class OverwritesItsInput(nn.Module):
    """Cannot be traced, and works in place."""

    def forward(self, x: Tensor) -> Tensor:
        return x.relu_() if x.sum() > 0 else x.mul_(2)


def test_a_part_that_cannot_be_traced_moves_no_point_before_it() -> None:
    model = nn.Sequential(
        *(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.SiLU(), OverwritesItsInput(), nn.Flatten(), nn.Linear(36, 2))
    )
    neurons = assert_measured(model, torch.randn(3, 2, 5, 5), {"2": "0", "5": "5"})
    assert str(neurons["0"].points[0]) == "output of 2"
    assert neurons["0"].points[0].copy
    assert names(neurons["0"].parameters) == ["0.weight", "0.bias", "1.weight", "1.bias"]


def test_a_module_with_two_names_in_a_model_that_cannot_be_traced() -> None:
    relu = nn.ReLU()
    a, b = (Model(lambda part, x: part.relu(part.fc(x)), fc=nn.Linear(4, 4), relu=relu) for _ in range(2))
    model = Model(lambda model, x: model.b(model.a(x)) if x.sum() >= 0 else model.a(x), a=a, b=b)
    assert points(find_neurons(model)) == ["output of a.fc", "output of b.fc"]


def test_a_class_derived_from_a_normalization_is_passed_even_if_it_cannot_be_traced() -> None:
    class CheckedNorm(nn.BatchNorm2d):
        def forward(self, input: Tensor) -> Tensor:
            if input.abs().amax() == torch.inf:
                raise ValueError("infinite")
            return F.relu(super().forward(input))

    neurons = find_neurons(nn.Sequential(nn.Conv2d(2, 4, 3), CheckedNorm(4), nn.Conv2d(4, 2, 1)))
    assert str(neurons["0"].points[0]) == "output of 1"
    assert names(neurons["0"].parameters) == ["0.weight", "0.bias", "1.weight", "1.bias"]


def test_functional_pooling_does_not_hide_a_following_normalization() -> None:
    def forward(model: Any, x: Tensor) -> Tensor:
        x = F.avg_pool2d(F.max_pool2d(model.conv(x), 2), 2)
        return model.fc(model.norm(F.adaptive_avg_pool2d(x, 2)).mean((2, 3)))

    model = Model(forward, conv=nn.Conv2d(2, 4, 3), norm=nn.BatchNorm2d(4), fc=nn.Linear(4, 2))
    assert str(find_neurons(model)["conv"].points[0]) == "output of norm"


def test_scales_of_a_layer_norm_behind_a_convolution_count_positions_not_neurons() -> None:
    # The last dimension is as long as there are neurons, by chance.
    neurons = find_neurons(nn.Sequential(nn.Conv1d(2, 5, 1), nn.LayerNorm(5), nn.ReLU(), nn.Conv1d(5, 2, 1)))
    assert names(neurons["0"].parameters) == ["0.weight", "0.bias"]
    assert names(neurons.other_parameters) == ["1.weight", "1.bias"]
    assert str(neurons["0"].points[0]) == "output of 2"


def test_detaching_takes_every_hook_out() -> None:
    model = ResNet()
    neurons = attached(model)
    assert any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    neurons.detach()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize(
    "make",
    [
        paper_cnn,
        ResNet,
        vgg,
        ManyHeads,
        DataDependent,
        lambda: nn.TransformerEncoderLayer(8, 2, 12),
        lambda: nn.Sequential(nn.Embedding(9, 4), nn.LSTM(4, 4), nn.Linear(4, 3)),
    ],
)
def test_the_table_lists_every_parameter_once(make: Callable[[], nn.Module]) -> None:
    model = make()
    neurons = find_neurons(model)
    listed = names(p for layer in neurons for p in layer.parameters) + names(neurons.other_parameters)
    assert sorted(listed) == sorted(name for name, _ in model.named_parameters())
    for name in listed:
        assert name.rpartition(".")[2] in str(neurons)


def test_language_model_head_tied_with_its_embedding() -> None:
    embedding, head = nn.Embedding(11, 4), nn.Linear(4, 11, bias=False)
    head.weight = embedding.weight
    model = Model(lambda model, tokens: model.head(model.embedding(tokens)), embedding=embedding, head=head)
    neurons, got = measured(model, torch.randint(11, (2, 5)))
    assert "also the embedding embedding" in neurons["head"].note
    assert got["head"].shape == (11,)


def test_layers_whose_weight_is_computed_train_plainly() -> None:
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(3, 4)), nn.ReLU(), nn.Linear(4, 2))
    neurons = find_neurons(model)
    assert names(neurons) == ["2"]
    assert all("a parametrization" in other.reason for other in neurons.other_parameters)


def tied_across_dimensions() -> nn.Module:
    model = nn.Sequential(nn.Conv1d(4, 6, 3), nn.ConvTranspose1d(6, 4, 3))
    model[1].weight = model[0].weight
    return model


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (lambda: nn.ReLU(), {}, r"the model \(ReLU\) has no neurons that can be measured"),
        (lambda: nn.LazyLinear(3), {}, "'weight' is not initialized yet: pass one batch"),
        (lambda: nn.Linear(2, 2, dtype=torch.cfloat), {}, "'weight' is complex"),
        (tied_across_dimensions, {}, "layers '0', '1' share one weight but count their neurons along different"),
        (paper_cnn, {"measure_at": {"conv1": "pool9"}}, "measure_at names 'pool9', which is not in the model; close to it: 'pool"),
        (paper_cnn, {"measure_at": {"convv": "pool1"}}, "measure_at names 'convv', which is not in the model; close to it: 'conv"),
        (paper_cnn, {"batch_dim": {"nope": 1}}, "batch_dim names 'nope', .*; there are 'conv1', 'conv2', 'hidden', 'output'"),
        (paper_cnn, {"measure_at": {"conv2": "norm1"}}, "measure_at of 'conv2' is 'norm1', which comes before the layer"),
        (paper_cnn, {"measure_at": {"conv1": "xyz"}}, "names 'xyz', .*; there are 'conv1', 'norm1', .* and [0-9]+ more"),
        (paper_cnn, {"batch_dim": {"conv1": 1}}, "batch_dim is 1 for 'conv1', but dimension 1 of a convolution's"),
        (ResNet, {"measure_at": {"stem": "conv2"}}, "close to it: 'blocks.0.conv2', 'blocks.1.conv2'"),
    ],
)  # fmt: skip
def test_invalid_models_and_options_are_refused(make: Callable[[], nn.Module], options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        find_neurons(make(), **options)


def test_looking_up_an_unknown_layer_names_the_known() -> None:
    with pytest.raises(KeyError, match="no layer 'conv9'; close to it: 'conv1', 'conv2'"):
        find_neurons(paper_cnn())["conv9"]


def test_a_normalization_that_is_named_or_passed_belongs_to_the_neurons() -> None:
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.GroupNorm(2, 4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3))
    for at in ("1", "2"):
        layer = find_neurons(model, measure_at={"0": at})["0"]
        assert names(layer.parameters) == ["0.weight", "0.bias", "1.weight", "1.bias"]

    def cannot_be_traced(model: Any, x: Tensor) -> Tensor:
        x = model.norm(model.layer(x))
        return x if x.sum() > 0 else -x

    model = Model(cannot_be_traced, layer=nn.Linear(5, 4), norm=nn.LayerNorm(4))
    assert len(find_neurons(model, measure_at={"layer": "norm"})["layer"].parameters) == 4


def test_the_table_says_what_is_not_trained() -> None:
    model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
    model[0].requires_grad_(False)
    model[1].requires_grad_(False)
    table = str(find_neurons(model))
    assert "0.weight  embedding; requires no gradient, and is not trained" in table
    assert "nowhere: none of its parameters requires a gradient" in table


def test_transposed_linear_layers_have_the_neurons_of_linear_ones() -> None:
    transposed, usual = transposed_and_not()
    x = torch.randn(4, 5, 6)  # a sequence
    neurons, got = measured(transposed, x)
    twin, want = measured(usual, x)
    assert_same(got, {name: importance.double() for name, importance in want.items()})
    for layer, other in zip(neurons, twin, strict=True):
        assert (layer.neurons, layer.fan_in, layer.points) == (other.neurons, other.fan_in, other.points)
        assert names(layer.parameters) == names(other.parameters)
        assert layer.parameters[0].dim == 1 and {p.dim for p in layer.parameters[1:]} == {0}


def test_what_is_only_called_conv1d_is_no_layer() -> None:
    model = nn.Sequential(Conv1D(4, 4), nn.Linear(4, 2))
    model[0].nf = 5
    assert names(find_neurons(model)) == ["1"]


class PackedLinear(nn.Linear):
    """Stores four weights in a byte, and hides that."""

    def __init__(self, inputs: int, outputs: int, packed: Tensor) -> None:
        super().__init__(inputs, outputs)
        self.weight = nn.Parameter(packed, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, torch.ones(self.out_features, self.in_features), self.bias)


@pytest.mark.parametrize(
    "packed",
    [
        torch.zeros(128, 1, dtype=torch.uint8),
        torch.zeros(64, 1, dtype=torch.bfloat16),  # storage of 4-bit weights
        torch.zeros(16, 16, dtype=torch.int8),
        torch.zeros(16, 16).to(torch.float8_e4m3fn),
        torch.zeros(256),
        torch.zeros(0),
    ],
)
def test_packed_weights_are_no_neurons(packed: Tensor) -> None:
    neurons = find_neurons(nn.Sequential(PackedLinear(16, 16, packed), nn.ReLU(), nn.Linear(16, 2)))
    assert names(neurons) == ["2"]
    assert all("its weight " in other.reason for other in neurons.other_parameters)
    assert "0.weight" in str(neurons)


@pytest.mark.parametrize(
    "layer", [nn.Conv2d(4, 6, 3, groups=2), nn.ConvTranspose2d(4, 6, 3, groups=2), nn.Conv1d(4, 6, (2,))]
)
def test_weights_of_convolutions_are_those_of_their_shape(layer: nn.Module) -> None:
    assert find_neurons(layer)[""].neurons == 6
    layer.weight = nn.Parameter(torch.zeros(layer.weight.numel() // 2, 1))
    with pytest.raises(ValueError, match="its weight has the shape"):
        find_neurons(layer)


def test_a_head_that_has_grown_keeps_its_neurons() -> None:
    model = nn.Linear(5, 3)
    model.weight.data, model.bias.data = torch.randn(8, 5), torch.zeros(8)
    assert find_neurons(model)[""].neurons == 8


def test_tokens_count_as_samples_where_dimension_1_does() -> None:
    """Packed sequences, (1, tokens, channels): one sample by default."""
    model, x = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)), torch.randn(1, 9, 5)
    _, as_one = measured(model, x)
    _, by_token = measured(model, x, batch_dim={"0": 1, "2": 1})
    _, flat = measured(model, x[0])
    torch.testing.assert_close(by_token, flat)
    assert (as_one["0"] < by_token["0"]).all()


def test_tokens_count_as_samples_also_in_attentions_input_projection() -> None:
    model, x = nn.MultiheadAttention(8, 2, batch_first=True), torch.randn(1, 9, 8)
    _, by_token = measured(model, x, x, x, batch_dim={"in_proj": 1}, loss=lambda y: y[0].sin().sum())
    projected, (output, _) = attention(model, [x, x, x], None)
    gradients = torch.autograd.grad(output.sin().sum(), projected)
    want = [eq_2(n, g, channel_dim=2, batch_dim=1) for n, g in zip(projected, gradients, strict=True)]
    assert_same({"in_proj": by_token["in_proj"]}, {"in_proj": torch.cat(want)})


@pytest.mark.parametrize("model", [nn.Linear(16, 48), nn.MultiheadAttention(16, 2)], ids=["linear", "attention"])
def test_sinks_take_no_memory_before_they_are_measured(model: nn.Module) -> None:
    x = torch.randn(2, 3, 16)
    neurons, got = measured(model, *[x] * (1 if isinstance(model, nn.Linear) else 3), loss=lambda y: y[0].sin().sum())
    first = neurons.layers[0]
    assert first.sink.untyped_storage().nbytes() == 4
    assert got[first.name].shape == (48,) and got[first.name].is_contiguous()


def test_a_parametrized_input_projection_of_the_model_itself_says_why_it_is_no_layer() -> None:
    model = nn.utils.parametrizations.weight_norm(nn.MultiheadAttention(8, 2), "in_proj_weight")
    reasons = {other.name.rpartition(".")[2]: other.reason for other in find_neurons(model).other_parameters}
    assert reasons == dict.fromkeys(
        ("original0", "original1", "in_proj_bias"), "its weight is computed from other parameters (a parametrization)"
    )


def test_convolutions_in_a_sequence_first_transformer_have_their_samples_first() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 12, batch_first=False)
    layer.conv = nn.Conv1d(8, 8, 3)
    dims = {found.name: found.points[0].batch_dim for found in find_neurons(layer)}
    assert dims["conv"] == 0 and dims["linear1"] == 1


def test_the_dimension_of_samples_may_be_given_for_attention_with_everything_else() -> None:
    model = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    optimizer = NPC(model, layers={"*": {"batch_dim": 1}})
    assert {point.batch_dim for layer in optimizer.neurons for point in layer.points} == {1}
