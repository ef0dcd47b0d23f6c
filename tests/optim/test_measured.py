"""A step without importance names the cause and a fix that works. One warning names all layers that it concerns."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad
from torch.nn import functional as F

import npc_ext
from npc_ext import NPC, ImportanceWarning

from ..methods import wrapped_sgd
from ..models import paper_cnn
from ..training import batches, refused

KINDS = pytest.mark.parametrize("kind", [NPC, wrapped_sgd])
Kind = Callable[..., Any]
DATA = batches(1)
X, Y = DATA[0]


def loss_of(model: Any) -> Tensor:
    return F.cross_entropy(model(X), Y)


def learn(model: nn.Module, optimizer: Any) -> None:
    optimizer.zero_grad()
    loss_of(model).backward()
    optimizer.step()


def why(model: nn.Module, optimizer: Any) -> str:
    """The text of the error that a step without importance raises, after the part that is always the same."""
    with refused(model, optimizer, RuntimeError, "no importance was measured since the last step") as caught:
        optimizer.step()
    _, separator, cause = str(caught.value).partition("so nothing would be protected. ")
    assert separator
    return cause


# ----------------------------------------------------------------------------------------------------- no layer at all


@KINDS
def test_eval_mode_is_named(kind: Kind) -> None:
    model = paper_cnn()
    optimizer = kind(model)
    for part in (model, model):
        part.eval()
        loss_of(model).backward()
        assert why(model, optimizer) == (
            "In eval mode, importance is not measured: call model.train() before the forward pass. To keep dropout or "
            "normalization in eval mode, call eval() on these modules after that."
        )
        model.train()
        model.norm1.eval()
        learn(model, optimizer)


def test_eval_mode_is_named_if_only_the_layers_are_in_it() -> None:
    model = nn.Sequential(paper_cnn())
    optimizer = NPC(model)
    model[0].eval()
    loss_of(model).backward()
    assert model.training
    assert why(model, optimizer).startswith("In eval mode, importance is not measured: call model.train()")


@KINDS
def test_a_second_step_after_a_backward_pass_is_named(kind: Kind) -> None:
    model = paper_cnn()
    optimizer = kind(model)
    learn(model, optimizer)
    assert why(model, optimizer) == (
        "There was no backward pass since the last step, which has used up the importance of its gradients. Call "
        "backward() before each step()."
    )
    learn(model, optimizer)
    other, of_other = pickle.loads(pickle.dumps((optimizer, model)))  # other processes count passes anew
    assign(of_other)
    assert why(of_other, other).startswith("Possible causes: ")
    loss_of(paper_cnn()).backward()  # now it is not certain
    assert why(model, optimizer).endswith("; step() was called twice after one backward pass.")


@KINDS
def test_a_later_optimizer_that_took_the_importance_over_is_named(kind: Kind) -> None:
    model = paper_cnn()
    earlier = kind(model)
    learn(model, earlier)
    later = kind(model).load_importance(earlier)
    loss_of(model).backward()
    assert why(model, earlier) == (
        "Another optimizer has taken over the importance of this one (load_importance) and measures the model instead: "
        "call step() of that optimizer."
    )
    later.step()


@KINDS
def test_taps_that_were_taken_out_are_named(kind: Kind) -> None:
    model = paper_cnn()
    optimizer = kind(model)
    learn(model, optimizer)
    optimizer.neurons.detach()
    loss_of(model).backward()
    built = "NPC(model, ...)" if kind is NPC else "PlasticityWrapper(new_optimizer, model)"
    assert why(model, optimizer) == (
        "optimizer.neurons.detach() has removed the taps that measure it. To continue training, build a new optimizer "
        f"with the importance of this one (earlier): {built}.load_importance(earlier)."
    )
    learn(model, kind(model).load_importance(optimizer))


@pytest.mark.parametrize("part", ["hooks", "modules"])
def test_taps_that_other_code_removed_are_named(part: str) -> None:
    model = nn.Sequential(nn.Linear(6, 8), npc_ext.nn.ReLU(), nn.Linear(8, 3))
    optimizer = NPC(model)
    if part == "hooks":
        model[1]._taps.clear()
        for module in model.modules():
            module._forward_hooks.clear()
    else:
        model[1] = nn.Sequential(nn.ReLU())
        model[2] = nn.Sequential(model[2])
        model[2][0]._forward_hooks.clear()
    x = torch.randn(4, 6)
    model(x).square().sum().backward()
    assert why(model, optimizer) == (
        "Other code has replaced modules or removed forward hooks, so the taps that measure it are no longer in the "
        "model. After such changes, build a new optimizer with the importance of this one (earlier): "
        "NPC(model, ...).load_importance(earlier)."
    )
    later = NPC(model).load_importance(optimizer)
    model(x).square().sum().backward()
    later.step()


@pytest.mark.parametrize("way", ["autograd.grad", "inputs"])
def test_gradients_without_the_sinks_are_named(way: str) -> None:
    model = paper_cnn()
    optimizer = NPC(model)
    for _ in range(2):
        parameters, loss = list(model.parameters()), loss_of(model)
        if way == "inputs":
            loss.backward(inputs=parameters)
        else:
            for parameter, gradient in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
                parameter.grad = gradient
        assert why(model, optimizer) == (
            "torch.autograd.grad and backward(inputs=...) compute the gradients that they are asked for, and no "
            "importance. Call loss.backward() instead."
        )
        learn(model, optimizer)


def assign(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)


def with_torch_func(model: nn.Module) -> None:
    of_loss = grad(lambda values: F.cross_entropy(functional_call(model, values, (X,)), Y))
    for name, gradient in of_loss(dict(model.named_parameters())).items():
        model.get_parameter(name).grad = gradient


def copy_from_a_twin(model: nn.Module) -> None:
    twin = copy.deepcopy(model)
    loss_of(twin).backward()
    for parameter, other in zip(model.parameters(), twin.parameters(), strict=True):
        parameter.grad = other.grad


def in_eval_mode(model: nn.Module) -> None:
    model.eval()
    loss_of(model).backward()
    model.train()


@pytest.mark.parametrize("compute", [assign, with_torch_func, copy_from_a_twin, in_eval_mode])
def test_causes_that_cannot_be_known_are_listed(compute: Callable[[nn.Module], None]) -> None:
    model = paper_cnn()
    optimizer = NPC(model)
    compute(model)
    message = why(model, optimizer)
    possible = (
        "the forward pass ran in eval mode (call model.train() before it); the gradients were assigned, copied from "
        "another model, or computed with torch.func (call loss.backward() on the outputs of the model that the "
        "optimizer was built on); the model was compiled and called before the optimizer was built (call "
        "torch.compiler.reset()); a graph of torch.jit.trace or torch.export was called (call the model itself)"
    )
    first = "the forward pass ran before the optimizer was built (build it first)"
    assert message == f"Possible causes: {first}; {possible}."
    learn(model, optimizer)
    compute(model)
    loss_of(paper_cnn()).backward()
    assert why(model, optimizer) == f"Possible causes: {possible}; step() was called twice after one backward pass."


def test_a_forward_pass_before_the_optimizer_was_built_is_among_the_possible_causes() -> None:
    model = paper_cnn()
    loss = loss_of(model)
    optimizer = NPC(model)
    loss.backward()
    assert "the forward pass ran before the optimizer was built (build it first)" in why(model, optimizer)
    learn(model, optimizer)


def test_the_layers_are_listed_in_the_error() -> None:
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(12)))
    optimizer = NPC(model)
    model.eval()(torch.randn(3, 4)).sum().backward()
    layers = "layers '0', '1', '2', '3', '4', '5', '6', '7' and 4 more"
    with pytest.raises(RuntimeError, match=rf"there are gradients \({layers}\), so nothing would be protected"):
        optimizer.step()


# ------------------------------------------------------------------------------------------------------- single layers


def warning_of(model: nn.Module, optimizer: Any, x: Tensor) -> str:
    """The one warning of a step; the next step gives none."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            optimizer.zero_grad()
            model(x).square().sum().backward()
            optimizer.step()
    assert [warning.category for warning in caught] == [ImportanceWarning]
    return str(caught[0].message)


