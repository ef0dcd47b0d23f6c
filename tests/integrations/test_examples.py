"""The examples run with the real libraries, learn, and resume where they stopped, bit for bit."""

from __future__ import annotations

import ast
import importlib
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from npc_ext import NPC, ImportanceWarning, PlasticityWrapper

from ..training import importances, same

pytestmark = pytest.mark.slow  # these libraries take seconds to import
ROOT = Path(__file__).resolve().parents[2]


def all_measured(optimizer: Any) -> bool:
    return all(bool(importance.any()) for importance in importances(optimizer))


def example(name: str, *packages: str) -> Any:
    """Imports an example; skips the test if a package that it needs is missing."""
    for package in packages:
        pytest.importorskip(package, reason=f"{package} is not installed")
    return importlib.import_module(f"examples.{name}")


# Names on the package index, where they differ from the modules'.
INDEX = {"sklearn": "scikit-learn", "avalanche": "avalanche-lib"}
EXAMPLES = sorted(path.stem for path in (ROOT / "examples").glob("[a-z]*.py") if path.stem != "digits")


def source_of(name: str) -> str:
    return (ROOT / "examples" / f"{name}.py").read_text()


def packages_of(name: str, *, itself: bool = False) -> set[str]:
    """The packages that an example imports, itself or through examples.digits, by their names on the index."""
    tree = ast.parse(source_of(name))
    modules = {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    modules |= {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    tops = {module.partition(".")[0] for module in modules} - {*sys.stdlib_module_names, "torch", "npc_ext", "examples"}
    packages = {INDEX.get(top, top) for top in tops}
    if "torch.utils.tensorboard" in modules:
        packages.add("tensorboard")
    if "examples.digits" in modules and not itself:
        packages |= packages_of("digits")
    return packages


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_says_how_to_run_it_and_what_it_needs(name: str) -> None:
    description = " ".join((ast.get_docstring(ast.parse(source_of(name))) or "").split())
    assert f"Run `python -m examples.{name}`" in description
    needed = re.search(r"It needs `pip install ([\w -]+)`", description)
    assert needed and set(needed[1].split()) == packages_of(name)
    advised = re.search(r"this example needs: pip install ([\w -]+)", source_of(name))
    assert advised[1] == needed[1] if advised else not packages_of(name, itself=True)


def test_the_extras_have_what_the_examples_need() -> None:
    project = (ROOT / "pyproject.toml").read_text()
    for name in EXAMPLES:
        extra = "avalanche" if name.startswith("avalanche") else "trainers"
        (listed,) = re.findall(rf"^{extra} = \[(.*)\]$", project, re.MULTILINE)
        assert packages_of(name) <= set(re.findall(r'"([\w-]+)"', listed)), extra


OF_ONE_LIBRARY = ("accelerated", "avalanche_strategy", "hugging_face", "lightning_module")


@pytest.mark.parametrize(
    ("name", "way"),
    [(name, way) for name in OF_ONE_LIBRARY for way in ("-m", "by path")] + [("digits", "-m"), ("tensorboard", "-m")],
)
def test_a_missing_package_is_one_sentence(name: str, way: str) -> None:
    modules = {distribution: module for module, distribution in INDEX.items()}
    run = f"run_module('examples.{name}'" if way == "-m" else f"run_path('examples/{name}.py'"
    for package in packages_of(name, itself=True):
        blocked = modules.get(package, package)
        script = f"import runpy, sys; sys.modules[{blocked!r}] = None; runpy.{run}, run_name='__main__')"
        # Other packages warn while they are imported, as Avalanche's do of missing solvers.
        command = [sys.executable, "-W", "ignore", "-c", script]
        result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        assert result.returncode == 1
        (sentence,) = result.stderr.strip().splitlines()
        assert "; this example needs: pip install " in sentence and package in sentence


@pytest.fixture
def hugging_face() -> Any:
    return example("hugging_face", "transformers", "accelerate")


@pytest.fixture
def lightning_module() -> Any:
    return example("lightning_module", "lightning", "sklearn")


def test_hugging_face_trainer(tmp_path: Path, hugging_face: Any) -> None:
    whole = hugging_face.train(tmp_path / "whole", 20)
    losses = [entry["loss"] for entry in whole.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0] - 0.5
    by_the_trainer = hugging_face.train(tmp_path / "own", 20, by_the_trainer=True)
    resumed = hugging_face.train(tmp_path / "resumed", 20, resume_from=tmp_path / "whole" / "checkpoint-10")
    for other in (by_the_trainer, resumed):
        assert isinstance(other.optimizer.optimizer, NPC)
        assert same(whole.model, other.model)
        assert same(importances(whole.optimizer.optimizer), importances(other.optimizer.optimizer))
    assert all_measured(whole.optimizer.optimizer)


def test_hugging_face_trainer_with_a_wrapped_optimizer(tmp_path: Path, hugging_face: Any) -> None:
    from transformers import Trainer, TrainingArguments

    options = {"max_steps": 8, "save_steps": 4, "report_to": [], "use_cpu": True, "disable_tqdm": True}
    models = []
    for name, resume_from in (("whole", None), ("resumed", str(tmp_path / "whole" / "checkpoint-4"))):
        model = hugging_face.tiny_llama()
        optimizer = PlasticityWrapper(torch.optim.AdamW(model.parameters(), lr=1e-3), model, delta=0.9)
        arguments = TrainingArguments(str(tmp_path / name), save_total_limit=3, **options)
        trainer = Trainer(model, arguments, train_dataset=hugging_face.samples(), optimizers=(optimizer, None))
        trainer.train(resume_from_checkpoint=resume_from)
        models.append(model)
        assert all_measured(optimizer)
    assert same(*models)


@pytest.mark.parametrize(
    "options",
    [{"bf16": True}, {"gradient_checkpointing": True}, {"torch_compile": True, "torch_compile_backend": "aot_eager"}],
    ids=lambda options: next(iter(options)),
)
def test_hugging_face_trainer_with_options(tmp_path: Path, hugging_face: Any, options: dict[str, Any]) -> None:
    from transformers import Trainer, TrainingArguments

    importance = []
    for chosen in ({}, options):
        model = hugging_face.tiny_llama()
        arguments = TrainingArguments(
            str(tmp_path), max_steps=3, save_strategy="no", report_to=[], use_cpu=True, disable_tqdm=True, **chosen
        )
        how = (NPC, {"model": model, "lr": 0.1, "half_life": 70})
        trainer = Trainer(model, arguments, train_dataset=hugging_face.samples(), optimizer_cls_and_kwargs=how)
        trainer.train()
        importance.append(torch.cat(list(importances(trainer.optimizer.optimizer))))
    plain, with_option = importance
    if "bf16" in options:
        assert (with_option - plain).norm() < 0.05 * plain.norm() and not torch.equal(with_option, plain)
    else:
        torch.testing.assert_close(with_option, plain, rtol=1e-3, atol=1e-6)


def test_hugging_face_trainer_resumes_an_adapter(tmp_path: Path, hugging_face: Any) -> None:
    from transformers import Trainer, TrainingArguments

    peft = pytest.importorskip("peft", reason="peft is not installed")
    models, optimizers = [], []
    for name, resume_from in (("whole", None), ("resumed", str(tmp_path / "whole" / "checkpoint-2"))):
        config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"])
        model = peft.get_peft_model(hugging_face.tiny_llama(), config)
        arguments = TrainingArguments(
            str(tmp_path / name), max_steps=4, save_steps=2, report_to=[], use_cpu=True, disable_tqdm=True
        )
        how = (NPC, {"model": model, "lr": 0.1, "half_life": 70})
        trainer = Trainer(model, arguments, train_dataset=hugging_face.samples(), optimizer_cls_and_kwargs=how)
        trainer.train(resume_from_checkpoint=resume_from)
        models.append(model)
        optimizers.append(trainer.optimizer.optimizer)
    assert same(*models) and same(*map(importances, optimizers))
    assert any(importance.any() for importance in importances(optimizers[0]))


def test_hugging_face_trainers_of_several_tasks_share_an_optimizer(tmp_path: Path, hugging_face: Any) -> None:
    from transformers import Trainer, TrainerCallback, TrainingArguments

    class Rates(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            rates.append(kwargs["optimizer"].param_groups[0]["lr"])

    rates: list[float] = []
    model = hugging_face.tiny_llama()
    optimizer = NPC(model, lr=0.5, half_life=70)
    importance = []
    for task in range(2):
        arguments = TrainingArguments(
            str(tmp_path / str(task)), max_steps=3, save_strategy="no", report_to=[], use_cpu=True, disable_tqdm=True
        )
        data, callbacks = hugging_face.samples(), [Rates()]
        Trainer(model, arguments, train_dataset=data, optimizers=(optimizer, None), callbacks=callbacks).train()
        importance.append(float(torch.cat(list(importances(optimizer))).sum()))
    assert rates[:3] == rates[3:] and rates[-1] == 0  # each Trainer starts a new schedule
    assert importance[1] > importance[0] * 1.5


def test_accelerate() -> None:
    accuracy, optimizer = example("accelerated", "accelerate", "sklearn").train(3)
    assert accuracy > 0.9
    assert all_measured(optimizer)


def test_accelerate_does_not_hide_that_a_new_optimizer_loses_the_importance_of_the_earlier_one() -> None:
    accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")
    accelerator = accelerate.Accelerator(cpu=True)
    model = accelerator.prepare(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)))

    def train(optimizer: Any) -> None:
        accelerator.backward(model(torch.randn(5, 4)).square().sum())
        optimizer.step()
        optimizer.zero_grad()

    first = accelerator.prepare(NPC(model))
    train(first)
    second = accelerator.prepare(NPC(model))
    with pytest.warns(ImportanceWarning, match="an earlier NPC of this model held the importance of '0', '2'"):
        train(second)
    train(accelerator.prepare(NPC(model).load_importance(first)))


def test_accelerate_says_which_steps_were_skipped() -> None:
    accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")
    accelerator = accelerate.Accelerator(cpu=True)
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=4.0)  # which it makes for mixed_precision="fp16"
    model = accelerator.prepare(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)))
    optimizer = accelerator.prepare(NPC(model, delta=0.5))
    skipped = []
    for factor in (1.0, float("inf"), 1.0):
        before = [*map(torch.clone, model.parameters()), *importances(optimizer.optimizer)]
        accelerator.backward(model(torch.randn(5, 4)).square().sum() * factor)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        after = [*model.parameters(), *importances(optimizer.optimizer)]
        assert optimizer.step_was_skipped is same(before, after)
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
    assert all_measured(trainer.optimizers[0])


