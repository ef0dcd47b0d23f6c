"""The importance kernel against the float64 reference: shapes, strides, dtypes, instruction sets, threads."""

from __future__ import annotations

import mmap
import random
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.library import opcheck

from npc_ext import ops, reference

from .. import cuda_on_cpu
from ..tolerances import DTYPES, assert_importance
from .checks import with_threads

SHAPES = [
    *[(1, 1), (3, 1), (2, 10), (5, 16), (4, 33), (64, 200), (300, 3)],
    *[(1, 1, 1), (2, 17, 2), (3, 64, 2, 2), (3, 40, 8), (2, 35, 4, 4), (2, 33, 3, 3), (2, 20, 5), (2, 64, 7, 7)],
    *[(2, 5, 16, 16), (1, 3, 300), (4, 2, 31, 33), (2, 18, 1, 40), (3, 16, 15), (2, 7, 2, 3, 4)],
    *[(1, 700), (40, 136), (1, 1, 3000), (70, 2, 49), (3, 24, 64)],
]
EMPTY = [(0, 5), (4, 0), (3, 5, 0), (0, 0)]


def layouts(tensor: Tensor) -> dict[str, Tensor]:
    """The same values in several memory layouts, some of them parts of larger tensors filled with NaN."""
    surroundings = torch.full(
        [*(size + 3 for size in tensor.shape[:-1]), 2 * tensor.shape[-1] + 5], torch.nan, device=tensor.device
    )
    cut = surroundings.to(tensor.dtype, copy=True)[tuple(slice(1, 1 + size) for size in tensor.shape)]
    every_other = surroundings.to(tensor.dtype, copy=True)[tuple(slice(0, size) for size in tensor.shape[:-1])]
    every_other = every_other[..., : 2 * tensor.shape[-1] : 2]
    return {
        "contiguous": tensor,
        "cut": cut.copy_(tensor),
        "every other": every_other.copy_(tensor),
        "channels last": channels_last(tensor),
        "transposed": tensor.transpose(0, -1).contiguous().transpose(0, -1),
    }


def channels_last(tensor: Tensor) -> Tensor:
    return tensor.movedim(1, -1).contiguous().movedim(-1, 1)


def check_importance(
    got: Tensor, activation: Tensor, gradient: Tensor, channel_dim: int = 1, batch_dim: int = 0
) -> None:
    n, g = activation.double(), gradient.double()
    absolute = (n * g).abs().movedim(channel_dim, 0).flatten(1).sum(1)
    want = reference.importance(n, g, channel_dim, batch_dim)
    terms = activation.numel() // max(activation.shape[channel_dim], 1)
    assert_importance(got, want, absolute, terms, activation.dtype)
    assert torch.equal(got.signbit(), want.signbit())  # of -0.0


def check(activation: Tensor, gradient: Tensor, channel_dim: int = 1, batch_dim: int = 0) -> None:
    got = ops.importance(activation, gradient, channel_dim, batch_dim)
    check_importance(got, activation, gradient, channel_dim, batch_dim)


def check_relu_backward(output: Tensor, gradient: Tensor, channel_dim: int = 1, batch_dim: int = 0) -> None:
    grad_input, importance = ops.relu_backward_importance(output, gradient, channel_dim, batch_dim)
    assert torch.equal(grad_input, torch.ops.aten.threshold_backward(gradient, output, 0))
    assert torch.equal(grad_input, reference.relu_backward_importance(output, gradient)[0])
    assert grad_input.stride() == torch.empty_like(output).stride()
    check_importance(importance, output, gradient, channel_dim, batch_dim)


def with_few_gradients(activation: Tensor, gradient: Tensor) -> None:
    """Sets activations to 0, and all gradients but a few to -0.0, in place."""
    activation.zero_()
    gradient.fill_(-0.0)
    *_, last = torch.cartesian_prod(*map(torch.arange, gradient.shape)) if gradient.numel() else [()]
    if gradient.numel():
        gradient[tuple(last.tolist())] = 1  # the last position of the last neuron
        gradient[0, :: 3 if gradient.shape[1] > 2 else 2] = 1


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape",
    [(5, 16), (64, 200), (3, 40, 8), (2, 33, 3, 3), (1, 3, 300), (4, 2, 31, 33), (1, 1, 3000), (70, 2, 49)],
    ids=str,
)
def test_importance_is_negative_zero_where_there_was_no_gradient(
    shape: tuple[int, ...], dtype: torch.dtype, device: str
) -> None:
    activation, gradient = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)
    with_few_gradients(activation, gradient)
    received = torch.zeros(shape[1], dtype=torch.bool)
    received[:: 3 if shape[1] > 2 else 2] = received[-1] = True
    activations, gradients = layouts(activation.to(device)), layouts(gradient.to(device))
    for name, in_layout in activations.items():
        got = ops.importance(in_layout, gradients[name])
        assert not got.any()
        assert torch.equal(got.signbit().cpu(), ~received), name


