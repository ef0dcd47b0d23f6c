"""Training and testing on one task. Samples stay on the device, and no step waits for the device.

Every batch is whole. A smaller batch at the end of an epoch would count as much as the others and be far noisier: the
gradient of four samples can be so large that one step destroys what was learned.

Order, crops and flips of an epoch are drawn at once by a generator on the CPU, so that they are the same on every
machine. One gather then cuts a batch out of the padded images.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..cases import tf32
from .tasks import Task

Step = Callable[[Tensor], None]


@dataclass(frozen=True)
class Augmentation:
    """Random crops of images that are padded with `padding` black pixels, and horizontal flips."""

    padding: int = 0
    flip: bool = False


@dataclass(frozen=True)
class Machine:
    """Where and how to compute. `bf16` and `tf32` change the arithmetic; the other fields only change the speed."""

    device: str = "cpu"
    bf16: bool = False
    tf32: bool = False
    channels_last: bool = False
    cuda_graph: bool = False

    @property
    def precision(self) -> str:
        """The name of the arithmetic."""
        return "bf16" if self.bf16 else "tf32" if self.tf32 else "float32"

    def autocast(self) -> AbstractContextManager[object]:
        """Autocast to bfloat16, or nothing."""
        return torch.autocast(torch.device(self.device).type, torch.bfloat16) if self.bf16 else nullcontext()

    def memory_format(self) -> torch.memory_format:
        """The layout of images and of convolutions' weights."""
        return torch.channels_last if self.channels_last else torch.contiguous_format


