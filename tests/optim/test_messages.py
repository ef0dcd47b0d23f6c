"""What optimizers refuse, warn of and print."""

from __future__ import annotations

import copy
import pickle
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from npc_ext import CPC, EWC, MAS, NPC, ImportanceWarning, NPCAdamW, PlasticityWrapper, find_neurons, plot_plasticity
from npc_ext.kernels import native

from ..methods import METHODS, wrapped_adamw
from ..models import SetTask, paper_cnn
from ..training import batches, refused, same, set_importance, train, weights

# --------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize("kind", [NPC, EWC])
@pytest.mark.parametrize(
    ("model", "error", "message"),
    [
        (
            nn.Linear(3, 2).parameters(),
            TypeError,
            r"(\w+) takes the model itself, got generator; write \1\(model, lr=...",
        ),
        (nn.Sequential(nn.LazyLinear(3), nn.Linear(3, 2)), ValueError, "pass one batch through the model first"),
        (nn.Linear(2, 2, dtype=torch.cfloat), ValueError, "complex"),
    ],
    ids=["parameters", "lazy", "complex"],
)
def test_models_that_cannot_be_trained_are_refused(kind: Any, model: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        kind(model)


def test_a_model_without_neurons_is_refused() -> None:
    with pytest.raises(ValueError, match=r"the model \(Embedding\) has no neurons"):
        NPC(nn.Embedding(3, 4))


@pytest.mark.parametrize("make", [NPC, METHODS["EWC"], wrapped_adamw], ids=["NPC", "EWC", "PlasticityWrapper"])
def test_what_cannot_be_trained_because_of_inference_mode_is_refused(make: Any) -> None:
    with torch.inference_mode():
        untrainable = paper_cnn()
    with pytest.raises(ValueError, match=r"'conv1.weight' was created under torch.inference_mode\(\)"):
        make(untrainable)
    model, (x, y) = paper_cnn(), batches(1)[0]
    with torch.inference_mode(), pytest.raises(RuntimeError, match=r"is built under torch.inference_mode"):
        make(model)
    assert not any(module._forward_hooks for module in model.modules())
    with torch.no_grad():
        optimizer = make(model)
    F.cross_entropy(model(x), y).backward()
    before = weights(model)
    with refused(model, optimizer, RuntimeError, r"step\(\) is called under torch.inf"), torch.inference_mode():
        optimizer.step()
    with refused(model, optimizer, RuntimeError, r"load_state_dict\(\) is called under"), torch.inference_mode():
        optimizer.load_state_dict(optimizer.state_dict())
    optimizer.step()
    assert not same(model, before)


@pytest.mark.parametrize("make", [NPC, NPCAdamW, CPC, MAS])
def test_tensors_that_keep_their_numbers_in_others_are_refused_where_they_are_trained(make: Any) -> None:
    two_tensor = pytest.importorskip("torch.testing._internal.two_tensor")
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    model[0].weight = nn.Parameter(two_tensor.TwoTensor(torch.randn(8, 6), torch.randn(8, 6)))
    optimizer = make(model, lr=0.1)
    model(torch.randn(4, 6)).square().sum().backward()
    with refused(model[2], optimizer, ValueError, r"'0.weight' is of type TwoTensor, .* expected a plain tensor"):
        optimizer.step()


def test_state_dicts_of_other_architectures_are_refused_before_any_change() -> None:
    optimizer = NPC(paper_cnn(), lr=0.3)
    others = {
        r"importance for layer 'conv1' has shape \(9,\), expected \(8,\)": NPC(paper_cnn(channels=(9, 16))),
        r"parameter groups of \[10\] parameters, this optimizer has \[8\]": NPC(paper_cnn(channels=(8, 16, 4))),
        "has no importance; another optimizer than NPC saved it. Do not load it": torch.optim.SGD(
            paper_cnn().parameters()
        ),
    }
    for message, other in others.items():
        with pytest.raises(ValueError, match=message):
            optimizer.load_state_dict(other.state_dict())
    assert optimizer.param_groups[0]["lr"] == 0.3


def test_native_backend_is_refused_with_the_fix_where_there_are_no_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    missing = native.Native(None, "none", "no C++ compiler; install one")
    monkeypatch.setattr(native, "status", lambda: missing)
    native.module.cache_clear()
    try:
        fix = r"no C\+\+ compiler; install one\nFix that, or pass backend='reference'"
        with pytest.raises(native.NativeUnavailableError, match=fix):
            NPC(paper_cnn(), backend="native")
        model = paper_cnn()
        optimizer = NPC(model)
        with pytest.warns(RuntimeWarning, match="plain PyTorch is used instead"):
            train(model, optimizer, batches(1))
    finally:
        native.module.cache_clear()


def test_unknown_layers_are_answered_with_names_that_are_close() -> None:
    message = "no protected layer 'hiden'; close to it: 'hidden'"
    for optimizer in (NPC(paper_cnn()), CPC(paper_cnn())):
        with pytest.raises(KeyError, match=message):
            optimizer.plasticity()["hiden"]
    with pytest.raises(KeyError, match=message):
        NPC(paper_cnn()).constants("hiden")
    with pytest.raises(ValueError, match=r"'head', .*; there are 'conv1', 'conv2', 'hidden', 'output'"):
        NPC(paper_cnn(), layers={"head": {}})


def test_a_batch_dim_for_all_layers_of_a_model_with_convolutions_is_refused_with_entries_that_work() -> None:
    names = "'conv1', 'conv2'"
    entries = "'conv1': {'batch_dim': 0}, 'conv2': {'batch_dim': 0}"
    with pytest.raises(ValueError, match=rf"batch_dim is 1 for {names}, but .*: layers=\{{{entries}, \.\.\.\}}"):
        NPC(paper_cnn(), layers={"*": {"batch_dim": 1}})
    by_name = {"conv1": {"batch_dim": 0}, "conv2": {"batch_dim": 0}, "*": {"batch_dim": 1}}
    by_pattern = {"conv*": {"batch_dim": 0}, "*": {"batch_dim": 1}}
    for layers in (by_name, by_pattern, dict(reversed(by_name.items()))):
        neurons = NPC(paper_cnn(), layers=layers).neurons
        assert [layer.points[0].batch_dim for layer in neurons] == [0, 0, 1, 1]


@pytest.mark.parametrize("kind", [NPC, wrapped_adamw])
def test_a_step_without_any_measured_importance_raises_and_says_how_to_fix_it(kind: Any) -> None:
    model, data = paper_cnn(), batches(1)
    optimizer = kind(model)
    model.eval()
    with refused(model, optimizer, RuntimeError, r"no importance was measured.*call model.train\(\)"):
        train(model, optimizer, data)
    model.train()
    train(model, optimizer, data)


# ------------------------------------------------------------------------------------------------------------- warnings


def test_a_single_layer_that_was_not_measured_is_reported_once() -> None:
    model, data = paper_cnn(), batches(2)
    optimizer = NPC(model)
    model.pool1._forward_hooks.clear()
    with pytest.warns(
        ImportanceWarning, match="layer 'conv1' received gradients, but importance was not measured. Other code"
    ):
        train(model, optimizer, data[:1])
    train(model, optimizer, data[1:])  # the tests' settings turn a second warning into an error


def test_importance_that_is_not_finite_is_left_out_counted_and_reported_once() -> None:
    model, (x, y) = paper_cnn(), batches(1)[0]
    optimizer = NPC(model, lr=0.0)
    for expectation in (
        pytest.warns(ImportanceWarning, match="layer 'conv1' had an importance that is not finite"),
        warnings.catch_warnings(),
    ):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.neurons["conv1"].sink.grad[0] = torch.nan
        with expectation:
            optimizer.step()
    assert optimizer.plasticity()["conv1"].nonfinite_steps == 2
    assert not optimizer.plasticity()["conv1"].importance.any()
    assert optimizer.plasticity()["conv2"].importance.any()


def test_steps_that_train_another_model_are_warned_of() -> None:
    model = paper_cnn()
    optimizer = NPC(model)
    for _ in range(9):
        optimizer.step()
    train(model, optimizer, batches(1))  # one that learns: the count starts again
    optimizer.zero_grad()
    for _ in range(9):
        optimizer.step()
    with pytest.warns(ImportanceWarning, match="no parameter had a gradient in 10 steps in a row.*build the optimizer"):
        optimizer.step()


class SetTaskWithGELU(SetTask):
    """Its hidden layer has to be measured behind the GELU, which is the input of a head."""

    def forward(self, x: Tensor) -> Tensor:
        return self.heads[self.task](F.gelu(self.hidden(x)))


def test_a_body_that_is_measured_at_one_of_several_heads_is_warned_of_with_advice_that_works() -> None:
    advice = {"hidden": {"measure_at": "hidden"}}
    data = [(torch.randn(4, 6), torch.tensor([0, 1, 2, 0]))]
    model = SetTaskWithGELU()
    optimizer = NPC(model)
    model.task = 1
    with pytest.warns(ImportanceWarning, match=r"at the input of heads.0, .* one of several heads") as caught:
        train(model, optimizer, data)
    assert f"layers={advice}" in str(caught[0].message)
    model = SetTaskWithGELU()
    optimizer = NPC(model, layers=advice)
    model.task = 1
    train(model, optimizer, data)
    assert optimizer.plasticity()["hidden"].importance.any()


class Sentences(nn.Module):
    """Most of its weights are in no neuron."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.rnn, self.head = nn.Embedding(20, 8), nn.LSTM(8, 32), nn.Linear(32, 5)

    def forward(self, words: Tensor) -> Tensor:
        return self.head(self.rnn(self.words(words))[0])


def wrapped_sgd(model: nn.Module, **options: Any) -> PlasticityWrapper:
    """Warnings are attributed to its caller, so it is in this file."""
    return PlasticityWrapper(torch.optim.SGD(model.parameters(), lr=0.1), model, **options)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("make", [NPC, NPCAdamW, wrapped_sgd, CPC])
def test_models_that_are_hardly_protected_are_warned_of_once(make: Any) -> None:
    with pytest.warns(ImportanceWarning, match="only 3 % of .*: LSTM 'rnn': 94 %, Embedding 'words': 3 %") as caught:
        optimizer = make(Sentences())
    assert len(caught) == 1 and caught[0].filename == __file__
    assert "in protected layers: 165 of 5,701 trained elements (3 %)" in repr(optimizer)
    if make is not CPC:
        assert "in protected layers: 165 of 5,701 trained elements (3 %)" in str(optimizer.neurons)
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(3))]})
        assert "in protected layers: 165 of 5,704 trained" in repr(optimizer)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("make", [NPC, NPCAdamW, wrapped_sgd, CPC])
def test_what_is_unprotected_on_purpose_is_not_warned_of(make: Any) -> None:
    frozen = Sentences()
    frozen.words.requires_grad_(False)
    frozen.rnn.requires_grad_(False)
    layers = {"hidden": {"protect": False}, "output": {"protect": False}}
    assert "in protected layers: 1,248 of 3,658 trained elements (34 %)" in repr(make(paper_cnn(), layers=layers))
    assert "in protected layers: 165 of 165 trained elements (100 %)" in repr(make(frozen))
    if make is not wrapped_sgd:
        assert "in protected layers: 165 of 165 trained elements (100 %)" in repr(
            make(Sentences(), other_parameters="freeze")
        )


# ------------------------------------------------------------------------------------------------- tables and plots


def test_what_is_printed_names_every_layer() -> None:
    optimizer = NPC(paper_cnn())
    assert "in 66 neurons of 4 layers" in repr(optimizer)
    optimizer.neurons["conv1"].parameters[0].parameter.requires_grad_(False)
    assert "in 66 neurons of 4 layers" in repr(optimizer)  # its bias is trained
    optimizer.neurons["conv1"].parameters[1].parameter.requires_grad_(False)
    assert "in 58 neurons of 3 layers" in repr(optimizer)
    optimizer.neurons["conv1"].parameters[1].parameter.requires_grad_(True)
    for text in ("conv1", "output of pool1", "weight, bias", "fan-in"):
        assert text in str(optimizer.neurons)


def test_the_table_explains_its_terms_and_says_what_is_not_trained_or_not_measured() -> None:
    model = nn.Sequential(nn.Embedding(5, 6), nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4))
    optimizer = NPC(model)
    table = str(optimizer.neurons)
    assert "copied: the tap passes on a copy, because what follows may change the activation in place" in table
    assert (
        "in no neuron, so not protected; trained at the plain learning rate (other_parameters='freeze' keeps" in table
    )
    assert "detached" not in table and "detached" not in str(find_neurons(model))
    optimizer.neurons.detach()
    assert "detached: the taps have been removed from the model, so nothing is measured any more" in str(
        optimizer.neurons
    )
    assert "in no neuron, and not trained:" in str(NPC(model, other_parameters="freeze").neurons)


def test_a_layer_prints_no_weights() -> None:
    layer = NPC(nn.Sequential(nn.Linear(3, 4))).neurons["0"]
    assert "tensor" not in repr(layer) and "neurons=4" in repr(layer) and "name='0.weight'" in repr(layer)


def test_parameters_outside_of_the_model_are_in_the_table() -> None:
    model, head = nn.Linear(4, 3), nn.Linear(3, 2)
    optimizer = NPC(model)
    assert "not in the model" not in str(optimizer.neurons)
    optimizer.add_param_group({"params": head.parameters()})
    assert "not in the model, so not protected; trained at the plain learning rate: 2 parameters, 8 elements" in str(
        optimizer.neurons
    )


def test_the_table_says_which_layers_are_protected() -> None:
    def row(optimizer: Any, name: str) -> str:
        """The first line of the table that begins with a name."""
        return next(" ".join(line.split()) for line in str(optimizer.neurons).splitlines() if line.startswith(name))

    optimizer = NPC(paper_cnn(), layers={"output": {"protect": False}})
    assert row(optimizer, "output").endswith(
        "nowhere: protect=False, so it trains at the plain learning rate weight, bias"
    )
    model = nn.Sequential(nn.Embedding(5, 6), nn.Linear(6, 8), nn.Linear(8, 4), nn.Linear(4, 2))
    model[1].requires_grad_(False)
    optimizer = NPC(model, params=[model[1].weight, model[2].weight])
    assert "nowhere: none of its parameters requires a gradient weight, bias" in row(optimizer, "1")
    assert row(optimizer, "2").endswith("weight, bias (not trained)")
    assert row(optimizer, "3").endswith("nowhere: this optimizer trains none of its parameters weight, bias")
    assert row(optimizer, "  0.weight") == "0.weight embedding; not trained by this optimizer"
    assert "in protected layers: 32 of 32 trained elements (100 %)" in str(optimizer.neurons)
    again = copy.deepcopy(optimizer)
    assert str(again.neurons) == str(optimizer.neurons) == str(pickle.loads(pickle.dumps(optimizer)).neurons)


def test_plasticity_prints_a_table_with_a_row_for_each_layer() -> None:
    model = nn.Sequential(nn.Linear(13, 1200), nn.ReLU(), nn.Linear(1200, 4))
    optimizer = NPC(model)
    set_importance(optimizer, "2", torch.tensor([0.0, 0.25, 0.75, 2.0]))
    plasticity = optimizer.plasticity()
    assert (
        repr(plasticity)
        == """\
layer  neurons  frozen  importance  learning rate
-----  -------  ------  ----------  -------------
0      1,200    0%      0           0.1
2      4        50%     0 to 2      0 to 0.1"""
    )
    text = "LayerPlasticity(4 neurons, 50% frozen, importance 0 to 2, learning rate 0 to 0.1)"
    assert repr(plasticity["2"]) == text
    assert plasticity == dict(plasticity)
    assert repr(NPC(nn.Linear(3, 2)).plasticity()).splitlines()[2].startswith("(the model)  2")


def test_the_plasticity_of_connections_prints_a_table_also_of_layers_that_are_not_trained() -> None:
    model = nn.Sequential(nn.Linear(13, 300), nn.ReLU(), nn.Linear(300, 5))
    plasticity = CPC(model, params=model[0].parameters()).plasticity()
    assert (
        repr(plasticity)
        == """\
layer  connections  frozen  importance  learning rate
-----  -----------  ------  ----------  -------------
0      4,200        0%      0           0.1
2      0            0%      none        none"""
    )
    assert "(4,200 connections, 0% frozen, importance 0, learning rate 0.1)" in repr(plasticity["0"])


def test_plasticity_can_be_drawn(tmp_path: Path) -> None:
    model = paper_cnn()
    optimizer = NPC(model, delta=0.5)
    train(model, optimizer, batches(3))
    figure = plot_plasticity(optimizer)
    assert [axes.get_title().split("\n")[0] for axes in figure.axes[:4]] == ["conv1", "conv2", "hidden", "output"]
    figure.savefig(tmp_path / "plasticity.png")
    assert len(plot_plasticity(wrapped_sgd(model)).axes) == len(figure.axes)
