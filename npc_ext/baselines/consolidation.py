"""How important every weight was to a task: what EWC, MAS and SSL measure once, at the task's end.

Both importances are means over samples of something that is not linear in a sample's own gradient g,

    Fisher information (EWC)     F = 1/M sum over m of g_m ** 2,   g_m = d log p(y_m | x_m) / d theta
    output sensitivity (MAS)     W = 1/M sum over m of |g_m|,      g_m = d ||f(x_m)||^2 / d theta

so the gradient of a batch's mean does not do: its square has the products of different samples in it, which are of
either sign. Every sample's own gradient is needed. torch.func computes those of a chunk of samples at once, by
vmap over grad of the model called with one sample.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional as F
from torch.nn.parameter import UninitializedParameter
from torch.utils.data import Dataset, IterableDataset

from .._torch import own_buffers, tree_flatten, tree_unflatten, version_of
from .._warn import warn

_LABELS = ("sampled", "data", "exact")
# What the gradients of one chunk may occupy by default, in bytes.
_CHUNK_BYTES = 512 * 2**20


class NonFiniteImportanceError(ValueError):
    """What was measured is not finite, as where training diverges."""


# What is differentiated for a sample: of its outputs (1, ...), and whatever else belongs to it, each (1, ...).
_Term = Callable[..., Tensor]
# How the user calls the model with a batch.
_UserForward = Callable[[nn.Module, Any], Any]


@dataclass(frozen=True)
class _Batch:
    """A batch: its tensors, with a dimension 0 that counts samples, and how to call the model with them."""

    tensors: tuple[Tensor, ...]
    targets: Any
    # Puts the batch together again, of as many samples as the tensors have. None: they are the model's arguments.
    of: Callable[[Sequence[Tensor]], Any] | None

    @property
    def samples(self) -> int:
        return self.tensors[0].shape[0]

    def first(self, count: int, device: torch.device) -> _Batch:
        """The first samples, on a device."""
        targets = self.targets
        if isinstance(targets, Tensor) and targets.shape[:1] == self.tensors[0].shape[:1]:
            targets = targets[:count]
        return _Batch(tuple(_moved(tensor[:count], device) for tensor in self.tensors), targets, self.of)


def _moved(tensor: Tensor, device: torch.device) -> Tensor:
    moved = tensor.to(device, non_blocking=True)
    # Autograd takes no tensors made in inference mode, but copies of them made outside.
    return moved.clone() if moved.is_inference() else moved


def fisher(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    parameters: Iterable[Tensor] | None = None,
    outputs: Callable[[Any], Tensor] | None = None,
    labels: Literal["sampled", "data", "exact"] = "sampled",
    loss: Callable[[Tensor, Any], Tensor] | None = None,
    forward: Callable[[nn.Module, Any], Any] | None = None,
    samples: int | None = None,
    chunk_size: int | None = None,
    generator: torch.Generator | None = None,
    progress: bool = True,
) -> dict[Tensor, Tensor]:
    """The diagonal of the Fisher information: the mean over samples of (d log p(y|x) / d theta) ** 2.

    It is the weight of EWC's quadratic anchor: Kirkpatrick et al., "Overcoming catastrophic forgetting in neural
    networks", PNAS 2017, eq. 3. The model is measured as it is used: in evaluation mode (no dropout, batch norm by its
    running statistics). Modes and buffers are then put back module by module, also after an error; no parameter's
    gradient is touched, and torch's default random number generators are put back, too.

    Args:
        model: the network; its dimension 0 counts samples. It is called with batches of one.
        batches: a DataLoader, or any iterable. A batch is the inputs, or (inputs,), or (inputs, targets); inputs are a
            tensor (B, ...), or a tuple or list of such tensors, the model's positional arguments. Moved to the device
            of the model. For any other batch, pass `forward`.
        parameters: those to measure, all of the model's by default. Those that do not require a gradient are left out.
        outputs: picks what counts of what the model returns for one sample, (1, ...): for one task's classes
            `lambda y: y[:, classes]`.
        labels: where y comes from. "sampled": drawn from the model's own p(y|x), once for each sample: the Fisher
            information, without bias, for one backward pass. "exact": the mean over all classes instead of a draw, for
            a pass per class. "data": the targets given. That is the "empirical Fisher", which is neither the Fisher
            information nor a curvature (Kunstner et al., NeurIPS 2019): it vanishes with the loss where the model fits
            its data, and is largest for samples that the model gets wrong. Many implementations of EWC use it; it is
            not the default as EWC's derivation asks for the Fisher information. Outputs are (B, C), the logits of p,
            except with "data".
        loss: for "data", the negative log-likelihood of one sample: loss(outputs (1, ...), target (1, ...)) -> one
            number. Default: cross-entropy, where targets count within the outputs picked by `outputs`. With `forward`
            it is called with the batch instead of a target, loss(outputs, batch), and there is no default.
        forward: how to call the model with a batch of one sample: forward(model, batch) -> the model's outputs. A batch
            is then whatever the loader gives: a dictionary, tuple or list, nested or not. Dimension 0 of every tensor
            in it counts samples; everything else is handed on as it is. Default: model(*inputs).
        samples: how many samples to use at most. Default: all.
        chunk_size: how many samples' gradients are held at once. They occupy chunk_size times the memory of the
            parameters measured, and the largest parameter's once more; activations, what training on as many samples
            takes. Default: as many as fit into 512 MiB, at least 1 and at most the batch.
        generator: draws the labels, whichever device it is on. Default: a copy of torch's default generator of the
            CPU, so that `torch.manual_seed` decides and training continues as if nothing had been drawn. Two calls
            without a draw between them then draw the same.
        progress: show a bar if tqdm is installed and stderr is a terminal.

    Returns:
        For each parameter, the importance in its shape and on its device; float32, for float64 parameters float64.
        Zeros where the outputs do not depend on it. A parameter used in several places counts once, with its whole
        gradient.

    Raises:
        TypeError: the model is no module; a batch, the outputs or `parameters` are of another kind than expected.
        ValueError: there are no samples or no trained parameters, or the outputs depend on none of them; an option or a
            shape does not fit.
        NonFiniteImportanceError: an importance is not finite; a ValueError, too.

    Warns:
        UserWarning: all importance is zero.
        UserWarning: torch.func cannot run this model (control flow that depends on data, buffers changed in place,
            some recurrent layers), so that samples are taken one by one, which is slower; the numbers are the same.

    Example:
        >>> importance = fisher(model, loader, outputs=lambda y: y[:, 0:10])
        >>> importance[model.conv1.weight]  # of the weight's shape

        A model that is called with the task, and batches (inputs, targets):

        >>> fisher(model, loader, forward=lambda model, batch: model(batch[0], task=3))

        Batches that are dictionaries, as of a language model, and its own loss:

        >>> fisher(model, loader, labels="data", forward=lambda model, batch: model(**batch).logits,
        ...        loss=lambda y, batch: F.cross_entropy(y, batch["labels"]))
    """
    if labels not in _LABELS:
        raise ValueError(f"labels is {labels!r}; expected one of {', '.join(map(repr, _LABELS))}")
    if loss is not None and labels != "data":
        raise ValueError(
            f"loss is for the targets given, but labels is {labels!r}; use labels='data' or leave loss out"
        )
    if generator is not None and labels != "sampled":
        raise ValueError(f"generator draws labels, but labels is {labels!r}; use labels='sampled' or leave it out")
    if forward is not None and labels == "data" and loss is None:
        raise ValueError(
            "labels is 'data' and forward is given, so that nothing says where a batch has its targets; pass "
            "loss=lambda outputs, batch: ..., for example F.cross_entropy(outputs, batch['labels'])"
        )
    if labels == "sampled" and generator is None:
        generator = torch.Generator()
        generator.set_state(torch.get_rng_state())

    def terms(first: Tensor, batch: _Batch) -> tuple[list[_Term], tuple[Tensor, ...]]:
        count = batch.samples
        if labels == "data":
            if batch.of is not None and loss is not None:
                return [partial(_loss_of_batch, loss, batch.of)], batch.tensors
            return [F.cross_entropy if loss is None else loss], (_checked_targets(batch.targets, count),)
        _check_logits(first, labels)
        classes = first.shape[1]
        if labels == "exact":
            return [partial(_weighted_log_probability, label=label) for label in range(classes)], ()
        return [_log_probability_of_draw], (_exponential_noise(count, classes, first.dtype, generator),)

    called = _CalledWithSamples(model, forward)
    return _mean_over_samples(
        called, batches, parameters, outputs, terms, torch.square, samples, chunk_size, "Fisher information", progress
    )


def output_sensitivity(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    parameters: Iterable[Tensor] | None = None,
    outputs: Callable[[Any], Tensor] | None = None,
    forward: Callable[[nn.Module, Any], Any] | None = None,
    samples: int | None = None,
    chunk_size: int | None = None,
    progress: bool = True,
) -> dict[Tensor, Tensor]:
    """The mean over samples of |d ||f(x)||^2 / d theta|: how much each weight moves the model's outputs f. No labels.

    It is the weight Omega of MAS's quadratic anchor: Aljundi et al., "Memory Aware Synapses: Learning what (not) to
    forget", ECCV 2018, section 4.1, with the squared l2 norm of the outputs. SSL (Aljundi et al., "Selfless Sequential
    Learning", ICLR 2019) anchors by the same.

    Args:
        model: as for `fisher`.
        batches: as for `fisher`; targets are not looked at.
        parameters: as for `fisher`.
        outputs: picks what counts of what the model returns, as for `fisher`; any shape.
        forward: as for `fisher`.
        samples: as for `fisher`.
        chunk_size: as for `fisher`.
        progress: as for `fisher`.

    Returns:
        For each parameter, its importance, as `fisher` does.

    Raises:
        TypeError, ValueError: as `fisher` does.

    Warns:
        UserWarning: as `fisher` does.
    """
    called = _CalledWithSamples(model, forward)
    return _mean_over_samples(
        called,
        batches,
        parameters,
        outputs,
        _squared_norm_only,
        torch.abs,
        samples,
        chunk_size,
        "sensitivity",
        progress,
    )


# ------------------------------------------------------------------------------------------- what is differentiated


def _loss_of_batch(loss: _Term, of: Callable[[Sequence[Tensor]], Any], outputs: Tensor, *tensors: Tensor) -> Tensor:
    return loss(outputs, of(tensors))


def _squared_norm_only(first: Tensor, batch: _Batch) -> tuple[list[_Term], tuple[Tensor, ...]]:
    return [_squared_norm], ()


def _squared_norm(outputs: Tensor) -> Tensor:
    return outputs.square().sum()


def _weighted_log_probability(logits: Tensor, label: int) -> Tensor:
    """sqrt(p_c) log p_c with a constant p_c, whose squared gradients add up to sum over c of p_c g_c ** 2."""
    log_p = F.log_softmax(logits, 1)[0, label]
    return log_p.detach().exp().sqrt() * log_p


def _log_probability_of_draw(logits: Tensor, noise: Tensor) -> Tensor:
    """The log p_c of a class c drawn from p: of exponential variables of rates p, c is least with probability p_c."""
    drawn = (F.softmax(logits.detach(), 1) / noise).argmax(1)
    return F.cross_entropy(logits, drawn)


def _exponential_noise(count: int, classes: int, dtype: torch.dtype, generator: torch.Generator | None) -> Tensor:
    """(count, classes). Drawn before the samples are divided into chunks, so that these do not matter.

    Always drawn in float64: generators may give other numbers in another dtype.
    """
    device = "cpu" if generator is None else generator.device
    noise = torch.empty(count, classes, dtype=torch.float64, device=device).exponential_(generator=generator).to(dtype)
    return noise.clamp_min_(torch.finfo(dtype).tiny)  # 0 for a class of probability 0 would be 0 / 0


def _check_logits(outputs: Tensor, labels: str) -> None:
    if outputs.ndim != 2:
        raise ValueError(
            f"the outputs of one sample have shape {tuple(outputs.shape)}, but labels={labels!r} needs logits of shape "
            "(1, classes); pick them with outputs=..., or use labels='data' with a loss for these outputs"
        )
    if outputs.shape[1] < 2:
        raise ValueError(
            f"the outputs of one sample have shape {tuple(outputs.shape)}: the softmax of fewer than two classes has "
            "no information; for a single logit use labels='data' and "
            "loss=torch.nn.functional.binary_cross_entropy_with_logits"
        )


def _checked_targets(targets: Any, count: int) -> Tensor:
    if not isinstance(targets, Tensor):
        got = "no targets" if targets is None else f"targets that are a {type(targets).__name__}"
        raise TypeError(f"labels is 'data', but a batch has {got}; expected (inputs, targets) with a tensor of targets")
    if targets.ndim < 1 or targets.shape[0] != count:
        raise ValueError(f"a batch has {count} samples, but targets of shape {tuple(targets.shape)}; they must agree")
    return targets


# ------------------------------------------------------------------------------------------------- the mean of samples


class _CalledWithSamples(nn.Module):
    """The model as a function of a batch's tensors. A module, so that torch.func can replace the model's parameters."""

    def __init__(self, model: nn.Module, forward: _UserForward | None) -> None:
        super().__init__()
        if not isinstance(model, nn.Module):
            raise TypeError(f"model is a {type(model).__name__}; expected a torch.nn.Module")
        if forward is not None and not callable(forward):
            raise TypeError(f"forward is a {type(forward).__name__}; expected a function of a model and a batch")
        self.model, self.call = model, forward
        self._of: Callable[[Sequence[Tensor]], Any] | None = None

    def batch(self, batch: Any) -> _Batch:
        """Takes a batch apart; from now on the model is called with the samples of batches like it."""
        if self.call is None:
            return _Batch(*_inputs_and_targets(batch), None)
        tensors, self._of = _apart(batch)
        return _Batch(tensors, None, self._of)

    def forward(self, *tensors: Tensor) -> Any:
        if self.call is not None and self._of is not None:
            return self.call(self.model, self._of(tensors))
        try:
            return self.model(*tensors)
        except TypeError:
            _check_takes(self.model, tensors)
            raise


def _mean_over_samples(
    called: _CalledWithSamples,
    batches: Iterable[Any],
    parameters: Iterable[Tensor] | None,
    outputs: Callable[[Any], Tensor] | None,
    terms: Callable[[Tensor, _Batch], tuple[list[_Term], tuple[Tensor, ...]]],
    magnitude: Callable[[Tensor], Tensor],
    samples: int | None,
    chunk_size: int | None,
    description: str,
    progress: bool,
) -> dict[Tensor, Tensor]:
    """The mean over samples of sum over terms of magnitude(d term / d theta), for each parameter theta."""
    model = called.model
    if isinstance(batches, Tensor):
        raise TypeError("batches is a tensor; expected an iterable of batches: for a single one write [inputs]")
    if isinstance(batches, tuple) and all(isinstance(part, Tensor) for part in batches):
        raise TypeError(
            "batches is a tuple of tensors; expected an iterable of batches: for a single one write [(x, y)]"
        )
    if isinstance(batches, Dataset) and not isinstance(batches, IterableDataset):
        raise TypeError(
            f"batches is a {type(batches).__name__}, which gives single samples; expected batches: "
            "torch.utils.data.DataLoader(dataset, batch_size=64)"
        )
    if outputs is not None and not callable(outputs):
        raise TypeError(f"outputs is {outputs!r}; expected a function that picks outputs, as in lambda y: y[:, 2:4]")
    for name, value in (("samples", samples), ("chunk_size", chunk_size)):
        if value is not None and (not isinstance(value, int) or value < 1):
            raise ValueError(f"{name} is {value!r}; expected an integer of at least 1, or None")
    trained = _trained_parameters(model, parameters)
    device = next(iter(trained.values())).device
    most = chunk_size or _default_chunk_size(trained)
    counted, first = 0, None
    # Data loaders draw from the default generator, which training is to find as it was.
    random = torch.random.fork_rng([device] if device.type == "cuda" else [])
    # Gradients are asked for explicitly; no graph is to grow through parameters that are not measured.
    with torch.inference_mode(False), _as_used(model), random, torch.no_grad():
        importance = _Importance(called, trained, outputs, magnitude)
        for one in _with_progress(batches, description, progress):
            batch = called.batch(one)
            count = batch.samples if samples is None else min(batch.samples, samples - counted)
            if count == 0:
                continue
            batch = batch.first(count, device)
            inputs = batch.tensors
            if first is None:
                first = importance.outputs_of(*(tensor[:1] for tensor in inputs))
                importance.check_dependence([tensor[:1] for tensor in inputs])
            functions, others = terms(first, batch)
            others = tuple(_moved(tensor, device) for tensor in others)
            if counted == 0:
                _check_one_number(functions[0](first, *(tensor[:1] for tensor in others)))
            for start in range(0, count, most):
                chunk = slice(start, start + most)
                for function in functions:
                    importance.add(function, [t[chunk] for t in inputs], [t[chunk] for t in others])
            counted += count
            if counted == samples:
                break
    if counted == 0:
        raise ValueError("batches has no samples; expected at least one (a generator can be read only once)")
    return importance.mean(counted)


class _Importance:
    """Adds up magnitudes of single samples' gradients: of a whole chunk at once, where torch.func can do that."""

    def __init__(
        self,
        called: _CalledWithSamples,
        trained: dict[str, Tensor],
        outputs: Callable[[Any], Tensor] | None,
        magnitude: Callable[[Tensor], Tensor],
    ) -> None:
        self._called, self._trained, self._outputs, self._magnitude = called, trained, outputs, magnitude
        self._kind = type(called.model).__name__
        self._values = {name: parameter.detach() for name, parameter in trained.items()}
        self._sums = {
            name: torch.zeros_like(value, dtype=_accumulated(value.dtype), requires_grad=False)
            for name, value in self._values.items()
        }
        self._at_once = self._unchecked = True

    def outputs_of(self, *inputs: Tensor) -> Tensor:
        """What counts of the model's outputs for one sample, (1, ...), in float32 or float64."""
        return self._picked(self._called(*inputs))

    def check_dependence(self, inputs: list[Tensor]) -> None:
        """Raises ValueError if the outputs depend on none of the parameters, so that all importance would be zero."""
        with torch.enable_grad():
            outputs = self.outputs_of(*inputs).sum()
            if outputs.requires_grad:
                gradients = torch.autograd.grad(outputs, list(self._trained.values()), allow_unused=True)
                if any(gradient is not None for gradient in gradients):
                    return
        raise ValueError(
            f"the outputs of {self._kind} depend on none of the {len(self._trained)} parameters to "
            "measure: a forward pass under no_grad or with detach, outputs=... that picks what is constant, or "
            "parameters of a part that is not used"
        )

    def add(self, term: _Term, inputs: list[Tensor], others: list[Tensor]) -> None:
        """Adds a chunk's samples; each of the tensors is (chunk, ...)."""
        if self._at_once:
            failure = self._add_at_once(term, inputs, others)
            if failure is None:
                return
            self._at_once = False
            # If the model cannot be run at all, the loop's error is the one to see; then there is nothing to warn of.
            self._add_one_by_one(term, inputs, others)
            reason = str(failure).strip().split("\n")[0]
            warn(
                f"torch.func cannot run {self._kind} for many samples at once, so that they are taken "
                f"one by one, which is slower ({type(failure).__name__}: {reason[:300]})",
            )
            return
        self._add_one_by_one(term, inputs, others)

    def mean(self, samples: int) -> dict[Tensor, Tensor]:
        """The sums divided by the number of samples.

        Raises:
            NonFiniteImportanceError: one of them is not finite.
        """
        for name, total in self._sums.items():
            total /= samples
            if not bool(total.isfinite().all()):
                wrong = int((~total.isfinite()).sum())
                raise NonFiniteImportanceError(
                    f"the importance of parameter {name!r} is not finite in {wrong} of {total.numel()} elements: "
                    "the model's outputs or their gradients are nan or infinite, or overflow when squared (training "
                    "may have diverged; with implicit=False it does if lr * strength is too large)"
                )
        if not any(bool(total.any()) for total in self._sums.values()):
            warn(
                "the importance of every parameter is zero, so that nothing will be kept: the outputs do not move with "
                "the parameters in any of the samples (outputs that are zero, or probabilities that are exactly 1)",
            )
        return {parameter: self._sums[name] for name, parameter in self._trained.items()}

    def _picked(self, outputs: Any) -> Tensor:
        picked = outputs if self._outputs is None else self._outputs(outputs)
        if not isinstance(picked, Tensor) or not picked.is_floating_point():
            got = f"a tensor of {picked.dtype}" if isinstance(picked, Tensor) else f"a {type(picked).__name__}"
            what = "the model returned" if self._outputs is None else "outputs returned"
            raise TypeError(f"{what} {got}; expected a floating-point tensor: pick one with outputs=lambda y: ...")
        return picked.to(_accumulated(picked.dtype))

    def _add_at_once(self, term: _Term, inputs: list[Tensor], others: list[Tensor]) -> Exception | None:
        """Returns what torch.func failed with; then nothing was added."""

        def of_one_sample(values: dict[str, Tensor], inputs: list[Tensor], others: list[Tensor]) -> Tensor:
            outputs = self._with(values, [tensor.unsqueeze(0) for tensor in inputs])
            return term(self._picked(outputs), *(tensor.unsqueeze(0) for tensor in others)).reshape(())

        try:
            if self._unchecked:
                self._check_replaceable([tensor[:1] for tensor in inputs])
                self._unchecked = False
            gradients = vmap(grad(of_one_sample), in_dims=(None, 0, 0), randomness="different")(
                self._values, inputs, others
            )
        except torch.OutOfMemoryError:  # says by itself what to do: a smaller chunk_size
            raise
        except Exception as failure:
            return failure
        for name, total in self._sums.items():
            total += self._magnitude(gradients.pop(name).to(total.dtype)).sum(0)
        return None

    def _with(self, values: dict[str, Tensor], inputs: list[Tensor]) -> Any:
        """What the model returns with other values in place of its parameters."""
        if self._called.call is None:
            return functional_call(self._called.model, values, tuple(inputs))
        return functional_call(self._called, {f"model.{name}": one for name, one in values.items()}, tuple(inputs))

    def _check_replaceable(self, inputs: list[Tensor]) -> None:
        """Raises if the model has a parameter by another way than its name, where torch.func cannot replace it."""
        with torch.enable_grad():
            outputs = self._picked(self._with(self._values, inputs)).sum()
            if not outputs.requires_grad:
                return
            gradients = torch.autograd.grad(outputs, list(self._trained.values()), allow_unused=True)
        for name, gradient in zip(self._trained, gradients, strict=True):
            if gradient is not None:
                raise RuntimeError(f"the forward pass takes parameter {name!r} from elsewhere than the module's own")

    def _add_one_by_one(self, term: _Term, inputs: list[Tensor], others: list[Tensor]) -> None:
        parameters = list(self._trained.values())
        for index in range(inputs[0].shape[0]):
            one = slice(index, index + 1)
            with torch.enable_grad():
                outputs = self.outputs_of(*(tensor[one] for tensor in inputs))
                value = term(outputs, *(tensor[one] for tensor in others)).reshape(())
                if not value.requires_grad:  # depends on none of the parameters
                    continue
                gradients = torch.autograd.grad(value, parameters, allow_unused=True)
            for total, gradient in zip(self._sums.values(), gradients, strict=True):
                if gradient is not None:
                    total += self._magnitude(gradient.to(total.dtype))


