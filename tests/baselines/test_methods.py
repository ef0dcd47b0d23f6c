"""CPC, EWC, MAS, SI and SSL compute what their papers define, and behave as torch optimizers."""

from __future__ import annotations

import copy
import inspect
import io
import pickle
import re
import warnings
import weakref
from collections import OrderedDict
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from npc_ext import CPC, EWC, MAS, NPC, SI, SSL, reference
from npc_ext.baselines.consolidation import NonFiniteImportanceError, fisher, output_sensitivity
from npc_ext.baselines.ssl import local_inhibition

from ..tolerances import TRAJECTORY
from ..training import images, same

OPTIONS: dict[type, dict[str, Any]] = {
    CPC: {"delta": 0.98},
    EWC: {"strength": 1.0},
    MAS: {"strength": 0.05},
    SI: {"strength": 0.1},
    SSL: {"strength": 0.05, "sparsity": 0.01},
}
METHODS = list(OPTIONS)
ANCHORED = [EWC, MAS, SI, SSL]
SGD = {"momentum": 0.9, "nesterov": True, "weight_decay": 0.01}


@pytest.fixture(params=METHODS)
def method(request: pytest.FixtureRequest) -> Any:
    """Each of the methods, in tests that do not choose some."""
    return request.param


def network(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 6, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(54, 12), nn.ReLU()]
    return nn.Sequential(*layers, nn.Dropout(0.0), nn.Linear(12, 4)).to(dtype)


def batch(number: int, dtype: torch.dtype = torch.float32, size: int = 16) -> tuple[Tensor, Tensor]:
    x, y = images(number, classes=4, size=size)
    return x.to(dtype), y


def build(method: Any, model: nn.Module, **options: Any) -> Any:
    """An optimizer with options of its method, and others."""
    return method(model, **{"lr": 0.05, **OPTIONS[method], **options})


def backward(model: nn.Module, number: int, scaled: Callable[[Tensor], Tensor] = lambda loss: loss) -> None:
    """Gives the parameters the gradients of a batch's loss."""
    x, y = batch(number, next(model.parameters()).dtype)
    model.zero_grad()
    scaled(F.cross_entropy(model(x), y)).backward()


def learn(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 8, first: int = 0) -> None:
    for number in range(first, first + steps):
        backward(model, number)
        optimizer.step()


def consolidate(optimizer: Any, number: int = 0) -> None:
    if isinstance(optimizer, SI):
        optimizer.consolidate()
    elif not isinstance(optimizer, CPC):
        dtype = optimizer.param_groups[0]["params"][0].dtype
        optimizer.consolidate([batch(1000 + number, dtype)], progress=False)


def two_tasks(method: Any, dtype: torch.dtype = torch.float32, **options: Any) -> tuple[nn.Module, Any]:
    model = network(dtype)
    optimizer = build(method, model, **options)
    learn(model, optimizer)
    consolidate(optimizer)
    learn(model, optimizer, first=100)
    return model, optimizer


def weights(model: nn.Module) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def state_tensors(optimizer: Any) -> list[Tensor]:
    """A copy of all state."""
    return [tensor.clone() for state in optimizer.state.values() for tensor in state.values()]


# --------------------------------------------------------------------------------------------------------- definitions


EXPLICIT = {"implicit": False}


@pytest.mark.parametrize(
    ("method", "pull"), [*((method, {}) for method in METHODS), *((method, EXPLICIT) for method in ANCHORED)]
)
def test_kernels_and_plain_pytorch_take_the_same_path(method: Any, pull: dict[str, Any]) -> None:
    exact = weights(two_tasks(method, torch.float64, **SGD, **pull)[0])
    for backend in ("auto", "reference"):
        model, _ = two_tasks(method, **SGD, **pull, backend=backend)
        assert (weights(model).double() - exact).abs().max() < TRAJECTORY * exact.abs().max()


@pytest.mark.parametrize("implicit", [True, False])
@pytest.mark.parametrize("method", ANCHORED)
def test_the_penalty_is_not_zero_after_task_1_and_steps_follow_its_gradient(method: Any, implicit: bool) -> None:
    """A step without a loss moves the weights along the gradient of the penalty, here by finite differences.

    If the pull is implicit, this is the gradient at the end of the step, else at its start.
    """
    model, optimizer = two_tasks(method, torch.float64, implicit=implicit)
    assert optimizer.penalty() > 1e-8
    parameter = model[4].weight
    stiffness, anchor = (optimizer.state[parameter][name] for name in ("stiffness", "anchor"))
    assert (stiffness > 0).double().mean() > 0.3
    at = (stiffness * (parameter - anchor)).abs().flatten().topk(5).indices  # where the pull is strongest

    @torch.no_grad()
    def slope(index: Tensor) -> float:
        weight, penalties = parameter.view(-1)[index], []
        for move in (1e-4, -1e-4):
            weight += move
            penalties.append(optimizer.penalty().item())
            weight -= move
        return (penalties[0] - penalties[1]) / 2e-4

    before, slopes = parameter.detach().clone(), list(map(slope, at))
    for each in model.parameters():
        each.grad = torch.zeros_like(each)
    optimizer.step()
    moved = (parameter.detach() - before).view(-1)[at] / -0.05
    expected = torch.tensor(list(map(slope, at)) if implicit else slopes, dtype=torch.float64)
    torch.testing.assert_close(moved, expected, rtol=1e-6, atol=1e-9)
    assert moved.abs().min() > 1e-6