def test_layers_in_eval_mode_are_named_in_one_warning() -> None:
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(12)))
    optimizer = NPC(model)
    model[:11].eval()
    assert warning_of(model, optimizer, torch.randn(3, 4)) == (
        "layers '0', '1', '2', '3', '4', '5', '6', '7' and 3 more received gradients, but importance was not measured. "
        "In eval mode, importance is not measured: call model.train() before the forward pass. To keep dropout or "
        "normalization in eval mode, call eval() on these modules after that. Until then, learning rates follow from "
        "the importance so far"
    )
    model.train()
    learned = optimizer.plasticity()["0"].importance.clone()
    model(torch.randn(3, 4)).square().sum().backward()
    optimizer.step()
    assert not learned.any() and optimizer.plasticity()["0"].importance.any()


def test_layers_whose_taps_other_code_removed_are_named_in_one_warning() -> None:
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(3)))
    optimizer = NPC(model)
    for module in model[:2]:
        module._forward_hooks.clear()
    assert warning_of(model, optimizer, torch.randn(3, 4)).startswith(
        "layers '0', '1' received gradients, but importance was not measured. Other code has replaced modules or removed forward hooks"
    )
    rebuilt = NPC(model).load_importance(optimizer)
    learn_square(model, rebuilt)
    assert rebuilt.plasticity()["0"].importance.any()


