"""`npc_ext.nn.ReLU` against `torch.nn.ReLU` with a tap behind it: the same gradients, the same importance."""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from functorch.compile import make_boxed_func
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch.autograd import gradcheck, gradgradcheck
from torch.nn import functional as F

import npc_ext
from npc_ext import NPC, ImportanceWarning, find_neurons, reference
from npc_ext.neurons.relu import ReLU, _MeasuredReLU
from npc_ext.neurons.table import Neurons

from ..tolerances import TRAJECTORY
from .measuring import assert_equal, assert_gradients_equal, attached, batch, take_sinks


def with_relu(relu: type[nn.ReLU], *modules: nn.Module | None) -> nn.Sequential:
    """A sequence with a ReLU wherever None is."""
    return nn.Sequential(*(relu() if module is None else module for module in modules))


def pair(*modules: nn.Module | None) -> tuple[nn.Sequential, nn.Sequential]:
    """The same model with `npc_ext.nn.ReLU` and with `torch.nn.ReLU`."""
    return with_relu(ReLU, *modules), with_relu(nn.ReLU, *copy.deepcopy(modules))


def cnn(relu: type[nn.ReLU] = ReLU) -> nn.Sequential:
    hidden = (nn.MaxPool2d(2), nn.Flatten(), nn.Linear(6 * 16, 12), None, nn.Dropout(0.0), nn.Linear(12, 5))
    return with_relu(relu, nn.Conv2d(3, 6, 3, padding=1), nn.InstanceNorm2d(6), None, *hidden)


def test_without_an_optimizer_it_is_torchs_relu() -> None:
    relu, x = ReLU(), torch.randn(4, 5, requires_grad=True)
    assert isinstance(relu, nn.ReLU)
    assert repr(relu) == "ReLU()"
    assert not relu.inplace
    assert type(relu(x).grad_fn) is type(F.relu(x).grad_fn)
    assert torch.equal(relu(torch.arange(-3, 3)), F.relu(torch.arange(-3, 3)))
    assert not relu.state_dict()
    assert npc_ext.nn.ReLU is ReLU


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
def test_without_an_optimizer_it_can_be_scripted() -> None:
    x = torch.randn(4, 5)
    assert torch.equal(torch.jit.script(nn.Sequential(ReLU()))(x), F.relu(x))


def test_nan_goes_through_as_in_torch() -> None:
    model, x = nn.Sequential(nn.Linear(3, 3), ReLU(), nn.Linear(3, 1)), torch.randn(2, 3)
    x[1, 1] = torch.nan
    attached(model)
    assert model[1](model[0](x)).isnan().tolist() == [[False] * 3, [True] * 3]


MODELS: dict[str, tuple[tuple[nn.Module | None, ...], tuple[int, ...]]] = {
    "linear": ((nn.Linear(5, 7), None, nn.Linear(7, 2)), (6, 5)),
    "linear, sequences": ((nn.Linear(5, 7), None, nn.Linear(7, 2)), (6, 4, 5)),
    "linear, images": ((nn.Linear(5, 7), None, nn.Linear(7, 2)), (3, 2, 4, 5)),
    "linear, one sample": ((nn.Linear(5, 7), None, nn.Linear(7, 2)), (5,)),
    "conv1d": ((nn.Conv1d(2, 4, 3), None, nn.Conv1d(4, 2, 1)), (3, 2, 9)),
    "conv2d": ((nn.Conv2d(2, 4, 3), None, nn.Conv2d(4, 2, 1)), (3, 2, 6, 6)),
    "conv2d, one sample": ((nn.Conv2d(2, 4, 3), None, nn.Flatten(-3), nn.Linear(64, 3)), (2, 6, 6)),
    "norm, pooling": ((nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), None, nn.MaxPool2d(2), nn.Conv2d(4, 2, 1)), (3, 2, 6, 6)),
    "conv3d": ((nn.Conv3d(1, 3, 2), None, nn.Conv3d(3, 2, 1)), (2, 1, 4, 4, 4)),
    "transposed": ((nn.ConvTranspose2d(2, 4, 2), nn.InstanceNorm2d(4), None, nn.Conv2d(4, 2, 1)), (3, 2, 4, 4)),
}
LAYOUTS = [(name, torch.contiguous_format) for name in MODELS] + [
    (name, torch.channels_last) for name in ("conv2d", "norm, pooling", "transposed")
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("name", "memory"), LAYOUTS, ids=str)
def test_gradients_and_importance_are_those_of_torchs_relu_with_a_tap(
    name: str, memory: torch.memory_format, dtype: torch.dtype
) -> None:
    modules, shape = MODELS[name]
    x = torch.randn(shape).to(dtype=dtype, memory_format=memory)
    mine, plain = (model.to(dtype=dtype, memory_format=memory) for model in pair(*copy.deepcopy(modules)))
    at = str(modules.index(None))
    neurons, taps = attached(mine), attached(plain, measure_at={"0": at})
    assert neurons["0"].points[0].in_backward
    assert neurons["0"].points[0].module == at
    x, y = x.clone().requires_grad_(), x.clone().requires_grad_()
    out, want = mine(x), plain(y)
    assert torch.equal(out, want)
    assert out.stride() == want.stride()
    out.pow(2).sum().backward()
    want.pow(2).sum().backward()
    assert torch.equal(x.grad, y.grad)
    assert_gradients_equal(mine, plain)
    assert_equal(take_sinks(neurons), take_sinks(taps))