@pytest.mark.parametrize("method", [EWC, MAS, SSL])
def test_two_buffers_hold_all_old_tasks_exactly(method: Any) -> None:
    model = network(torch.float64)
    optimizer = build(method, model)
    measure = fisher if method is EWC else output_sensitivity
    parameters = list(model.parameters())
    tasks = []
    for number in range(5):
        learn(model, optimizer, first=100 * number)
        importance = measure(model, [batch(1000 + number, torch.float64)], progress=False)
        tasks.append([(importance[p], p.detach().clone()) for p in parameters])
        consolidate(optimizer, number)
    learn(model, optimizer, first=900)
    strength = OPTIONS[method]["strength"]
    for index, parameter in enumerate(parameters):
        per_task = sum(
            reference.anchor_gradient(parameter.detach(), anchor, importance, strength)
            for importance, anchor in (task[index] for task in tasks)
        )
        state = optimizer.state[parameter]
        merged = reference.anchor_gradient(parameter.detach(), state["anchor"], state["stiffness"], strength)
        torch.testing.assert_close(merged, per_task, rtol=1e-9, atol=1e-13)
    names = {name for state in optimizer.state.values() for name in state}
    assert names == {"stiffness", "anchor"}


def test_si_integrates_along_the_path_and_divides_by_the_squared_distance() -> None:
    model = network(torch.float64)
    optimizer = SI(model, lr=0.05, strength=0.1, damping=1e-2, **SGD)
    parameter = model[4].weight
    start = parameter.detach().clone()

    def path_integral(first: int) -> Tensor:
        """The sum over 8 steps of the gradient of the task's loss times the movement."""
        path = torch.zeros_like(parameter)
        for number in range(first, first + 8):
            backward(model, number)
            gradient, before = parameter.grad.clone(), parameter.detach().clone()
            optimizer.step()
            path -= gradient * (parameter.detach() - before)
        return path

    path = path_integral(0)
    torch.testing.assert_close(optimizer.state[parameter]["path"], path, rtol=1e-10, atol=1e-14)
    optimizer.consolidate()
    want = path.clamp(min=0) / ((parameter.detach() - start) ** 2 + 1e-2)
    torch.testing.assert_close(optimizer.state[parameter]["stiffness"], want, rtol=1e-10, atol=1e-14)
    state = optimizer.state[parameter]
    assert torch.equal(state["anchor"], parameter.detach())
    assert not state["path"].any()
    # The anchor is a copy of the weight: training moves the weight away from it, and is pulled back.
    path = path_integral(100)
    assert not torch.equal(state["anchor"], parameter.detach())
    assert optimizer.penalty() > 0
    torch.testing.assert_close(state["path"], path, rtol=1e-10, atol=1e-14)


def test_ssl_descends_the_loss_and_the_inhibition_of_hidden_neurons() -> None:
    model = network(torch.float64)
    optimizer = SSL(model, lr=0.1, strength=1.0, sparsity=0.3)
    assert [layer.name for layer in optimizer.inhibited] == ["4"]
    learn(model, optimizer)
    consolidate(optimizer)
    discount = torch.exp(-optimizer.state[model[4].bias]["stiffness"])
    assert discount.min() < 0.999
    backward(model, 50)
    gradients = [parameter.grad.clone() for parameter in model.parameters()]
    twin = network(torch.float64)
    twin.load_state_dict(model.state_dict())
    x, y = batch(50, torch.float64)
    hidden = twin[:6](x)
    penalty = local_inhibition(hidden, discount.float().double(), 12 / 6)
    (F.cross_entropy(twin[6:](hidden), y) + 0.3 * penalty).backward()
    torch.testing.assert_close(gradients, [parameter.grad for parameter in twin.parameters()], rtol=1e-5, atol=1e-7)
    model.eval()  # the hooks do nothing then
    backward(model, 50)
    assert not torch.equal(model[0].weight.grad, gradients[0])


def test_ssl_inhibits_named_layers_also_after_convolutions() -> None:
    model = network()
    optimizer = SSL(model, lr=0.1, inhibited=["0"], sparsity=1.0)
    assert [layer.name for layer in optimizer.inhibited] == ["0"]
    learn(model, optimizer, steps=1)


def test_ssl_takes_names_of_layers_that_read_like_patterns() -> None:
    model = nn.Sequential(OrderedDict([("a[0]", nn.Linear(8, 6)), ("relu", nn.ReLU()), ("b", nn.Linear(6, 4))]))
    assert [layer.name for layer in SSL(model, inhibited=["a[0]"]).inhibited] == ["a[0]"]