def test_importance_without_gradients_lasts_through_sums_and_no_others_do(device: str) -> None:
    n, g = torch.ones(4, 3, device=device), torch.zeros(4, 3, device=device)
    g[:2, 1], g[0, 2], g[1, 2] = 0, 1, -1
    first, second = ops.importance(n * 0, g), ops.importance(n, g * 0)
    assert first.signbit().tolist() == [True, True, False]
    assert (first + second).signbit().tolist() == [True, True, False]
    assert (first + first).signbit().tolist() == [True, True, False]
    assert ops.importance(n, g * torch.nan).isnan().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_importance_agrees_with_the_reference_in_every_layout(
    shape: tuple[int, ...], dtype: torch.dtype, device: str
) -> None:
    activations = layouts(torch.randn(shape).to(device, dtype))
    gradients = layouts(torch.randn(shape).to(device, dtype))
    for name, activation in activations.items():
        check(activation, gradients[name])
        check(activation, gradients["contiguous"])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("positions", [1, 2, 3, 4, 7, 9, 16, 25, 49, 50, 64, 196, 256, 1024, 1025])
def test_importance_of_any_number_of_positions_alone_and_with_relu(
    positions: int, dtype: torch.dtype, device: str
) -> None:
    """Rows that begin and end inside packs; few and many packs per row; batches that continue in the next sample's row."""
    for batch, neurons in [(1 + positions % 5, 8), (16 if positions < 256 else 2, 5 + positions % 2)]:
        activation = torch.randn(batch, neurons, positions).relu().to(device, dtype)
        gradient = torch.randn(batch, neurons, positions).to(device, dtype)
        gradient[:, 1] = 0
        activation[0, 2, 0] = torch.inf  # stays in its row
        gradient[0, 2, 0] = 1
        n, g = activation.double(), gradient.double()
        want, absolute = reference.importance(n, g), (n * g).abs().sum((0, 2))
        for output, its_gradient in [(activation, gradient), (channels_last(activation), channels_last(gradient))]:
            gradient_in, measured = ops.relu_backward_importance(output, its_gradient)
            assert torch.equal(gradient_in, reference.relu_backward_importance(output, its_gradient)[0])
            for got in (measured, ops.importance(output, its_gradient)):
                finite = want.isfinite()
                assert torch.equal(got[~finite].double(), want[~finite])
                assert_importance(got[finite], want[finite], absolute[finite], batch * positions, dtype)
                assert torch.equal(got.signbit(), want.signbit())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "shape", [(3, 8, 49), (5, 16, 7), (2, 8, 14, 14), (2, 8, 1025), (1, 1, 64), (16, 40), (2, 8, 3)], ids=str
)
def test_cuda_kernels_read_contiguous_tensors_in_packs_of_16_bytes_only(
    shape: tuple[int, ...], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every pack is read once, and twice if two rows share it."""
    cuda_on_cpu.take_over(monkeypatch.setattr)
    activation, gradient = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)
    rows, packs = shape[0] * shape[1], 2 * activation.numel() * dtype.itemsize // 16
    loads = partial(cuda_on_cpu.counted, "loads")
    assert packs <= loads(lambda: check(activation, gradient)) <= packs + (2 * rows if len(shape) > 2 else 0)
    assert loads(lambda: check(channels_last(activation), channels_last(gradient))) == packs
    assert loads(lambda: check(activation[..., 1:], gradient[..., 1:])) == 0, "not aligned"


def test_samples_may_lie_further_apart_than_32_bits_count(device: str) -> None:
    if device == "cuda":
        pytest.skip("a GPU cannot reserve memory without using it")
    stride, shape = 2**33 + 8, (5, 64, 4)
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0x4000)
    try:
        memory = mmap.mmap(-1, 4 * (4 * stride + 256), flags)
    except OSError:
        pytest.skip("the machine does not reserve addresses without memory behind them")
    activation = torch.frombuffer(memory, dtype=torch.float32).as_strided(shape, (stride, 4, 1))
    activation.copy_(torch.randn(shape))
    check(activation, torch.randn(shape))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_importance_of_linear_layers_on_sequences(dtype: torch.dtype, device: str) -> None:
    activation, gradient = (torch.randn(3, 5, 4, 37).to(device, dtype) for _ in range(2))
    check(activation, gradient, channel_dim=-1)
    check(activation, gradient, channel_dim=3, batch_dim=1)
    check_relu_backward(activation.relu(), gradient, channel_dim=-1, batch_dim=1)


@pytest.mark.parametrize("shape", EMPTY, ids=str)
def test_importance_of_nothing_is_zero(shape: tuple[int, ...]) -> None:
    activation, gradient = torch.randn(shape), torch.randn(shape)
    for got in (ops.importance(activation, gradient), ops.relu_backward_importance(activation, gradient)[1]):
        assert got.shape == (shape[1],)
        assert not got.any()
        assert got.signbit().all()


def test_importance_of_an_expanded_gradient_is_not_copied_and_right(device: str) -> None:
    activation = torch.randn(4, 6, 5, 5).to(device)
    check(activation, torch.randn(4, 6, 1, 1).to(device).expand(4, 6, 5, 5))
    check(activation, torch.tensor(0.5).to(device).expand(4, 6, 5, 5))


@pytest.mark.parametrize("shape", [(64, 512, 8, 8), (4096, 40), (4096, 3), (64, 3, 64, 64), (3, 2, 200, 200)], ids=str)
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_importance_on_several_threads_is_right_and_repeats_bit_for_bit(shape: tuple[int, ...], threads: int) -> None:
    activation, gradient = torch.randn(shape), torch.randn(shape)
    several = partial(with_threads, threads)
    several(lambda: check(activation, gradient))
    first, *others = several(lambda: [ops.importance(activation, gradient) for _ in range(6)])
    assert all(torch.equal(first, other) for other in others)


def test_importance_keeps_infinities_and_nans_visible(device: str) -> None:
    activation, gradient = torch.ones(2, 40, 9, device=device), torch.ones(2, 40, 9, device=device)
    activation[0, 3, 2], activation[1, 17, 8] = torch.inf, torch.nan
    got = ops.importance(activation, gradient)
    assert got[3] == torch.inf
    assert got[17].isnan()
    assert got.isfinite().sum() == 38


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_every_half_precision_number_is_read_exactly(dtype: torch.dtype, device: str) -> None:
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    finite = every[every.isfinite()][None].to(device)
    got = ops.importance(finite, torch.ones_like(finite))
    assert torch.equal(got, finite[0].float().abs())


@st.composite
def strided_pairs(draw: st.DrawFn) -> tuple[Tensor, Tensor, int, int]:
    """Two tensors of one shape with different strides: dimensions permuted in memory, with gaps, or expanded."""
    ndim = draw(st.integers(2, 5))
    shape = [draw(st.integers(1, 20 if dim < 2 else 6)) for dim in range(ndim)]
    dtype = draw(st.sampled_from(DTYPES))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))

    def strided() -> Tensor:
        order = draw(st.permutations(range(ndim)))  # from the outermost dimension in memory to the innermost
        steps = [draw(st.sampled_from([0, 1, 1, 2, 3])) for _ in range(ndim)]
        sizes = [shape[dim] * steps[dim] if steps[dim] else 1 for dim in range(ndim)]
        memory = torch.randn([sizes[dim] for dim in order], generator=generator).to(dtype)
        view = memory.permute([order.index(dim) for dim in range(ndim)])
        return view[tuple(slice(None, None, max(step, 1)) for step in steps)].expand(shape)

    channel_dim, batch_dim = draw(st.permutations(range(ndim)))[:2]
    return strided(), strided(), channel_dim, batch_dim


@given(pair=strided_pairs())
def test_importance_of_any_shape_and_strides(pair: tuple[Tensor, Tensor, int, int]) -> None:
    activation, gradient, channel_dim, batch_dim = pair
    check(activation, gradient, channel_dim, batch_dim)


@pytest.mark.parametrize("count", range(40))
def test_importance_of_random_shapes_and_strides(count: int, device: str) -> None:
    generator = random.Random(count)
    shape = [generator.randint(1, 20 if dim < 2 else 6) for dim in range(generator.randint(2, 5))]
    dtype = generator.choice([torch.float32, torch.float16, torch.bfloat16])

    def strided() -> Tensor:
        order = generator.sample(range(len(shape)), len(shape))
        memory = torch.randn([2 * shape[dim] for dim in order]).to(device, dtype)
        view = memory.permute([order.index(dim) for dim in range(len(shape))])
        return view[tuple(slice(None, None, 2) if generator.random() < 0.5 else slice(size) for size in shape)]

    check(strided(), strided(), *generator.sample(range(len(shape)), 2))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [*SHAPES, (40, 33), (3, 24, 8, 8), (2, 5, 7), (1, 2, 900), *EMPTY], ids=str)
def test_relu_backward_takes_importance_on_the_way(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> None:
    outputs = layouts(torch.randn(shape).relu().to(device, dtype))
    gradients = layouts(torch.randn(shape).to(device, dtype))
    for name, output in outputs.items():
        for gradient in (gradients[name], gradients["contiguous"]):
            check_relu_backward(output, gradient)
            silent = gradient * (torch.arange(shape[1], device=device) % 2).view(-1, *[1] * (gradient.ndim - 2))
            check_relu_backward(output * 0, silent)


def test_relu_backward_by_hand(device: str) -> None:
    output = torch.tensor([[[1.0, 0.0], [2.0, torch.nan], [0.0, 0.0]]], device=device)
    gradient = torch.tensor([[[3.0, torch.inf], [-1.0, 4.0], [torch.nan, 2.0]]], device=device)
    for operation in (ops.relu_backward_importance, reference.relu_backward_importance):
        grad_input, importance = operation(output, gradient)
        assert grad_input.tolist() == [
            [[3.0, 0.0], [-1.0, 4.0], [0.0, 0.0]]
        ]  # a NaN passes the gradient on, as in torch
        assert importance.isnan().all()  # 0 * inf, nan * 4 and 0 * nan
    gradient[0, 0, 1] = output[0, 1, 1] = 5.0
    assert ops.relu_backward_importance(output, gradient)[1][:2].tolist() == [3.0, 18.0]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(8, 32), (4, 16, 4, 4), (3, 5, 7, 7)], ids=str)
def test_relu_backward_of_special_numbers(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> None:
    tiny = torch.finfo(dtype).smallest_normal / 2
    special = torch.tensor([0.0, -0.0, tiny, -tiny, torch.inf, -torch.inf, torch.nan, 1.0], dtype=dtype)
    output = special[torch.randint(8, shape)].to(device)
    gradient = torch.randn(shape).to(device, dtype)
    for last in (False, True):
        n, g = (channels_last(tensor) if last else tensor for tensor in (output, gradient))
        got, _ = ops.relu_backward_importance(n, g)
        want = torch.ops.aten.threshold_backward(g.cpu().double(), n.cpu().double(), 0)
        assert torch.equal(got.cpu().double(), want)


@pytest.mark.parametrize("shape", [(70, 30), (3, 5, 700), (40, 8, 4, 4), (1, 3, 2000)], ids=str)
def test_importance_repeats_bit_for_bit(shape: tuple[int, ...], device: str) -> None:
    for tensor in layouts(torch.randn(shape).to(device)).values():
        first = ops.importance(tensor, tensor * 3)
        assert all(torch.equal(first, ops.importance(tensor, tensor * 3)) for _ in range(5))


@pytest.mark.parametrize("name", ["importance", "relu_backward_importance"])
def test_operations_pass_opcheck(name: str) -> None:
    operation = getattr(torch.ops.npc_ext, name).default
    opcheck(operation, (torch.randn(2, 5, 4), torch.randn(2, 5, 4)))
    opcheck(operation, (torch.randn(2, 4, 5), torch.randn(2, 1, 1).expand(2, 4, 5), -1, 1))
    opcheck(operation, (channels_last(torch.randn(2, 5, 4, 4)), torch.randn(2, 5, 4, 4)))


def test_importance_inside_a_compiled_function() -> None:
    compiled = torch.compile(lambda n, g: ops.importance(n * 2, g) + 1, fullgraph=True, backend="aot_eager")
    n, g = torch.randn(3, 5, 4), torch.randn(3, 5, 4)
    torch.testing.assert_close(compiled(n, g), ops.importance(n * 2, g) + 1)


@pytest.mark.parametrize(
    ("operation", "name"), [(ops.importance, "activation"), (ops.relu_backward_importance, "output")]
)
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.ones(2, 3), torch.ones(2, 4)), r"gradient has shape \(2, 4\), but NAME has \(2, 3\)"),
        ((torch.ones(2, 3), torch.ones(2, 3).double()), "gradient is torch.float64 on cpu, but NAME is torch.float32"),
        ((torch.ones(2, 3).int(), torch.ones(2, 3).int()), "NAME is torch.int32; expected float32"),
        ((torch.ones(3), torch.ones(3)), r"NAME has shape \(3,\); expected samples and neurons"),
        ((torch.ones(2, 3), torch.ones(2, 3), 2), "channel_dim is 2, but NAME has 2 dimensions"),
        ((torch.ones(2, 3), torch.ones(2, 3), 1, -1), "channel_dim and batch_dim are both dimension 1"),
    ],
)
def test_what_does_not_fit_is_refused(
    arguments: tuple[Any, ...], message: str, operation: Callable[..., object], name: str
) -> None:
    with pytest.raises(ValueError, match=message.replace("NAME", name)):
        operation(*arguments)


def test_more_positions_than_the_kernel_takes_are_refused() -> None:
    tensor = torch.randn([2, 3] + [4] * 9)[(slice(None), slice(None)) + (slice(None, None, 2),) * 9]
    with pytest.raises(ValueError, match="more than 8 position dimensions"):
        ops.importance(tensor, tensor)
