"""Means over samples of a nonlinear function of each sample's gradient.

torch.func computes the gradients of a chunk of samples at once, by vmap over grad of the model called with one sample.
Models that it cannot run are differentiated sample by sample.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.parameter import UninitializedParameter
from torch.utils.data import Dataset, IterableDataset

from .._torch import direct_buffers, version_of
from .._warn import warn
from ..optim.options import check_choice
from ..reference import compute_dtype
from .batches import Batch, CalledWithSamples, moved

# The default limit for the gradients of a chunk, in bytes.
CHUNK_BYTES = 512 * 2**20

# A number to differentiate, of a sample's outputs (1, ...) and further tensors of that sample, each (1, ...).
Term = Callable[..., Tensor]
# The terms of a batch, and the further tensors of all its samples.
TermsOfBatch = tuple[list[Term], tuple[Tensor, ...]]
# Makes them from the outputs of a first sample and a batch.
Terms = Callable[[Tensor, Batch], TermsOfBatch]


class NonFiniteImportanceError(ValueError):
    """A measured importance is not finite, for example because training diverged."""


@dataclass(frozen=True)
class Sampling:
    """Which samples are measured, and how; the options of `npc_ext.baselines.consolidation.fisher`."""

    batches: Iterable[Any]
    forward: Callable[[nn.Module, Any], Any] | None
    outputs: Callable[[Any], Tensor] | None
    samples: int | None
    chunk_size: int | None
    progress: bool

    def check(self) -> None:
        """Raises TypeError or ValueError if an option is of another kind or out of range."""
        batches, outputs = self.batches, self.outputs
        if isinstance(batches, Tensor):
            raise TypeError("batches is a tensor; expected an iterable of batches: for a single one write [inputs]")
        if isinstance(batches, Mapping):
            raise TypeError(
                f"batches is of type {type(batches).__name__}; expected an iterable of batches: for a single one write "
                "[batch]"
            )
        if isinstance(batches, tuple) and all(isinstance(part, Tensor) for part in batches):
            raise TypeError(
                "batches is a tuple of tensors; expected an iterable of batches: for a single one write [(x, y)]"
            )
        if isinstance(batches, Dataset) and not isinstance(batches, IterableDataset):
            raise TypeError(
                f"batches is of type {type(batches).__name__}, which yields single samples; expected batches: "
                "torch.utils.data.DataLoader(dataset, batch_size=64)"
            )
        # Sequences of the old protocol have no __iter__.
        if not hasattr(batches, "__iter__") and not hasattr(batches, "__getitem__"):
            raise TypeError(
                f"batches is of type {type(batches).__name__}; expected an iterable of batches, such as a DataLoader"
            )
        if outputs is not None and not callable(outputs):
            raise TypeError(
                f"outputs is {outputs!r}; expected a function that picks outputs, as in lambda y: y[:, 2:4]"
            )
        for name, value in (("samples", self.samples), ("chunk_size", self.chunk_size)):
            if value is None:
                continue
            if not isinstance(value, Integral) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} is {value!r}; expected an integer of at least 1, or None")
        check_choice("progress", self.progress, (True, False))


def mean_over_samples(
    model: nn.Module,
    parameters: Iterable[Tensor] | None,
    sampling: Sampling,
    terms: Terms,
    magnitude: Callable[[Tensor], Tensor],
    description: str,
) -> dict[Tensor, Tensor]:
    """The mean over samples of sum over terms of magnitude(d term / d theta), for each parameter theta.

    Args:
        model: the network.
        parameters: the parameters to measure. None: all of the model's.
        sampling: the samples.
        terms: what to differentiate.
        magnitude: an elementwise function of a sample's gradient.
        description: the label of the progress bar.
    """
    called = CalledWithSamples(model, sampling.forward)
    sampling.check()
    trained = _trained_parameters(model, parameters)
    device = next(iter(trained.values())).device
    chunk_size = sampling.chunk_size or _default_chunk_size(trained)
    # Data loaders draw from the default generator. Training must not see that.
    random = torch.random.fork_rng([device] if device.type == "cuda" else [])
    # Gradients are computed explicitly; no graph may grow through parameters that are not measured.
    with torch.inference_mode(False), _evaluating(model), random, torch.no_grad():
        importance = Importance(called, trained, sampling.outputs, magnitude)
        batches = _with_progress(sampling.batches, description, sampling.progress)
        for batch in called.batches(batches, sampling.samples, device):
            importance.add_batch(batch, terms, chunk_size)
    return importance.mean()


class Importance:
    """Adds up magnitudes of single samples' gradients.

    Args:
        called: the model.
        trained: the parameters to measure, by name.
        outputs: picks the outputs that count.
        magnitude: an elementwise function of a sample's gradient.
    """

    def __init__(
        self,
        called: CalledWithSamples,
        trained: dict[str, Tensor],
        outputs: Callable[[Any], Tensor] | None,
        magnitude: Callable[[Tensor], Tensor],
    ) -> None:
        self._called, self._trained, self._outputs, self._magnitude = called, trained, outputs, magnitude
        self._model_name = type(called.model).__name__
        self._values = {name: parameter.detach() for name, parameter in trained.items()}
        self._sums = {
            name: torch.zeros_like(value, dtype=compute_dtype(value.dtype), requires_grad=False)
            for name, value in self._values.items()
        }
        self._samples = 0
        self._outputs_of_first: Tensor | None = None
        self._at_once = self._unchecked = True

    def add_batch(self, batch: Batch, terms: Terms, chunk_size: int) -> None:
        """Adds a batch's samples, chunk by chunk."""
        is_first = self._outputs_of_first is None
        if self._outputs_of_first is None:
            self._outputs_of_first = self._outputs_that_depend([tensor[:1] for tensor in batch.tensors])
        functions, others = terms(self._outputs_of_first, batch)
        others = tuple(moved(tensor, batch.tensors[0].device) for tensor in others)
        if is_first:
            with torch.enable_grad():
                outputs = self._outputs_of_first.detach().requires_grad_().clone()  # a loss may change it in place
                _check_one_number(functions[0](outputs, *(tensor[:1] for tensor in others)))
        for start in range(0, batch.samples, chunk_size):
            chunk = slice(start, start + chunk_size)
            for function in functions:
                self.add(function, [tensor[chunk] for tensor in batch.tensors], [tensor[chunk] for tensor in others])
        self._samples += batch.samples

    def add(self, term: Term, inputs: list[Tensor], others: list[Tensor]) -> None:
        """Adds a chunk's samples; each of the tensors is (chunk, ...)."""
        if not self._at_once:
            self._add_one_by_one(term, inputs, others)
            return
        failure = self._add_at_once(term, inputs, others)
        if failure is None:
            return
        self._at_once = False
        # If the model cannot run at all, this raises the error that helps, and there is nothing to warn of.
        self._add_one_by_one(term, inputs, others)
        reason = str(failure).strip().split("\n")[0]
        warn(
            f"torch.func cannot run {self._model_name} for many samples at once, so they are taken "
            f"one by one, which is slower ({type(failure).__name__}: {reason[:300]})",
        )

    def mean(self) -> dict[Tensor, Tensor]:
        """The sums divided by the number of samples.

        Raises:
            ValueError: there are no samples.
            NonFiniteImportanceError: a sum is not finite.
        """
        if self._samples == 0:
            raise ValueError("batches has no samples; expected at least one (a generator can be read only once)")
        for name, total in self._sums.items():
            total /= self._samples
            if not bool(total.isfinite().all()):
                wrong = int((~total.isfinite()).sum())
                raise NonFiniteImportanceError(
                    f"the importance of parameter {name!r} is not finite in {wrong} of {total.numel()} elements: "
                    "the model's outputs or their gradients are nan or infinite, or overflow when squared (training "
                    "may have diverged; with implicit=False it does if lr * strength is too large)"
                )
        if not any(bool(total.any()) for total in self._sums.values()):
            warn(
                "the importance of every parameter is zero, so nothing will be kept: the outputs do not change with "
                "the parameters in any of the samples (outputs that are zero, or probabilities that are exactly 1)",
            )
        return {parameter: self._sums[name] for name, parameter in self._trained.items()}

    def _outputs_that_depend(self, inputs: list[Tensor]) -> Tensor:
        """The outputs for a sample. Raises ValueError if they depend on none of the parameters."""
        with torch.enable_grad():
            outputs = self._picked(self._called(*inputs))
        if all(gradient is None for gradient in self._gradients(outputs)):
            raise ValueError(
                f"the outputs of {self._model_name} depend on none of the {len(self._trained)} parameters to "
                "measure: a forward pass under no_grad or with detach, outputs=... that picks what is constant, or "
                "parameters of a part that is not used"
            )
        return outputs.detach()

    def _gradients(self, outputs: Tensor) -> tuple[Tensor | None, ...]:
        """The gradient of the sum of outputs with respect to each parameter; None where it is not used."""
        if not outputs.requires_grad:
            return (None,) * len(self._trained)
        with torch.enable_grad():
            return torch.autograd.grad(outputs.sum(), list(self._trained.values()), allow_unused=True)

    def _picked(self, outputs: Any) -> Tensor:
        """The outputs that count, (1, ...), in float32 or float64: squares of halves overflow and underflow."""
        try:
            picked = outputs if self._outputs is None else self._outputs(outputs)
        except IndexError as error:
            of_shape = f", of shape {tuple(outputs.shape)}" if isinstance(outputs, Tensor) else ""
            raise IndexError(
                f"the function outputs=... failed for what the model returned for one sample{of_shape}: {error}. "
                "Dimension 0 counts samples; to pick classes write outputs=lambda y: y[:, [2, 3]]"
            ) from error
        if not isinstance(picked, Tensor) or not picked.is_floating_point():
            got = f"a tensor of {picked.dtype}" if isinstance(picked, Tensor) else f"a {type(picked).__name__}"
            if self._outputs is not None:
                what = "outputs returned"
            else:
                what = "the model returned" if self._called.call is None else "forward returned"
            raise TypeError(f"{what} {got}; expected a floating-point tensor: pick one with outputs=lambda y: ...")
        if not picked.numel():
            what = "the model returned" if self._outputs is None else "outputs picked"
            raise ValueError(
                f"{what} nothing for one sample: a tensor of shape {tuple(picked.shape)}. Dimension 0 counts samples; "
                "to pick classes write outputs=lambda y: y[:, [2, 3]]"
            )
        return picked.to(compute_dtype(picked.dtype))

    def _add_at_once(self, term: Term, inputs: list[Tensor], others: list[Tensor]) -> Exception | None:
        """Adds a chunk with torch.func. Returns its error if it fails; then nothing was added."""

        def of_one_sample(values: dict[str, Tensor], inputs: list[Tensor], others: list[Tensor]) -> Tensor:
            outputs = self._outputs_with(values, [tensor.unsqueeze(0) for tensor in inputs])
            return term(outputs, *(tensor.unsqueeze(0) for tensor in others)).reshape(())

        try:
            if self._unchecked:
                self._check_replaceable([tensor[:1] for tensor in inputs])
                self._unchecked = False
            of_samples = vmap(grad(of_one_sample), in_dims=(None, 0, 0), randomness="different")
            gradients = of_samples(self._values, inputs, others)
        except torch.OutOfMemoryError:  # a smaller chunk_size helps, a loop does not
            raise
        except Exception as failure:
            return failure
        for name, total in self._sums.items():
            total += self._magnitude(gradients.pop(name).to(total.dtype)).sum(0)
        return None

    def _outputs_with(self, values: dict[str, Tensor], inputs: list[Tensor]) -> Tensor:
        """The outputs that count with other values in place of the model's parameters."""
        if self._called.call is None:
            return self._picked(functional_call(self._called.model, values, tuple(inputs)))
        values = {f"model.{name}": value for name, value in values.items()}
        return self._picked(functional_call(self._called, values, tuple(inputs)))

    def _check_replaceable(self, inputs: list[Tensor]) -> None:
        """Raises if the model reaches a parameter in another way than by name, so torch.func cannot replace it."""
        with torch.enable_grad():
            outputs = self._outputs_with(self._values, inputs)
        for name, gradient in zip(self._trained, self._gradients(outputs), strict=True):
            if gradient is not None:
                raise RuntimeError(f"the forward pass takes parameter {name!r} from elsewhere than the module's own")

    def _add_one_by_one(self, term: Term, inputs: list[Tensor], others: list[Tensor]) -> None:
        for index in range(inputs[0].shape[0]):
            sample = slice(index, index + 1)
            with torch.enable_grad():
                outputs = self._picked(self._called(*(tensor[sample] for tensor in inputs)))
                value = term(outputs, *(tensor[sample] for tensor in others)).reshape(())
            for total, gradient in zip(self._sums.values(), self._gradients(value), strict=True):
                if gradient is not None:
                    total += self._magnitude(gradient.to(total.dtype))