def test_the_table_says_where_it_measures() -> None:
    neurons = find_neurons(cnn())
    assert [str(layer.points[0]) for layer in neurons] == ["output of 2", "output of 6", "output of 8"]
    assert [layer.points[0].in_backward for layer in neurons] == [True, True, False]
    assert "output of 6, in its backward pass  weight" in str(neurons)
    assert "output of 8, in its" not in str(neurons)


def test_importance_at_the_relu_equals_importance_behind_pooling_and_dropout() -> None:
    model, (x, y) = cnn(), batch(channels=3, classes=5)
    model[7] = nn.Dropout(0.5)
    plain = with_relu(nn.ReLU, *[None if isinstance(m, ReLU) else m for m in copy.deepcopy(model)])
    neurons, taps = attached(model), attached(plain)
    assert [str(layer.points[0]) for layer in taps] == ["output of 3", "output of 7", "output of 8"]
    for twin in (model, plain):
        torch.manual_seed(1)
        F.cross_entropy(twin(x), y).backward()
    got, want = take_sinks(neurons), take_sinks(taps)
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=1e-3, atol=1e-5 * want[name].max().item())


@pytest.mark.parametrize("backend", ["auto", "native", "reference"])
def test_training_gives_the_weights_that_torchs_relu_gives(backend: Any) -> None:
    mine, (x, y) = cnn(), batch(channels=3, classes=5)
    plain = with_relu(nn.ReLU, *[None if isinstance(m, ReLU) else m for m in copy.deepcopy(mine)])
    exact = copy.deepcopy(plain)
    options: dict[str, Any] = {"lr": 0.1, "delta": 0.9, "momentum": 0.5, "backend": backend}
    at = {"0": {"measure_at": "2"}, "5": {"measure_at": "6"}}
    optimizers = [NPC(mine, **options), NPC(plain, **options, layers=at), NPC(exact, **options)]
    for _ in range(5):
        for model, optimizer in zip((mine, plain, exact), optimizers, strict=True):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
    assert optimizers[0].plasticity()["0"].importance.max() > 0
    for a, b, c in zip(mine.parameters(), plain.parameters(), exact.parameters(), strict=True):
        assert torch.equal(a, b)
        torch.testing.assert_close(a, c, rtol=TRAJECTORY, atol=TRAJECTORY)


def test_the_reference_backend_uses_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    original = reference.relu_backward_importance
    monkeypatch.setattr(reference, "relu_backward_importance", lambda *a: calls.append(a) or original(*a))
    model, (x, y) = cnn(), batch(channels=3, classes=5)
    for backend, want in (("auto", 0), ("reference", 2)):
        optimizer = NPC(model, backend=backend)  # type: ignore[arg-type]
        F.cross_entropy(model(x), y).backward()
        optimizer.neurons.detach()
        assert len(calls) == want


def test_nothing_more_is_saved_for_the_backward_pass_than_by_torchs_relu() -> None:
    mine, plain = pair(nn.Linear(5, 7), None, nn.Linear(7, 2))
    assert attached(mine)["0"].points[0].in_backward
    x, saved = torch.randn(6, 5), []
    for model in (mine, plain):
        tensors: list[Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, tensors=tensors: tensors.append(t) or t, lambda t: t):
            hidden = model[1](model[0](x))
        saved.append([tuple(t.shape) for t in tensors])
        # ReLU keeps its output, which the next layer keeps, too.
        assert hidden.data_ptr() in [t.data_ptr() for t in tensors]
    assert saved[0] == saved[1]


