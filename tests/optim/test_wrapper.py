"""PlasticityWrapper: the movement of any optimizer, scaled for each neuron."""

from __future__ import annotations

import copy
import gc
import math
import pickle
from collections.abc import Callable
from functools import partialmethod
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from npc_ext import EWC, NPC, NPCAdamW, PlasticityWrapper
from npc_ext.optim import wrapper
from npc_ext.reference import learning_rate

from ..methods import wrapped_sgd
from ..training import images, importances, refused, same, set_importance, train, weights

Factory = Callable[[Any], torch.optim.Optimizer]
OPTIMIZERS: dict[str, Factory] = {
    "AdamW": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1),
    "AdamW fused": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1, fused=True),
    "AdamW foreach": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1, foreach=True, amsgrad=True),
    "SGD": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=0.01),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=1e-3),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=1e-2),
    "Adafactor": lambda p: torch.optim.Adafactor(p, lr=1e-2),  # a weight moves by what the whole gradient says
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


OPTIMIZERS["counts by itself"] = Counting


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

    train = partialmethod(_interpolate, True)
    eval = partialmethod(_interpolate, False)

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


SCHEDULE_FREE: dict[str, Factory] = {"imitation": ScheduleFree, "schedulefree": real_schedule_free}


def network() -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Conv2d(1, 6, 3), nn.InstanceNorm2d(6, affine=True), nn.ReLU(), nn.ConvTranspose2d(6, 4, 2, groups=2), nn.ReLU(),
        nn.Flatten(), nn.Linear(196, 10), nn.ReLU(), nn.Linear(10, 3),
    )  # fmt: skip


def learn(model: nn.Module, optimizer: torch.optim.Optimizer, *seeds: int) -> None:
    train(model, optimizer, (images(seed, size=5) for seed in seeds))


@pytest.mark.parametrize("bucket_bytes", [1, 2**20])
@pytest.mark.parametrize("make", [*OPTIMIZERS.values(), *SCHEDULE_FREE.values()], ids=[*OPTIMIZERS, *SCHEDULE_FREE])
def test_without_importance_it_is_the_optimizer_itself(make: Factory, bucket_bytes: int) -> None:
    model, twin = network(), network()
    ours = PlasticityWrapper(make(model.parameters()), model, bucket_bytes=bucket_bytes)
    for trained, optimizer in ((model, ours), (twin, make(twin.parameters()))):
        if hasattr(optimizer, "train"):
            optimizer.train()
        learn(trained, optimizer, *range(20))
        if hasattr(optimizer, "eval"):
            optimizer.eval()
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
            for parameter, got in zip(twin.parameters(), model.parameters(), strict=True):
                parameter.copy_(got)
        before = weights(twin)
        learn(model, ours, seed)
        learn(twin, plain, seed)
        shares = {layer: state.learning_rate for layer, state in ours.plasticity().items()}
        names = ["0", "0", "0", "0", "3", "3", "6", "6", "8", "8"]
        rows = [(6, 1, 1, 1), 6, 6, 6, (2, 1, 2, 1, 1), 4, (10, 1), 10, (3, 1), 3]
        frozen = 0
        for at, (was, got, moved, layer, shape) in enumerate(
            zip(before, model.parameters(), twin.parameters(), names, rows, strict=True)
        ):
            share = shares[layer].view(shape)
            if len(share.shape) == 5:  # (groups, in, out, height, width) of the grouped transposed convolution
                share = share.expand(2, 3, 2, 1, 1).reshape(6, 2, 1, 1)
            want = was.double() + share.double() * (moved.double() - was.double())
            assert torch.allclose(got.double(), want, rtol=0, atol=4e-7)
            still = (share == 0).expand_as(got)
            assert torch.equal(got[still], was[still])
            frozen += int(still.sum())
            for moment in ("momentum_buffer", "exp_avg"):  # cleared where a neuron froze just now
                if moment in ours.state[got]:
                    assert not ours.state[got][moment][still & ~known[at]].any()
                    plain.state[moved][moment][still & ~known[at]] = 0
                    assert torch.equal(ours.state[got][moment], plain.state[moved][moment])
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
    for trained, optimizer in ((model, wrapped), (plain, torch.optim.Muon(plain.parameters(), lr=1e-2))):
        trained(x).square().mean().backward()
        optimizer.step()
    assert torch.equal(model[0].weight[:4], before[:4])
    assert torch.equal(model[0].weight[4:], plain[0].weight[4:]) and not torch.equal(model[0].weight[4:], before[4:])


