"""Changes of a model, or of an optimizer's state, between steps: the next step continues correctly or raises.

No tensor reaches a kernel before its dtype (whatever the default is), shape, device and layout are checked.
"""

from __future__ import annotations

import ast
import copy
import warnings
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import prune

import npc_ext
from npc_ext import EWC, NPC, NPCAdamW

from ..methods import METHODS, consolidate
from ..tolerances import TRAJECTORY
from ..training import refused, same, train, weights


class Words(nn.Module):
    """An embedding, a convolution over words, and layers that are fully connected."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, 6)
        self.conv = nn.Conv2d(6, 8, 3, padding=1)
        self.hidden = nn.Linear(8, 12)
        self.relu = nn.ReLU()
        self.head = nn.Linear(12, 5)

    def forward(self, words: Tensor) -> Tensor:
        planes = self.embedding(words).permute(0, 3, 1, 2)
        return self.head(self.relu(self.hidden(F.relu(self.conv(planes)).mean((2, 3)))))


OPTIMIZERS: dict[str, Callable[..., Any]] = {
    **METHODS,
    "EWC, explicit": partial(METHODS["EWC"], implicit=False),
    "SSL": partial(METHODS["SSL"], sparsity=0.01),
    "stochastic rounding": lambda model, **options: METHODS["NPCAdamW"](
        model.to(torch.bfloat16), stochastic_rounding=True, **options
    ),
}


def sentences(seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(20, (8, 4, 4), generator=generator), torch.randint(2, (8,), generator=generator)


def learn(model: nn.Module, optimizer: Any, *seeds: int) -> None:
    train(model, optimizer, map(sentences, seeds))


def change_data(change: Callable[[Tensor], Tensor], *parameters: nn.Parameter) -> None:
    for parameter in parameters:
        parameter.data = change(parameter.data)
        parameter.grad = None


def with_rows(data: Tensor, rows: int) -> Tensor:
    return torch.cat([data, torch.full((rows, *data.shape[1:]), 0.1, dtype=data.dtype)])


def set_another_storage(model: Any) -> None:
    with torch.no_grad():
        model.hidden.weight.set_(model.hidden.weight.detach().clone())


CHANGES: dict[str, Callable[[Any], Any]] = {
    "double": lambda model: model.double(),
    "bfloat16": lambda model: model.bfloat16(),
    "half": lambda model: model.half(),
    "channels_last": lambda model: model.to(memory_format=torch.channels_last),
    "new addresses": lambda model: change_data(torch.clone, *model.parameters()),
    "set_": set_another_storage,
    "assign": lambda model: model.load_state_dict(copy.deepcopy(model.state_dict()), assign=True),
    "pruning": lambda model: prune.l1_unstructured(model.hidden, "weight", 0.5),
    "grown embedding": lambda model: change_data(lambda data: with_rows(data, 20_000), model.embedding.weight),
    "grown head": lambda model: change_data(lambda data: with_rows(data, 2000), *model.head.parameters()),
    # At the same address, with the same strides.
    "shrunken head": lambda model: change_data(lambda data: data[:2], *model.head.parameters()),
    # As many neurons with fewer weights each.
    "narrower layer": lambda model: change_data(
        lambda data: data[:, :5].clone(), model.conv.weight, model.embedding.weight
    ),
}
# Changes after which a step raises; the message names the parameter or the layer.
REFUSED = {
    "grown embedding": "embedding.weight",
    "grown head": "head",
    "shrunken head": "head",
    "narrower layer": "(conv|embedding).weight",
}
# Changes after which torch.optim.AdamW raises.
TORCH_REFUSES = ("grown embedding", "narrower layer", "double", "bfloat16", "half")
# Methods without state of the parameter's shape continue with another shape, as torch.optim.SGD does.
GOES_ON = {
    ("NPC", "grown embedding"),
    ("NPC", "narrower layer"),
}


def run(name: str, change: str, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    model = Words()
    optimizer = OPTIMIZERS[name](model, **options)
    learn(model, optimizer, 0, 1, 2)
    consolidate(optimizer, sentences(99))
    learn(model, optimizer, 3)
    CHANGES[change](model)
    learn(model, optimizer, 4, 5, 6, 7)
    return model


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_steps_fit_what_was_done_to_the_model_or_say_what_does_not(name: str, change: str) -> None:
    if name == "PlasticityWrapper" and change in TORCH_REFUSES:
        with pytest.raises(RuntimeError, match=r"size|dtype"):
            run(name, change)
        return
    if change in REFUSED and (name, change) not in GOES_ON:
        with pytest.raises(ValueError, match=REFUSED[change]):
            run(name, change)
        return
    with warnings.catch_warnings():
        if change == "assign":
            warnings.simplefilter("ignore", UserWarning)
        model = run(name, change)
        plain = run(name, change, backend="reference")
    rounding = {torch.float16: 0.01, torch.bfloat16: 0.1}.get(next(model.parameters()).dtype, TRAJECTORY)
    assert all(bool(parameter.isfinite().all()) for parameter in model.parameters())
    torch.testing.assert_close(weights(model), weights(plain), rtol=rounding, atol=rounding)


@pytest.mark.parametrize("change", REFUSED)
@pytest.mark.parametrize("name", ["NPC, momentum", "NPCAdamW", "CPC", "EWC", "SI"])
def test_a_refused_step_changes_nothing(name: str, change: str) -> None:
    model = Words()
    optimizer = OPTIMIZERS[name](model)
    learn(model, optimizer, 0)
    consolidate(optimizer, sentences(99))
    learn(model, optimizer, 1)
    CHANGES[change](model)
    with refused(model, optimizer, ValueError, REFUSED[change]):
        learn(model, optimizer, 2)


def test_a_gradient_of_the_shape_that_the_parameter_had_is_refused() -> None:
    model = Words()
    optimizer = NPC(model, other_parameters="train")
    F.cross_entropy(model(sentences(0)[0]), sentences(0)[1]).backward()
    model.embedding.weight.data = torch.zeros(2000, 6)
    with pytest.raises(ValueError, match=r"gradient of 'embedding.weight' has shape \(20, 6\).*shape \(2000, 6\)"):
        optimizer.step()


def test_parameters_that_went_to_the_meta_device_are_warned_of() -> None:
    model = Words()
    optimizer = EWC(model)
    learn(model, optimizer, 0)
    model.to("meta")  # which makes new parameters
    optimizer.zero_grad()
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    with pytest.warns(UserWarning, match=r"'embedding\.weight'.*are not trained"):
        optimizer.step()


def test_parameters_that_began_on_the_meta_device_are_refused() -> None:
    model = Words().to("meta")
    optimizer = EWC(model)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    with pytest.raises(ValueError, match=r"'embedding\.weight' is on the meta device"):
        optimizer.step()


@pytest.mark.parametrize("tensor", ["exp_avg", "exp_avg_sq", "step", "importance"])
def test_state_that_is_replaced_by_hand_is_checked_before_a_kernel_reads_it(tensor: str) -> None:
    model, twin = Words(), Words()
    twin.load_state_dict(model.state_dict())
    optimizer, other = NPCAdamW(model, delta=0.9), NPCAdamW(twin, delta=0.9)
    learn(model, optimizer, 0, 1, 2)
    learn(twin, other, *range(6))
    state = optimizer.state[model.hidden.weight]
    state[tensor] = state[tensor].double()
    learn(model, optimizer, 3, 4, 5)
    assert state[tensor].dtype == torch.float32
    assert same(model, twin)
    state[tensor] = torch.zeros(7)
    with pytest.raises(ValueError, match="hidden"):
        learn(model, optimizer, 6)
    del state[tensor]
    learn(model, optimizer, 7)


def test_state_with_other_memory_behind_it_does_not_reach_a_kernel() -> None:
    model = Words()
    optimizer = NPCAdamW(model)
    learn(model, optimizer, 0)
    optimizer.state[model.hidden.weight]["exp_avg"].data = torch.zeros(3)
    with pytest.raises(ValueError, match=r"first_moments.*expected torch\.float32"):
        learn(model, optimizer, 1)


@pytest.mark.parametrize("tensor", ["importance", "step"])
def test_state_that_has_gone_to_another_device_does_not_reach_a_kernel(tensor: str) -> None:
    model = Words()
    optimizer = NPCAdamW(model)
    learn(model, optimizer, 0)
    state = optimizer.state[model.hidden.weight]
    torch.utils.swap_tensors(state[tensor], torch.empty_like(state[tensor], device="meta"))
    with pytest.raises(ValueError, match=f"{tensor}s.*on meta; expected .*on cpu"):
        learn(model, optimizer, 1)


def test_a_state_dictionary_that_is_replaced_by_hand_is_the_one_that_steps_read() -> None:
    model = Words()
    optimizer = EWC(model, momentum=0.9)
    learn(model, optimizer, 0)
    optimizer.state[model.head.bias] = {"momentum_buffer": torch.full((5,), 1e6)}
    learn(model, optimizer, 1)
    assert model.head.bias.abs().min() > 1e3


# ------------------------------------------------------------------------------------- default dtype, default device


@pytest.fixture
def _restored_defaults() -> Iterator[None]:
    before = torch.get_default_dtype()
    yield
    torch.set_default_dtype(before)
    torch.set_default_device(None)


def trained(name: str, backend: str, change_defaults: Callable[[], object]) -> nn.Module:
    torch.manual_seed(0)
    model, data, last = Words(), [sentences(seed) for seed in range(12)], sentences(99)
    change_defaults()
    optimizer = OPTIMIZERS[name](model, backend=backend)
    train(model, optimizer, data[:6])
    with torch.device("cpu"):
        consolidate(optimizer, last)
    train(model, optimizer, data[6:])
    getattr(optimizer, "plasticity", dict)()
    return model


def counts_steps_on_the_default_device() -> bool:
    """Whether torch's AdamW does so, for a parameter on another device."""
    parameter = nn.Parameter(torch.zeros(1, device="cpu"))
    parameter.grad = torch.zeros(1, device="cpu")
    optimizer = torch.optim.AdamW([parameter])
    with torch.device("meta"), suppress(RuntimeError):  # it may not be able to read such a number
        optimizer.step()
    return optimizer.state[parameter]["step"].is_meta