# -------------------------------------------------------------------------------------------------------------- checks


def _check_one_number(value: Any) -> None:
    if not isinstance(value, Tensor) or value.numel() != 1:
        got = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
        raise ValueError(f"loss returned {got} for one sample; expected one number: reduce it, for example by sum()")
    if not value.requires_grad:
        raise ValueError(
            "loss returned a number that does not depend on the outputs, so it has no gradient; expected one computed "
            "from them, without detach() or no_grad()"
        )


def _trained_parameters(model: nn.Module, parameters: Iterable[Tensor] | None) -> dict[str, Tensor]:
    """Those of `parameters` that require a gradient, by name."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    if isinstance(parameters, Tensor):
        raise TypeError("parameters is a tensor; expected an iterable of the model's parameters: write [parameter]")
    trained: dict[str, Tensor] = {}
    for index, parameter in enumerate(model.parameters() if parameters is None else parameters):
        if not isinstance(parameter, Tensor):
            raise TypeError(
                f"parameters[{index}] is of type {type(parameter).__name__}; expected a parameter of the model"
            )
        if id(parameter) not in names:
            raise ValueError(
                f"parameters[{index}], of shape {tuple(parameter.shape)}, is no parameter of the model "
                f"({type(model).__name__}); was the model replaced, or wrapped by a copy?"
            )
        name = names[id(parameter)]
        if isinstance(parameter, UninitializedParameter):
            raise ValueError(f"parameter {name!r} is not initialized yet: pass one batch through the model first")
        if parameter.is_complex():
            raise ValueError(f"parameter {name!r} is complex ({parameter.dtype}); expected real parameters")
        if parameter.requires_grad and parameter.is_inference():
            raise ValueError(
                f"parameter {name!r} was created under torch.inference_mode(), so it has no gradient; create and load "
                "the model outside of that mode"
            )
        if parameter.requires_grad:
            trained[name] = parameter
    if not trained:
        raise ValueError("no parameter requires a gradient, so there is nothing to measure")
    return trained


def _default_chunk_size(trained: dict[str, Tensor]) -> int:
    bytes_per_sample = sum(parameter.numel() * parameter.element_size() for parameter in trained.values())
    return max(1, CHUNK_BYTES // max(bytes_per_sample, 1))


# -------------------------------------------------------------------------------------------------------- surroundings


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Puts every module in evaluation mode; afterwards restores modes and buffers, module by module.

    Flags are set one by one, because users may override `model.eval()` and `model.train()`: to keep some modules in a
    mode, or to do more (LoRA layers merge weights).
    """
    modules = [(module, module.training) for module in model.modules()]
    buffers = [
        (module, name, buffer, None if buffer.is_inference() else version_of(buffer), buffer.clone())
        for module, _ in modules
        for name, buffer in direct_buffers(module).items()
        if buffer is not None
    ]
    # cuDNN's recurrent layers have a backward pass in training mode only.
    is_recurrent = any(isinstance(module, nn.RNNBase) for module, _ in modules)
    with torch.backends.cudnn.flags(enabled=False) if is_recurrent else nullcontext():
        try:
            for module, _ in modules:
                module.training = False
            for module, name, _, version, values in buffers:
                if version is None:  # made in inference mode: autograd takes a copy only
                    direct_buffers(module)[name] = values
            yield
        finally:
            for module, training in modules:
                module.training = training
            for module, name, buffer, version, values in buffers:
                direct_buffers(module)[name] = buffer
                if version is not None and version_of(buffer) != version:
                    with torch.no_grad():
                        buffer.copy_(values)


def _with_progress(batches: Iterable[Any], description: str, progress: bool) -> Iterable[Any]:
    if not progress or sys.stderr is None or not sys.stderr.isatty():
        return batches
    try:
        from tqdm.auto import tqdm
    except ImportError:
        return batches
    bar: Iterable[Any] = tqdm(batches, desc=description, unit="batch", leave=False, dynamic_ncols=True)
    return bar
