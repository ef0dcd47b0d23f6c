"""SSL's penalty against its definition, autograd and finite differences."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from npc_ext.baselines.ssl import local_inhibition, local_inhibition_gradient


def case(samples: int = 4, neurons: int = 7) -> tuple[Tensor, Tensor]:
    h = torch.randn(samples, neurons, dtype=torch.float64).relu()
    return h, torch.rand(neurons, dtype=torch.float64)


@pytest.mark.parametrize("scale", [0.5, 2.0, 7 / 6, 100.0])
def test_penalty_is_the_sum_over_pairs_of_neurons_that_defines_it(scale: float) -> None:
    h, importance = case()
    expected = 0.0
    for sample in h.tolist():
        for i, first in enumerate(sample):
            for j, second in enumerate(sample):
                if i != j:
                    discount = math.exp(-(importance[i] + importance[j]))
                    expected += discount * math.exp(-((i - j) ** 2) / (2 * scale**2)) * first * second / 4
    assert local_inhibition(h, (-importance).exp(), scale).item() == pytest.approx(expected, rel=1e-13)


def test_gradient_agrees_with_autograd_and_finite_differences() -> None:
    h, importance = case()
    discount = (-importance).exp()
    leaf = h.clone().requires_grad_()
    (expected,) = torch.autograd.grad(local_inhibition(leaf, discount, 1.5), leaf)
    gradient = local_inhibition_gradient(leaf, discount, 1.5)
    assert not gradient.requires_grad
    torch.testing.assert_close(gradient, expected, rtol=1e-13, atol=1e-15)
    assert torch.autograd.gradcheck(lambda x: local_inhibition(x, discount, 1.5), (leaf,))


def test_neurons_important_to_earlier_tasks_neither_inhibit_nor_are_inhibited() -> None:
    h, _ = case()
    discount = torch.ones(7, dtype=torch.float64)
    discount[3] = 0
    others = torch.arange(7) != 3
    gradient = local_inhibition_gradient(h + 1, discount, 2.0)
    assert not gradient[:, 3].any() and gradient[:, others].all()
    without = h + 1
    without[:, 3] = 0
    torch.testing.assert_close(gradient[:, others], local_inhibition_gradient(without, discount, 2.0)[:, others])


def test_one_active_neuron_costs_nothing() -> None:
    h = torch.tensor([[0.0, 3.0, 0.0]])
    assert local_inhibition(h, torch.ones(3), 1.0) == 0
    assert local_inhibition(torch.rand(2, 1), torch.ones(1), 1.0) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dtype_is_that_of_the_activations(dtype: torch.dtype) -> None:
    h, importance = case()
    discount = (-importance).exp().float()
    assert local_inhibition(h.to(dtype), discount, 2.0).dtype == dtype
    gradient = local_inhibition_gradient(h.to(dtype), discount, 2.0)
    assert gradient.dtype == dtype
    # Four factors and a sum of seven products, each rounded once.
    tolerance = 11 * torch.finfo(dtype).eps
    expected = local_inhibition_gradient(h, discount.double(), 2.0)
    torch.testing.assert_close(gradient.double(), expected, rtol=tolerance, atol=0)


@pytest.mark.parametrize(
    ("h", "discount", "scale", "words"),
    [
        (torch.rand(2, 3, 4), torch.ones(3), 1.0, r"h has shape \(2, 3, 4\)"),
        (torch.rand(0, 3), torch.ones(3), 1.0, "at least one sample"),
        (torch.ones(2, 3, dtype=torch.int64), torch.ones(3), 1.0, "dtype torch.int64"),
        (torch.rand(2, 3), torch.ones(2), 1.0, r"h has 3 neurons, but discount_factors has shape \(2,\)"),
        (torch.rand(2, 3), torch.ones(3), 0.0, "scale is 0.0; expected"),
        (torch.rand(2, 3), torch.ones(3), math.nan, "scale is nan; expected"),
    ],
)
def test_wrong_arguments_raise_an_error_that_explains(h: Tensor, discount: Tensor, scale: float, words: str) -> None:
    for function in (local_inhibition, local_inhibition_gradient):
        with pytest.raises(ValueError, match=words):
            function(h, discount, scale)