def learn_square(model: nn.Module, optimizer: Any) -> None:
    optimizer.zero_grad()
    model(torch.randn(3, 4)).square().sum().backward()
    optimizer.step()


class WeightUsedElsewhere(nn.Module):
    def __init__(self, *, calls: bool = False) -> None:
        super().__init__()
        self.hidden, self.output, self.calls = nn.Linear(4, 4), nn.Linear(4, 4), calls

    def forward(self, x: Tensor) -> Tensor:
        return self.output(self.hidden(x) if self.calls else F.linear(x, self.hidden.weight, self.hidden.bias))


def test_a_layer_whose_weight_is_used_without_calling_it_is_named_with_advice_that_works() -> None:
    model = WeightUsedElsewhere(calls=True)
    optimizer = NPC(model)
    model.calls = False
    text = warning_of(model, optimizer, torch.randn(3, 4))
    assert "The module was probably not called, because other code uses its weight: call the module, or" in text
    advice = {"hidden": {"protect": False}}
    assert f"leave it unprotected: layers={advice}." in text
    learn_square(model, NPC(model, layers=advice).load_importance(None))
    model.calls = True
    learn_square(model, optimizer)
    assert optimizer.plasticity()["hidden"].importance.any()


class NormalizedHeads(nn.Module):
    """Its hidden layer is measured at the input of the first head, because what comes before is no module."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden, self.norm, self.task = nn.Linear(4, 6), nn.BatchNorm1d(6), 0
        self.heads = nn.ModuleList([nn.Linear(6, 3), nn.Linear(6, 3)])

    def forward(self, x: Tensor) -> Tensor:
        return self.heads[self.task](F.gelu(self.norm(self.hidden(x))))


def test_a_normalized_layer_that_is_measured_at_another_head_is_named_with_advice_that_works() -> None:
    model = NormalizedHeads()
    optimizer = NPC(model)
    model.task = 1
    text = warning_of(model, optimizer, torch.randn(5, 4))
    assert text.startswith(
        "layer 'hidden' received gradients, but importance was not measured. Layer 'hidden' is measured at the input "
        "of heads.0, which was probably not called in this step, as happens to one of several heads. Measure at a "
        "module that is called in every forward pass: layers={'hidden': {'measure_at': 'norm'}}."
    )
    model.task = 0
    optimizer = NPC(model, layers={"hidden": {"measure_at": "norm"}}).load_importance(None)
    model.task = 1
    learn_square(model, optimizer)
    assert optimizer.plasticity()["hidden"].importance.min() > 0


def test_layers_with_importance_that_is_not_finite_are_named_in_one_warning() -> None:
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(3)))
    optimizer = NPC(model)
    assert warning_of(model, optimizer, torch.full((3, 4), torch.inf)) == (
        "layers '0', '1', '2' had an importance that is not finite (inf or nan in activations or gradients). Such steps "
        "leave importance as it was. plasticity()[layer].nonfinite_steps counts them"
    )
    assert [layer.nonfinite_steps for layer in optimizer.plasticity().values()] == [2, 2, 2]
