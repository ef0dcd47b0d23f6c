"""Compiled models are measured and trained like others, in whatever order model and optimizer were built."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo import convert_frame
from torch.nn import functional as F

import npc_ext
from bench.cases import certify
from npc_ext import CPC, EWC, NPC, ImportanceWarning, NPCAdamW
from npc_ext._torch import TRACES_BOUND_FORWARDS

from ..methods import wrapped_sgd
from ..tolerances import TRAJECTORY
from ..training import close, images, importances, refused, same, set_importance, train, weights

Made = tuple[Any, nn.Module, NPC]
BACKEND = "aot_eager"  # follows taps through autograd as the default does, and takes no C++ compiler


@pytest.fixture(autouse=True)
def fresh_compiler() -> None:
    torch._dynamo.reset()


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
        nn.Linear(128, 16), npc_ext.nn.ReLU(), nn.Dropout(0.0), nn.Linear(16, 4),
    )  # fmt: skip


optimizer_of = partial(NPC, delta=0.9)


def optimizer_first() -> Made:
    model = network()
    optimizer = optimizer_of(model)
    return torch.compile(model, fullgraph=True, backend=BACKEND), model, optimizer


def compiled_first() -> Made:
    model = network()
    return torch.compile(model, fullgraph=True, backend=BACKEND), model, optimizer_of(model)


def of_what_compile_returned() -> Made:
    model = network()
    compiled = torch.compile(model, fullgraph=True, backend=BACKEND)
    return compiled, model, optimizer_of(compiled)


def in_place() -> Made:
    model = network()
    optimizer = optimizer_of(model)
    model.compile(fullgraph=True, backend=BACKEND)
    return model, model, optimizer


def part_by_part() -> Made:
    model = network()
    optimizer = optimizer_of(model)
    model[0].compile(backend=BACKEND)
    model[5].compile(backend=BACKEND)
    return model, model, optimizer


def after_it_ran() -> Made:
    """The taps are placed when the model was compiled and has run."""
    model = network()
    compiled = torch.compile(model, fullgraph=True, backend=BACKEND)
    loss(compiled, 0).backward()
    model.load_state_dict(network().state_dict())
    return compiled, model, optimizer_of(model)


def loss(model: Any, seed: int, size: int = 6) -> Tensor:
    x, y = images(seed, classes=4, size=size)
    return F.cross_entropy(model(x), y)


def step(model: Any, optimizer: NPC, seed: int, size: int = 6) -> None:
    train(model, optimizer, [images(seed, classes=4, size=size)])


def assert_alike(optimizer: NPC, model: nn.Module, plain: NPC, twin: nn.Module) -> None:
    assert close(model, twin)
    for got, want in zip(importances(optimizer), importances(plain), strict=True):
        assert want.any() and (got - want).norm() <= TRAJECTORY * want.norm()


@pytest.mark.parametrize(
    "make", [optimizer_first, compiled_first, of_what_compile_returned, in_place, part_by_part, after_it_ran]
)
def test_it_does_not_matter_how_model_and_optimizer_come_together(make: Callable[[], Made]) -> None:
    """And nothing is compiled again from step to step, as rates change and neurons freeze."""
    twin = network()
    plain = optimizer_of(twin)
    compiled, model, optimizer = make()
    assert [layer.name for layer in optimizer.neurons] == ["0", "5", "8"]
    for seed in range(40):
        step(twin, plain, seed)
        with torch._dynamo.config.patch(error_on_recompile=seed > 0):
            step(compiled, optimizer, seed)
    assert any(layer.frozen > 0 for layer in optimizer.plasticity().values())
    assert_alike(optimizer, model, plain, twin)


@pytest.mark.parametrize("ran_before", [False, True])
def test_micro_batches_of_a_compiled_model_add_up(ran_before: bool) -> None:
    twin = network()
    plain = optimizer_of(twin)
    compiled, model, optimizer = compiled_first()
    for seed in range(0, 6, 2):
        for net, its_optimizer in ((twin, plain), (model if ran_before and seed == 0 else compiled, optimizer)):
            its_optimizer.zero_grad()
            loss(net, seed).backward()
            loss(net, seed + 1).backward()
            its_optimizer.step()
    assert_alike(optimizer, model, plain, twin)


@pytest.mark.parametrize("ran_before", [False, True])
def test_importance_of_compiled_code_does_not_outlive_gradients_that_the_model_clears(ran_before: bool) -> None:
    """It is not noticed in time to measure the next loss alone, but in time to leave both out, and said."""
    compiled, model, optimizer = compiled_first()
    step(model if ran_before else compiled, optimizer, 0)
    importance, before = importances(optimizer), weights(model)
    optimizer.zero_grad()
    loss(compiled, 1).backward()
    model.zero_grad()
    loss(compiled, 2).backward()
    with pytest.warns(ImportanceWarning, match=r"call optimizer\.zero_grad\(\) instead") as caught:
        optimizer.step()
    assert len(caught) == 1 and str(caught[0].message).startswith("layers '0', '5', '8' ran in compiled code")
    assert same(importances(optimizer), importance)
    assert not same(before, model)


def test_evaluation_and_other_batch_sizes_compile_once_each() -> None:
    twin = network()
    plain = optimizer_of(twin)
    compiled, model, optimizer = optimizer_first()
    for seed in range(12):
        with torch._dynamo.config.patch(error_on_recompile=seed > 3):
            size = 6 if seed % 2 else 4
            step(compiled, optimizer, seed, size)
            step(twin, plain, seed, size)
            for trained in (compiled, twin):
                trained.eval()
                with torch.no_grad():
                    loss(trained, 100 + seed, size)
                trained.train()
    assert_alike(optimizer, model, plain, twin)


def test_a_compiled_model_that_lost_its_taps_is_refused() -> None:
    compiled, model, optimizer = optimizer_first()
    for module in model.modules():
        module._forward_hooks.clear()
        module._forward_pre_hooks.clear()
    model[6]._taps.clear()
    with refused(model, optimizer, RuntimeError, "no importance was measured"):
        step(compiled, optimizer, 0)


class ConvBlock(nn.Module):
    """Its convolution has to be measured behind the normalization, whose scales belong to the neurons."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(channels, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.norm(self.conv(x)))