def test_ssl_reports_where_its_penalty_would_not_act() -> None:
    flat = nn.Sequential(nn.Conv2d(1, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(216, 4))
    with pytest.raises(ValueError, match="no neurons would inhibit each other"):
        SSL(flat)
    assert SSL(flat, sparsity=0).inhibited == []
    with pytest.warns(UserWarning, match="the neurons of '0' have no bias"):
        SSL(nn.Sequential(nn.Linear(8, 6, bias=False), nn.ReLU(), nn.Linear(6, 4)))
    model, scaler = network(), torch.amp.GradScaler("cpu")
    optimizer, before = SSL(model, lr=0.1), weights(model)
    backward(model, 0, scaler.scale)
    with pytest.raises(RuntimeError, match=r"write SSL\(model, ..., scaler=scaler\)"):
        scaler.step(optimizer)
    assert torch.equal(weights(model), before)


def test_the_penalty_of_ssl_counts_once_however_often_ssl_is_built_for_a_model() -> None:
    gradients = []
    for times in (1, 2):
        model = network()
        for _ in range(times):
            model = copy.deepcopy(model)  # with the hooks of the earlier SSL
            SSL(model, sparsity=1.0)
        learn(model, SSL(model, lr=0.0, sparsity=1.0), steps=1)
        gradients.append(model[0].weight.grad)
    assert torch.equal(*gradients)


def inhibition_hooks(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


def gradient_of(model: nn.Module, called: Callable[[Tensor], Tensor] | None = None) -> Tensor:
    x, y = batch(50)
    model.zero_grad()
    F.cross_entropy((called or model)(x), y).backward()
    return model[4].weight.grad.clone()


def pickled(value: Any) -> Any:
    return pickle.loads(pickle.dumps(value))


def test_a_deleted_ssl_is_freed_and_inhibits_no_more() -> None:
    model = network()
    plain = gradient_of(model)
    optimizer = SSL(model, sparsity=1.0)
    inhibited = gradient_of(model)
    loss = model(batch(50)[0]).sum()  # its graph stays
    freed = weakref.ref(optimizer)
    del optimizer
    assert freed() is None and inhibition_hooks(model) == 0
    assert torch.equal(gradient_of(model), plain) and not torch.equal(inhibited, plain)
    model.zero_grad()
    loss.backward()


@pytest.mark.parametrize("duplicate", [copy.deepcopy, pickled])
def test_copies_of_a_model_are_inhibited_if_its_ssl_is_copied_with_it(duplicate: Any) -> None:
    model = network()
    plain = gradient_of(model)
    optimizer = SSL(model, sparsity=1.0)
    inhibited = gradient_of(model)
    alone = duplicate(model)
    assert torch.equal(gradient_of(alone), plain) and inhibition_hooks(alone) == 0
    model_copy, optimizer_copy = duplicate((model, optimizer))
    assert torch.equal(gradient_of(model_copy), inhibited)
    optimizer_copy.sparsity = 0
    assert torch.equal(gradient_of(model_copy), plain) and torch.equal(gradient_of(model), inhibited)
    optimizer_copy.sparsity = 1.0
    assert torch.equal(gradient_of(model_copy), inhibited)
    del optimizer
    assert torch.equal(gradient_of(model_copy), inhibited) and inhibition_hooks(model) == 0
    del optimizer_copy
    assert torch.equal(gradient_of(model_copy), plain) and inhibition_hooks(model_copy) == 0


def test_an_optimizer_that_loads_the_importance_of_ssl_ends_its_inhibition() -> None:
    model = network()
    plain = gradient_of(model)
    earlier = SSL(model, sparsity=1.0)
    earlier.consolidate([batch(1000)], progress=False)
    later = SSL(model, sparsity=1.0).load_importance(earlier)
    assert not torch.equal(gradient_of(model), plain)
    last = EWC(model).load_importance(later)
    assert torch.equal(gradient_of(model), plain)
    assert same(state_tensors(last), state_tensors(earlier))


def test_a_compiled_model_is_inhibited_as_long_as_there_is_an_ssl() -> None:
    torch._dynamo.reset()
    model = network()
    compiled = torch.compile(model, backend="eager")
    plain = gradient_of(model, compiled)
    optimizer = SSL(model, sparsity=1.0)
    inhibited = gradient_of(model, compiled)
    assert torch.equal(inhibited, gradient_of(model)) and not torch.equal(inhibited, plain)
    optimizer.consolidate([batch(1000)], progress=False)
    discounted = gradient_of(model, compiled)
    assert torch.equal(discounted, gradient_of(model)) and not torch.equal(discounted, inhibited)
    del optimizer
    assert torch.equal(gradient_of(model, compiled), plain)


@pytest.mark.parametrize(
    ("sparsity", "error", "words"),
    [
        (-1, ValueError, "sparsity is -1; expected a finite number of at least 0"),
        (float("nan"), ValueError, "sparsity is nan; expected"),
        ("1", TypeError, "sparsity is '1'; expected"),
        (torch.tensor(1.0), TypeError, r"sparsity is a tensor; expected .*, as sparsity.item\(\)"),
    ],
)
def test_a_wrong_sparsity_raises_when_it_is_set(sparsity: Any, error: type[Exception], words: str) -> None:
    optimizer = SSL(network(), sparsity=0.5)
    with pytest.raises(error, match=words):
        optimizer.sparsity = sparsity
    assert optimizer.sparsity == 0.5
    without_layers = SSL(network(), sparsity=0, inhibited=[])
    with pytest.raises(ValueError, match="no neurons would inhibit each other"):
        without_layers.sparsity = 0.5


def test_ssl_discounts_by_the_state_that_it_loads() -> None:
    model = network()
    optimizer = SSL(model, lr=0.1)
    learn(model, optimizer)
    before = copy.deepcopy(optimizer.state_dict())
    optimizer.sparsity = 1.0

    def gradient() -> Tensor:
        backward(model, 50)
        return model[4].weight.grad.clone()

    undiscounted = gradient()
    consolidate(optimizer)
    discounted = gradient()
    assert not torch.equal(discounted, undiscounted)
    after = copy.deepcopy(optimizer.state_dict())
    optimizer.load_state_dict(before)
    assert torch.equal(gradient(), undiscounted)
    optimizer.load_state_dict(after)
    assert torch.equal(gradient(), discounted)


def test_ssl_scales_its_penalty_with_the_loss() -> None:
    gradients = []
    for scale in (1.0, 1024.0):
        model, scaler = network(), torch.amp.GradScaler("cpu", init_scale=scale)
        optimizer = SSL(model, lr=0.1, sparsity=1.0, scaler=scaler)
        backward(model, 0, scaler.scale)
        scaler.unscale_(optimizer)
        gradients.append(model[4].weight.grad.clone())
    torch.testing.assert_close(*gradients)


def test_cpc_is_npc_with_a_neuron_for_each_connection() -> None:
    """With one connection to each neuron and no bias, |w dL/dw| is |n dL/dn|, so both measure the same."""
    model = nn.Sequential(nn.Linear(1, 40, bias=False), nn.ReLU(), nn.Linear(40, 3))
    twin = copy.deepcopy(model)
    options = {"lr": 0.1, "delta": 0.9}
    connections, neurons = CPC(model, **options), NPC(twin, **options)
    for number in range(5):
        x = torch.rand(1, 1, generator=torch.Generator().manual_seed(number)) + 0.5
        for net, optimizer in ((model, connections), (twin, neurons)):
            optimizer.zero_grad()
            F.cross_entropy(net(x), torch.tensor([number % 3])).backward()
            optimizer.step()
        with torch.no_grad():  # the heads differ, because CPC's has three connections to a neuron
            twin[2].load_state_dict(model[2].state_dict())
    got, want = connections.plasticity()["0"], neurons.plasticity()["0"]
    torch.testing.assert_close(got.importance["weight"].flatten(), want.importance, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(model[0].weight, twin[0].weight, rtol=1e-4, atol=1e-6)
    assert 0 < got.frozen < 1


# ------------------------------------------------------------------------------------------ behaviour of an optimizer


def saved_and_loaded(model: nn.Module, optimizer: Any) -> tuple[nn.Module, Any]:
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    other = network()
    resumed = build(type(optimizer), other, lr=0.3)
    other.load_state_dict(saved["model"])
    resumed.load_state_dict(saved["optimizer"])
    return other, resumed


def test_resumed_runs_copies_and_pickles_have_forgotten_nothing(method: Any) -> None:
    run = two_tasks(method, **SGD)
    twins = [saved_and_loaded(*run), copy.deepcopy(run), pickle.loads(pickle.dumps(run))]
    for model, optimizer in (run, *twins):
        learn(model, optimizer, first=200)
        consolidate(optimizer, 1)
        learn(model, optimizer, first=300)
        assert torch.equal(weights(model), weights(run[0]))


def test_state_stays_float32_beside_bfloat16_weights(method: Any) -> None:
    _, optimizer = two_tasks(method, torch.bfloat16)
    resumed = build(method, network(torch.bfloat16))
    resumed.load_state_dict(optimizer.state_dict())
    assert {tensor.dtype for each in (optimizer, resumed) for tensor in state_tensors(each)} == {torch.float32}
    assert same(state_tensors(optimizer), state_tensors(resumed))


def test_parameters_without_gradient_stay_as_they_are(method: Any) -> None:
    model, optimizer = two_tasks(method, **SGD)
    model[0].requires_grad_(False)
    model[0].weight.grad = model[0].bias.grad = None
    before = model[0].weight.detach().clone()
    learn(model, optimizer, first=600)
    consolidate(optimizer, 2)
    learn(model, optimizer, first=700)
    assert torch.equal(model[0].weight, before)
    model[0].requires_grad_(True)
    learn(model, optimizer, first=800)
    assert not torch.equal(model[0].weight, before)


def test_a_head_may_be_added_later(method: Any) -> None:
    model, optimizer = two_tasks(method)
    head = nn.Linear(4, 4)
    model.append(head)
    optimizer.add_param_group({"params": head.parameters(), "lr": 0.01})
    before = head.weight.detach().clone()
    learn(model, optimizer, first=900)
    assert not torch.equal(head.weight, before)
    consolidate(optimizer, 3)
    learn(model, optimizer, first=1900)
    if method is not CPC:
        assert "stiffness" in optimizer.state[head.weight]
    else:
        assert optimizer.plasticity()["8"].importance["weight"].any()


def test_groups_and_schedulers(method: Any) -> None:
    model = network()
    groups = [{"params": model[0].parameters(), "lr": 0.0}, {"params": model[4:].parameters()}]
    optimizer = build(method, model, lr=0.1, params=groups)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.0)
    before = weights(model[0]), weights(model[4])
    learn(model, optimizer, steps=2)
    assert torch.equal(weights(model[0]), before[0])
    after = weights(model[4])
    assert not torch.equal(after, before[1])
    scheduler.step()  # to a rate of zero
    learn(model, optimizer, steps=2)
    assert torch.equal(weights(model[4]), after)


def test_an_overflow_under_gradscaler_changes_nothing(method: Any) -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    given = {"scaler": scaler} if method is SSL else {}
    model, optimizer = two_tasks(method, **SGD, **given)
    before, state = weights(model), state_tensors(optimizer)

    def step(factor: float) -> None:
        backward(model, 3, lambda loss: scaler.scale(loss) * factor)
        scaler.step(optimizer)
        scaler.update()

    step(torch.inf)
    assert torch.equal(weights(model), before) and same(state_tensors(optimizer), state)
    step(1.0)
    assert not torch.equal(weights(model), before)


def test_closures_maximize_and_memory_formats(method: Any) -> None:
    model = network().to(memory_format=torch.channels_last)
    optimizer = build(method, model, lr=0.01, maximize=True)
    x, y = batch(0, size=32)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        return loss

    first = optimizer.step(closure)
    consolidate(optimizer)
    losses = [optimizer.step(closure) for _ in range(5)]
    assert losses[-1] > first


NAN = float("nan")
WRONG_ARGUMENTS: list[tuple[list[type], dict[str, Any], type[Exception], str]] = [
    (METHODS, {"lr": -1}, ValueError, "lr is -1; expected a finite number of at least 0"),
    (METHODS, {"lr": None}, TypeError, "lr is None; expected a finite number of at least 0"),
    (METHODS, {"lr": "0.1"}, TypeError, "lr is '0.1'; expected a finite number of at least 0"),
    (METHODS, {"lr": torch.ones(2)}, TypeError, r"lr is .*; expected a finite number of at least 0"),
    (METHODS, {"nesterov": True}, ValueError, "nesterov is on, but momentum is 0"),
    (METHODS, {"backend": "cuda"}, ValueError, "backend is 'cuda'; expected one of 'auto', 'native', 'reference'"),
    (ANCHORED, {"strength": NAN}, ValueError, "strength is nan; expected a finite number"),
    (ANCHORED, {"implicit": None}, ValueError, "implicit is None; expected one of True, False"),
    (ANCHORED, {"momentum": 1.0}, ValueError, "momentum is 1.0; implicit anchors need a momentum below 1"),
    ([SI], {"damping": NAN}, ValueError, "damping is nan; expected a finite number"),
    ([SSL], {"sparsity": NAN}, ValueError, "sparsity is nan; expected a finite number"),
    ([SSL], {"inhibited": []}, ValueError, "no neurons would inhibit each other"),
    (
        [SSL],
        {"inhibited": ["head"]},
        ValueError,
        "inhibited names 'head', but no layer .* has that name; there are '0', '4', '7'",
    ),
    (
        [SSL],
        {"inhibited": "4"},
        TypeError,
        r"inhibited is '4'; expected a list of layers' names, as in \['fc1', 'fc2'\]",
    ),
    ([SSL], {"inhibited": [4]}, TypeError, r"inhibited is \[4\]; expected a list of layers' names"),
    ([SSL], {"scaler": True}, TypeError, "scaler is True; expected the torch.amp.GradScaler in use, or None"),
    ([CPC], {"alpha": NAN}, ValueError, "alpha is nan; expected a finite number"),
    ([CPC], {"layers": {"4": {"measure_at": "5"}}}, ValueError, r"layers\['4'\] has the option 'measure_at'"),
]


@pytest.mark.parametrize(
    ("method", "options", "error", "words"),
    [(method, *case) for methods, *case in WRONG_ARGUMENTS for method in methods],
)
def test_wrong_arguments_raise_an_error_that_explains(
    method: Any, options: dict[str, Any], error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        method(network(), **options)


def test_parameters_in_place_of_the_model_raise_an_error_that_explains(method: Any) -> None:
    with pytest.raises(TypeError, match=f"{method.__name__} takes the model itself, got generator"):
        method(network().parameters(), lr=0.1)


@pytest.mark.parametrize(
    ("method", "strength", "more"),
    [
        (EWC, 100.0, []),
        (MAS, 1.0, []),
        (SI, 0.1, ["damping"]),
        (SSL, 1.0, ["sparsity", "scale", "inhibited", "scaler"]),
    ],
)
def test_anchored_methods_share_a_constructor(method: Any, strength: float, more: list[str]) -> None:
    signature = inspect.signature(method)
    common = ["lr", "strength", "momentum", "nesterov", "weight_decay", "implicit", "params", "maximize", "backend"]
    assert [name for name in signature.parameters if name not in more] == ["model", *common]
    assert all(parameter.annotation is not inspect.Parameter.empty for parameter in signature.parameters.values())
    assert signature.parameters["strength"].default == strength
    assert method(network()).param_groups[0]["strength"] == strength
    assert method(network(), 0.1, strength=7.0).param_groups[0]["strength"] == 7.0


def test_help_describes_every_argument(method: Any) -> None:
    described = method.__doc__.partition("Args:")[2].partition("Raises:")[0]
    for name in inspect.signature(method).parameters:
        assert re.search(rf"^        (\w+, )*{name}(, \w+)*:", described, re.MULTILINE), name
    assert "as in `torch.optim.SGD`" in described


def test_sparse_gradients_raise_an_error_that_explains(method: Any) -> None:
    model = network()
    optimizer = build(method, model)
    model[0].weight.grad = torch.zeros(6, 1, 3, 3).to_sparse()
    with pytest.raises(ValueError, match=r"the gradient of '0.weight' is sparse; expected a dense one"):
        optimizer.step()


def test_other_state_dicts_raise_an_error_that_explains_and_change_nothing(method: Any) -> None:
    model = network()
    optimizer = build(method, model)
    before = copy.deepcopy(optimizer.state_dict())
    name = "alpha" if method is CPC else "strength"
    with pytest.raises(ValueError, match="the state dict has parameter groups of"):
        optimizer.load_state_dict(build(method, nn.Sequential(nn.Linear(3, 3), nn.ReLU())).state_dict())
    with pytest.raises(
        ValueError, match=f"no .*{name}.*; another optimizer than {method.__name__}, or another version, saved it"
    ):
        optimizer.load_state_dict(torch.optim.SGD(model.parameters(), lr=0.2).state_dict())
    with pytest.raises(ValueError, match=r"the state dict has 0.weight, .*; expected state and param_groups"):
        optimizer.load_state_dict(model.state_dict())
    assert optimizer.state_dict() == before


def test_anchors_of_another_architecture_raise_an_error_that_explains() -> None:
    trained = EWC(network(), lr=0.1)
    consolidate(trained)
    wrong = network()
    wrong[0] = nn.Conv2d(1, 6, 5)
    with pytest.raises(ValueError, match=r"stiffness for '0.weight' has shape \(6, 1, 3, 3\), expected \(6, 1, 5, 5\)"):
        EWC(wrong).load_state_dict(trained.state_dict())


def test_si_without_a_step_has_nothing_to_consolidate() -> None:
    with pytest.raises(RuntimeError, match="no step has moved a weight since the last consolidate"):
        SI(network(), lr=0.1).consolidate()


@pytest.mark.parametrize("tasks", [0, 1])
def test_si_changes_nothing_if_importance_is_not_finite_and_names_gradients_as_the_cause(tasks: int) -> None:
    model = network()
    optimizer = SI(model, lr=0.05, strength=0.1)
    for task in range(tasks):
        learn(model, optimizer, first=100 * task)
        optimizer.consolidate()
    learn(model, optimizer)
    optimizer.state[model[7].bias]["path"][0] = torch.inf
    before = state_tensors(optimizer)
    with pytest.raises(NonFiniteImportanceError, match=r"importance of '7.bias' is not finite: gradients were huge"):
        optimizer.consolidate()
    assert same(state_tensors(optimizer), before)


def test_ewc_changes_nothing_if_it_cannot_consolidate() -> None:
    optimizer = EWC(network(), lr=0.1)
    with pytest.raises(ValueError, match="batches has no samples"):
        optimizer.consolidate([], progress=False)
    x, y = batch(0)
    x[0, 0, 0, 0] = torch.nan
    with pytest.raises(ValueError, match="is not finite"):
        optimizer.consolidate([(x, y)], progress=False)
    assert not optimizer.state


@pytest.mark.parametrize(
    ("method", "option", "words"),
    [
        (EWC, {"smaples": 5}, "consolidate has no option 'smaples': close to it: 'samples'"),
        (EWC, {"parameters": []}, "consolidate has no option 'parameters': there are 'outputs', 'forward'"),
        (MAS, {"labels": "data"}, "consolidate has no option 'labels': there are 'outputs', "),
        (SSL, {"generator": None}, "consolidate has no option 'generator': there are"),
    ],
)
def test_unknown_options_of_consolidate_raise_an_error_that_explains(
    method: Any, option: dict[str, Any], words: str
) -> None:
    with pytest.raises(TypeError, match=words):
        method(network()).consolidate([batch(0)], **option)


@pytest.mark.parametrize("method", ANCHORED)
def test_consolidate_after_parameters_were_replaced_raises_an_error_that_explains(method: Any) -> None:
    model, optimizer = two_tasks(method)
    model[7] = nn.Linear(12, 4)
    before = state_tensors(optimizer)
    words = rf"replaced after the optimizer was built: '7.weight', '7.bias'\..*{method.__name__}\(model, ...\).load_imp"
    with pytest.raises(ValueError, match=words):
        consolidate(optimizer, 1)
    assert same(state_tensors(optimizer), before)
    model[7].requires_grad_(False)  # nothing to anchor there
    consolidate(optimizer, 1)


@pytest.mark.parametrize("method", ANCHORED)
def test_a_parameter_replaced_in_the_groups_keeps_all_its_tasks(method: Any) -> None:
    model, optimizer = two_tasks(method)
    twin, expected = two_tasks(method)
    new = nn.Parameter(model[7].weight.detach().clone())
    parameters = optimizer.param_groups[0]["params"]
    parameters[[p is model[7].weight for p in parameters].index(True)] = new
    model[7].weight = new
    for each in (optimizer, expected):
        consolidate(each, 1)
    for each, net in ((optimizer, model), (expected, twin)):
        learn(net, each, first=200)
    assert torch.equal(weights(model), weights(twin))
    for name in ("stiffness", "anchor"):
        assert torch.equal(optimizer.state[new][name], expected.state[twin[7].weight][name])


@pytest.mark.parametrize("method", [EWC, MAS, SSL])
def test_parameters_outside_of_the_model_get_no_anchor(method: Any) -> None:
    model, temperature = network(), nn.Parameter(torch.ones(()))
    optimizer = build(method, model, params=[*model.parameters(), temperature])
    consolidate(optimizer)
    assert "stiffness" in optimizer.state[model[0].weight] and temperature not in optimizer.state


@pytest.mark.parametrize("method", ANCHORED)
def test_anchors_made_in_inference_mode_are_usual_tensors(method: Any) -> None:
    model = network()
    optimizer = build(method, model)
    learn(model, optimizer)
    with torch.inference_mode():
        consolidate(optimizer)
    assert not any(tensor.is_inference() for state in optimizer.state.values() for tensor in state.values())


def test_si_consolidates_with_a_valid_damping_only() -> None:
    model = network()
    optimizer = SI(model, lr=0.05)
    learn(model, optimizer)
    optimizer.param_groups[0]["damping"] = -1.0
    with pytest.raises(ValueError, match=r"damping is -1.0; expected a finite number above 0"):
        optimizer.consolidate()


def test_the_penalty_of_a_parameter_that_has_grown_raises_an_error_that_explains() -> None:
    model, optimizer = two_tasks(EWC)
    model[7].weight.data = torch.ones(5, 12)
    with pytest.raises(ValueError, match=r"'7.weight' has shape \(5, 12\), but its 'stiffness' .* shape \(4, 12\)"):
        optimizer.penalty()


@pytest.mark.parametrize("method", ANCHORED)
def test_a_task_is_anchored_as_a_whole_or_not_at_all(method: Any) -> None:
    optimizer = two_tasks(method)[1]
    before = state_tensors(optimizer)
    first = torch.zeros(6, 1, 3, 3)
    out_of_memory = mock.patch.object(method, "_new_state_tensor", side_effect=[first, torch.OutOfMemoryError("full")])
    with out_of_memory, pytest.raises(torch.OutOfMemoryError):
        consolidate(optimizer, 1)
    assert same(state_tensors(optimizer), before)


@pytest.mark.parametrize("method", ANCHORED)
def test_printing_shows_how_much_is_anchored(method: Any) -> None:
    model = network()
    optimizer = build(method, model, params=model[0].parameters())
    assert "anchored: 0 of 60 trained elements (consolidate()" in repr(optimizer)
    learn(model, optimizer, steps=1)
    consolidate(optimizer)
    optimizer.add_param_group({"params": model[7].parameters()})
    assert "strength: " in repr(optimizer) and "anchored: 60 of 112 trained elements\n" in repr(optimizer)
    if method is SSL:
        assert "layers whose neurons inhibit each other: '4', sparsity 0.01\n" in repr(optimizer)


def after_a_task_with_a_huge_strength(method: Any, implicit: bool) -> tuple[nn.Module, Any]:
    model, optimizer = two_tasks(method, momentum=0.9, strength=1e30, implicit=implicit)
    learn(model, optimizer, first=108, steps=22)
    return model, optimizer


@pytest.mark.parametrize("method", ANCHORED)
def test_with_implicit_anchors_weights_stay_at_them_however_large_the_strength_is(method: Any) -> None:
    model, optimizer = after_a_task_with_a_huge_strength(method, implicit=True)
    for parameter in model.parameters():
        state = optimizer.state[parameter]
        stiff = state["stiffness"] > 1e-20
        torch.testing.assert_close(parameter[stiff], state["anchor"][stiff], rtol=1e-5, atol=1e-5)
    consolidate(optimizer, 1)
    assert weights(model).isfinite().all()


@pytest.mark.parametrize("method", ANCHORED)
def test_with_explicit_anchors_training_diverges_under_a_huge_strength(method: Any) -> None:
    model, optimizer = after_a_task_with_a_huge_strength(method, implicit=False)
    assert not weights(model).isfinite().all()
    with pytest.raises(NonFiniteImportanceError):
        consolidate(optimizer, 1)


@pytest.mark.parametrize(
    ("options", "bound"),
    [({}, 1.0), ({"momentum": 0.5}, 1.5), ({"momentum": 0.5, "nesterov": True}, 0.75)],
    ids=str,
)
def test_explicit_anchors_diverge_above_a_bound_and_implicit_ones_do_not(options: dict[str, Any], bound: float) -> None:
    """Without a loss, the explicit pull multiplies the distance by 1 - 2 lr strength W, or with momentum by a matrix."""
    for implicit in (True, False):
        for of_bound, diverges in ((0.99, False), (1.01, not implicit)):
            model = nn.Linear(1, 1, bias=False)
            optimizer = EWC(model, lr=0.1, strength=10 * bound * of_bound, **options, implicit=implicit)
            optimizer.state[model.weight].update(stiffness=torch.ones(1, 1), anchor=torch.zeros(1, 1))
            model.weight.data.fill_(1.0)
            for _ in range(500):
                model.weight.grad = torch.zeros(1, 1)
                optimizer.step()
            assert (model.weight.abs().item() > 1) is diverges


def test_every_group_has_its_kind_of_pull() -> None:
    model, twin = network(), network()
    groups = [{"params": model[0].parameters(), "implicit": False}, {"params": model[4:].parameters()}]
    optimizers = EWC(model, params=groups, strength=10.0), EWC(twin, strength=10.0)
    for net, optimizer in zip((model, twin), optimizers, strict=True):
        learn(net, optimizer, steps=2)
        consolidate(optimizer)
        learn(net, optimizer, steps=1, first=2)  # from the anchor, where nothing pulls
        optimizer.step()
    assert not torch.equal(model[0].weight, twin[0].weight)
    assert torch.equal(model[4].weight, twin[4].weight)
    optimizers[0].param_groups[0]["implicit"] = True  # from the next step on
    model.load_state_dict(twin.state_dict())
    for parameter, of_twin in zip(model.parameters(), twin.parameters(), strict=True):
        optimizers[0].state[parameter] = copy.deepcopy(optimizers[1].state[of_twin])
    for net, optimizer in zip((model, twin), optimizers, strict=True):
        learn(net, optimizer, steps=2, first=9)
    assert torch.equal(weights(model), weights(twin))


@pytest.mark.parametrize("method", ANCHORED)
def test_the_kind_of_pull_is_saved_and_never_guessed(method: Any) -> None:
    optimizer, other = build(method, network(), implicit=False), build(method, network())
    saved = optimizer.state_dict()
    other.load_state_dict(saved)
    assert other.param_groups[0]["implicit"] is False
    del saved["param_groups"][0]["implicit"]
    with pytest.raises(ValueError, match="groups have no implicit"):
        other.load_state_dict(saved)
    method(network(), momentum=1.0, implicit=False)


@pytest.mark.parametrize("method", [EWC, MAS, SSL])
def test_a_users_function_calls_the_model_to_consolidate(method: Any) -> None:
    model, twin = network(), network()
    optimizer, usual = build(method, model), build(method, twin)
    x, y = batch(0)
    torch.manual_seed(1)
    usual.consolidate([(x, y)], outputs=lambda y: y[:, 1:3], progress=False)
    torch.manual_seed(1)
    optimizer.consolidate([{"x": x}], forward=lambda model, batch: model(batch["x"])[:, 1:3], progress=False)
    for mine, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(optimizer.state[mine]["stiffness"], usual.state[theirs]["stiffness"])


def test_cpc_names_its_layers_and_reports_them() -> None:
    model = network()
    optimizer = CPC(model, lr=0.1, delta=0.5, layers={"7": {"protect": False}, "4": {"beta": 1e9}})
    learn(model, optimizer, steps=6)
    plasticity = optimizer.plasticity()
    assert list(plasticity) == ["0", "4"]
    assert repr(plasticity["4"]).startswith("ConnectionPlasticity(660 connections, 0% frozen, importance ")
    model = network()
    untrained = CPC(model, params=model[0].parameters()).plasticity()["4"]
    assert repr(untrained) == "ConnectionPlasticity(0 connections, 0% frozen, importance none, learning rate none)"
    assert set(plasticity["0"].importance) == {"weight", "bias"}
    assert plasticity["4"].frozen == 0 < plasticity["0"].frozen
    assert torch.equal(plasticity["0"].learning_rate["weight"] == 0, plasticity["0"].importance["weight"] >= 0.5)
    assert optimizer.state[model[7].weight].keys() == set()
    with pytest.raises(ValueError, match="has no Linear, Conv or ConvTranspose layer"):
        CPC(nn.Sequential(nn.PReLU()))


@pytest.mark.parametrize("options", [{}, {"kdim": 4, "vdim": 6, "bias": False}], ids=str)
def test_cpc_protects_attentions_input_projection(options: dict[str, Any]) -> None:
    model = nn.MultiheadAttention(8, 2, batch_first=True, add_bias_kv=True, **options)
    model.register_parameter("gate", nn.Parameter(torch.ones(1)))  # as derived classes may have
    inputs = [torch.randn(3, 5, size) for size in (8, model.kdim, model.vdim)]
    optimizer = CPC(model, lr=0.1, delta=0.5, momentum=0.9)
    for _ in range(3):
        optimizer.zero_grad()
        model(*inputs)[0].sin().sum().backward()
        optimizer.step()
    plasticity = optimizer.plasticity()
    assert list(plasticity) == ["in_proj", "out_proj"]
    names = [name for name, _ in model.named_parameters() if name.startswith("in_proj") or "_proj_weight" in name]
    assert list(plasticity["in_proj"].importance) == names and len(names) in (2, 3)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer.step()
    for name, rate in optimizer.plasticity()["in_proj"].learning_rate.items():
        assert torch.equal(model.get_parameter(name)[rate == 0], before[name][rate == 0])
    assert 0 < optimizer.plasticity()["in_proj"].frozen < 1
    assert not torch.equal(model.in_proj_bias if options == {} else model.v_proj_weight, before[names[-1]])
    assert not torch.equal(model.bias_k, before["bias_k"])


def test_cpc_counts_and_reports_importance_that_is_not_finite() -> None:
    model = network()
    optimizer = CPC(model, lr=0.1)
    learn(model, optimizer, steps=1)
    model[0].weight.grad[0, 0, 0, 0] = torch.inf
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        optimizer.step()
    assert "layer '0' had an importance that is not finite" in str(caught[0].message)
    assert optimizer.plasticity()["0"].nonfinite_steps == 1
