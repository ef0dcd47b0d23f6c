"""How important every weight was to a task: what EWC, MAS and SSL measure once, at the end of the task.

Both importances are means over samples m of a nonlinear function of the sample's gradient g_m:

    Fisher information (EWC)     F = 1/M sum over m of g_m ** 2,   g_m = d log p(y_m | x_m) / d theta
    output sensitivity (MAS)     W = 1/M sum over m of |g_m|,      g_m = d ||f(x_m)||^2 / d theta

The gradient of a batch's mean is not enough: its square contains products of different samples' gradients, of either
sign. `samples.py` computes the gradient of every sample.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from functools import partial
from typing import Any, Literal, TypedDict

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .._names import close_to
from ..optim.options import check_choice
from .batches import Batch, Together
from .samples import NonFiniteImportanceError as NonFiniteImportanceError
from .samples import Sampling, Term, Terms, TermsOfBatch, mean_over_samples

# Cross-entropy leaves out targets of this label.
_IGNORED = -100


class SensitivityOptions(TypedDict, total=False):
    """Options of `output_sensitivity` that the optimizers pass on; `fisher` has them, too."""

    outputs: Callable[[Any], Tensor] | None
    forward: Callable[[nn.Module, Any], Any] | None
    samples: int | None
    chunk_size: int | None
    progress: bool


class FisherOptions(SensitivityOptions, total=False):
    """Options of `fisher` that the optimizers pass on."""

    labels: Literal["sampled", "data", "exact"]
    loss: Callable[[Tensor, Any], Tensor] | None
    generator: torch.Generator | None


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
    networks", PNAS 2017, eq. 3. The model is measured in evaluation mode, as it is used: without dropout, and with the
    running statistics of batch norm. Afterwards, also after an error, modes and buffers are restored module by module,
    and so are torch's default random number generators. No parameter's gradient is touched.

    Args:
        model: the network; dimension 0 of its inputs counts samples. It is called with batches of one sample.
        batches: a DataLoader, or any iterable. A batch is the inputs, or (inputs,), or (inputs, targets); inputs are a
            tensor (B, ...), or a tuple or list of such tensors, the model's positional arguments. They are moved to the
            device of the model. For any other batch, pass `forward`.
        parameters: the parameters to measure. Default: all of the model's. Those that do not require a gradient are
            left out.
        outputs: picks the outputs that count from what the model returns for one sample, (1, ...): for one task's
            classes `lambda y: y[:, classes]`.
        labels: where y comes from. "sampled": drawn from the model's own p(y|x), once for each sample. This estimates
            the Fisher information without bias, in one backward pass. "exact": the mean over all classes instead of a
            draw, in one pass per class. "data": the targets given. That is the "empirical Fisher", which is neither the
            Fisher information nor a curvature (Kunstner et al., NeurIPS 2019): it vanishes with the loss where the
            model fits its data, and is largest for samples that the model gets wrong. Many implementations of EWC use
            it. It is not the default, because EWC's derivation asks for the Fisher information. Except with "data",
            outputs are (B, C), the logits of p.
        loss: for "data", the negative log-likelihood of one sample: loss(outputs (1, ...), target (1, ...)) -> one
            number. Default: cross-entropy of integer labels or of probabilities. Labels then count within the outputs
            picked by `outputs`, from 0; -100 marks targets without a label. With `forward`
            it is called with the batch instead of a target, loss(outputs, batch), and there is no default.
        forward: how to call the model with a batch of one sample: forward(model, batch) -> the model's outputs. A batch
            is then whatever the loader gives: a dictionary, tuple or list, nested or not. Dimension 0 of every tensor
            in it counts samples; everything else is passed on unchanged. Default: model(*inputs).
        samples: how many samples to use at most. Default: all.
        chunk_size: how many samples' gradients are held at once. They take chunk_size times the memory of the
            parameters measured, plus the largest parameter's once more; activations take as much as in training on as
            many samples. Default: as many as fit into 512 MiB, at least 1 and at most the batch.
        generator: draws the labels; it may be on any device. Default: a copy of torch's default generator of the CPU,
            so that `torch.manual_seed` decides and training continues as if nothing had been drawn. Two calls without a
            draw between them then draw the same labels.
        progress: show a bar if tqdm is installed and stderr is a terminal.

    Returns:
        For each parameter, the importance in its shape and on its device; float32, for float64 parameters float64.
        Zeros where the outputs do not depend on it. A parameter used in several places counts once, with its whole
        gradient.

    Raises:
        TypeError: the model is not a module; a batch, the outputs, an option or `parameters` are not of the expected
            kind.
        ValueError: there are no samples or no trained parameters, or the outputs depend on none of them; an option, a
            shape or a label does not fit.
        IndexError: `outputs` picks what is not there.
        NonFiniteImportanceError: an importance is not finite; a ValueError, too.

    Warns:
        UserWarning: all importance is zero.
        UserWarning: torch.func cannot run this model (control flow that depends on data, buffers changed in place,
            some recurrent layers), so samples are taken one by one. This is slower; the numbers are the same.

    Example:
        >>> importance = fisher(model, loader, outputs=lambda y: y[:, 0:10])
        >>> importance[model.conv1.weight]  # of the weight's shape

        A model that is called with the task, and batches (inputs, targets):

        >>> fisher(model, loader, forward=lambda model, batch: model(batch[0], task=3))

        Batches that are dictionaries, as for a language model, with a loss:

        >>> fisher(model, loader, labels="data", forward=lambda model, batch: model(**batch).logits,
        ...        loss=lambda y, batch: F.cross_entropy(y, batch["labels"]))
    """
    _check_labels(labels, loss, generator, forward)
    terms: Terms
    if labels == "data":
        terms = partial(_losses, loss)
    elif labels == "exact":
        terms = _log_probabilities_of_all_classes
    else:
        terms = partial(_log_probabilities_of_draws, _copy_of_default_generator() if generator is None else generator)
    sampling = Sampling(batches, forward, outputs, samples, chunk_size, progress)
    return mean_over_samples(model, parameters, sampling, terms, torch.square, "Fisher information")


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
    Learning", ICLR 2019) uses the same anchor.

    Args:
        model, parameters, forward, samples, chunk_size, progress: as for `fisher`.
        batches: as for `fisher`; targets are ignored.
        outputs: picks the outputs that count, as for `fisher`; any shape.

    Returns:
        For each parameter, its importance, as for `fisher`.

    Raises:
        TypeError: as for `fisher`.
        ValueError: as for `fisher`.

    Warns:
        UserWarning: as for `fisher`.
    """
    sampling = Sampling(batches, forward, outputs, samples, chunk_size, progress)
    return mean_over_samples(model, parameters, sampling, _squared_norms, torch.abs, "sensitivity")


# --------------------------------------------------------------- terms to differentiate, of a batch and a first sample


def _squared_norms(outputs: Tensor, batch: Batch) -> TermsOfBatch:
    return [_squared_norm], ()


def _losses(loss: Callable[[Tensor, Any], Tensor] | None, outputs: Tensor, batch: Batch) -> TermsOfBatch:
    if batch.together is not None and loss is not None:
        return [partial(_loss_of_batch, loss, batch.together)], batch.tensors
    targets = _checked_targets(batch.targets, batch.samples)
    if loss is None:
        return [F.cross_entropy], (_checked_labels(targets, outputs),)
    return [loss], (targets,)


def _log_probabilities_of_all_classes(logits: Tensor, batch: Batch) -> TermsOfBatch:
    _check_logits(logits, "exact")
    return [partial(_weighted_log_probability, label=label) for label in range(logits.shape[1])], ()


def _log_probabilities_of_draws(generator: torch.Generator, logits: Tensor, batch: Batch) -> TermsOfBatch:
    _check_logits(logits, "sampled")
    return [_log_probability_of_draw], (_exponential_noise(batch.samples, logits.shape[1], logits.dtype, generator),)


def _squared_norm(outputs: Tensor) -> Tensor:
    return outputs.square().sum()


def _loss_of_batch(loss: Term, together: Together, outputs: Tensor, *tensors: Tensor) -> Tensor:
    return loss(outputs, together(tensors))


def _weighted_log_probability(logits: Tensor, label: int) -> Tensor:
    """sqrt(p_c) log p_c with a constant p_c; the squared gradients add up to sum over c of p_c g_c ** 2."""
    log_p = F.log_softmax(logits, 1)[0, label]
    return log_p.detach().exp().sqrt() * log_p


def _log_probability_of_draw(logits: Tensor, noise: Tensor) -> Tensor:
    """-log p_c of a class c drawn from p: the exponential variable of rate p_c is the least with probability p_c."""
    drawn = (F.softmax(logits.detach(), 1) / noise).argmax(1)
    return F.cross_entropy(logits, drawn)


def _exponential_noise(count: int, classes: int, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """(count, classes). Drawn before the samples are divided into chunks, so the chunk size does not matter.

    Always drawn in float64, because generators may give other numbers in another dtype.
    """
    noise = torch.empty(count, classes, dtype=torch.float64, device=generator.device)
    noise = noise.exponential_(generator=generator).to(dtype)
    return noise.clamp_min_(torch.finfo(dtype).tiny)  # 0 for a class of probability 0 would be 0 / 0


def _copy_of_default_generator() -> torch.Generator:
    generator = torch.Generator()
    generator.set_state(torch.get_rng_state())
    return generator


# -------------------------------------------------------------------------------------------------------------- checks


def check_known(options: Iterable[str], known: Collection[str]) -> None:
    """Raises TypeError if `consolidate` is called with an option that it does not have."""
    for name in options:
        if name not in known:
            raise TypeError(f"consolidate has no option {name!r}: {close_to(name, known)}")


def _check_labels(
    labels: str,
    loss: Callable[[Tensor, Any], Tensor] | None,
    generator: torch.Generator | None,
    forward: Callable[[nn.Module, Any], Any] | None,
) -> None:
    check_choice("labels", labels, ("sampled", "data", "exact"))
    if loss is not None and not callable(loss):
        raise TypeError(f"loss is of type {type(loss).__name__}; expected a function of outputs and targets, or None")
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(
            f"generator is of type {type(generator).__name__}; expected a torch.Generator: for a seed write "
            "torch.Generator().manual_seed(seed)"
        )
    if loss is not None and labels != "data":
        raise ValueError(
            f"loss is for the targets given, but labels is {labels!r}; use labels='data' or leave loss out"
        )
    if generator is not None and labels != "sampled":
        raise ValueError(f"generator draws labels, but labels is {labels!r}; use labels='sampled' or leave it out")
    if forward is not None and labels == "data" and loss is None:
        raise ValueError(
            "labels is 'data' and forward is given, so nothing says where a batch has its targets; pass "
            "loss=lambda outputs, batch: ..., for example F.cross_entropy(outputs, batch['labels'])"
        )


def _check_logits(outputs: Tensor, labels: str) -> None:
    if outputs.shape[:1] != (1,) or not (outputs.ndim == 2 or (labels == "data" and outputs.ndim > 2)):
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


def _checked_labels(targets: Tensor, outputs: Tensor) -> Tensor:
    """Targets as cross-entropy takes them: class indices (B, ...) as int64, or probabilities (B, classes, ...)."""
    _check_logits(outputs, "data")
    classes, dims = outputs.shape[1], outputs.ndim
    if targets.is_floating_point() and targets.ndim == dims and targets.shape[1] == classes:
        return targets.to(outputs.dtype)
    samples = len(targets)
    if targets.is_floating_point() or targets.is_complex() or targets.ndim != dims - 1:
        more = tuple(outputs.shape[2:])
        raise ValueError(
            f"a batch has targets of {targets.dtype} and shape {tuple(targets.shape)}, but the outputs of one sample "
            f"have shape {tuple(outputs.shape)}; cross-entropy expects integer labels of shape {(samples, *more)}, or "
            f"floating-point probabilities of shape {(samples, classes, *more)}. For other targets pass a loss: "
            "loss=lambda outputs, target: ..."
        )
    targets = targets.long()
    labels = targets[targets != _IGNORED]
    lowest, highest = (int(labels.min()), int(labels.max())) if labels.numel() else (0, 0)
    if lowest < 0 or highest >= classes:
        raise ValueError(
            f"a batch has labels from {lowest} to {highest}, but there are {classes} outputs; expected labels from 0 "
            f"to {classes - 1}, which count within the outputs picked. Map them in the loader, or in a loss: "
            "loss=lambda outputs, target: torch.nn.functional.cross_entropy(outputs, target - first_class)"
        )
    return targets
