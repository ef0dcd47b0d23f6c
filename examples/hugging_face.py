"""NPC in the Hugging Face `Trainer`: a tiny Llama learns to repeat a text.

Run `python -m examples.hugging_face` in the checkout.
It needs `pip install transformers accelerate`.

>>> options = {"model": model, "lr": 0.05}
>>> trainer = Trainer(model, arguments, optimizer_cls_and_kwargs=(NPC, options), ...)
>>> trainer = Trainer(model, arguments, optimizers=(NPC(**options), None), ...)

In the first form the Trainer builds the optimizer when the model is on its device. In
the second form, move the model there first. Neither works with `model_init`, which
builds a new model for every trial. `arguments.learning_rate` and weight decay are not
passed on. Schedules, `max_grad_norm`, accumulation and resuming work as usual. With
several processes, add `process_group=torch.distributed.group.WORLD`.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from npc_ext import NPC, check_capacity

try:
    import accelerate  # noqa: F401  # the Trainer imports it when it is built
    from transformers import (
        LlamaConfig,
        LlamaForCausalLM,
        Trainer,
        TrainerCallback,
        TrainingArguments,
    )
except ImportError as error:
    sys.exit(f"{error}; this example needs: pip install transformers accelerate")

TEXT = (
    "Neural networks forget: trained on a second task, they overwrite "
    "what the first one taught them. "
)
LENGTH = 32


class WatchCapacity(TrainerCallback):
    """Warns about full layers at the end of each epoch."""

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Called by the Trainer, which passes its optimizer."""
        check_capacity(kwargs["optimizer"].optimizer)  # Accelerate's wrapper holds ours


def tiny_llama() -> LlamaForCausalLM:
    """A Llama with 30 thousand weights that reads bytes."""
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=128,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=LENGTH,
        )
    )


def samples() -> list[dict[str, torch.Tensor]]:
    """Pieces of the text, in the form that the Trainer expects."""
    codes = torch.tensor(list((TEXT * 20).encode()))[: 48 * LENGTH].view(-1, LENGTH)
    return [{"input_ids": piece, "labels": piece} for piece in codes]


def train(
    folder: Path,
    steps: int,
    *,
    by_the_trainer: bool = False,
    resume_from: Path | None = None,
) -> Trainer:
    """Trains, saving a checkpoint every ten steps; returns the Trainer."""
    model = tiny_llama()
    arguments = TrainingArguments(
        str(folder),
        max_steps=steps,
        per_device_train_batch_size=8,
        gradient_accumulation_steps=2,
        max_grad_norm=1.0,
        save_steps=10,
        logging_steps=10,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    options: dict[str, Any] = {"lr": 0.5, "half_life": 70}
    how: dict[str, Any] = {"optimizers": (NPC(model, **options), None)}
    if by_the_trainer:
        how = {"optimizer_cls_and_kwargs": (NPC, {"model": model, **options})}
    trainer = Trainer(
        model, arguments, train_dataset=samples(), callbacks=[WatchCapacity()], **how
    )
    trainer.train(
        resume_from_checkpoint=None if resume_from is None else str(resume_from)
    )
    return trainer


def main() -> None:
    """Trains and prints the loss and the plasticity of all layers."""
    parser = argparse.ArgumentParser(
        prog="python -m examples.hugging_face", description=__doc__
    )
    parser.add_argument(
        "--steps", type=int, default=40, help="optimizer steps (default 40)"
    )
    steps = parser.parse_args().steps
    with TemporaryDirectory() as folder:
        optimizer: Any = train(Path(folder), steps).optimizer
        for name, layer in optimizer.optimizer.plasticity().items():
            print(
                f"{name}: mean importance {layer.importance.mean():.2f}, "
                f"{layer.frozen:.0%} frozen"
            )


if __name__ == "__main__":
    main()
