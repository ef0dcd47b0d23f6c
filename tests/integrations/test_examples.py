"""The examples run with the real libraries, learn, and resume where they stopped, bit for bit."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from npc_ext import NPC, PlasticityWrapper


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


def importance(optimizer: Any) -> list[torch.Tensor]:
    return [layer.importance for layer in optimizer.plasticity().values()]


def example(name: str, *packages: str) -> Any:
    """Imports an example; skips the test if a package that it needs is missing."""
    for package in packages:
        pytest.importorskip(package, reason=f"{package} is not installed")
    return importlib.import_module(f"examples.{name}")


@pytest.fixture
def hugging_face() -> Any:
    return example("hugging_face", "transformers", "accelerate")


@pytest.fixture
def lightning_module() -> Any:
    return example("lightning_module", "lightning")


def test_hugging_face_trainer(tmp_path: Path, hugging_face: Any) -> None:
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


def test_hugging_face_trainer_with_a_wrapped_optimizer(tmp_path: Path, hugging_face: Any) -> None:
    from transformers import Trainer, TrainingArguments

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
    accuracy, optimizer = example("accelerated", "accelerate").train(3)
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
def test_lightning_clips_gradients_under_mixed_precision(tmp_path: Path, lightning_module: Any, precision: str) -> None:
    from lightning.pytorch.plugins import MixedPrecision

    options: dict[str, Any] = {"precision": precision}
    if precision == "16-mixed":  # for which Lightning makes a scaler on GPUs only
        options = {"plugins": [MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=2.0**8))]}
    trainer = lightning_module.train(tmp_path, 1, gradient_clip_val=1.0, **options)
    assert trainer.logged_metrics["accuracy"] > 0.7
    assert all(bool(one.any()) for one in importance(trainer.optimizers[0]))


def test_lightning(tmp_path: Path, lightning_module: Any) -> None:
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
