"""NPC in Lightning: `configure_optimizers` returns it, and a callback logs plasticity.

Run `python -m examples.lightning_module` in the checkout.
It needs `pip install lightning scikit-learn`.

>>> class Classifier(lightning.LightningModule):
...     def configure_optimizers(self):
...         return NPC(self, lr=0.1)
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from npc_ext import NPC, check_capacity

try:
    import lightning
    from sklearn.datasets import load_digits
except ImportError as error:
    sys.exit(f"{error}; this example needs: pip install lightning scikit-learn")


class Classifier(lightning.LightningModule):
    """A network that learns digits with NPC."""

    def __init__(self) -> None:
        super().__init__()
        self.network = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1),
            nn.InstanceNorm2d(16),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(256, 64),
            nn.ReLU(),
            nn.Linear(64, 10),
        )

    def forward(self, images: Tensor) -> Tensor:
        """(B, 1, 8, 8) to (B, 10)."""
        outputs: Tensor = self.network(images)
        return outputs

    def training_step(self, batch: Any, index: int) -> Tensor:
        """The loss of a batch."""
        images, labels = batch
        outputs = self(images)
        self.log(
            "accuracy",
            (outputs.argmax(1) == labels).float().mean(),
            on_step=False,
            on_epoch=True,
        )
        return F.cross_entropy(outputs, labels)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """NPC on the whole module, which Lightning has already moved to its device."""
        return NPC(self, lr=0.1, half_life=500)


class LogPlasticity(lightning.Callback):
    """Logs frozen shares and mean importance after every epoch, and warns."""

    def on_train_epoch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule
    ) -> None:
        """Called by Lightning."""
        for optimizer in trainer.optimizers:
            if hasattr(optimizer, "plasticity"):
                check_capacity(optimizer)
                for name, layer in optimizer.plasticity().items():
                    pl_module.log(f"frozen/{name}", layer.frozen)
                    pl_module.log(f"importance/{name}", layer.importance.mean())


def train(
    folder: Path, epochs: int, *, resume_from: Path | None = None, **options: Any
) -> lightning.Trainer:
    """Trains, saving a checkpoint after every epoch; returns Lightning's trainer."""
    torch.manual_seed(0)
    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32).unsqueeze(1) / 16
    loader = DataLoader(TensorDataset(images, torch.tensor(data.target)), batch_size=16)
    trainer = lightning.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        devices=1,
        default_root_dir=str(folder),
        callbacks=[LogPlasticity()],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )
    trainer.fit(
        Classifier(),
        loader,
        ckpt_path=None if resume_from is None else str(resume_from),
        weights_only=True,
    )
    return trainer


def main() -> None:
    """Trains and prints what was logged."""
    parser = argparse.ArgumentParser(
        prog="python -m examples.lightning_module", description=__doc__
    )
    parser.add_argument(
        "--epochs", type=int, default=5, help="passes over the data (default 5)"
    )
    with TemporaryDirectory() as folder:
        trainer = train(Path(folder), parser.parse_args().epochs)
    for name, value in trainer.logged_metrics.items():
        print(f"{name}: {value:.3f}")


if __name__ == "__main__":
    main()