@pytest.mark.parametrize("bucket_bytes", [1, 2**20])
@pytest.mark.parametrize("name", SCHEDULE_FREE)
def test_frozen_neurons_of_a_schedule_free_optimizer_stay_bit_identical_in_both_modes(
    name: str, bucket_bytes: int
) -> None:
    model = network()
    ours = PlasticityWrapper(SCHEDULE_FREE[name](model.parameters()), model, delta=0.9999, bucket_bytes=bucket_bytes)
    ours.train()
    learn(model, ours, 0, 1, 2)
    set_importance(ours, "6", torch.tensor([5.0] * 4 + [0.3] * 6))
    before = model[6].weight.detach().clone()
    for seed in range(3, 9):
        learn(model, ours, seed)
        frozen = ours.plasticity()["6"].learning_rate == 0
        assert frozen.sum() == 4
        in_training = model[6].weight.detach().clone()
        ours.eval()
        assert torch.equal(model[6].weight[frozen], before[frozen])
        assert not torch.equal(model[6].weight[~frozen], in_training[~frozen])
        ours.train()
        assert torch.equal(model[6].weight[frozen], before[frozen])
        assert not torch.equal(model[6].weight[~frozen], before[~frozen])


def test_neurons_take_their_share_of_the_movement_of_both_weights() -> None:
    model = network()
    twin = copy.deepcopy(model)
    plain = ScheduleFree(twin.parameters())
    ours = PlasticityWrapper(ScheduleFree(model.parameters()), model, delta=0.9999)
    set_importance(ours, "6", 0.3)
    before = model[6].weight.detach().clone()
    for trained, optimizer in ((model, ours), (twin, plain)):
        optimizer.train()
        learn(trained, optimizer, 0)
    share = ours.plasticity()["6"].learning_rate.unsqueeze(1)
    assert bool(((share > 0) & (share < 1)).all())
    moved, whole = model[6].weight, twin[6].weight
    torch.testing.assert_close(moved, before + share * (whole - before))
    torch.testing.assert_close(ours.state[moved]["z"], before + share * (plain.state[whole]["z"] - before))


def test_a_schedule_free_optimizer_that_is_not_in_training_mode_is_refused() -> None:
    model = network()
    ours = PlasticityWrapper(ScheduleFree(model.parameters()), model, delta=0.5)
    with refused(model, ours, RuntimeError, r"the ScheduleFree is not in training mode; call optimizer\.train\(\)"):
        learn(model, ours, 0)


def test_modes_without_second_weights_are_refused() -> None:
    class Other(ScheduleFree):
        second = "averaged"

    model = network()
    ours = PlasticityWrapper(Other(model.parameters()), model)
    set_importance(ours, "6", 5.0)
    ours.train()
    with pytest.raises(RuntimeError, match=r"Other has train\(\) and eval\(\), but not the second weights"):
        learn(model, ours, 0)


def test_an_optimizer_without_modes_has_none_when_wrapped() -> None:
    """Trainers ask for them by hasattr()."""
    model = network()
    ours = wrapped_sgd(model)
    assert not hasattr(ours, "train") and not hasattr(ours, "eval")


def test_the_share_is_eq_7_in_units_of_the_rate() -> None:
    model = network()
    ours = wrapped_sgd(model, lr=3.0)
    importance = torch.tensor([0.0, 0.1, 0.25, 0.4, 0.5, 9.0])
    set_importance(ours, "0", importance)
    want = [1.0, 1.0, 0.5, 0.25, 0.0, 0.0]
    assert torch.allclose(ours.plasticity()["0"].learning_rate, torch.tensor(want), rtol=1e-6, atol=1e-7)
    assert torch.equal(learning_rate(importance, 1.0, 0.5, 0.5), ours.plasticity()["0"].learning_rate)


