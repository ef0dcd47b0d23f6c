"""The examples run with the real libraries, learn, and resume where they stopped, to the last bit."""

from __future__ import annotations

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


def test_hugging_face_trainer(tmp_path: Path) -> None:
    pytest.importorskip("transformers", reason="transformers is not installed")
    pytest.importorskip("accelerate", reason="accelerate is not installed")
    from bench.examples import hugging_face

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

    from bench.examples import hugging_face

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
    from bench.examples import accelerated

    accuracy, optimizer = accelerated.train(3)
    assert accuracy > 0.9
    assert all(bool(one.any()) for one in importance(optimizer))


def test_lightning(tmp_path: Path) -> None:
    pytest.importorskip("lightning", reason="lightning is not installed")
    from bench.examples import lightning_module

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
