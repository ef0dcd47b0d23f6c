"""The weight importances of EWC and MAS against loops over single samples, finite differences and hand calculation."""

from __future__ import annotations

import copy
import sys
import warnings
from collections import UserDict
from collections.abc import Callable, Iterable
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import weight_norm
from torch.utils.data import DataLoader, TensorDataset

import npc_ext.nn
from npc_ext import NPC
from npc_ext.baselines.batches import moved
from npc_ext.baselines.consolidation import NonFiniteImportanceError, fisher, output_sensitivity
from npc_ext.baselines.samples import Importance

from ..models import DataDependent, ResNet, paper_cnn

# Both ways are sums of the same float64 products in another order: a few hundred roundings of 1e-16.
EXACT = {"rtol": 1e-10, "atol": 1e-14}


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).double()


def data(samples: int = 12, features: int = 5, classes: int = 3) -> tuple[Tensor, Tensor]:
    return torch.randn(samples, features, dtype=torch.float64), torch.randint(classes, (samples,))


def one_by_one(
    model: nn.Module,
    x: Tensor,
    values: Callable[[Tensor, int], Iterable[Tensor]],
    magnitude: Callable[[Tensor], Tensor] = torch.square,
) -> list[Tensor]:
    """The definition: a loop with batch size 1 that differentiates `values(outputs, index)`."""
    model.eval()
    parameters = list(model.parameters())
    sums = [torch.zeros_like(parameter) for parameter in parameters]
    for index in range(len(x)):
        for value in values(model(x[index : index + 1]), index):
            gradients = torch.autograd.grad(value, parameters, retain_graph=True, allow_unused=True)
            for total, gradient in zip(sums, gradients, strict=True):
                total += 0 if gradient is None else magnitude(gradient) / len(x)
    return sums


def assert_same(importance: dict[Tensor, Tensor], expected: Iterable[Tensor], **options: Any) -> None:
    for mine, theirs in zip(importance.values(), expected, strict=True):
        torch.testing.assert_close(mine, theirs, **{**EXACT, **options})


def exact_terms(logits: Tensor, _: int) -> list[Tensor]:
    log_p = F.log_softmax(logits, 1)[0]
    return [log_p[c].exp().detach().sqrt() * log_p[c] for c in range(len(log_p))]


def drawn_labels(logits: Tensor, seed: int) -> Tensor:
    """Labels drawn from p: with exponential variables e_c, the c of the greatest p_c / e_c has the distribution p."""
    noise = torch.empty(logits.shape, dtype=torch.float64)
    return (logits.softmax(1) / noise.exponential_(generator=torch.Generator().manual_seed(seed))).argmax(1)


def squared_norm(outputs: Tensor, _: int) -> list[Tensor]:
    return [outputs.square().sum()]


def masked(label: int) -> Callable[[Tensor], Tensor]:
    """Gives one of three labels the probability zero."""
    return lambda logits: logits.masked_fill(torch.arange(3) == label, -torch.inf)


def tied() -> nn.Sequential:
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
    model[2].weight = model[0].weight
    return model


def attention() -> nn.Sequential:
    encoder = nn.TransformerEncoderLayer(4, 2, 6, batch_first=True)
    return nn.Sequential(encoder, nn.Flatten(), nn.Linear(12, 3))


MODELS_AND_SHAPES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "fully connected": (mlp, (12, 5)),
    "paper's, with instance norm": (lambda: paper_cnn((3, 4), 5, 3), (6, 1, 8, 8)),
    "residual, with batch norm, in place": (ResNet, (6, 3, 6, 6)),
    "attention": (attention, (5, 3, 4)),
    "tied": (tied, (12, 4)),
    "weight norm": (lambda: nn.Sequential(weight_norm(nn.Linear(5, 4)), nn.ReLU(), nn.Linear(4, 3)), (12, 5)),
}


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("kind", MODELS_AND_SHAPES)
def test_importance_is_that_of_a_loop_over_single_samples(kind: str) -> None:
    build, shape = MODELS_AND_SHAPES[kind]
    model, x = build().double(), torch.randn(shape, dtype=torch.float64)
    y = torch.randint(3, (len(x),))
    model(x)  # running statistics of batch norm that are not trivial
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="torch.func cannot run")
        empirical = fisher(model, [(x, y)], labels="data")
        exact = fisher(model, [x], labels="exact", chunk_size=4)
        sensitivity = output_sensitivity(model, [x])
    assert_same(empirical, one_by_one(model, x, lambda out, i: [F.cross_entropy(out, y[i : i + 1])]))
    assert_same(exact, one_by_one(model, x, exact_terms))
    assert_same(sensitivity, one_by_one(model, x, squared_norm, torch.abs))