def test_importance_is_that_of_npc() -> None:
    model, twin = network(), network()
    ours, npc = wrapped_sgd(model, lr=0.0, delta=0.9), NPC(twin, lr=0.0, delta=0.9)
    learn(model, ours, *range(5))
    learn(twin, npc, *range(5))
    assert ours.plasticity().keys() == npc.plasticity().keys()
    assert same(importances(ours), importances(npc))


def test_frozen_neurons_survive_an_optimizer_that_explodes() -> None:
    model = network()
    ours = wrapped_sgd(model, lr=math.inf)
    set_importance(ours, "6", 5.0)
    before = weights(model[6])
    learn(model, ours, 0)
    assert same(before, model[6])
    assert not all(bool(parameter.isfinite().all()) for parameter in model[8].parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_precisions(dtype: torch.dtype) -> None:
    model = network().to(dtype)
    twin = copy.deepcopy(model)
    ours, plain = wrapped_sgd(model, lr=0.5), torch.optim.SGD(twin.parameters(), lr=0.5)
    set_importance(ours, "6", torch.tensor([0.25] * 5 + [5.0] * 5))
    before = model[6].weight.detach().clone()
    for trained, optimizer in ((model, ours), (twin, plain)):
        trained(torch.ones(2, 1, 8, 8, dtype=dtype)).square().sum().backward()
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


def test_a_state_that_does_not_fit_or_is_of_another_kind_changes_nothing() -> None:
    model, other = network(), network()
    ours = wrapped_sgd(model)
    learn(model, ours, 0)
    groups = copy.deepcopy(ours.state_dict()["param_groups"])
    broken = copy.deepcopy(ours.state_dict())
    broken["param_groups"][0]["params"].pop()
    saved_by_another = r"but not .*dampening.*; they were saved by another optimizer"
    for state, message in (
        (ours.optimizer.state_dict(), "no 'plasticity'"),
        (broken, "parameter group"),
        (NPC(other).state_dict(), saved_by_another),
        (PlasticityWrapper(torch.optim.RMSprop(other.parameters()), other).state_dict(), saved_by_another),
    ):
        with refused(model, ours, ValueError, message):
            ours.load_state_dict(state)
    assert ours.state_dict()["param_groups"] == groups


def test_schedulers_and_new_groups() -> None:
    model = network()
    ours = PlasticityWrapper(torch.optim.SGD(list(model.parameters())[:-2], lr=1.0), model)
    schedule = torch.optim.lr_scheduler.StepLR(ours, 1, gamma=0.5)
    assert "8" not in ours.plasticity()
    learn(model, ours, 0)
    schedule.step()
    assert ours.optimizer.param_groups[0]["lr"] == 0.5
    ours.add_param_group({"params": list(model.parameters())[-2:], "lr": 0.1})
    learn(model, ours, 1)
    assert "8" in ours.plasticity() and len(ours.optimizer.param_groups) == 2


def test_constants_are_changed_by_the_wrapper_and_not_in_the_groups_of_the_wrapped_optimizer() -> None:
    model = network()
    ours = PlasticityWrapper(torch.optim.RMSprop(model.parameters(), alpha=0.9), model, layers={"0": {"beta": 3.0}})
    train(model, ours, [images(0)])
    ours.set_constants(beta=2.0, half_life=50)
    ours.add_param_group({"params": [nn.Parameter(torch.zeros(2))]})
    assert (ours.constants("0")["beta"], ours.constants("3")["beta"]) == (3.0, 2.0)
    assert (ours.constants("3")["delta"], ours.constants("3")["half_life"]) == (None, 50)
    with pytest.raises(TypeError, match="there is no constant 'betta': close to it: 'beta'"):
        ours.set_constants(betta=1.0)
    with pytest.raises(ValueError, match="beta is -1"):
        ours.set_constants(alpha=0.1, beta=-1)
    assert ours.constants("3")["alpha"] == 0.5
    assert "alpha=0.5, beta=2.0, half_life=50" in repr(ours)
    ours.param_groups[0]["alpha"] = 0.95  # RMSprop's
    train(model, ours, [images(1)])
    ours.param_groups[0]["beta"] = 1.0
    message = r"key 'beta', but the groups are those of the wrapped RMSprop, .*call wrapper.set_constants\(beta=...\)"
    with refused(model, ours, ValueError, message):
        train(model, ours, [images(2)])


@pytest.mark.parametrize("copied", [lambda pair: pair, copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
def test_a_step_of_the_wrapped_optimizer_itself_is_refused(copied: Callable[[Any], Any]) -> None:
    model = network()
    model, ours = copied((model, wrapped_sgd(model)))
    train(model, ours, [images(0)])
    with refused(model, ours, RuntimeError, r"step\(\) of the wrapped SGD was called, .*; call step\(\) of the Plast"):
        ours.optimizer.step()
    train(model, ours, [images(1)])
    inner = ours.optimizer
    del ours
    gc.collect()  # the error that was raised holds it
    inner.step()  # the wrapper is gone


def test_a_new_wrapper_takes_over_from_an_earlier_one_of_the_same_optimizer() -> None:
    model = network()
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    earlier = PlasticityWrapper(sgd, model)
    train(model, earlier, [images(0)])
    ours = PlasticityWrapper(sgd, model).load_importance(earlier)
    train(model, ours, [images(1)])
    with refused(model, ours, RuntimeError, r"step\(\) of the wrapped SGD was called"):
        sgd.step()


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
def test_a_wrapper_of_an_optimizer_that_copies_its_hooks_is_copied(copied: Callable[[Any], Any]) -> None:
    original = network()
    wrapped = PlasticityWrapper(EWC(original), original)  # stays alive, with its check
    train(original, wrapped, [images(0)])
    model, ours = copied((original, wrapped))
    train(model, ours, [images(1)])
    with refused(model, ours, RuntimeError, r"step\(\) of the wrapped EWC was called"):
        ours.optimizer.step()


class Inside(torch.optim.Optimizer):
    """Passes everything on to another optimizer. It has no hooks, because it does not call Optimizer.__init__."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer
        self.param_groups, self.state, self.defaults = optimizer.param_groups, optimizer.state, optimizer.defaults

    def step(self, closure: Any = None) -> None:
        self.optimizer.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.optimizer.zero_grad(set_to_none)


def test_an_optimizer_without_hooks_is_wrapped() -> None:
    model = network()
    before = copy.deepcopy(model)
    train(model, PlasticityWrapper(Inside(torch.optim.SGD(model.parameters(), lr=0.1)), model), [images(0)])
    train(before, wrapped_sgd(before), [images(0)])
    assert same(model, before)


@pytest.mark.parametrize("copied", [lambda pair: pair, copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
def test_the_wrapped_optimizer_does_not_drop_the_importance_in_a_state_dict(copied: Callable[[Any], Any]) -> None:
    model = network()
    model, ours = copied((model, wrapped_sgd(model)))
    train(model, ours, [images(0)])
    with refused(model, ours, ValueError, "a PlasticityWrapper saved the state dict, and SGD alone would drop"):
        ours.optimizer.load_state_dict(ours.state_dict())
    ours.load_state_dict(ours.state_dict())
    ours.optimizer.load_state_dict(ours.optimizer.state_dict())


def test_what_cannot_be_wrapped_is_refused() -> None:
    model = network()
    sgd = torch.optim.SGD(model.parameters())
    for optimizer, wrapped, message in (
        (torch.optim.LBFGS(model.parameters()), model, "LBFGS cannot be wrapped: it evaluates a closure several times"),
        (NPC(model), model, "NPC cannot be wrapped: it gives each neuron"),
        (NPCAdamW(model), model, "NPCAdamW cannot be wrapped: it gives each neuron"),
        (PlasticityWrapper(sgd, model), model, "is wrapped already"),
        (model, sgd, r"expected a torch\.optim\.Optimizer"),
        (sgd, model.parameters(), "model is of type generator; expected the model itself, as in PlasticityWrapper"),
    ):
        with pytest.raises(TypeError, match=message):
            PlasticityWrapper(optimizer, wrapped)
    with pytest.raises(ValueError, match="none of the SGD's parameters belongs to a neuron of the model"):
        PlasticityWrapper(sgd, network())