@pytest.mark.usefixtures("_restored_defaults")
@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16, torch.float16, torch.device("meta")], ids=str)
@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_default_dtype_and_the_default_device_do_not_matter(name: str, backend: str, default: Any) -> None:
    on_meta = isinstance(default, torch.device)
    if on_meta and name == "PlasticityWrapper" and counts_steps_on_the_default_device():
        pytest.skip("AdamW of this torch counts its steps on the default device")
    usual = trained(name, backend, lambda: None)
    change = torch.set_default_device if on_meta else torch.set_default_dtype
    assert same(usual, trained(name, backend, lambda: change(default)))


_CREATE = {"zeros", "ones", "empty", "full", "tensor", "as_tensor", "scalar_tensor", "arange", "range", "linspace"}
_CREATE |= {"logspace", "eye", "rand", "randn", "randint", "randperm", "empty_strided", "normal"}


@pytest.mark.parametrize(
    "path", sorted(Path(npc_ext.__file__).parent.rglob("*.py")), ids=lambda path: "/".join(path.parts[-2:])
)
def test_every_tensor_is_created_with_a_dtype_and_a_device_that_are_named(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in _CREATE):
            continue
        if isinstance(node.func.value, ast.Name) and node.func.value.id == "torch":
            missing = {"dtype", "device"} - {keyword.arg for keyword in node.keywords}
            assert not missing, f"{path.name}:{node.lineno}: torch.{node.func.attr} without {', '.join(missing)}"