def _accumulated(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which numbers are squared and summed: float32 also for halves, which overflow and underflow."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _check_one_number(value: Any) -> None:
    if not isinstance(value, Tensor) or value.numel() != 1:
        got = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
        raise ValueError(f"loss returned {got} for one sample; expected one number: reduce it, for example by sum()")


def _trained_parameters(model: nn.Module, parameters: Iterable[Tensor] | None) -> dict[str, Tensor]:
    """By their names, those of `parameters` that require a gradient."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    if isinstance(parameters, Tensor):
        raise TypeError("parameters is a tensor; expected an iterable of the model's parameters: write [parameter]")
    trained: dict[str, Tensor] = {}
    for index, parameter in enumerate(model.parameters() if parameters is None else parameters):
        if not isinstance(parameter, Tensor):
            raise TypeError(f"parameters[{index}] is a {type(parameter).__name__}; expected a parameter of the model")
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
        if parameter.requires_grad:
            trained[name] = parameter
    if not trained:
        raise ValueError("no parameter requires a gradient, so there is nothing to measure")
    return trained


def _default_chunk_size(trained: dict[str, Tensor]) -> int:
    bytes_per_sample = sum(parameter.numel() * parameter.element_size() for parameter in trained.values())
    return max(1, _CHUNK_BYTES // max(bytes_per_sample, 1))


def _inputs_and_targets(batch: Any) -> tuple[tuple[Tensor, ...], Any]:
    inputs, targets = batch, None
    if isinstance(batch, (tuple, list)) and len(batch) in (1, 2):
        inputs, targets = batch[0], batch[1] if len(batch) == 2 else None
    tensors = (inputs,) if isinstance(inputs, Tensor) else inputs
    # A batch of more than two elements is not guessed at: which of them are inputs, which are targets?
    is_unclear = isinstance(batch, (tuple, list)) and len(batch) not in (1, 2)
    if is_unclear or not isinstance(tensors, (tuple, list)) or not all(isinstance(t, Tensor) for t in tensors):
        raise TypeError(
            f"a batch is {_described(batch)}; expected inputs, (inputs,) or (inputs, targets), where inputs are a "
            f"tensor or a tuple of tensors. Say how to call the model with it: {_example_of_forward(batch)}"
        )
    _check_shapes(tensors)
    return tuple(tensors), targets


def _apart(batch: Any) -> tuple[tuple[Tensor, ...], Callable[[Sequence[Tensor]], Any]]:
    """The tensors of a batch of any form, and what puts others in their place."""
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
    """After a call of the model failed: raises TypeError if that was because it needs other arguments."""
    try:
        signature = inspect.signature(model.forward)
    except (TypeError, ValueError):  # of a forward that is no Python
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
        return f"a {type(batch).__name__} of {len(batch)} ({', '.join(type(one).__name__ for one in batch[:4])})"
    return f"a {type(batch).__name__}"


@contextmanager
def _as_used(model: nn.Module) -> Iterator[None]:
    """Has every module in evaluation mode; afterwards modes and buffers are what they were, module by module.

    Flags are set one by one as `model.eval()` and `model.train()` may be overridden: to keep some modules in a mode,
    or to do more (LoRA layers merge weights).
    """
    modules = [(module, module.training) for module in model.modules()]
    buffers = [
        (module, name, buffer, version_of(buffer), buffer.clone())
        for module, _ in modules
        for name, buffer in own_buffers(module).items()
        if buffer is not None
    ]
    # cuDNN's recurrent layers have a backward pass in training mode only.
    is_recurrent = any(isinstance(module, nn.RNNBase) for module, _ in modules)
    with torch.backends.cudnn.flags(enabled=False) if is_recurrent else nullcontext():
        try:
            for module, _ in modules:
                module.training = False
            yield
        finally:
            for module, training in modules:
                module.training = training
            for module, name, buffer, version, values in buffers:
                own_buffers(module)[name] = buffer
                if version_of(buffer) != version:
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