def test_drawn_labels_are_used_as_if_they_were_given() -> None:
    model, (x, _) = mlp(), data()
    drawn = drawn_labels(model(x), seed=5)
    assert len(drawn.unique()) > 1
    sampled = fisher(model, [x], generator=torch.Generator().manual_seed(5), chunk_size=5)
    assert_same(sampled, fisher(model, [(x, drawn)], labels="data").values())


def test_a_linear_softmax_model_has_the_fisher_information_computed_by_hand() -> None:
    model = nn.Linear(2, 2, bias=True).double()
    with torch.no_grad():
        model.weight.zero_()
        model.bias.copy_(torch.tensor([1.0, 4.0], dtype=torch.float64).log())  # odds 1 : 4
    x = torch.tensor([[1.0, 2.0], [3.0, 0.0]], dtype=torch.float64)
    # d log p_c / d logit_k = [c = k] - p_k, with p = (1/5, 4/5): its mean square is p_k (1 - p_k) = 4/25 for both k;
    # d logit_k / d w_kj = x_j, whose mean squares are (1 + 9) / 2 and (4 + 0) / 2.
    importance = fisher(model, [x], labels="exact")
    expected = torch.tensor([5.0, 2.0], dtype=torch.float64).expand(2, 2) * 4 / 25
    torch.testing.assert_close(importance[model.weight], expected, **EXACT)
    torch.testing.assert_close(importance[model.bias], torch.full((2,), 4 / 25, dtype=torch.float64), **EXACT)
    # ||f||^2 = f_1^2 + f_2^2 with f = b = (0, log 4): d / d w_kj = 2 b_k x_j, the mean of x_j is (2, 1).
    sensitivity = output_sensitivity(model, [x])
    norm = torch.tensor([0.0, 4.0], dtype=torch.float64).clamp_min(1).log() * 2
    torch.testing.assert_close(sensitivity[model.weight], norm[:, None] * torch.tensor([2.0, 1.0]).double(), **EXACT)
    torch.testing.assert_close(sensitivity[model.bias], norm, **EXACT)


def test_importance_agrees_with_finite_differences() -> None:
    model, (x, y) = mlp().eval(), data(4)
    weight, step = model[0].weight, 1e-5
    empirical = fisher(model, [(x, y)], labels="data")[weight]
    sensitivity = output_sensitivity(model, [x])[weight]

    @torch.no_grad()
    def values_after(move: float, i: int, j: int) -> Tensor:
        weight[i, j] += move
        outputs = model(x)
        weight[i, j] -= move
        return torch.stack([F.cross_entropy(outputs, y, reduction="none"), outputs.square().sum(1)])

    for i, j in ((0, 0), (3, 2), (6, 4)):
        differences = (values_after(step, i, j) - values_after(-step, i, j)) / (2 * step)
        # Central differences: step ** 2 from the third derivative, 1e-16 / step from rounding, both near 1e-10.
        torch.testing.assert_close(empirical[i, j], differences[0].square().mean(), rtol=1e-6, atol=1e-9)
        torch.testing.assert_close(sensitivity[i, j], differences[1].abs().mean(), rtol=1e-6, atol=1e-9)


def test_sampled_labels_give_the_fisher_information_on_average() -> None:
    model, x = nn.Linear(3, 3).double(), torch.randn(4, 3, dtype=torch.float64)
    repeated = x.repeat(2500, 1)  # 10,000 draws
    exact = fisher(model, [x], labels="exact")[model.bias]
    sampled = fisher(model, [repeated])[model.bias]
    # Squares lie in [0, 1], so their variance is at most 1/4 and the mean's deviation 0.005; 4 of these fail by chance
    # in 1 of 5,000 seeds for the three, and the seed is fixed. Data labels, all of class 0, are far outside.
    torch.testing.assert_close(sampled, exact, rtol=0, atol=0.02)
    of_one_class = fisher(model, [(repeated, torch.zeros(10000, dtype=torch.long))], labels="data")[model.bias]
    assert (of_one_class - exact).abs().max() > 0.04