def test_detaching_makes_it_torchs_relu_again() -> None:
    model, (x, y) = cnn(), batch(channels=3, classes=5)
    neurons = attached(model)
    assert type(model[2](model[0](x)).grad_fn).__name__ == "_MeasuredReLUBackward"
    neurons.detach()
    assert type(model[2](model[0](x)).grad_fn).__name__ == "ReluBackward0"
    F.cross_entropy(model(x), y).backward()
    assert not take_sinks(neurons)


def test_two_optimizers_on_one_model_both_measure() -> None:
    model, (x, y) = cnn(), batch(channels=3, classes=5)
    first, second = attached(model), attached(model)
    F.cross_entropy(model(x), y).backward()
    want = take_sinks(first)
    assert want.keys() == {"0", "5", "8"}
    assert_equal(take_sinks(second), want)
    first.detach()
    F.cross_entropy(model(x), y).backward()
    assert not take_sinks(first)
    assert_equal(take_sinks(second), want)


def test_a_model_that_grows_keeps_measuring() -> None:
    model, x = nn.Sequential(nn.Linear(4, 6), ReLU(), nn.Linear(6, 2)), torch.randn(5, 4)
    optimizer = NPC(model)
    model.append(ReLU())
    model.append(nn.Linear(2, 3))
    optimizer.add_param_group({"params": model[4].parameters()})
    assert [layer.points[0].in_backward for layer in optimizer.neurons] == [True, True, False]
    model(x).pow(2).sum().backward()
    assert take_sinks(optimizer.neurons).keys() == {"0", "2", "4"}
    assert [len(module._taps) for module in (model[1], model[3])] == [1, 1]


def test_a_measured_model_can_be_copied_and_pickled() -> None:
    model, (x, y) = cnn(), batch(channels=3, classes=5)
    neurons = attached(model)
    saved = io.BytesIO()
    torch.save(model, saved)
    saved.seek(0)
    twins = [copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(saved, weights_only=False)]
    F.cross_entropy(model(x), y).backward()
    want = take_sinks(neurons)
    for twin in twins:
        F.cross_entropy(twin(x), y).backward()
        assert not take_sinks(neurons)
        assert torch.equal(twin(x), model(x))
        (hook,) = twin[2]._taps.values()  # the twin has a different sink
        assert torch.equal(hook.layer.sink.grad, want["0"])
        assert hook.weighted is twin[0]


def test_a_copied_optimizer_measures_the_copied_model() -> None:
    model, (x, y) = cnn(), batch(channels=3, classes=5)
    optimizer = NPC(model)
    twin = copy.deepcopy(optimizer)
    F.cross_entropy(twin._model(x), y).backward()
    assert take_sinks(twin.neurons).keys() == {"0", "5", "8"}
    assert not take_sinks(optimizer.neurons)
    twin.neurons.detach()
    assert not twin._model[2]._taps
    assert model[2]._taps


def test_a_compiled_backward_pass_holds_the_operation_in_place_of_relus_own() -> None:
    graphs: list[torch.fx.GraphModule] = []

    def compiler(graph: torch.fx.GraphModule, _: object) -> Callable[..., Any]:
        graphs.append(graph)
        return make_boxed_func(graph.forward)

    model, (x, y) = cnn(), batch(channels=3, classes=5)
    attached(model)
    F.cross_entropy(torch.compile(model, fullgraph=True, backend=aot_autograd(fw_compiler=compiler))(x), y).backward()
    operations = [str(node.target) for graph in graphs for node in graph.graph.nodes]
    assert operations.count("npc_ext.relu_backward_importance.default") == 2
    assert "aten.threshold_backward.default" not in operations


def test_autocast_measures_half_precision_in_float32_take_sinks() -> None:
    mine, plain = pair(nn.Linear(8, 16), None, nn.Linear(16, 4))
    x, neurons, taps = torch.randn(32, 8), attached(mine), attached(plain)
    for model in (mine, plain):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(x).float().pow(2).sum()
        loss.backward()
    got = take_sinks(neurons)
    assert got["0"].dtype == torch.float32
    assert_equal(got, take_sinks(taps))
    assert_gradients_equal(mine, plain)


# ------------------------------------------------------------------------------------------------- double derivatives


