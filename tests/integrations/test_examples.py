"""The examples run with the real libraries, learn, and resume where they stopped, to the last bit."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from npc_ext import NPC, ImportanceWarning, NPCAdamW, PlasticityWrapper


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


def importance(optimizer: Any) -> list[torch.Tensor]:
    return [layer.importance for layer in optimizer.plasticity().values()]


def test_hugging_face_trainer(tmp_path: Path) -> None:
    pytest.importorskip("transformers", reason="transformers is not installed")
    pytest.importorskip("accelerate", reason="accelerate is not installed")
    from examples import hugging_face

    whole = hugging_face.train(tmp_path / "whole", 20)
    losses = [entry["loss"] for entry in whole.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0] - 0.5
    by_the_trainer = hugging_face.train(tmp_path / "own", 20, by_the_trainer=True)
    resumed = hugging_face.train(tmp_path / "resumed", 20, resume_from=tmp_path / "whole" / "checkpoint-10")
    for other in (by_the_trainer, resumed):
        assert isinstance(other.optimizer.optimizer, NPC)
        assert same(whole.model, other.model)
        pairs = zip(importance(whole.optimizer.optimizer), importance(other.optimizer.optimizer), strict=True)
        assert all(torch.equal(p, q) and bool(p.any()) for p, q in pairs)


def test_hugging_face_trainer_with_a_wrapped_optimizer(tmp_path: Path) -> None:
    pytest.importorskip("transformers", reason="transformers is not installed")
    pytest.importorskip("accelerate", reason="accelerate is not installed")
    from transformers import Trainer, TrainingArguments

    from examples import hugging_face

    models = []
    for resume_from in (None, tmp_path / "whole" / "checkpoint-4"):
        model = hugging_face.tiny_llama()
        optimizer = PlasticityWrapper(torch.optim.AdamW(model.parameters(), lr=1e-3), model, delta=0.9)
        folder = str(tmp_path / ("whole" if resume_from is None else "resumed"))
        arguments = TrainingArguments(
            folder, max_steps=8, save_steps=4, report_to=[], use_cpu=True, disable_tqdm=True, save_total_limit=3
        )
        trainer = Trainer(model, arguments, train_dataset=hugging_face.samples(), optimizers=(optimizer, None))
        trainer.train(resume_from_checkpoint=None if resume_from is None else str(resume_from))
        models.append(model)
        assert any(bool(one.any()) for one in importance(optimizer))
    assert same(*models)


def test_accelerate() -> None:
    pytest.importorskip("accelerate", reason="accelerate is not installed")
    from examples import accelerated

    accuracy, optimizer = accelerated.train(3)
    assert accuracy > 0.9
    assert all(bool(one.any()) for one in importance(optimizer))


def test_accelerate_says_which_steps_were_skipped() -> None:
    accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")
    accelerator = accelerate.Accelerator(cpu=True)
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=4.0)  # which it makes for mixed_precision="fp16"
    model = accelerator.prepare(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)))
    optimizer = accelerator.prepare(NPC(model, delta=0.5))
    skipped = []
    for factor in (1.0, float("inf"), 1.0):
        before = [*map(torch.clone, model.parameters()), *importance(optimizer.optimizer)]
        accelerator.backward(model(torch.randn(5, 4)).square().sum() * factor)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        after = [*model.parameters(), *importance(optimizer.optimizer)]
        assert optimizer.step_was_skipped is all(map(torch.equal, before, after))
        skipped.append(optimizer.step_was_skipped)
        optimizer.zero_grad()
    assert skipped == [False, True, False]


@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed"])
def test_lightning_clips_gradients_under_mixed_precision(tmp_path: Path, precision: str) -> None:
    pytest.importorskip("lightning", reason="lightning is not installed")
    from lightning.pytorch.plugins import MixedPrecision

    from examples import lightning_module

    options: dict[str, Any] = {"precision": precision}
    if precision == "16-mixed":  # for which Lightning makes a scaler on GPUs only
        options = {"plugins": [MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=2.0**8))]}
    trainer = lightning_module.train(tmp_path, 1, gradient_clip_val=1.0, **options)
    assert trainer.logged_metrics["accuracy"] > 0.7
    assert all(bool(one.any()) for one in importance(trainer.optimizers[0]))


def test_lightning(tmp_path: Path) -> None:
    pytest.importorskip("lightning", reason="lightning is not installed")
    from examples import lightning_module

    whole = lightning_module.train(tmp_path, 3)
    assert whole.logged_metrics["accuracy"] > 0.9
    assert {"frozen/network.0", "importance/network.7"} <= whole.logged_metrics.keys()
    first = lightning_module.train(tmp_path / "first", 1)
    assert first.checkpoint_callback is not None
    path = Path(first.checkpoint_callback.best_model_path)  # type: ignore[attr-defined]
    resumed = lightning_module.train(tmp_path / "resumed", 3, resume_from=path)
    assert whole.model is not None and resumed.model is not None
    assert same(whole.model, resumed.model)
    for p, q in zip(importance(whole.optimizers[0]), importance(resumed.optimizers[0]), strict=True):
        assert torch.equal(p, q) and bool(p.any())


def needs_avalanche() -> None:
    try:
        import avalanche.training.plugins  # noqa: F401
    except Exception as error:  # torchvision's RuntimeError, where it does not fit torch
        pytest.skip(f"Avalanche cannot be imported: {type(error).__name__}: {error}")


def grown_by_classes(optimizer_of: Any, probes: list[Any]) -> Any:
    """Classes 0 and 1, then 2 and 3, by one output layer that Avalanche enlarges."""
    from avalanche.benchmarks import benchmark_from_datasets
    from avalanche.benchmarks.scenarios.supervised import with_classes_timeline
    from avalanche.benchmarks.utils import as_classification_dataset
    from avalanche.models import IncrementalClassifier
    from avalanche.training.plugins import EvaluationPlugin
    from avalanche.training.supervised import Naive

    from npc_ext.avalanche import PlasticityPlugin

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
    needs_avalanche()
    from examples import avalanche_strategy
    from npc_ext.avalanche import PlasticityPlugin

    accuracies, strategy = avalanche_strategy.train(avalanche_strategy.npc, [PlasticityPlugin()], 4)
    assert min(accuracies) > 0.8
    heads = [f"classifier.classifiers.{task}.classifier" for task in range(5)]
    plasticity = strategy.optimizer.plasticity()
    assert list(plasticity) == ["features.0", "features.2", *heads]
    assert all(bool(layer.importance.any()) for layer in plasticity.values())
    assert len(strategy.optimizer.param_groups) == 1


@pytest.mark.parametrize("kind", AVALANCHE_OPTIMIZERS)
def test_avalanche_keeps_importance_and_momentum_of_layers_that_grow(kind: str) -> None:
    needs_avalanche()
    from avalanche.training.plugins import SupervisedPlugin

    before: list[Any] = []
    after: list[Any] = []

    class Probe(SupervisedPlugin):
        def state(self, strategy: Any) -> Any:
            optimizer = strategy.optimizer
            momenta = {
                name: {key: value.clone() for key, value in optimizer.state[one].items() if key != "importance"}
                for name, one in strategy.model.named_parameters()
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
    assert sum(any(one is weights for one in group["params"]) for group in strategy.optimizer.param_groups) == 1
    assert strategy.optimizer.state_dict()["param_groups"][-1]["lr"] == strategy.optimizer.param_groups[-1]["lr"]


def test_avalanche_trains_what_grew_in_the_middle_of_an_experience() -> None:
    needs_avalanche()
    from avalanche.training.plugins import SupervisedPlugin

    measured = []

    class EvaluatesUnseenClasses(SupervisedPlugin):
        def after_training_epoch(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
            strategy.model[2].adaptation(SimpleNamespace(classes_in_this_experience=[2, 3]))

        def after_backward(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
            trained = {id(one) for group in strategy.optimizer.param_groups for one in group["params"]}
            assert {id(one) for one in strategy.model.parameters()} == trained
            measured.append(strategy.optimizer.neurons["2.classifier"].sink.grad.numel())

    grown_by_classes(AVALANCHE_OPTIMIZERS["NPC"], [EvaluatesUnseenClasses()])
    assert measured == [2] * 5 + [4] * 15


def test_avalanche_layer_that_is_replaced_by_another_one_begins_anew() -> None:
    needs_avalanche()
    from avalanche.training.plugins import SupervisedPlugin

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
    needs_avalanche()
    from avalanche.training.plugins import SupervisedPlugin

    class Replaces(SupervisedPlugin):
        def before_training_epoch(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
            strategy.optimizer = torch.optim.SGD(strategy.model.parameters(), lr=0.1)

    with pytest.raises(TypeError, match="SGD, which measures no neurons"):
        grown_by_classes(lambda model: torch.optim.SGD(model.parameters(), lr=0.1), [])
    with pytest.raises(ValueError, match="another model"):
        grown_by_classes(lambda _: NPC(nn.Linear(2, 2)), [])
    with pytest.raises(RuntimeError, match="replaced by another SGD"):
        grown_by_classes(AVALANCHE_OPTIMIZERS["NPC"], [Replaces()])