def blocks(count: int = 2) -> nn.Sequential:
    torch.manual_seed(0)
    widths = [1, *[6] * count]
    convolutions = [ConvBlock(*pair) for pair in pairwise(widths)]
    return nn.Sequential(*convolutions, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(24, 4))


def compiled_in_place(module: nn.Module, backend: Any = BACKEND) -> nn.Module:
    module.compile(fullgraph=True, backend=backend)
    return module


def compiled_around(module: nn.Module) -> Any:
    return torch.compile(module, fullgraph=True, backend=BACKEND)


def compiled_forward(module: nn.Module) -> nn.Module:
    module.forward = torch.compile(module.forward, fullgraph=True, backend=BACKEND)
    return module


def compile_blocks(model: nn.Sequential, way: Callable[[nn.Module], nn.Module]) -> None:
    for index in range(len(model) - 3):
        model[index] = way(model[index])


def compile_every_module(model: nn.Sequential) -> None:
    for module in model.modules():
        module.compile(backend=BACKEND)


class DependsOnData(nn.Module):
    """Cannot be traced, so that its parts are."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        y = self.inner(x)
        return y if x.sum() < 1e9 else -y


def table(model: nn.Module) -> list[str]:
    lines = str(npc_ext.find_neurons(model)).replace("_orig_mod.", "").splitlines()
    return [" ".join(line.split()) for line in lines if set(line) != {"-", " "}]


MODULE_WAYS = [compiled_in_place, compiled_around, compiled_forward]
WAYS: dict[str, Callable[[nn.Sequential], None]] = {
    **{way.__name__: partial(compile_blocks, way=way) for way in MODULE_WAYS},
    "every module": compile_every_module,
}


@pytest.mark.parametrize("way", WAYS)
def test_compiled_blocks_are_measured_where_others_are(way: str) -> None:
    for wrap in (nn.Sequential, DependsOnData):
        model = blocks()
        WAYS[way](model)
        compiled, usual = table(wrap(model)), table(wrap(blocks()))
        assert compiled == usual
        assert "norm.weight" in compiled[1] and "relu" in compiled[1]


@pytest.mark.parametrize("skip_gradients", ["rows", "none"])
@pytest.mark.parametrize("way", WAYS)
def test_blocks_compiled_before_the_optimizer_is_built_are_measured_and_trained_as_others(
    way: str, skip_gradients: str
) -> None:
    twin, model = blocks(), blocks()
    WAYS[way](model)
    plain, optimizer = (NPC(network, delta=0.9, skip_gradients=skip_gradients) for network in (twin, model))
    for seed in range(5):
        step(twin, plain, seed)
        with torch._dynamo.config.patch(error_on_recompile=seed > 0 and way != "every module"):
            step(model, optimizer, seed)
    assert_alike(optimizer, model, plain, twin)


@pytest.mark.skipif(not TRACES_BOUND_FORWARDS, reason="this torch compiles a graph for each block")
@pytest.mark.parametrize("skip_gradients", ["rows", "layers", "none"])
def test_equal_blocks_share_their_graphs(skip_gradients: str) -> None:
    """And none takes that of another: the last one is measured behind it, so that its graph has no tap."""
    graphs = 0

    def counting(graph: Any, inputs: Any) -> Any:
        nonlocal graphs
        graphs += 1
        return torch._dynamo.lookup_backend(BACKEND)(graph, inputs)

    model = blocks(12)
    compile_blocks(model, partial(compiled_in_place, backend=counting))
    optimizer = NPC(model, delta=0.9, skip_gradients=skip_gradients)
    for seed in range(10):  # within which certificates are issued
        step(model, optimizer, seed)  # warns of layers that are not measured
    points = [str(optimizer.neurons[name].points[0]) for name in ("10.conv", "11.conv")]
    assert points == ["output of 10.relu", "output of 12"]
    assert graphs == 3  # the first block's, the last one's, and that of all others
    assert all(layer.importance.any() for layer in optimizer.plasticity().values())


@pytest.mark.parametrize("way", MODULE_WAYS)
def test_a_layer_whose_tap_is_in_a_compiled_module_does_not_rest(way: Callable[[nn.Module], nn.Module]) -> None:
    """Else the module would be compiled again whenever the layer goes to rest."""
    models, optimizers = [], []
    for skip_gradients in ("rows", "none"):
        torch.manual_seed(0)
        models.append(nn.Sequential(nn.Linear(6, 8), way(nn.Tanh()), nn.Linear(8, 3)))
        optimizers.append(NPC(models[-1], delta=0.9999, skip_gradients=skip_gradients))
        set_importance(optimizers[-1], "0", 9.0)
    certify(optimizers[0])
    for seed in range(4):
        generator = torch.Generator().manual_seed(seed)
        batch = torch.randn(8, 6, generator=generator), torch.randint(3, (8,), generator=generator)
        with torch._dynamo.config.patch(error_on_recompile=seed > 0):
            for model, optimizer in zip(models, optimizers, strict=True):
                train(model, optimizer, [batch])
    assert optimizers[0].plasticity()["0"].gradients_skipped == 1.0
    assert same(*models)
    assert same(*map(importances, optimizers))
    assert all(importance.any() for importance in importances(optimizers[0]))


def test_a_model_that_was_compiled_and_trained_before_says_what_to_do() -> None:
    model = blocks(1)
    compiled = torch.compile(model, backend=BACKEND)
    with torch._dynamo.config.patch(skip_nnmodule_hook_guards=True):  # the default, as long as there is no optimizer
        loss(compiled, 0).backward()
    optimizer = NPC(model, skip_gradients="none")
    with pytest.raises(RuntimeError, match=r"call torch\.compiler\.reset\(\)"):
        step(compiled, optimizer, 1)
    torch.compiler.reset()
    step(compiled, optimizer, 1)
    assert all(layer.importance.any() for layer in optimizer.plasticity().values())


@pytest.mark.parametrize("batch_first", [True, False])
def test_compiled_attention_is_measured_without_graph_breaks(batch_first: bool) -> None:
    torch.manual_seed(0)
    model = nn.TransformerDecoderLayer(8, 2, 12, dropout=0.0, batch_first=batch_first)
    twin = copy.deepcopy(model)
    plain, optimizer = optimizer_of(twin), optimizer_of(model)
    compiled = torch.compile(model, fullgraph=True, backend=BACKEND)
    for seed in range(8):
        generator = torch.Generator().manual_seed(seed)
        target, memory = torch.randn(4, 3, 8, generator=generator), torch.randn(4, 3, 8, generator=generator)
        with torch._dynamo.config.patch(error_on_recompile=seed > 0):
            for net, its_optimizer in ((compiled, optimizer), (twin, plain)):
                its_optimizer.zero_grad()
                net(target, memory).sin().square().mean().backward()
                its_optimizer.step()
    assert {"self_attn.in_proj", "multihead_attn.in_proj"} < optimizer.plasticity().keys()
    assert_alike(optimizer, model, plain, twin)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "scheduled"),
    [(NPC, False), (NPC, True), (NPCAdamW, True), (CPC, False), (EWC, True), (wrapped_sgd, True)],
)
def test_the_compiler_keeps_out_of_steps(kind: Any, scheduled: bool) -> None:
    """It traces callers up to `step`, and nothing that a step does; hooks and schedulers count each step once."""
    model, twin = network(), network()
    optimizer, plain = kind(model, lr=0.01), kind(twin, lr=0.01)

    def whole_step() -> None:
        optimizer.zero_grad()
        loss(model, 0).backward()
        optimizer.step()

    called = list[int]()
    optimizer.register_step_post_hook(lambda *_: called.append(1))
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 100) if scheduled else None
    code = list[str]()
    with warnings.catch_warnings(record=True) as caught, pytest.MonkeyPatch.context() as patch:
        warnings.simplefilter("always")
        compile_one = convert_frame._compile
        patch.setattr(convert_frame, "_compile", lambda c, *a, **k: code.append(c.co_name) or compile_one(c, *a, **k))
        compiled = torch.compile(whole_step, backend=BACKEND)
        for _ in range(3):
            compiled()
        if scheduler is not None:
            scheduler.step()  # warns if no step was counted
    assert not [
        warning.message
        for warning in caught
        if "Dynamo" in str(warning.message) or "lr_scheduler" in str(warning.message)
    ]
    for _ in range(3):
        step(twin, plain, 0)
    assert len(called) == 3
    assert not {"_prepare", "_signature", "_make_plans", "_launch", "_take_steps"} & set(code)
    assert close(model, twin)
