"""In Avalanche, importance is kept from experience to experience, also in layers that grow."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from npc_ext import NPC, ImportanceWarning, NPCAdamW, PlasticityWrapper

try:
    import avalanche.training.plugins  # noqa: F401
except Exception as error:  # torchvision's RuntimeError, where it does not fit torch
    pytest.skip(f"Avalanche cannot be imported: {type(error).__name__}: {error}", allow_module_level=True)

from avalanche.benchmarks import benchmark_from_datasets
from avalanche.benchmarks.scenarios.supervised import with_classes_timeline
from avalanche.benchmarks.utils import as_classification_dataset
from avalanche.models import IncrementalClassifier
from avalanche.training.plugins import EvaluationPlugin, SupervisedPlugin
from avalanche.training.supervised import Naive

from examples import avalanche_strategy
from npc_ext.avalanche import PlasticityPlugin


def grown_by_classes(optimizer_of: Any, probes: list[Any]) -> Any:
    """Classes 0 and 1, then 2 and 3, by one output layer that Avalanche enlarges."""
    generator = torch.Generator().manual_seed(0)
    experiences = []
    for classes in ((0, 1), (2, 3)):
        labels = torch.tensor(classes).repeat(20)
        samples: Any = torch.utils.data.TensorDataset(torch.randn(40, 8, generator=generator), labels)
        samples.targets = labels.tolist()
        experiences.append(as_classification_dataset(samples))
    stream = with_classes_timeline(benchmark_from_datasets(train=experiences)).train_stream
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), IncrementalClassifier(16, 2))
    strategy = Naive(
        model=model,
        optimizer=optimizer_of(model),
        train_mb_size=8,
        train_epochs=2,
        plugins=[PlasticityPlugin(), *probes],
        evaluator=EvaluationPlugin(),
    )
    for experience in stream:
        strategy.train(experience)
    return strategy


AVALANCHE_OPTIMIZERS = {
    "NPC": lambda model: NPC(model, lr=0.1, delta=0.9, momentum=0.9),
    "NPCAdamW": lambda model: NPCAdamW(model, lr=0.01, delta=0.9),
    "wrapper": lambda model: PlasticityWrapper(torch.optim.AdamW(model.parameters(), lr=0.01), model, delta=0.9),
    "two groups": lambda model: NPC(
        model, lr=0.1, params=[{"params": model[0].parameters()}, {"params": model[2].parameters(), "lr": 0.05}]
    ),
}


def test_avalanche_example_learns_and_measures_all_heads() -> None:
    accuracies, strategy = avalanche_strategy.train(avalanche_strategy.npc, [PlasticityPlugin()], 4)
    assert min(accuracies) > 0.8
    heads = [f"classifier.classifiers.{task}.classifier" for task in range(5)]
    plasticity = strategy.optimizer.plasticity()
    assert list(plasticity) == ["features.0", "features.2", *heads]
    assert all(bool(layer.importance.any()) for layer in plasticity.values())
    assert len(strategy.optimizer.param_groups) == 1


@pytest.mark.parametrize("kind", AVALANCHE_OPTIMIZERS)
def test_avalanche_keeps_importance_and_momentum_of_layers_that_grow(kind: str) -> None:
    before: list[Any] = []
    after: list[Any] = []

    class Probe(SupervisedPlugin):
        def state(self, strategy: Any) -> Any:
            optimizer = strategy.optimizer
            momenta = {
                name: {key: value.clone() for key, value in optimizer.state[parameter].items() if key != "importance"}
                for name, parameter in strategy.model.named_parameters()
            }
            return {name: layer.importance for name, layer in optimizer.plasticity().items()}, momenta

        def after_training_exp(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
            before.append(self.state(strategy))

        def before_training_exp(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
            after.append(self.state(strategy))

    optimizers: list[Any] = []

    def optimizer_of(model: nn.Module) -> Any:
        optimizers.append(AVALANCHE_OPTIMIZERS[kind](model))
        return optimizers[-1]

    strategy = grown_by_classes(optimizer_of, [Probe()])
    assert strategy.optimizer is optimizers[0]
    (importance_before, momenta_before), (importance_after, momenta_after) = before[0], after[1]
    assert torch.equal(importance_before["0"], importance_after["0"]) and bool(importance_before["0"].any())
    old, grown = importance_before["2.classifier"], importance_after["2.classifier"]
    assert bool(old.any()) and torch.equal(grown, torch.cat([old, torch.zeros(2)]))
    for name, states in momenta_before.items():
        assert states.keys() == momenta_after[name].keys()
        for key, value in states.items():
            now = momenta_after[name][key]
            assert torch.equal(now[tuple(map(slice, value.shape))], value), (name, key)
            assert now.shape == value.shape or not bool(now[len(value) :].any())
    (importance_now, _), weights = before[1], strategy.model[2].classifier.weight
    assert bool((importance_now["2.classifier"][2:] > 0).any())
    assert (
        sum(any(parameter is weights for parameter in group["params"]) for group in strategy.optimizer.param_groups)
        == 1
    )
    assert strategy.optimizer.state_dict()["param_groups"][-1]["lr"] == strategy.optimizer.param_groups[-1]["lr"]


def test_avalanche_trains_what_grew_in_the_middle_of_an_experience() -> None:
    measured = []

    class EvaluatesUnseenClasses(SupervisedPlugin):
        def after_training_epoch(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
            strategy.model[2].adaptation(SimpleNamespace(classes_in_this_experience=[2, 3]))

        def after_backward(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
            trained = {id(parameter) for group in strategy.optimizer.param_groups for parameter in group["params"]}
            assert {id(parameter) for parameter in strategy.model.parameters()} == trained
            measured.append(strategy.optimizer.neurons["2.classifier"].sink.grad.numel())

    grown_by_classes(AVALANCHE_OPTIMIZERS["NPC"], [EvaluatesUnseenClasses()])
    assert measured == [2] * 5 + [4] * 15


def test_avalanche_layer_that_is_replaced_by_another_one_begins_anew() -> None:
    importance = []

    class Replaces(SupervisedPlugin):
        def after_train_dataset_adaptation(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
            if strategy.clock.train_exp_counter:
                strategy.model[0] = nn.Linear(8, 16)

        def before_training_exp(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
            importance.append(strategy.optimizer.plasticity())

    with pytest.warns(ImportanceWarning, match=r"'0.weight', '0.bias': replaced by parameters"):
        strategy = grown_by_classes(AVALANCHE_OPTIMIZERS["NPC"], [Replaces()])
    assert not bool(importance[1]["0"].importance.any()) and bool(importance[1]["2.classifier"].importance.any())
    assert bool(strategy.optimizer.plasticity()["0"].importance.any())


def test_avalanche_plugin_says_what_does_not_fit() -> None:
    class Replaces(SupervisedPlugin):
        def before_training_epoch(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
            strategy.optimizer = torch.optim.SGD(strategy.model.parameters(), lr=0.1)

    with pytest.raises(TypeError, match="SGD, which measures no neurons"):
        grown_by_classes(lambda model: torch.optim.SGD(model.parameters(), lr=0.1), [])
    with pytest.raises(ValueError, match="another model"):
        grown_by_classes(lambda _: NPC(nn.Linear(2, 2)), [])
    with pytest.raises(RuntimeError, match="replaced by another SGD"):
        grown_by_classes(AVALANCHE_OPTIMIZERS["NPC"], [Replaces()])