def test_a_class_of_probability_zero_is_never_drawn_and_does_no_harm() -> None:
    model, (x, _) = mlp(), data()
    drawn = fisher(model, [x], outputs=masked(1))
    exact = fisher(model, [x], outputs=masked(1), labels="exact")
    assert_same(exact, fisher(model, [x], outputs=lambda y: y[:, [0, 2]], labels="exact").values())
    for importance in (drawn, exact):
        assert all(bool(value.isfinite().all()) for value in importance.values())
        assert not importance[model[2].bias][1]


def test_labels_are_drawn_alike_in_every_dtype() -> None:
    model, (x, _) = mlp(), data(50)
    double = fisher(model, [x], generator=torch.Generator().manual_seed(1))
    single = fisher(model.float(), [x.float()], generator=torch.Generator().manual_seed(1))
    # A hundred roundings of 6e-8 each. Another draw of a single label changes these means by about 1 / 50.
    assert_same(single, double.values(), rtol=1e-5, atol=1e-7, check_dtype=False)


def test_noise_of_zero_does_not_make_a_draw_undefined(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Tensor, "exponential_", lambda noise, generator: noise.zero_())
    model, (x, _) = mlp(), data()
    likeliest = masked(0)(model(x)).argmax(1)
    drawn = fisher(model, [x], outputs=masked(0))
    assert_same(drawn, fisher(model, [(x, likeliest)], outputs=masked(0), labels="data").values())


# ------------------------------------------------------------------------------------- which samples, which parameters


def test_chunks_and_batches_do_not_change_the_numbers() -> None:
    model, (x, y) = paper_cnn((3, 4), 5, 3).double(), (torch.randn(11, 1, 8, 8).double(), torch.randint(3, (11,)))
    whole = fisher(model, [(x, y)], labels="data")
    for chunk_size in (1, 2, 4, 100):
        assert_same(fisher(model, [(x, y)], labels="data", chunk_size=chunk_size), whole.values())
    loader = DataLoader(TensorDataset(x, y), batch_size=4)
    assert_same(fisher(model, loader, labels="data", progress=False), whole.values())
    drawn = fisher(model, [x], generator=torch.Generator().manual_seed(1))
    assert_same(fisher(model, [x], generator=torch.Generator().manual_seed(1), chunk_size=3), drawn.values())


def test_the_default_chunk_fills_the_memory_it_may_use(monkeypatch: pytest.MonkeyPatch) -> None:
    model, (x, _) = mlp(), data(10)
    elements = sum(parameter.numel() for parameter in model.parameters())
    for budget, chunks in ((elements * 8 * 4, [4, 4, 2]), (1, [1] * 10), (2**40, [10])):
        monkeypatch.setattr("npc_ext.baselines.samples.CHUNK_BYTES", budget)
        with mock.patch.object(Importance, "add", autospec=True, side_effect=Importance.add) as add:
            output_sensitivity(model, [x])
        assert [len(call.args[2][0]) for call in add.call_args_list] == chunks


def test_samples_limits_how_many_are_used_and_how_many_batches_are_read() -> None:
    model, (x, y) = mlp(), data(12)

    def batches() -> Iterable[tuple[Tensor, Tensor]]:
        yield x[:4], y[:4]
        yield x[4:8], y[4:8]
        raise AssertionError("read too far")

    for samples in (6, 8):
        limited = fisher(model, batches(), labels="data", samples=samples)
        assert_same(limited, fisher(model, [(x[:samples], y[:samples])], labels="data").values())


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_a_batch_may_be_inputs_alone_or_several_inputs() -> None:
    model, (x, y), z = nn.Bilinear(5, 2, 3).double(), data(), torch.randn(12, 2, dtype=torch.float64)
    expected = fisher(model, [((x, z), y)], labels="exact").values()
    for batch in (((x, z),), [[x, z], ["any"] * 12], ((x, z), None)):
        assert_same(fisher(model, [batch], labels="exact"), expected)


