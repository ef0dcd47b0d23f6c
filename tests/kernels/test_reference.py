"""The specification against values computed by hand, and the four facts the design rests on."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from npc_ext import reference

from .arguments import call, one_layer, sgd


def test_importance_takes_the_absolute_value_per_sample_after_the_sum_over_positions() -> None:
    activation = torch.tensor([[[1.0, 2.0], [1.0, 1.0]], [[3.0, 0.0], [2.0, 2.0]]])
    gradient = torch.tensor([[[1.0, -1.0], [1.0, 1.0]], [[-2.0, 5.0], [1.0, -1.0]]])
    # neuron 0: |1 - 2| + |-6 + 0| = 7; neuron 1: |1 + 1| + |2 - 2| = 2
    assert reference.importance(activation, gradient).tolist() == [7.0, 2.0]


def test_importance_of_a_linear_layer_on_sequences_sums_over_the_sequence() -> None:
    activation, gradient = torch.randn(2, 3, 5, dtype=torch.double), torch.randn(2, 3, 5, dtype=torch.double)
    want = torch.stack([(activation[b] * gradient[b]).sum(0).abs() for b in range(2)]).sum(0)
    torch.testing.assert_close(reference.importance(activation, gradient, channel_dim=-1), want)
    swapped = reference.importance(activation.transpose(0, 1), gradient.transpose(0, 1), channel_dim=-1, batch_dim=1)
    torch.testing.assert_close(swapped, want)


def test_normalize_divides_by_the_mean_of_all_or_of_active_neurons() -> None:
    measured = torch.tensor([-0.0, 1.0, 3.0, 0.0])  # the first received no gradient
    assert reference.normalize(measured).tolist() == [0.0, 1.0, 3.0, 0.0]
    assert reference.normalize(measured, active_only=True).tolist() == [0.0, 0.75, 2.25, 0.0]


def test_importance_is_negative_zero_only_where_no_gradient_was_received() -> None:
    activation = torch.tensor([[0.0, 1.0, 1.0, 0.0], [0.0, 1.0, 1.0, 2.0]])
    gradient = torch.tensor([[0.0, 0.0, -0.0, 1.0], [2.0, 0.0, -0.0, 1e-45]])
    got = reference.importance(activation, gradient)
    assert got.signbit().tolist() == [False, True, True, False]
    assert reference.received_no_gradient(got).tolist() == [False, True, True, False]
    assert reference.received_no_gradient(got + got).tolist() == [False, True, True, False]
    connections = reference.connection_importance(activation, gradient)
    assert connections.signbit().tolist() == [[True, True, True, False], [False, True, True, False]]


@pytest.mark.parametrize(
    ("before", "measured", "after", "weight", "momentum"),
    [
        (0.4, 2.0, 0.52, 1.0, 0.0),  # freezes
        (0.6, 2.0, 0.68, 1.0, 3.0),  # was frozen
        (0.0, 0.0, 0.0, 1 - 0.1 * (0.9 * 3 + 1 + 0.5), 0.9 * 3 + 1 + 0.5),  # moves
    ],
)
def test_a_neuron_that_freezes_loses_its_momentum(
    before: float, measured: float, after: float, weight: float, momentum: float
) -> None:
    parameter, gradient, buffer = torch.ones(2, 1), torch.ones(2, 1), torch.full((2, 1), 3.0)
    averages, sums = torch.tensor([before, 0.0]), torch.tensor([measured, 2.0])
    arguments = one_layer(averages, [parameter], [gradient], sums) | {"momentum_buffers": [buffer]}
    arguments |= {**sgd(1, momentum=0.9, weight_decay=0.5), "delta": [0.8], "sigma": ["erf"]}
    call(reference.update_, arguments)
    assert averages[0].item() == pytest.approx(after)
    assert parameter[0].item() == pytest.approx(weight)
    assert buffer[0].item() == pytest.approx(momentum)


def test_a_neuron_without_a_gradient_takes_no_part_among_the_active() -> None:
    parameter, gradient, buffer = (torch.full((3, 1), value) for value in (1.0, 0.0, 3.0))
    averages, sums = torch.tensor([0.4, 0.4, 0.0]), torch.tensor([-0.0, 0.0, 2.0])
    arguments = one_layer(averages, [parameter], [gradient], sums) | {"momentum_buffers": [buffer]}
    arguments |= {**sgd(1, momentum=0.5, weight_decay=0.5), "delta": [0.8], "sigma": ["erf"], "active_only": [True]}
    call(reference.update_, arguments)
    torch.testing.assert_close(averages, torch.tensor([0.4, 0.32, 0.4]))
    assert parameter[0] == 1
    assert buffer[0] == 3
    assert buffer[1] == 2
    assert parameter[1] < 1


def test_moving_average() -> None:
    average = reference.moving_average(torch.tensor([0.0, 2.0]), torch.tensor([1.0, 1.0]), delta=0.75)
    assert average.tolist() == [0.25, 1.75]


@pytest.mark.parametrize(
    ("importance", "rate"), [(0.0, 0.1), (0.05, 0.1), (0.1, 0.1), (0.25, 0.05), (0.4, 0.025), (0.5, 0.0), (0.7, 0.0)]
)
def test_learning_rate_at_the_check_values_of_the_paper(importance: float, rate: float) -> None:
    got = reference.learning_rate(torch.tensor([importance], dtype=torch.double), lr=0.1, alpha=0.5, beta=0.5)
    assert got.item() == pytest.approx(rate, abs=1e-15)


def test_learning_rate_for_the_error_function_is_the_root_of_the_logarithm() -> None:
    got = reference.learning_rate(torch.tensor([0.0, 0.25, 0.5, 1.0]), lr=0.1, alpha=0.5, beta=0.5, sigma="erf")
    torch.testing.assert_close(got, torch.tensor([0.1, 0.05 * math.sqrt(math.log(2)), 0.0, 0.0]))


@pytest.mark.parametrize("sigma", ["sigmoid", "erf"])
def test_at_the_papers_constants_alpha_in_units_of_lr_gives_the_rates_of_the_papers_form(sigma: str) -> None:
    importance = torch.linspace(0, 1, 501, dtype=torch.double)
    ratio = 0.5 / importance
    surplus = (ratio.log() if sigma == "erf" else ratio - 1).clamp(min=0)
    paper = (0.05 * surplus.sqrt()).clamp(max=0.1)
    ours = reference.learning_rate(importance, lr=0.1, alpha=0.5, beta=0.5, sigma=sigma)
    torch.testing.assert_close(ours, paper, rtol=1e-15, atol=0)


def test_the_share_of_the_learning_rate_is_one_at_most_and_does_not_depend_on_it() -> None:
    importance = torch.tensor([0.0, 0.01, 0.3, 0.5, 1.0], dtype=torch.double)
    share = reference.plasticity(importance, 0.5, 0.5)
    assert share[:2].tolist() == [1, 1] and 0 < share[2] < 1 and share[3:].tolist() == [0, 0]
    for lr in (0.0, 1e-3, 10.0):
        assert torch.equal(reference.learning_rate(importance, lr, 0.5, 0.5), lr * share)


@pytest.mark.parametrize(
    "options", [{}, {"momentum": 0.9}, {"momentum": 0.9, "nesterov": True}, {"maximize": True, "weight_decay": 0.1}]
)
def test_descend_is_sgd_where_nothing_is_frozen(options: dict[str, float]) -> None:
    ours = torch.randn(5, 3, dtype=torch.double)
    theirs = nn.Parameter(ours.clone())
    sgd = torch.optim.SGD([theirs], lr=0.1, **options)  # type: ignore[arg-type]
    buffer = torch.zeros_like(ours) if "momentum" in options else None
    for _ in range(3):
        theirs.grad = torch.randn_like(ours)
        reference.descend_(ours, theirs.grad, buffer, 0.1, **options)  # type: ignore[arg-type]
        sgd.step()
    torch.testing.assert_close(ours, theirs.detach())


def test_per_element_gives_each_row_of_a_grouped_transposed_convolution_its_neuron() -> None:
    layer = nn.ConvTranspose1d(4, 6, 3, groups=2, bias=False)  # weight (4, 3, 3); neurons 0-2 from inputs 0-1
    rates = torch.arange(6.0)
    spread = reference.per_element(rates, layer.weight, neuron_dim=1, groups=2)
    assert spread.squeeze(-1).tolist() == [[0, 1, 2], [0, 1, 2], [3, 4, 5], [3, 4, 5]]


# ------------------------------------------------------------------------------------------------- the four facts


def test_fact_1_every_positive_factor_cancels() -> None:
    measured = torch.rand(7, dtype=torch.double)
    for factor in (1e-6, 1 / 3, 2.0**16):
        torch.testing.assert_close(reference.normalize(measured * factor), reference.normalize(measured))


@pytest.mark.parametrize(
    "operation",
    [
        F.relu,
        lambda x: F.leaky_relu(x, 0.2),
        lambda x: F.max_pool2d(x, 2),
        lambda x: F.avg_pool2d(x, 2),
        lambda x: F.adaptive_avg_pool2d(x, 1),
        lambda x: x * torch.bernoulli(torch.full_like(x, 0.5)),
    ],
    ids=["relu", "leaky relu", "max pooling", "average pooling", "global pooling", "dropout"],
)
def test_fact_2_importance_is_the_same_before_and_after_homogeneous_operations(operation) -> None:  # type: ignore[no-untyped-def]
    before = torch.randn(3, 5, 8, 8, dtype=torch.double, requires_grad=True)
    after = operation(before)
    gradient = torch.randn_like(after)
    (gradient_before,) = torch.autograd.grad(after, before, gradient)
    torch.testing.assert_close(
        reference.importance(before.detach(), gradient_before), reference.importance(after.detach(), gradient)
    )


def test_fact_3_importance_before_instance_norm_is_rounding() -> None:
    before = torch.randn(3, 5, 8, 8, dtype=torch.double, requires_grad=True)
    after = F.instance_norm(before, eps=0)
    gradient = torch.randn_like(after)
    (gradient_before,) = torch.autograd.grad(after, before, gradient)
    assert reference.importance(before.detach(), gradient_before).max() < 1e-12
    assert reference.importance(after.detach(), gradient).min() > 1e-3


def test_fact_4_a_frozen_neuron_stays_frozen_as_long_as_its_average_can_decay() -> None:
    delta, beta, steps = 0.99, 0.5, 20
    average = torch.tensor([beta / delta**steps], dtype=torch.double) * (1 + 1e-12)
    for _ in range(steps):
        average = reference.moving_average(average, torch.zeros(1, dtype=torch.double), delta)
        assert reference.plasticity(average, 0.5, beta).item() == 0
