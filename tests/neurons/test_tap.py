"""The tap with autograd, the compiler and checkpointing."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import npc_ext
from npc_ext import NPC, ImportanceWarning
from npc_ext._torch import TRACES_BOUND_FORWARDS

from ..models import DataDependent, ResNet, paper_cnn
from .measuring import assert_equal, assert_gradients_equal, attached, batch, both_points, measured, take_sinks


def test_taps_change_neither_the_output_nor_the_gradients() -> None:
    model, (x, y) = ResNet(), (torch.randn(4, 3, 6, 6), torch.randint(5, (4,)))
    plain = copy.deepcopy(model)
    attached(model)
    assert torch.equal(model(x), plain(x))
    F.cross_entropy(model(x), y).backward()
    F.cross_entropy(plain(x), y).backward()
    assert_gradients_equal(model, plain)


def test_importance_adds_up_over_micro_batches_and_is_cleared_like_a_gradient() -> None:
    model, (x, y) = both_points(), batch()
    neurons = attached(model)
    F.cross_entropy(model(x), y, reduction="sum").backward()
    whole = take_sinks(neurons)
    for part in (slice(0, 3), slice(3, 8)):
        F.cross_entropy(model(x[part]), y[part], reduction="sum").backward()
    parts = take_sinks(neurons)
    assert whole.keys() == {"conv1", "conv2", "hidden", "output"}
    torch.testing.assert_close(parts, whole, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_measures_once(reentrant: bool) -> None:
    model, (x, y) = both_points(), batch()
    neurons, want = measured(model, x, y)
    x.requires_grad_()  # reentrant checkpointing passes gradients on only if its input requires one
    F.cross_entropy(checkpoint(model, x, use_reentrant=reentrant), y).backward()
    assert_equal(take_sinks(neurons), want)
    assert len(want) == 4


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_attention_is_measured_under_checkpointing_and_autocast(reentrant: bool, dtype: torch.dtype) -> None:
    model = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True)
    neurons, x = attached(model), torch.randn(4, 6, 8, requires_grad=True)

    def run(*, checkpointed: bool) -> dict[str, Tensor]:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype is not torch.float32):
            output = checkpoint(model, x, use_reentrant=reentrant) if checkpointed else model(x)
        output.float().sin().sum().backward()
        return take_sinks(neurons)

    want = run(checkpointed=False)
    assert len(want) == 4
    assert all(importance.dtype == torch.float32 and importance.min() > 0 for importance in want.values())
    assert_equal(run(checkpointed=True), want)


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_a_compiled_model_is_measured_without_graph_breaks(backend: str) -> None:
    model, (x, y) = both_points(), batch()
    plain = copy.deepcopy(model)
    F.cross_entropy(plain(x), y).backward()
    neurons, want = measured(model, x, y)
    model.zero_grad()
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    F.cross_entropy(compiled(x), y).backward()
    got = take_sinks(neurons)
    assert got.keys() == want.keys()
    for name, importance in want.items():
        torch.testing.assert_close(got[name], importance, rtol=1e-3, atol=1e-5 * importance.max().item())
    gradients, want_gradients = ([p.grad for p in each.parameters()] for each in (model, plain))
    torch.testing.assert_close(gradients, want_gradients)


def test_autocast_measures_half_precision_activations_in_float32_sinks() -> None:
    model, (x, y) = paper_cnn(), batch()
    neurons, want = measured(model, x, y)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = F.cross_entropy(model(x), y)
    loss.backward()
    got = take_sinks(neurons)
    assert got.keys() == want.keys()
    for name, importance in want.items():
        assert got[name].dtype == torch.float32
        assert torch.corrcoef(torch.stack([got[name], importance]))[0, 1] > 0.9


def test_nothing_is_measured_in_eval_mode_without_gradients_or_in_frozen_layers() -> None:
    model, (x, y) = both_points(), batch()
    neurons = attached(model)
    with torch.no_grad():
        assert model(x).grad_fn is None
    model.eval()
    F.cross_entropy(model(x), y).backward()
    assert not take_sinks(neurons)
    model.train()
    for frozen, rest in (("conv1", {"conv2", "hidden", "output"}), ("conv2", {"hidden", "output"})):
        model.get_submodule(frozen).requires_grad_(False)
        F.cross_entropy(model(x.requires_grad_()), y).backward()
        assert take_sinks(neurons).keys() == rest
    model.requires_grad_(False)
    F.cross_entropy(model(x.requires_grad_()), y).backward()
    assert not take_sinks(neurons)


def test_taps_are_not_placed_twice() -> None:
    model, x = nn.Sequential(nn.Linear(4, 3)), torch.randn(5, 4)
    optimizer = NPC(model, skip_gradients="none")
    with pytest.raises(RuntimeError, match=r"are in the model already .*call detach\(\) first to place them again"):
        optimizer.neurons.attach(model)
    optimizer.neurons.detach()
    optimizer.neurons.attach(model)
    model(x).sum().backward()
    torch.testing.assert_close(optimizer.neurons["0"].sink.grad, model(x).abs().sum(0).detach())
    optimizer.step()


def test_a_gradient_expanded_from_one_number_is_measured() -> None:
    model = nn.Sequential(nn.Linear(4, 3))
    neurons, x = attached(model), torch.randn(5, 4)
    model(x).sum().backward()
    torch.testing.assert_close(neurons["0"].sink.grad, model(x).abs().sum(0).detach())


def test_a_tapped_model_can_be_copied_and_pickled() -> None:
    model, (x, y) = paper_cnn(), batch()
    neurons = attached(model)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        F.cross_entropy(twin(x), y).backward()
        assert not take_sinks(neurons)
        assert torch.equal(twin(x), model(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("norm", "message", "is_zero"),
    [
        (nn.InstanceNorm2d(6), "before an instance normalization, where importance is zero except for rounding", True),
        (nn.BatchNorm2d(6), "before a batch normalization, where activation times gradient adds up to zero", False),
    ],
    ids=["instance norm", "batch norm"],
)
def test_a_measuring_point_before_a_normalization_is_reported_once(
    norm: nn.Module, message: str, is_zero: bool, dtype: torch.dtype
) -> None:
    model = DataDependent(norm)
    neurons = attached(model)

    def train() -> None:
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            model(torch.randn(8, 3, 12, 12)).float().pow(2).sum().backward()

    with pytest.warns(ImportanceWarning, match=f"layer 'conv' is measured at the output of conv, {message}"):
        train()
    importance = neurons["conv"].sink.grad
    assert importance is not None
    if dtype == torch.float32:
        # What the constant that is added to the variance leaves is 1e-4 here.
        assert bool((importance < 1e-3).all()) is is_zero
    train()  # a warning would fail any test


def sound_models() -> list[tuple[nn.Module, Tensor]]:
    """Models with taps in the right places, among them some whose gradients sum to zero anyway."""
    linear = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 2))
    convolution = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(2 * 14 * 14, 2))
    normalized = [
        nn.Sequential(
            *(nn.Conv2d(3, 8, 3), norm(8), nn.ReLU(), nn.Conv2d(8, 4, 1), norm(4), nn.ReLU()),
            *(nn.Conv2d(4, 4, 1), norm(4), nn.Flatten(), nn.Linear(4 * 36, 2)),
        )
        for norm in (nn.BatchNorm2d, nn.InstanceNorm2d)
    ]
    return [
        (linear, torch.randn(64, 6)),
        (convolution, torch.randn(64, 1, 16, 16)),
        *((model, torch.randn(64, 3, 8, 8)) for model in normalized),
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_sound_models_are_not_reported(dtype: torch.dtype) -> None:
    for seed in range(40):
        torch.manual_seed(seed)
        for model, x in sound_models():
            attached(model)
            with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
                F.cross_entropy(model(x).float(), torch.arange(64) % 2).backward()


def test_sound_models_and_dead_layers_are_not_reported() -> None:
    dead = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    nn.init.constant_(dead[0].bias, -1e3)
    images = torch.randn(4, 3, 6, 6)
    for model, x in ((paper_cnn(), batch()[0]), (ResNet(), images), (dead, torch.randn(5, 3))):
        attached(model)
        model(x).pow(2).sum().backward()


def test_measure_at_moves_the_point_behind_the_normalization() -> None:
    model = DataDependent(nn.InstanceNorm2d(6))
    neurons = attached(model, measure_at={"conv": "norm"})
    model(torch.randn(4, 3, 8, 8)).pow(2).sum().backward()
    assert neurons["conv"].sink.grad.min() > 1e-3


def test_a_point_with_another_number_of_channels_is_refused() -> None:
    model = paper_cnn()
    attached(model, measure_at={"conv1": "conv2"})
    message = r"output of conv2 gave a tensor of shape \(8, 16, 4, 4\), but layer 'conv1' has 8 neurons"
    with pytest.raises(ValueError, match=message):
        model(batch()[0])


def test_a_model_that_moved_after_its_taps_were_placed_is_refused() -> None:
    model = nn.Sequential(nn.Linear(3, 2))
    attached(model)
    model.to("meta")
    message = "layer '0' runs on meta, but its importance is on cpu; build the optimizer after"
    with pytest.raises(RuntimeError, match=message):
        model(torch.randn(4, 3, device="meta"))


@pytest.mark.filterwarnings("ignore:`torch.jit")
@pytest.mark.parametrize("options", [{}, {"skip_gradients": "none"}], ids=str)
@pytest.mark.parametrize("part", ["", "conv1", "norm1", "hidden"])
def test_scripting_a_model_with_taps_says_to_take_them_out(part: str, options: dict[str, Any]) -> None:
    model = paper_cnn()
    optimizer = NPC(model, **options)
    module = model.get_submodule(part)
    if any("forward" in vars(m) or m._forward_hooks for m in module.modules()):
        with pytest.raises(AttributeError, match=r"torch.jit.script cannot .* first with optimizer.neurons.detach\(\)"):
            torch.jit.script(module)
    optimizer.neurons.detach()
    torch.jit.script(module)


@pytest.mark.filterwarnings("ignore:`torch.jit")
def test_scripting_attention_with_taps_says_to_take_them_out() -> None:
    model = nn.MultiheadAttention(8, 2)
    optimizer = NPC(model, layers={"out_proj": {"protect": False}}, skip_gradients="none")
    with pytest.raises(AttributeError, match=r"torch.jit.script cannot compile what an optimizer"):
        torch.jit.script(model)
    optimizer.neurons.detach()
    torch.jit.script(model)


@pytest.mark.skipif(not TRACES_BOUND_FORWARDS, reason="this torch cannot export a model with taps")
@pytest.mark.filterwarnings("ignore:`torch.jit", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("training", [True, False])
def test_a_tapped_model_is_traced_and_exported_without_its_taps(training: bool) -> None:
    model, x = paper_cnn().train(training), batch()[0]
    attention, y = nn.MultiheadAttention(8, 2).train(training), torch.randn(5, 3, 8)
    linear, z = nn.Linear(4, 3).train(training), torch.randn(5, 4)
    for network, inputs in ((model, (x,)), (attention, (y, y, y)), (linear, (z,))):
        optimizer = NPC(network)
        want = torch.utils._pytree.tree_leaves(network(*inputs))
        traced = torch.jit.trace(network, inputs, check_trace=False)
        exported = torch.export.export(network, inputs).module()
        for other in (traced, exported):
            for tensor, same in zip(want, torch.utils._pytree.tree_leaves(other(*inputs)), strict=True):
                torch.testing.assert_close(tensor, same)
        optimizer.neurons.detach()
        assert not any(m._forward_hooks or m._forward_pre_hooks or "forward" in vars(m) for m in network.modules())


@pytest.mark.skipif(not TRACES_BOUND_FORWARDS, reason="this torch cannot export a model with taps")
def test_detaching_takes_a_measuring_relu_out_of_a_model_that_was_exported() -> None:
    model = nn.Sequential(nn.Linear(4, 8), npc_ext.nn.ReLU(), nn.Linear(8, 3))
    neurons = attached(model)
    torch.export.export(model, (torch.randn(2, 4),))
    model(torch.randn(2, 4)).sum().backward()
    assert len(take_sinks(neurons)) == 2
    neurons.detach()
    assert not model[1]._taps
