"""PlasticityWrapper: the movement of any optimizer, scaled for each neuron."""

from __future__ import annotations

import copy
import io
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from npc_ext import NPC, NPCAdamW, PlasticityWrapper
from npc_ext.optim import wrapper
from npc_ext.reference import learning_rate

from ..training import images, importances, same, set_importance, weights

Factory = Callable[[Any], torch.optim.Optimizer]
OPTIMIZERS: dict[str, Factory] = {
    "AdamW": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1),
    "AdamW fused": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1, fused=True),
    "AdamW foreach": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1, foreach=True, amsgrad=True),
    "SGD": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=0.01),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=1e-3),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=1e-2),
}


class Counting(torch.optim.Optimizer):
    """Counts its steps in its group, in a tensor of its group and in itself, as some optimizers do."""

    def __init__(self, params: Any, lr: float = 0.1) -> None:
        super().__init__(params, {"lr": lr, "step": 0, "total": torch.zeros(())})
        self.count = 0

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.count += 1
        for group in self.param_groups:
            group["step"] += 1
            group["total"] += 1
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.sub_(parameter.grad, alpha=group["lr"] / group["step"] / self.count)


class Whole(torch.optim.Optimizer):
    """Moves a weight by what the whole of its gradient says, as Muon does."""

    def __init__(self, params: Any, lr: float = 0.1) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.sub_(parameter.grad / parameter.grad.norm(), alpha=group["lr"])


OPTIMIZERS |= {"counts by itself": Counting, "moves matrices": Whole}


def network() -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Conv2d(1, 6, 3), nn.InstanceNorm2d(6, affine=True), nn.ReLU(), nn.ConvTranspose2d(6, 4, 2, groups=2), nn.ReLU(),
        nn.Flatten(), nn.Linear(196, 10), nn.ReLU(), nn.Linear(10, 3),
    )  # fmt: skip


def loss(model: nn.Module, seed: int) -> Tensor:
    x, y = images(seed, size=5)
    return F.cross_entropy(model(x), y)