@pytest.mark.parametrize(("shape", "dims"), [((3, 4), (1, 0)), ((2, 4, 3), (1, 0)), ((2, 3, 4), (2, 1))], ids=str)
def test_its_derivatives_are_right(shape: tuple[int, ...], dims: tuple[int, int]) -> None:
    model = nn.Sequential(nn.Linear(4, shape[dims[0]]), ReLU(), nn.Linear(4, 1))
    layer = find_neurons(model)["0"]

    def function(x: Tensor) -> Tensor:
        return _MeasuredReLU.apply(x, layer.sink, layer, *dims)

    x = torch.randn(shape, dtype=torch.double)
    x = (x + 0.1 * x.sign()).requires_grad_()  # away from the kink
    assert gradcheck(function, (x,))
    assert gradgradcheck(lambda x: function(x).pow(3), (x,))


def test_a_gradient_penalty_trains_as_with_torchs_relu() -> None:
    mine, plain = pair(nn.Linear(5, 7), None, nn.Linear(7, 6), None, nn.Linear(6, 1))
    neurons, x = attached(mine), torch.randn(9, 5, requires_grad=True)
    for model in (mine, plain):
        (gradient,) = torch.autograd.grad(model(x).tanh().sum(), x, create_graph=True)
        (gradient.norm(dim=1) - 1).pow(2).mean().backward()
    for mine_p, plain_p in zip(mine.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine_p.grad, plain_p.grad)
    assert not any(importance.requires_grad for importance in take_sinks(neurons).values())


# ------------------------------------------------------------------------------- where an ordinary tap is used instead


class SharedReLU(nn.Module):
    """One ReLU behind two layers."""

    def __init__(self, relu: type[nn.ReLU]) -> None:
        super().__init__()
        self.first, self.second, self.out = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 2)
        self.relu = relu()

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.relu(self.second(self.relu(self.first(x)))))


class CalledTwice(SharedReLU):
    """One layer and its ReLU called twice; `dropout` follows the second call only."""

    def __init__(self, relu: type[nn.ReLU]) -> None:
        super().__init__(relu)
        self.dropout = nn.Dropout(0.0)
        del self.first

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.second(F.pad(x, (0, 2))))
        return self.out(self.dropout(self.relu(self.second(y + 0 * y))))


def of_twins(make: Callable[[type[nn.ReLU]], nn.Module], x: Tensor) -> tuple[Neurons, dict[str, Tensor], Tensor]:
    """A model's neurons, importance and gradients with `npc_ext.nn.ReLU`, checked against `torch.nn.ReLU`."""
    results = []
    for relu in (nn.ReLU, ReLU):
        torch.manual_seed(3)
        model = make(relu)
        neurons = attached(model)
        model(x).pow(2).sum().backward()
        results.append((neurons, take_sinks(neurons), torch.cat([p.grad.flatten() for p in model.parameters()])))
    (_, want, gradients), (neurons, got, mine) = results
    assert torch.equal(mine, gradients)
    assert got.keys() == want.keys()
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=1e-4, atol=1e-6)
    return neurons, got, mine


def test_a_relu_behind_several_layers_is_not_used() -> None:
    neurons, _, _ = of_twins(SharedReLU, torch.randn(5, 4))
    assert not any(point.in_backward for layer in neurons for point in layer.points)


def test_a_layer_called_twice_with_its_relu_adds_up() -> None:
    neurons, _, _ = of_twins(CalledTwice, torch.randn(5, 4))
    assert [str(point) for point in neurons["second"].points] == ["output of relu"]
    assert neurons["second"].points[0].in_backward


class OverwritesItsOutput(nn.Module):
    """Works in place on the output of its ReLU."""

    def __init__(self, relu: type[nn.ReLU]) -> None:
        super().__init__()
        self.layer, self.relu, self.out = nn.Linear(4, 6), relu(), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.layer(x))
        x[:, 0] = 0
        return self.out(x)


def test_what_works_in_place_behind_it_gets_the_copy_of_an_ordinary_tap() -> None:
    neurons, got, _ = of_twins(OverwritesItsOutput, torch.randn(5, 4))
    assert str(neurons["layer"].points[0]) == "output of relu"
    assert neurons["layer"].points[0].copy
    assert not neurons["layer"].points[0].in_backward
    assert got["layer"][0] == 0