def test_lightning_takes_importance_over_from_fit_to_fit(tmp_path: Path, lightning_module: Any) -> None:
    import lightning

    class Learner(lightning_module.Classifier):  # type: ignore[misc, name-defined]
        optimizer: Any = None

        def configure_optimizers(self) -> Any:
            self.optimizer = NPC(self, lr=0.1, half_life=500).load_importance(self.optimizer)
            return self.optimizer

    def fit(model: Any) -> float:
        data = torch.utils.data.TensorDataset(torch.randn(64, 1, 8, 8), torch.randint(10, (64,)))
        trainer = lightning.Trainer(
            max_epochs=1, accelerator="cpu", devices=1, logger=False, enable_checkpointing=False, precision="bf16-true"
        )
        trainer.fit(model, torch.utils.data.DataLoader(data, batch_size=16))
        return float(torch.cat(list(importances(trainer.optimizers[0]))).sum())

    model = Learner()
    assert fit(model) * 1.5 < fit(model)
    plain = lightning_module.Classifier()
    fit(plain)
    with pytest.warns(ImportanceWarning, match="an earlier NPC of this model held the importance of"):
        fit(plain)


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
    assert same(importances(whole.optimizers[0]), importances(resumed.optimizers[0]))
    assert all_measured(whole.optimizers[0])