class Batches:
    """A task's training samples in batches of `batch_size`, epoch by epoch.

    Passes over all samples, in random order and with augmentation, follow each other without a gap and are cut into
    batches. Samples that an epoch has beyond its last batch count towards the next epoch.
    """

    def __init__(
        self,
        task: Task,
        *,
        batch_size: int,
        generator: torch.Generator,
        epoch_samples: int | None = None,
        augmentation: Augmentation | None = None,
    ) -> None:
        """Prepares the images.

        Args:
            task: the task to draw samples from.
            batch_size: number of samples in every batch.
            generator: a generator on the CPU, for order, crops and flips.
            epoch_samples: number of samples in an epoch (default: as many as the task has).
            augmentation: crops and flips (default: none).
        """
        augmentation = augmentation or Augmentation()
        self.task, self.batch_size = task, batch_size
        self._augmentation, self._generator = augmentation, generator
        self._epoch_samples = epoch_samples or len(task.train_labels)
        self._due = 0  # samples left from earlier epochs, fewer than a batch
        self._pass = torch.empty(0, dtype=torch.int64)  # what is left of the current pass
        _, channels, self._height, self._width = task.train_images.shape
        device = task.train_images.device
        # Padding all images once makes a crop a plain gather.
        self._padded = F.pad(task.train_images, (augmentation.padding,) * 4)
        self._channels = torch.arange(channels, device=device).view(1, -1, 1, 1)
        self._rows = torch.arange(self._height, device=device).view(1, 1, -1, 1)
        self._columns = torch.arange(self._width, device=device).view(1, 1, 1, -1)

    def epoch(self) -> tuple[Tensor, ...]:
        """The batches of the next epoch, to be passed to `images_and_labels`. Empty if too few samples are left."""
        steps, self._due = divmod(self._due + self._epoch_samples, self.batch_size)
        return self._draw(steps * self.batch_size).split(self.batch_size) if steps else ()

    def _draw(self, count: int) -> Tensor:
        """Draws the next samples: (count, 4) int64 of sample, first row, first column, and whether it is flipped."""
        generator, available = self._generator, len(self.task.train_labels)
        passes = [
            torch.randperm(available, generator=generator) for _ in range(-(-(count - len(self._pass)) // available))
        ]
        order = torch.cat([self._pass, *passes])
        self._pass = order[count:]
        drawn = torch.zeros(count, 4, dtype=torch.int64)
        drawn[:, 0] = order[:count]
        if self._augmentation.padding:
            places = 2 * self._augmentation.padding + 1
            drawn[:, 1:3] = torch.randint(places, (count, 2), generator=generator)
        if self._augmentation.flip:
            drawn[:, 3] = torch.randint(2, (count,), generator=generator)
        return drawn.to(self._padded.device)

    def images_and_labels(self, drawn: Tensor) -> tuple[Tensor, Tensor]:
        """A batch: standardized images (B, C, H, W) float32, and labels (B,)."""
        sample, top, left, flipped = drawn.view(-1, 4, 1, 1, 1).unbind(1)
        columns = torch.where(flipped.bool(), self._width - 1 - self._columns, self._columns)
        images = self._padded[sample, self._channels, top + self._rows, left + columns]
        index = drawn[:, 0]
        mean, std = (value if len(value) == 1 else value[index] for value in (self.task.mean, self.task.std))
        return (images - mean) / std, self.task.train_labels[index]


def loss_of(outputs: Tensor, labels: Tensor, task: Task) -> Tensor:
    """Cross-entropy over the outputs of the task's own classes (task-incremental learning).

    Args:
        outputs: (B, outputs), the network's outputs.
        labels: (B,) int64, among the task's classes.
        task: the task whose classes compete.
    """
    if task.rivals is not None:
        return F.cross_entropy(outputs.masked_fill(~task.rivals[labels], -torch.inf), labels)
    return F.cross_entropy(outputs[:, task.outputs], labels - task.classes[0])


def steps_of(epochs: int, epoch_samples: int, batch_size: int) -> int:
    """The number of steps in some epochs. Raises ValueError if it is zero."""
    if epochs * epoch_samples < batch_size:
        raise ValueError(
            f"batch_size is {batch_size}, but a task is learned with {epochs * epoch_samples} samples in all "
            f"({epochs} x {epoch_samples}); expected at least one batch"
        )
    return epochs * epoch_samples // batch_size


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Batches,
    *,
    epochs: int,
    machine: Machine | None = None,
    on_epoch: Callable[[float], None] = lambda loss: None,
) -> tuple[int, float]:
    """Trains a model on one task; returns the number of steps and their seconds. Stops if parameters are NaN.

    Args:
        model: the network, on the task's device.
        optimizer: the optimizer of its parameters.
        batches: batches of the task. A later call with the same object continues where this one ends.
        epochs: number of epochs.
        machine: how to compute (default: in float32 on the task's device).
        on_epoch: called with the mean loss of every epoch; this waits for the device.
    """
    task = batches.task
    machine = machine or Machine(str(task.train_labels.device))
    total = torch.zeros((), device=task.train_labels.device)
    model.train()

    def step(drawn: Tensor) -> None:
        images, labels = batches.images_and_labels(drawn)
        optimizer.zero_grad()
        with machine.autocast():
            loss = loss_of(model(images.contiguous(memory_format=machine.memory_format())), labels, task)
        loss.backward()
        optimizer.step()
        total.add_(loss.detach())

    run_step = _graph_of(step) if machine.cuda_graph and total.is_cuda else step
    steps, seconds = 0, 0.0
    with tf32(machine.tf32):
        for _ in range(epochs):
            started = time.perf_counter()
            epoch = batches.epoch()
            for drawn in epoch:
                run_step(drawn)
            mean_loss = total.item() / len(epoch) if epoch else math.nan
            total.zero_()
            seconds += time.perf_counter() - started
            steps += len(epoch)
            on_epoch(mean_loss)
            if not math.isfinite(mean_loss) and not is_finite(model):
                break
    return steps, seconds


def is_finite(model: nn.Module) -> bool:
    """Whether all parameters are finite."""
    return all(bool(parameter.isfinite().all()) for parameter in model.parameters())


def _graph_of(step: Step) -> Step:
    """Returns the step as a CUDA graph.

    The first three steps run eagerly on another stream, which is the warm-up that a capture needs.
    """
    graph, stream, seen = torch.cuda.CUDAGraph(), torch.cuda.Stream(), 0
    static: Tensor | None = None

    def run(drawn: Tensor) -> None:
        nonlocal static, seen
        seen += 1
        if seen <= 3:
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                step(drawn)
            torch.cuda.current_stream().wait_stream(stream)
            return
        if static is None:
            static = drawn.clone()
            with torch.cuda.graph(graph):
                step(static)
        static.copy_(drawn)
        graph.replay()

    return run


@torch.no_grad()
def accuracy_of(model: nn.Module, task: Task, machine: Machine | None = None, batch_size: int = 1000) -> float:
    """The share of test images that are classified correctly among the task's classes."""
    machine = machine or Machine(str(task.train_labels.device))
    training = model.training
    model.eval()
    right = torch.zeros((), dtype=torch.int64, device=task.test_labels.device)
    with tf32(machine.tf32), machine.autocast():
        for images, labels in zip(task.test_images.split(batch_size), task.test_labels.split(batch_size), strict=True):
            chosen = model(standard(images, task, machine))[:, task.outputs].argmax(1)
            right += (chosen == labels - task.classes[0]).sum()
    model.train(training)
    return right.item() / len(task.test_labels)


def standard(images: Tensor, task: Task, machine: Machine) -> Tensor:
    """Standardized images of a single task."""
    return ((images - task.mean) / task.std).contiguous(memory_format=machine.memory_format())