class ByTask(nn.Sequential):
    """A head for every task, chosen by an argument: a number, or a tensor with a number for each sample."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 6), nn.Unflatten(1, (2, 3)))

    def forward(self, x: Tensor, task: int | Tensor) -> Tensor:
        return super().forward(x)[torch.arange(len(x)), task]


def test_a_users_function_calls_a_model_that_takes_the_task() -> None:
    model, (x, y) = ByTask().double(), data()
    of_task_1 = model.register_forward_pre_hook(lambda model, inputs: (*inputs, 1))
    expected = one_by_one(model, x, exact_terms)
    of_task_1.remove()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="torch.func cannot run")
        by_number = fisher(model, [(x, y)], labels="exact", forward=lambda model, batch: model(batch[0], 1))
        batch = (x, y, torch.ones(len(x), dtype=torch.int64))
        by_sample = fisher(model, [batch], labels="exact", forward=lambda model, batch: model(batch[0], batch[2]))
    assert_same(by_number, expected)
    assert_same(by_sample, expected)


@pytest.mark.parametrize("mapping", [dict, UserDict])
def test_mappings_are_batches_if_a_users_function_takes_them(mapping: Any) -> None:
    model, (x, y) = mlp(), data()
    batches = [mapping(rows={"x": x[part]}, y=y[part], name="any") for part in (slice(5), slice(5, None))]
    options = {"forward": lambda model, batch: {"logits": model(batch["rows"]["x"])}, "outputs": lambda y: y["logits"]}
    empirical = fisher(
        model, batches, labels="data", loss=lambda out, batch: F.cross_entropy(out, batch["y"]), **options
    )
    assert_same(empirical, fisher(model, [(x, y)], labels="data").values())
    assert_same(output_sensitivity(model, batches, chunk_size=2, **options), output_sensitivity(model, [x]).values())
    assert_same(output_sensitivity(model, batches, samples=7, **options), output_sensitivity(model, [x[:7]]).values())


def test_a_users_function_may_call_a_model_that_torch_func_cannot_run() -> None:
    model, x = holds_its_weight(), data()[0]
    with pytest.warns(UserWarning, match="torch.func cannot run Linear .* one by one"):
        found = fisher(model, [{"x": x}], labels="exact", forward=lambda model, batch: model(batch["x"]))
    assert_same(found, one_by_one(model, x, exact_terms))


@pytest.mark.parametrize("build", [mlp, lambda: Counting(*mlp())], ids=["at once", "one by one"])
@pytest.mark.filterwarnings("ignore:torch.func cannot run")
def test_labels_may_be_integers_of_any_kind_probabilities_or_left_out(build: Callable[[], nn.Module]) -> None:
    model, (x, y) = build(), data()
    expected = list(fisher(model, [(x, y)], labels="data").values())
    for targets in (y.int(), y.byte(), F.one_hot(y).float(), F.one_hot(y).double()):
        assert_same(fisher(model, [(x, targets)], labels="data"), expected)
    some = fisher(model, [(x[:6], y[:6])], labels="data")
    ignored = fisher(model, [(x, torch.where(torch.arange(12) < 6, y, -100))], labels="data")
    assert_same(ignored, [value / 2 for value in some.values()])


def test_another_likelihood_and_selected_outputs() -> None:
    model, (x, _) = mlp(), data()
    target = torch.randn(12, 2, dtype=torch.float64)
    importance = fisher(
        model, [(x, target)], labels="data", outputs=lambda out: out[:, 1:], loss=lambda out, t: F.mse_loss(out, t) / 2
    )
    assert_same(importance, one_by_one(model, x, lambda out, i: [F.mse_loss(out[:, 1:], target[i : i + 1]) / 2]))
    assert not importance[model[2].weight][0].any() and importance[model[2].weight][1:].all()


def test_only_the_given_parameters_that_require_a_gradient_are_measured() -> None:
    model, (x, y) = mlp(), data()
    everything = fisher(model, [(x, y)], labels="data")
    assert list(everything) == list(model.parameters())
    model[0].weight.requires_grad_(False)
    some = fisher(
        model, [(x, y)], labels="data", parameters=(p for p in (model[2].bias, model[0].weight, model[0].bias))
    )
    assert list(some) == [model[2].bias, model[0].bias]
    assert_same(some, [everything[parameter] for parameter in some])
    assert all(not value.requires_grad for value in some.values())


def test_parameters_that_the_outputs_do_not_depend_on_get_zeros() -> None:
    model, (x, _) = mlp(), data()
    model[0].unused = nn.Parameter(torch.ones(2, 2))
    for importance in (fisher(model, [x]), output_sensitivity(model, [x], outputs=lambda y: y[:, :1])):
        assert importance[model[0].unused].dtype == torch.float32
        assert torch.equal(importance[model[0].unused], torch.zeros(2, 2))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_halves_are_squared_and_summed_in_float32(dtype: torch.dtype) -> None:
    model, (x, y) = mlp().to(dtype), data(200)
    with torch.no_grad():
        model[2].weight.mul_(1e-3)  # gradients of the first layer whose squares float16 does not hold
    importance = fisher(model, [(x.to(dtype), y)], labels="data")
    assert all(value.dtype == torch.float32 for value in importance.values())
    reference = fisher(copy.deepcopy(model).double(), [(x.to(dtype).double(), y)], labels="data")
    # A relative 2 ** -8 or less for each of some ten operations of a gradient, twice that for its square.
    for mine, theirs in zip(importance.values(), reference.values(), strict=True):
        assert (mine - theirs).abs().max() < 0.1 * theirs.max()


# ------------------------------------------------------------------------------------------------- the model as before


class Dropping(nn.Sequential):
    """Mixed modes, dropout, and statistics that a user has frozen."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Dropout(0.5), nn.Linear(6, 3))
        self.double()
        self[1].eval()

    def train(self, mode: bool = True) -> Dropping:
        raise AssertionError("called although train() and eval() may do more than set modes")