def test_a_part_that_cannot_be_traced_behind_it_gets_an_ordinary_tap() -> None:
    class Unknown(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.mul_(2) if x.sum() > 0 else x

    neurons, _, _ = of_twins(
        lambda relu: with_relu(relu, nn.Linear(4, 6), None, Unknown(), nn.Linear(6, 2)), torch.randn(5, 4)
    )
    assert neurons["0"].points[0].copy
    assert not neurons["0"].points[0].in_backward


def test_a_normalization_or_another_activation_behind_it_is_measured_behind_that() -> None:
    for module in (nn.BatchNorm1d(6), nn.Tanh()):
        neurons = find_neurons(with_relu(ReLU, nn.Linear(4, 6), None, module, nn.Linear(6, 2)))
        assert str(neurons["0"].points[0]) == "output of 2"
        assert not neurons["0"].points[0].in_backward


def test_several_consumers_of_what_it_returns_are_all_seen() -> None:
    class Branches(OverwritesItsOutput):
        def forward(self, x: Tensor) -> Tensor:
            x = self.relu(self.layer(x))
            return self.out(x) + x.sum(1, keepdim=True)

    neurons, _, _ = of_twins(Branches, torch.randn(5, 4))
    assert neurons["layer"].points[0].in_backward


def test_a_derived_class_may_do_more_and_is_tapped_from_outside() -> None:
    class Doubled(ReLU):
        def forward(self, input: Tensor) -> Tensor:
            return 2 * super().forward(input)

    model = nn.Sequential(nn.Linear(4, 6), Doubled(), nn.Linear(6, 2))
    for options in ({}, {"measure_at": {"0": "1"}}):
        neurons = attached(model, **options)
        assert not neurons["0"].points[0].in_backward
        model(torch.randn(5, 4)).sum().backward()
        assert take_sinks(neurons)["0"].max() > 0
        neurons.detach()


def test_measure_at_uses_it_and_moves_away_from_it() -> None:
    model, (x, y) = cnn(), batch(channels=3, classes=5)
    neurons = find_neurons(model, measure_at={"0": "3", "5": "6"})
    assert [str(layer.points[0]) for layer in neurons][:2] == ["output of 3", "output of 6"]
    assert [layer.points[0].in_backward for layer in neurons] == [False, True, False]
    optimizer = NPC(model, layers={"0": {"measure_at": "2"}})
    assert "output of 2, in its backward pass" in str(optimizer.neurons)
    F.cross_entropy(model(x), y).backward()
    optimizer.step()


def test_in_a_transformer_with_samples_second() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, activation=ReLU())
    plain = copy.deepcopy(layer)
    plain.activation = nn.ReLU()
    neurons, taps, x = attached(layer), attached(plain), torch.randn(3, 5, 8)
    assert neurons["linear1"].points[0].in_backward
    assert neurons["linear1"].points[0].batch_dim == 1
    weight = torch.randn(3, 5, 8)
    for model in (layer, plain):
        (model(x) * weight).sum().backward()
    assert_gradients_equal(layer, plain)
    got, want = take_sinks(neurons), take_sinks(taps)
    torch.testing.assert_close(got["linear1"], want["linear1"], rtol=1e-4, atol=1e-6)


# ------------------------------------------------------------------------------------------------------------- errors


def test_a_relu_with_another_number_of_channels_is_refused() -> None:
    model = cnn()
    attached(model, measure_at={"0": "6"})
    message = r"output of 6 gave a tensor of shape \(8, 12\), but layer '0' has 6 neurons"
    with pytest.raises(ValueError, match=message):
        model(batch(channels=3)[0])


def test_a_model_that_moved_is_refused() -> None:
    model = nn.Sequential(nn.Linear(3, 2), ReLU(), nn.Linear(2, 2))
    attached(model)
    model.to("meta")
    with pytest.raises(RuntimeError, match="layer '0' runs on meta, but its importance is on cpu"):
        model(torch.randn(4, 3, device="meta"))


def test_a_relu_before_a_normalization_is_reported_once() -> None:
    class Rest(nn.Module):
        """Hides from the search that a normalization follows."""

        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.InstanceNorm2d(6)

        def forward(self, x: Tensor) -> Tensor:
            return torch.tanh(self.norm(x + 0.0))

    model = nn.Sequential(nn.Conv2d(3, 6, 3, bias=False), ReLU(), Rest())
    neurons = attached(model)
    assert neurons["0"].points[0].in_backward

    def train() -> None:
        model(torch.randn(8, 3, 12, 12)).pow(2).sum().backward()

    with pytest.warns(ImportanceWarning, match="layer '0' is measured at the output of 1, before an instance"):
        train()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train()


def test_detaching_does_not_remove_the_tap_that_took_the_place_of_a_removed_one() -> None:
    model = nn.Sequential(nn.Linear(3, 2), ReLU())
    earlier = attached(model)
    model[1]._taps.clear()  # other code
    later = attached(model)
    earlier.detach()
    model(torch.randn(4, 3)).sum().backward()
    assert take_sinks(later).keys() == {"0"}