def step(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> None:
    optimizer.zero_grad()
    loss(model, seed).backward()
    optimizer.step()


@pytest.mark.parametrize("bucket_bytes", [1, 2**20])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_without_importance_it_is_the_optimizer_itself(name: str, bucket_bytes: int) -> None:
    model, twin = network(), network()
    plain = OPTIMIZERS[name](twin.parameters())
    ours = PlasticityWrapper(OPTIMIZERS[name](model.parameters()), model, bucket_bytes=bucket_bytes)
    for seed in range(20):
        step(model, ours, seed)
        step(twin, plain, seed)
    assert same(model, twin)


@pytest.mark.parametrize("bucket_bytes", [1, 2**20])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_neuron_takes_its_share_of_the_movement(name: str, bucket_bytes: int) -> None:
    model, twin = network(), network()
    plain = OPTIMIZERS[name](twin.parameters())
    ours = PlasticityWrapper(OPTIMIZERS[name](model.parameters()), model, delta=0.9, bucket_bytes=bucket_bytes)
    set_importance(ours, "0", torch.tensor([0.0, 0.2, 0.4, 0.6, 1.0, 5.0]))
    set_importance(ours, "6", torch.linspace(0.0, 2.0, 10))
    known = [torch.zeros(parameter.shape, dtype=torch.bool) for parameter in model.parameters()]
    known[0][3:] = known[1][3:] = known[2][3:] = known[3][3:] = known[6][3:] = known[7][3:] = True
    for seed in range(8):
        with torch.no_grad():
            for parameter, own in zip(twin.parameters(), model.parameters(), strict=True):
                parameter.copy_(own)
        before = [parameter.detach().clone() for parameter in twin.parameters()]
        step(model, ours, seed)
        step(twin, plain, seed)
        shares = {layer: one.learning_rate for layer, one in ours.plasticity().items()}
        names = ["0", "0", "0", "0", "3", "3", "6", "6", "8", "8"]
        rows = [(6, 1, 1, 1), 6, 6, 6, (2, 1, 2, 1, 1), 4, (10, 1), 10, (3, 1), 3]
        frozen = 0
        for at, (was, own, moved, layer, shape) in enumerate(
            zip(before, model.parameters(), twin.parameters(), names, rows, strict=True)
        ):
            share = shares[layer].view(shape)
            if len(share.shape) == 5:  # (groups, in, out, height, width) of the grouped transposed convolution
                share = share.expand(2, 3, 2, 1, 1).reshape(6, 2, 1, 1)
            want = was.double() + share.double() * (moved.double() - was.double())
            assert torch.allclose(own.double(), want, rtol=0, atol=4e-7)
            still = (share == 0).expand_as(own)
            assert torch.equal(own[still], was[still])
            frozen += int(still.sum())
            for moment in ("momentum_buffer", "exp_avg"):  # cleared where a neuron froze just now
                if moment in ours.state[own]:
                    assert not ours.state[own][moment][still & ~known[at]].any()
                    plain.state[moved][moment][still & ~known[at]] = 0
                    assert torch.equal(ours.state[own][moment], plain.state[moved][moment])
            known[at] = still
        assert frozen > 0


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this torch has no Muon")
def test_muon_takes_its_steps_and_frozen_neurons_stay() -> None:
    """Its steps make whole matrices orthogonal: what is taken back of a row changes no other."""
    model = nn.Sequential(nn.Linear(12, 10, bias=False), nn.ReLU(), nn.Linear(10, 3, bias=False))
    plain = copy.deepcopy(model)
    wrapped = PlasticityWrapper(torch.optim.Muon(model.parameters(), lr=1e-2), model, delta=0.9999)
    set_importance(wrapped, "0", 3.0, neurons=slice(4))
    x, before = torch.randn(8, 12), model[0].weight.detach().clone()
    for one, optimizer in ((model, wrapped), (plain, torch.optim.Muon(plain.parameters(), lr=1e-2))):
        one(x).square().mean().backward()
        optimizer.step()
    assert torch.equal(model[0].weight[:4], before[:4])
    assert torch.equal(model[0].weight[4:], plain[0].weight[4:]) and not torch.equal(model[0].weight[4:], before[4:])


class ScheduleFree(torch.optim.Optimizer):
    """SGD without a schedule (Defazio et al., 2024), as `schedulefree.SGDScheduleFree` writes it."""

    second = "z"

    def __init__(self, params: Any, lr: float = 0.1, beta: float = 0.9) -> None:
        super().__init__(params, {"lr": lr, "beta": beta, "k": 0, "train_mode": False})

    def _interpolate(self, train: bool) -> None:
        for group in self.param_groups:
            if group["train_mode"] != train:
                for parameter in group["params"]:
                    if self.second in self.state[parameter]:
                        weight = 1 - group["beta"] if train else 1 - 1 / group["beta"]
                        parameter.data.lerp_(self.state[parameter][self.second], weight)
            group["train_mode"] = train

    def train(self) -> None:
        self._interpolate(True)

    def eval(self) -> None:
        self._interpolate(False)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            group["k"] += 1
            beta, rate = group["beta"], 1 / group["k"]
            for y in group["params"]:
                if y.grad is not None:
                    z = self.state[y].setdefault(self.second, y.detach().clone())
                    y.lerp_(z, rate).add_(y.grad, alpha=group["lr"] * (beta * (1 - rate) - 1))
                    z.sub_(y.grad, alpha=group["lr"])


def real_schedule_free(parameters: Any) -> Any:
    schedulefree = pytest.importorskip("schedulefree", reason="schedulefree is not installed")
    return schedulefree.AdamWScheduleFree(parameters, lr=0.01, weight_decay=0.1)


@pytest.mark.parametrize("bucket_bytes", [1, 2**20])
@pytest.mark.parametrize("make", [ScheduleFree, real_schedule_free], ids=["imitation", "schedulefree"])
def test_frozen_neurons_of_a_schedule_free_optimizer_stay_bit_identical_in_both_modes(
    make: Any, bucket_bytes: int
) -> None:
    model = network()
    ours = PlasticityWrapper(make(model.parameters()), model, delta=0.9999, bucket_bytes=bucket_bytes)
    ours.train()
    for seed in range(3):
        step(model, ours, seed)
    set_importance(ours, "6", torch.tensor([5.0] * 4 + [0.3] * 6))
    before = model[6].weight.detach().clone()
    for seed in range(3, 9):
        step(model, ours, seed)
        frozen = ours.plasticity()["6"].learning_rate == 0
        assert frozen.sum() == 4
        in_training = model[6].weight.detach().clone()
        ours.eval()
        assert torch.equal(model[6].weight[frozen], before[frozen])
        assert not torch.equal(model[6].weight[~frozen], in_training[~frozen])
        ours.train()
        assert torch.equal(model[6].weight[frozen], before[frozen])
        assert not torch.equal(model[6].weight[~frozen], before[~frozen])


@pytest.mark.parametrize("make", [ScheduleFree, real_schedule_free], ids=["imitation", "schedulefree"])
def test_with_nothing_protected_a_schedule_free_optimizer_is_itself(make: Any) -> None:
    model = network()
    twin = copy.deepcopy(model)
    ours, plain = PlasticityWrapper(make(model.parameters()), model, beta=1e9), make(twin.parameters())
    for one, optimizer in ((model, ours), (twin, plain)):
        optimizer.train()
        for seed in range(4):
            step(one, optimizer, seed)
        optimizer.eval()
    assert same(model, twin)


def test_neurons_take_their_share_of_the_movement_of_both_weights() -> None:
    model = network()
    twin = copy.deepcopy(model)
    ours, plain = (
        PlasticityWrapper(ScheduleFree(model.parameters()), model, delta=0.9999),
        ScheduleFree(twin.parameters()),
    )
    set_importance(ours, "6", 0.3)
    before = model[6].weight.detach().clone()
    for one, optimizer in ((model, ours), (twin, plain)):
        optimizer.train()
        step(one, optimizer, 0)
    share = ours.plasticity()["6"].learning_rate.unsqueeze(1)
    assert bool(((share > 0) & (share < 1)).all())
    for got, whole in (
        (model[6].weight, twin[6].weight),
        (ours.state[model[6].weight]["z"], plain.state[twin[6].weight]["z"]),
    ):
        torch.testing.assert_close(got, before + share * (whole - before))


def test_a_schedule_free_optimizer_that_is_not_in_training_mode_is_refused() -> None:
    model = network()
    ours = PlasticityWrapper(ScheduleFree(model.parameters()), model, delta=0.5)
    loss(model, 0).backward()
    before = [*weights(model), *importances(ours)]
    with pytest.raises(RuntimeError, match=r"the ScheduleFree is not in training mode; call optimizer\.train\(\)"):
        ours.step()
    assert same(before, [*weights(model), *importances(ours)])


def test_modes_without_second_weights_are_refused() -> None:
    class Other(ScheduleFree):
        second = "averaged"

    model = network()
    ours = PlasticityWrapper(Other(model.parameters()), model)
    set_importance(ours, "6", 5.0)
    ours.train()
    with pytest.raises(RuntimeError, match=r"Other has train\(\) and eval\(\), but not the second weights"):
        step(model, ours, 0)


def test_an_optimizer_without_modes_has_none_when_wrapped() -> None:
    """Trainers ask for them by hasattr()."""
    model = network()
    ours = PlasticityWrapper(torch.optim.SGD(model.parameters()), model)
    assert not hasattr(ours, "train") and not hasattr(ours, "eval")


def test_the_share_is_eq_7_in_units_of_the_rate() -> None:
    model = network()
    ours = PlasticityWrapper(torch.optim.SGD(model.parameters(), lr=3.0), model)
    importance = torch.tensor([0.0, 0.1, 0.25, 0.4, 0.5, 9.0])
    set_importance(ours, "0", importance)
    want = [1.0, 1.0, 0.5, 0.25, 0.0, 0.0]
    assert torch.allclose(ours.plasticity()["0"].learning_rate, torch.tensor(want), rtol=1e-6, atol=1e-7)
    assert torch.equal(learning_rate(importance, 1.0, 0.5, 0.5), ours.plasticity()["0"].learning_rate)


def test_importance_is_that_of_npc() -> None:
    model, twin = network(), network()
    ours = PlasticityWrapper(torch.optim.SGD(model.parameters(), lr=0.0), model, delta=0.9)
    npc = NPC(twin, lr=0.0, delta=0.9)
    for seed in range(5):
        step(model, ours, seed)
        step(twin, npc, seed)
    assert ours.plasticity().keys() == npc.plasticity().keys()
    assert same(importances(ours), importances(npc))


def test_frozen_neurons_survive_an_optimizer_that_explodes() -> None:
    model = network()
    ours = PlasticityWrapper(torch.optim.SGD(model.parameters(), lr=math.inf), model)
    set_importance(ours, "6", 5.0)
    before = weights(model[6])
    step(model, ours, 0)
    assert same(before, model[6])
    assert not all(bool(parameter.isfinite().all()) for parameter in model[8].parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_precisions(dtype: torch.dtype) -> None:
    model = network().to(dtype)
    twin = copy.deepcopy(model)
    ours = PlasticityWrapper(torch.optim.SGD(model.parameters(), lr=0.5), model)
    plain = torch.optim.SGD(twin.parameters(), lr=0.5)
    set_importance(ours, "6", torch.tensor([0.25] * 5 + [5.0] * 5))
    before = model[6].weight.detach().clone()
    for one, optimizer in ((model, ours), (twin, plain)):
        optimizer.zero_grad()
        one(torch.ones(2, 1, 8, 8, dtype=dtype)).square().sum().backward()
        optimizer.step()
    share = ours.plasticity()["6"].learning_rate.double().unsqueeze(1)
    want = before.double() + share * (twin[6].weight.double() - before.double())
    assert torch.equal(model[6].weight[5:], before[5:])
    assert torch.allclose(model[6].weight.double(), want, rtol=2 * torch.finfo(dtype).eps, atol=1e-12)


def test_only_one_bucket_is_copied_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(*(layer for _ in range(6) for layer in (nn.Linear(64, 64), nn.ReLU())))
    ours = PlasticityWrapper(torch.optim.AdamW(model.parameters()), model, bucket_bytes=2 * 64 * 64 * 4)
    for index in range(0, 12, 2):
        set_importance(ours, f"{index}", 0.3)
    sizes, usual = [], wrapper._buckets

    def watched(parameters: list[Tensor], most_bytes: int) -> Any:
        for bucket in usual(parameters, most_bytes):
            sizes.append(sum(parameter.numel() * 4 for parameter in bucket))
            yield bucket

    monkeypatch.setattr(wrapper, "_buckets", watched)
    model(torch.randn(4, 64)).square().sum().backward()
    ours.step()
    assert len(sizes) > 3 and max(sizes) <= 2 * 64 * 64 * 4
    assert sum(sizes) == sum(parameter.numel() * 4 for parameter in model.parameters())


def test_a_resumed_run_is_the_same_bit_for_bit() -> None:
    model = network()
    ours = PlasticityWrapper(OPTIMIZERS["AdamW"](model.parameters()), model, delta=0.9)
    for seed in range(5):
        step(model, ours, seed)
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": ours.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    twin = network()
    resumed = PlasticityWrapper(OPTIMIZERS["AdamW"](twin.parameters()), twin, delta=0.9)
    twin.load_state_dict(saved["model"])
    resumed.load_state_dict(saved["optimizer"])
    copied_model, copied = copy.deepcopy((model, ours))
    for seed in range(5, 10):
        for one, own in ((model, ours), (twin, resumed), (copied_model, copied)):
            step(one, own, seed)
    for other, own in ((twin, resumed), (copied_model, copied)):
        assert same(model, other)
        assert same(importances(own), importances(ours))


def test_a_state_that_does_not_fit_changes_nothing() -> None:
    model = network()
    ours = PlasticityWrapper(OPTIMIZERS["AdamW"](model.parameters()), model)
    step(model, ours, 0)
    before = copy.deepcopy(ours.state_dict())
    with pytest.raises(ValueError, match="no 'plasticity'"):
        ours.load_state_dict(ours.optimizer.state_dict())
    broken = copy.deepcopy(before)
    broken["param_groups"][0]["params"].pop()
    with pytest.raises(ValueError, match="parameter group"):
        ours.load_state_dict(broken)
    after = ours.state_dict()["plasticity"]["state"]
    measured = {index: state for index, state in before["plasticity"]["state"].items() if state}
    assert len(measured) == 4
    for index, state in measured.items():
        assert torch.equal(after[index]["importance"], state["importance"])


def test_schedulers_and_new_groups() -> None:
    model = network()
    ours = PlasticityWrapper(torch.optim.SGD(list(model.parameters())[:-2], lr=1.0), model)
    schedule = torch.optim.lr_scheduler.StepLR(ours, 1, gamma=0.5)
    assert "8" not in ours.plasticity()
    step(model, ours, 0)
    schedule.step()
    assert ours.optimizer.param_groups[0]["lr"] == 0.5
    ours.add_param_group({"params": list(model.parameters())[-2:], "lr": 0.1})
    step(model, ours, 1)
    assert "8" in ours.plasticity() and len(ours.optimizer.param_groups) == 2


@pytest.mark.parametrize("unscaled", [False, True])
@pytest.mark.parametrize("bad", [(0,), (3,), (2, 3, 4)])
def test_steps_that_a_scaler_skips_change_nothing(bad: tuple[int, ...], unscaled: bool) -> None:
    """And leave no importance behind: the others are the steps of a run that never saw the bad batches."""
    runs = []
    for seeds in (range(6), [seed for seed in range(6) if seed not in bad]):
        model = network()
        ours = PlasticityWrapper(OPTIMIZERS["AdamW"](model.parameters()), model, delta=0.5)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=1000, backoff_factor=0.999999)
        for seed in seeds:
            model.zero_grad()  # the model's, which knows nothing of importance
            before = weights(model)
            scaler.scale(loss(model, seed) * (math.inf if seed in bad else 1.0)).backward()
            if unscaled:
                scaler.unscale_(ours)
                nn.utils.clip_grad_norm_(model.parameters(), 1e9)
            scaler.step(ours)
            scaler.update(2.0**10)
            if seed in bad:
                assert same(before, model)
        runs.append([*weights(model), *importances(ours)])
    assert same(*runs)


def test_what_cannot_be_wrapped_is_refused() -> None:
    model = network()
    parameters = list(model.parameters())
    with pytest.raises(TypeError, match=r"LBFGS cannot be wrapped: it evaluates a closure several times"):
        PlasticityWrapper(torch.optim.LBFGS(parameters), model)
    with pytest.raises(TypeError, match=r"NPC cannot be wrapped: it gives each neuron"):
        PlasticityWrapper(NPC(model), model)
    with pytest.raises(TypeError, match=r"NPCAdamW cannot be wrapped: it gives each neuron"):
        PlasticityWrapper(NPCAdamW(model), model)
    with pytest.raises(TypeError, match=r"is wrapped already"):
        PlasticityWrapper(PlasticityWrapper(torch.optim.SGD(parameters, lr=0.1), model), model)
    with pytest.raises(TypeError, match=r"expected a torch\.optim\.Optimizer"):
        PlasticityWrapper(model, torch.optim.SGD(parameters, lr=0.1))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"model is a generator; expected the model itself, as in PlasticityWrapper"):
        PlasticityWrapper(torch.optim.SGD(parameters, lr=0.1), model.parameters())  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="none of the SGD's parameters belongs to a neuron of the model"):
        PlasticityWrapper(torch.optim.SGD(parameters, lr=0.1), network())
    with pytest.raises(ValueError, match="bucket_bytes is 0"):
        PlasticityWrapper(torch.optim.SGD(parameters, lr=0.1), model, bucket_bytes=0)
    with pytest.raises(ValueError, match="beta is -1"):
        PlasticityWrapper(torch.optim.SGD(parameters, lr=0.1), model, beta=-1)


def test_the_state_of_another_kind_of_optimizer_is_refused() -> None:
    model = network()
    ours = PlasticityWrapper(torch.optim.SGD(model.parameters(), lr=0.1), model)
    loss(model, 0).backward()
    ours.step()
    before = copy.deepcopy(ours.state_dict())
    other = network()
    for optimizer in (NPC(other), PlasticityWrapper(torch.optim.RMSprop(other.parameters()), other)):
        with pytest.raises(ValueError, match=r"but not .*dampening.*; they were saved by another optimizer"):
            ours.load_state_dict(optimizer.state_dict())
    assert ours.state_dict()["param_groups"] == before["param_groups"]


def test_a_step_without_measurement_is_refused() -> None:
    model = network()
    ours = PlasticityWrapper(torch.optim.SGD(model.parameters(), lr=0.1), model)
    ours.neurons.detach()
    loss(model, 0).backward()
    before = weights(model)
    with pytest.raises(RuntimeError, match="no importance was measured"):
        ours.step()
    assert same(before, model)
