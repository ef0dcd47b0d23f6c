"""SSL's penalty on activations: sparse coding through local neural inhibition and discounting (SLNID).

    R(h) = 1/M sum over m, i != j of exp(-(alpha_i + alpha_j)) exp(-(i - j)^2 / (2 scale^2)) h_mi h_mj

Neurons that are active for the same sample cost, the more the closer their indices are, so that few stay active in a
neighbourhood and the others are left to later tasks. Neurons that earlier tasks need (alpha_i) are discounted: they
neither inhibit nor are inhibited. With d_i = exp(-alpha_i), z = h * d and the symmetric kernel K of the Gaussian
weights, whose diagonal is zero, R is the mean over samples of z K z', and its gradient

    dR/dh = 2/M (z K) * d
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def local_inhibition(h: Tensor, discount_factors: Tensor, scale: float) -> Tensor:
    """The penalty R of a layer's activations, to be added to the loss; differentiable in h.

    Source: Aljundi, Rohrbach, Tuytelaars, "Selfless Sequential Learning", ICLR 2019.

    Args:
        h: (B, N) floating-point activations behind a ReLU. Negative ones would be rewarded; nothing checks for them.
        discount_factors: (N,) exp(-alpha), where alpha >= 0 is the importance of each neuron to earlier tasks; ones
            during the first task. Taken as constants.
        scale: the Gaussian's standard deviation, in neurons. N / 6 is what the authors' scripts pass (the option that
            they call "scale" is the divisor). The kernel has N * N elements and is computed in each call.

    Returns:
        A scalar of h's dtype; not divided by the number of neurons.

    Raises:
        ValueError: h is not (B, N) with at least one sample, or not floating-point; discount_factors is not (N,);
            scale is not finite and above 0.
    """
    discount_factors = _checked(h, discount_factors, scale)
    discounted = h * discount_factors
    return (discounted @ _kernel(h, scale) * discounted).sum() / h.shape[0]


def local_inhibition_gradient(h: Tensor, discount_factors: Tensor, scale: float) -> Tensor:
    """The gradient dR/dh of `local_inhibition` in closed form, (B, N), for use without autograd.

    Args:
        h: as for `local_inhibition`.
        discount_factors: as for `local_inhibition`.
        scale: as for `local_inhibition`.

    Raises:
        ValueError: as `local_inhibition` does.
    """
    discount_factors = _checked(h, discount_factors, scale)
    with torch.no_grad():
        return (h * discount_factors) @ _kernel(h, scale) * discount_factors * (2 / h.shape[0])


def _kernel(h: Tensor, scale: float) -> Tensor:
    """K (N, N), in h's dtype and on its device."""
    index = torch.arange(
        h.shape[1], dtype=torch.float64 if h.dtype == torch.float64 else torch.float32, device=h.device
    )
    distance = (index[:, None] - index) / scale
    return (distance.square() * -0.5).exp().fill_diagonal_(0).to(h.dtype)


def _checked(h: Tensor, discount_factors: Tensor, scale: float) -> Tensor:
    """The discount factors as constants, in h's dtype."""
    if h.ndim != 2 or h.shape[0] == 0 or not h.is_floating_point():
        raise ValueError(
            f"h has shape {tuple(h.shape)} and dtype {h.dtype}; expected floating-point activations (samples, neurons) "
            "of at least one sample"
        )
    if discount_factors.shape != h.shape[1:]:
        raise ValueError(
            f"h has {h.shape[1]} neurons, but discount_factors has shape {tuple(discount_factors.shape)}; "
            f"expected ({h.shape[1]},)"
        )
    if not 0 < scale < math.inf:
        raise ValueError(f"scale is {scale}; expected a finite number of neurons above 0")
    return discount_factors.detach().to(h.dtype)