def test_the_model_is_measured_in_evaluation_mode_and_left_as_it_was() -> None:
    model, (x, _) = Dropping(), data()
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    before = copy.deepcopy(model.state_dict())
    buffers = dict(model.named_buffers())
    modes = [module.training for module in model.modules()]
    random = torch.get_rng_state()
    once, twice = fisher(model, [x]), fisher(model, [x])
    assert_same(once, twice.values(), rtol=0, atol=0)  # neither dropout nor another draw
    sensitivity = output_sensitivity(model, [x])
    assert torch.equal(random, torch.get_rng_state())
    assert [module.training for module in model.modules()] == modes
    assert all(buffer is buffers[name] for name, buffer in model.named_buffers())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(bool((parameter.grad == 1).all()) and parameter.requires_grad for parameter in model.parameters())
    plain = nn.Sequential(model[0], model[1], model[3])
    assert_same(sensitivity, one_by_one(plain, x, squared_norm, torch.abs))


def test_training_continues_in_the_same_modes_with_the_same_random_numbers_also_after_an_error() -> None:
    model = Dropping()
    fitting, too_wide = (DataLoader(TensorDataset(*data(12, n)), batch_size=3, shuffle=True) for n in (5, 9))
    modes, random = [module.training for module in model.modules()], torch.get_rng_state()
    fisher(model, fitting)
    assert torch.equal(random, torch.get_rng_state())
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        fisher(model, too_wide)
    assert torch.equal(random, torch.get_rng_state())
    assert [module.training for module in model.modules()] == modes


def test_importance_that_is_zero_everywhere_warns() -> None:
    with pytest.warns(UserWarning, match="the importance of every parameter is zero"):
        output_sensitivity(mlp(), [data()[0]], outputs=lambda y: 0 * y)


@pytest.mark.parametrize("without_gradients", [torch.no_grad, torch.inference_mode])
def test_importance_can_be_measured_where_no_gradients_are_recorded(without_gradients: Any) -> None:
    model, (x, y) = mlp(), data()
    counting = Counting(*model)
    expected = fisher(model, [(x, y)], labels="data").values()
    with without_gradients():
        found = fisher(model, [(x.clone(), y.clone())], labels="data")
        with pytest.warns(UserWarning, match="one by one"):
            looped = output_sensitivity(counting, [x.clone()])
    assert_same(found, expected)
    assert_same(looped, output_sensitivity(model, [x]).values())
    assert not any(importance.is_inference() for importance in (*found.values(), *looped.values()))


def test_buffers_made_in_inference_mode_are_used_and_left_as_they_are() -> None:
    model, x = ResNet().double(), torch.randn(6, 3, 6, 6, dtype=torch.float64)
    model(x)
    expected = fisher(model, [x], labels="exact").values()
    with torch.inference_mode():
        made_there = copy.deepcopy(model)
    for module, other in zip(model.modules(), made_there.modules(), strict=True):
        module._buffers = other._buffers
    buffers = dict(model.named_buffers())
    assert buffers and all(buffer.is_inference() for buffer in buffers.values())
    assert_same(fisher(model, [x], labels="exact"), expected)
    assert all(buffer is buffers[name] for name, buffer in model.named_buffers())


