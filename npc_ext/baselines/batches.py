"""Batches of any form as tensors whose dimension 0 counts samples, and the model as a function of these tensors."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .._torch import tree_flatten, tree_unflatten

Together = Callable[[Sequence[Tensor]], Any]


@dataclass(frozen=True)
class Batch:
    """A batch taken apart.

    Attributes:
        tensors: the tensors in it; dimension 0 of each counts samples.
        targets: what stands beside the inputs, if anything.
        together: puts such tensors, of any number of samples, together to a batch again. None: the tensors are the
            model's arguments.
    """

    tensors: tuple[Tensor, ...]
    targets: Any
    together: Together | None

    @property
    def samples(self) -> int:
        """How many samples there are."""
        return self.tensors[0].shape[0]

    def first(self, count: int, device: torch.device) -> Batch:
        """The first samples, on a device."""
        targets = self.targets
        if isinstance(targets, Tensor) and targets.shape[:1] == self.tensors[0].shape[:1]:
            targets = targets[:count]
        return Batch(tuple(moved(tensor[:count], device) for tensor in self.tensors), targets, self.together)


class CalledWithSamples(nn.Module):
    """The model as a function of a batch's tensors. A module, so that torch.func can replace the model's parameters.

    Args:
        model: the network.
        call: how the user calls it with a batch. None: the batch's tensors are its arguments.
    """

    def __init__(self, model: nn.Module, call: Callable[[nn.Module, Any], Any] | None) -> None:
        super().__init__()
        if not isinstance(model, nn.Module):
            raise TypeError(f"model is of type {type(model).__name__}; expected a torch.nn.Module")
        if call is not None and not callable(call):
            raise TypeError(f"forward is of type {type(call).__name__}; expected a function of a model and a batch")
        self.model, self.call = model, call
        self._together: Together | None = None

    def batch(self, batch: Any) -> Batch:
        """Takes a batch apart. From now on the model is called with samples of batches like it."""
        if self.call is None:
            return Batch(*_inputs_and_targets(batch), None)
        tensors, self._together = _taken_apart(batch)
        return Batch(tensors, None, self._together)

    def batches(self, batches: Iterable[Any], samples: int | None, device: torch.device) -> Iterator[Batch]:
        """Takes batches apart until there are enough samples (None: to the end); leaves out empty ones."""
        left = samples
        for each in batches:
            batch = self.batch(each)
            count = batch.samples if left is None else min(batch.samples, left)
            if count == 0:
                continue
            yield batch.first(count, device)
            if left is not None:
                left -= count
                if left == 0:
                    return

    def forward(self, *tensors: Tensor) -> Any:
        """What the model returns."""
        if self.call is not None and self._together is not None:
            return self.call(self.model, self._together(tensors))
        try:
            return self.model(*tensors)
        except TypeError:
            _check_takes(self.model, tensors)
            raise


def moved(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on a device, usable in autograd."""
    # The CPU would read a copy that has not arrived.
    copy = tensor.to(device, non_blocking=device.type == "cuda")
    # Autograd takes no tensors made in inference mode, but copies of them made outside.
    return copy.clone() if copy.is_inference() else copy


def _inputs_and_targets(batch: Any) -> tuple[tuple[Tensor, ...], Any]:
    inputs, targets = batch, None
    if isinstance(batch, (tuple, list)):
        # The roles of more than two elements are not guessed.
        inputs, targets = (*batch, None)[:2] if len(batch) in (1, 2) else (None, None)
    tensors = (inputs,) if isinstance(inputs, Tensor) else inputs
    if not isinstance(tensors, (tuple, list)) or not all(isinstance(tensor, Tensor) for tensor in tensors):
        raise TypeError(
            f"a batch is {_described(batch)}; expected inputs, (inputs,) or (inputs, targets), where inputs are a "
            f"tensor or a tuple of tensors. Say how to call the model with it: {_example_of_forward(batch)}"
        )
    _check_shapes(tensors)
    return tuple(tensors), targets


def _taken_apart(batch: Any) -> tuple[tuple[Tensor, ...], Together]:
    """The tensors of a batch of any form, and a function that puts others in their place."""
    if isinstance(batch, Mapping):  # also those of a class that torch does not look into
        batch = dict(batch)
    leaves, structure = tree_flatten(batch)
    places = [index for index, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
    tensors = tuple(leaves[place] for place in places)
    if not tensors:
        raise TypeError(
            f"a batch is {_described(batch)}, in which there are no tensors; expected tensors, or tuples, lists or "
            "dictionaries of them"
        )
    _check_shapes(tensors)

    def together(others: Sequence[Tensor]) -> Any:
        whole = list(leaves)
        for place, tensor in zip(places, others, strict=True):
            whole[place] = tensor
        return tree_unflatten(whole, structure)

    return tensors, together


def _check_takes(model: nn.Module, inputs: Sequence[Tensor]) -> None:
    """After a call of the model failed: raises TypeError if it needs other arguments."""
    try:
        signature = inspect.signature(model.forward)
    except (TypeError, ValueError):  # of a forward that is not Python
        return
    try:
        signature.bind(*inputs)
    except TypeError as error:
        raise TypeError(
            f"{type(model).__name__} takes {signature}, but is called with the {len(inputs)} inputs of a batch "
            f"({error}). Say how to call it: forward=lambda model, batch: model(batch[0], ...)"
        ) from None


def _check_shapes(tensors: Sequence[Tensor]) -> None:
    shapes = [tuple(tensor.shape) for tensor in tensors]
    if not shapes or any(len(shape) == 0 or shape[0] != shapes[0][0] for shape in shapes):
        raise ValueError(
            f"a batch has inputs of shapes {', '.join(map(str, shapes)) or '(none)'}; expected tensors whose "
            "dimension 0 counts the same samples"
        )


def _example_of_forward(batch: Any) -> str:
    if isinstance(batch, Mapping):
        return "forward=lambda model, batch: model(**batch).logits, or whichever entries it takes"
    return "forward=lambda model, batch: model(batch[0], batch[1]), or whichever elements it takes"


def _described(batch: Any) -> str:
    if isinstance(batch, (tuple, list)):
        kinds = ", ".join(type(element).__name__ for element in batch[:4])
        return f"a {type(batch).__name__} of {len(batch)} ({kinds})"
    return f"a {type(batch).__name__}"
