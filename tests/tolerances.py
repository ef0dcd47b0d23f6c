"""How far a kernel may be from the float64 reference, and why. No test has a tolerance of its own.

`U[dtype]` is the unit roundoff, half the distance from 1 to the next number.
"""

from __future__ import annotations

import torch
from torch import Tensor

U = {dtype: torch.finfo(dtype).eps / 2 for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16)}
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]


def assert_importance(got: Tensor, want: Tensor, absolute: Tensor, terms: int, dtype: torch.dtype) -> None:
    """A sum of m products in any order is off by at most (m + 1) u times the sum of their absolute values.

    `absolute` is that sum (N,), `terms` is m. Halves convert to float32 without loss, so u is float32's.
    """
    u = U[torch.float64 if dtype == torch.float64 else torch.float32]
    error, bound = (got.double() - want).abs(), (terms + 1) * u * absolute + torch.finfo(got.dtype).tiny
    assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert bool((error <= bound).all()), f"error {error.max():.3g}, bound {bound.max():.3g}"


def assert_average(got: Tensor, want: Tensor, neurons: int) -> None:
    """C and c are float32: the total (rounded once from float64), a division, two products and a sum."""
    bound = 8 * U[torch.float32] * want.abs().clamp(min=1e-30)
    bound += 8 * U[torch.float32] * neurons * torch.finfo(torch.float32).eps
    assert bool(((got.double() - want).abs() <= bound).all())


def assert_stepped(got: Tensor, want: Tensor, step: Tensor, alpha: float) -> None:
    """A weight after w - eta d, from the same C; `alpha` is in units of d, lr times that of eq. 7, and 0 for a plain rate.

    eta = alpha sqrt(beta / C - 1) in float32: the difference under the root is off by about 4 u at most, so near C =
    beta the root is off by up to sqrt(4 u) and eta by alpha times that; elsewhere by a few u of itself, which is at
    most about 4 alpha in these tests. The weight itself is rounded twice more in its own precision.
    """
    u = U[got.dtype]
    eta_error = alpha * ((4 * U[torch.float32]) ** 0.5 + 4 * 8 * U[torch.float32])
    bound = 4 * u * (want.abs() + step.abs()) + eta_error * step.abs() + torch.finfo(got.dtype).smallest_normal
    error = (got.double() - want).abs()
    assert bool((error <= bound).all()), f"error {error.max():.3g}, bound there {bound.flatten()[error.argmax()]:.3g}"


def assert_adam_stepped(got: Tensor, want: Tensor, step: Tensor, alpha: float) -> None:
    """A weight after Adam's step, from the same C; `step` is the largest step its terms in absolute value could make.

    In float32: the gradient and its scale (2 roundings), the first moment (4), its bias correction (4), the root of the
    second moment (3) and its correction (3), epsilon, the division, decay, share, lr and their products (7): 24 u of the
    step. The weight is rounded once more to its own precision. For `alpha` see `assert_stepped`; shares are 1 at most.
    """
    u = U[torch.float64 if got.dtype == torch.float64 else torch.float32]
    share_error = alpha * (4 * U[torch.float32]) ** 0.5 + 32 * U[torch.float32] * (alpha > 0)
    bound = (24 * u + share_error) * step + 2 * U[got.dtype] * want.abs() + torch.finfo(got.dtype).smallest_normal
    error = (got.double() - want).abs()
    assert bool((error <= bound).all()), f"error {error.max():.3g}, bound there {bound.flatten()[error.argmax()]:.3g}"


# 100 steps of a network in float32 against float64: rounding feeds back through forward and backward passes, but the
# network is not chaotic over so few steps at these rates. The figure is the project's promise, not a derived bound.
TRAJECTORY = 1e-4