@pytest.mark.parametrize("relu", [nn.ReLU, npc_ext.nn.ReLU])
def test_a_model_with_taps_is_measured_like_one_without(relu: type[nn.Module]) -> None:
    model = nn.Sequential(nn.Conv2d(1, 3, 3), relu(), nn.Flatten(), nn.Linear(48, 3)).double()
    x = torch.randn(4, 1, 6, 6, dtype=torch.float64)
    expected = fisher(model, [x], labels="exact").values()
    optimizer = NPC(model)
    assert model.training
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        importance = fisher(model, [x], labels="exact")
    assert_same(importance, expected)
    assert all(layer.sink.grad is None for layer in optimizer.neurons)


# ------------------------------------------------------------------------------------------------ one sample at a time


class Counting(nn.Sequential):
    """Changes buffers in place and by assignment, also in evaluation mode."""

    def __init__(self, *modules: nn.Module) -> None:
        super().__init__(*modules)
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("last", torch.zeros(3, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        self.last = y[0].detach()
        self.calls += 1
        return y


def holds_its_weight() -> nn.Module:
    """Keeps its weight in a list, too, which torch.func does not see."""
    model = nn.Linear(5, 3).double()
    weights = [model.weight]
    model.forward = lambda x: F.linear(x, weights[0], model.bias)
    return model


class Recurrent(nn.GRU):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)[0][:, -1]


@pytest.mark.parametrize(
    ("build", "shape"),
    [
        (lambda: DataDependent().double(), (5, 3, 6, 6)),
        (lambda: Counting(*mlp()), (5, 5)),
        (holds_its_weight, (5, 5)),
        (lambda: Recurrent(5, 3, batch_first=True).double(), (5, 2, 5)),
        (lambda: torch.jit.script(mlp()), (5, 5)),
    ],
    ids=["data-dependent", "buffers in place", "weight in a list", "recurrent", "scripted"],
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_models_that_torch_func_cannot_run_are_measured_one_by_one_with_one_warning(
    build: Callable[[], nn.Module], shape: tuple[int, ...]
) -> None:
    model, x = build(), torch.randn(shape, dtype=torch.float64)
    before = copy.deepcopy(model.state_dict())
    with pytest.warns(UserWarning, match="torch.func cannot run .* one by one") as warned:
        exact = fisher(model, [x[:2], x[2:]], labels="exact", chunk_size=1)
    assert len(warned) == 1 and warned[0].filename == __file__
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert_same(exact, one_by_one(model, x, exact_terms))
    generator = torch.Generator().manual_seed(3)
    with pytest.warns(UserWarning, match="one by one"):
        drawn = fisher(model, [x], generator=generator)
    labels = drawn_labels(model(x), seed=3)
    assert_same(drawn, one_by_one(model, x, lambda out, i: [F.cross_entropy(out, labels[i : i + 1])]))


# -------------------------------------------------------------------------------------------------------------- errors


def case(batches: object, error: type[Exception], words: str, **options: object) -> object:
    return pytest.param(batches, options, error, words, id=words[:40])


X, Y = torch.randn(4, 5, dtype=torch.float64), torch.tensor([0, 1, 2, 0])


@pytest.mark.parametrize(
    ("batches", "options", "error", "words"),
    [
        case([X], ValueError, "labels is 'true'; expected one of 'sampled'", labels="true"),
        case([X], ValueError, "loss is for the targets given, but labels is 'sampled'", loss=F.mse_loss),
        case([X], ValueError, "generator draws labels, but labels is 'exact'", labels="exact", generator=torch.Generator()),
        case([X], ValueError, "samples is 0; expected an integer of at least 1", samples=0),
        case([X], ValueError, "chunk_size is 2.5; expected an integer", chunk_size=2.5),
        case([X], ValueError, "samples is -1; expected an integer of at least 1", samples=-1),
        case([X], ValueError, "samples is True; expected an integer of at least 1", samples=True),
        case([X], ValueError, "chunk_size is 0; expected an integer of at least 1", chunk_size=0),
        case([X], ValueError, "progress is 'no'; expected one of True, False", progress="no"),
        case([X], TypeError, "loss is of type str; expected a function", labels="data", loss="mse"),
        case([X], TypeError, r"generator is of type int; .* torch.Generator\(\).manual_seed", generator=0),
        case(None, TypeError, "batches is of type NoneType; expected an iterable of batches"),
        case({"x": X}, TypeError, r"batches is of type dict; .* for a single one write \[batch\]"),
        case([X[:0]], ValueError, "batches has no samples"),
        case([], ValueError, "batches has no samples"),
        case(X, TypeError, r"batches is a tensor; .* write \[inputs\]"),
        case((X, Y), TypeError, r"batches is a tuple of tensors; .* write \[\(x, y\)\]"),
        case(TensorDataset(X, Y), TypeError, r"batches is of type TensorDataset, .*DataLoader\(dataset"),
        case([{"x": X}], TypeError, "a batch is a dict; expected inputs"),
        case([X], TypeError, "outputs is .*; expected a function that picks outputs", outputs=[2, 3]),
        case([{"x": X, "y": Y}], TypeError, r"Say how to call the model with it: forward=lambda model, batch: model\(\*\*"),
        case([(X, Y, Y)], TypeError, r"Say how to call the model with it: forward=lambda model, batch: model\(batch\[0\]"),
        case([((X, X), Y)], TypeError, r"is called with the 2 inputs of a batch \(too many positional.*forward=lambda"),
        case([{"x": 1}], TypeError, "a batch is a dict, in which there are no tensors", forward=lambda model, batch: 0),
        case([{"x": X, "y": Y[:2]}], ValueError, r"of shapes \(4, 5\), \(2,\); expected", forward=lambda model, batch: 0),
        case([X], TypeError, "forward is of type int; expected a function", forward=1),
        case([X], ValueError, "nothing says where a batch has its targets", forward=lambda model, x: model(x), labels="data"),
        case([(X, X, Y)], TypeError, r"a batch is a tuple of 3 \(Tensor, Tensor, Tensor\); expected"),
        case([((X, 1), Y)], TypeError, r"a batch is a tuple of 2 \(tuple, Tensor\)"),
        case([((X, X[:3]), Y)], ValueError, r"inputs of shapes \(4, 5\), \(3, 5\); expected"),
        case([torch.tensor(1.0)], ValueError, r"inputs of shapes \(\); expected"),
        case([X], TypeError, "labels is 'data', but a batch has no targets", labels="data"),
        case([(X, [0, 1, 2, 0])], TypeError, "targets that are a list", labels="data"),
        case([(X, Y[:3])], ValueError, r"4 samples, but targets of shape \(3,\)", labels="data"),
        case([(X, Y)], ValueError, r"loss returned a tensor of shape \(1, 3\) for one", labels="data", loss=lambda o, t: o),
        case([(X, Y + 2)], ValueError, "labels from 2 to 4, but there are 3 outputs; expected labels from 0 to 2", labels="data"),
        case([(X, Y)], ValueError, r"there are 2 outputs; .*loss=lambda outputs, target: ", labels="data", outputs=lambda y: y[:, 1:]),
        case([(X, Y - 1)], ValueError, "labels from -1 to 1, but", labels="data"),
        case([(X, Y.float())], ValueError, r"float32 and shape \(4,\), .* integer labels of shape \(4,\), or", labels="data"),
        case([(X, Y[:, None])], ValueError, r"int64 and shape \(4, 1\), but", labels="data"),
        case([(X, F.one_hot(Y))], ValueError, r"int64 and shape \(4, 3\), .* floating-point probabilities of shape \(4, 3\)", labels="data"),
        case([(X, F.one_hot(Y).float())], ValueError, r"probabilities of shape \(4, 2\)", labels="data", outputs=lambda y: y[:, 1:]),
        case([(X, Y)], ValueError, r"have shape \(1,\), but labels='data' needs logits", labels="data", outputs=lambda y: y[:, 0]),
        case([(X, Y)], ValueError, r"\(1, 1\): the softmax of fewer than two", labels="data", outputs=lambda y: y[:, :1]),
        case([(X, Y)], ValueError, "loss returned a number that does not depend on the outputs", labels="data", loss=lambda o, t: o.detach().sum()),
        case([X], ValueError, r"outputs picked nothing for one sample: a tensor of shape \(0, 3\)", outputs=lambda y: y[1:]),
        case([X], IndexError, r"one sample, of shape \(1, 3\): .* to pick classes write outputs=lambda y: y\[:, \[2, 3\]\]", outputs=lambda y: y[[1, 2]]),
        case([X], ValueError, r"have shape \(3, 1\), but labels='sampled' needs logits", outputs=lambda y: y.T),
        case([X], TypeError, "forward returned a NoneType; expected", forward=lambda model, batch: None),
        case([X], ValueError, r"have shape \(1,\), but labels='sampled' needs logits", outputs=lambda y: y[:, 0]),
        case([X], ValueError, r"\(1, 1\): the softmax of fewer than two classes", outputs=lambda y: y[:, :1]),
        case([X], TypeError, "outputs returned a tuple; expected a floating-point tensor", outputs=lambda y: (y,)),
        case([X], TypeError, "outputs returned a tensor of torch.int64", outputs=lambda y: y.argmax(1)),
        case([X], TypeError, r"parameters\[0\] is of type str", parameters=["weight"]),
        case([X], ValueError, r"parameters\[0\], of shape \(2,\), is no parameter of the model", parameters=[torch.ones(2)]),
        case([X], TypeError, "parameters is a tensor", parameters=torch.ones(2)),
        case([X], ValueError, "no parameter requires a gradient", parameters=[]),
        case([X], ValueError, "Sequential depend on none of the 4 parameters", outputs=lambda y: y.detach()),
        case([X / 0], NonFiniteImportanceError, "parameter '0.weight' is not finite in 35 of 35 elements"),
    ],
)  # fmt: skip
def test_wrong_arguments_raise_an_error_that_explains(
    batches: object, options: dict[str, object], error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        fisher(mlp(), batches, **options)


def test_models_that_cannot_be_measured_raise_an_error_that_explains() -> None:
    with pytest.raises(TypeError, match="model is of type function; expected"):
        output_sensitivity(lambda x: x, [X])
    with pytest.raises(ValueError, match=r"'0\.weight' is not initialized yet"):
        output_sensitivity(nn.Sequential(nn.LazyLinear(3)), [X])
    with pytest.raises(ValueError, match="'weight' is complex"):
        output_sensitivity(nn.Linear(5, 3, dtype=torch.complex64), [X])
    with torch.inference_mode():
        model = mlp()
    with pytest.raises(ValueError, match=r"'0\.weight' was created under torch.inference_mode\(\)"):
        output_sensitivity(model, [X])


def test_progress_is_shown_in_a_terminal_only(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("tqdm")
    model = mlp()
    fisher(model, [X, X])
    assert not capsys.readouterr().err
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    fisher(model, [X, X], progress=False)
    assert not capsys.readouterr().err
    fisher(model, [X, X])
    assert "Fisher information" in capsys.readouterr().err


@pytest.mark.gpu
def test_on_a_gpu_batches_are_moved_and_labels_drawn_as_on_the_cpu() -> None:
    model, (x, y) = paper_cnn((3, 4), 5, 3).double(), (torch.randn(11, 1, 8, 8).double(), torch.randint(3, (11,)))
    on_gpu = copy.deepcopy(model).cuda()
    for labels in ("sampled", "exact", "data"):
        mine = fisher(on_gpu, DataLoader(TensorDataset(x, y), batch_size=4, pin_memory=True), labels=labels)
        assert all(value.is_cuda for value in mine.values())
        expected = fisher(model, DataLoader(TensorDataset(x, y), batch_size=4), labels=labels)
        assert_same(mine, expected.values(), check_device=False)
    assert_same(fisher(model, [(x.cuda(), y.cuda())], labels="data"), fisher(model, [(x, y)], labels="data").values())


@pytest.mark.parametrize(("device", "waits"), [("cpu", True), ("cuda", False)])
def test_only_copies_to_a_gpu_may_still_be_on_their_way(device: str, waits: bool) -> None:
    """The CPU would read a copy from a GPU before it has arrived."""
    tensor = mock.Mock()
    moved(tensor, torch.device(device))
    tensor.to.assert_called_once_with(torch.device(device), non_blocking=not waits)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_samples_taken_one_by_one_are_moved_to_the_models_device(device: str) -> None:
    """Models whose control flow depends on data are never run at once, whatever torch can vectorize on the device."""
    model, x = DataDependent().double(), torch.randn(3, 3, 6, 6, dtype=torch.float64)
    with pytest.warns(UserWarning, match="one by one"):
        expected = output_sensitivity(model, [x])
    with pytest.warns(UserWarning, match="one by one"):
        mine = output_sensitivity(copy.deepcopy(model).to(device), [x])
    assert all(value.device.type == device for value in mine.values())
    assert_same(mine, expected.values(), check_device=False)
