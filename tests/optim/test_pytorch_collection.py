"""PyTorch's own tests of optimizers, by their names in its test/test_optim.py, applied to ours.

Options and bad input come from PyTorch's collection, `torch.testing._internal.common_optimizers`. What is left out, and
why:

    test_can_load_older_state_dict                  there is no older version of ours
    test_complex, test_complex_2d                   complex parameters are refused: test_complex_is_refused
    test_foreach_*, test_fused_*, test_peak_memory_foreach, test_mixed_device_dtype
                                                    ours have no foreach and fused forms to choose from; kernels are
                                                    tested in test_every_update.py
    test_rosenbrock, test_sparse_*                  sparse gradients are refused: test_sparse_gradients_are_refused
    test_differentiable                             the step is not differentiable
    test_tensor_lr_num_dim                          with the errors
    test_closures_lbfgs, test_lbfgs_*, test_cpu_load_state_dict, test_load_nontensor_step, test_save_load_equality_*
                                                    of other optimizers' state; ours is saved in test_state_dict_deterministic
    PlasticityWrapper, as a whole                   its steps are another optimizer's: test_wrapper.py
    test_param_group_with_lrscheduler_goes_right_direction
                                                    schedules: test_npc.py, test_npc_adamw.py
    test_state_dict_with_cuda_params, test_multigpu, test_capturable_*
                                                    need GPUs
"""

from __future__ import annotations

import copy
import inspect
import io
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from npc_ext import CPC, EWC, MAS, NPC, SI, SSL, NPCAdamW

from ..training import everything, refused, same, train, weights

pytest.importorskip("expecttest", reason="PyTorch's collection needs expecttest, which is not installed")
with mock.patch("torch.backends.disable_global_flags"):  # as it is imported it would forbid other tests to set flags
    from torch.testing._internal.common_optimizers import (
        get_error_inputs_for_all_optims,
        optim_inputs_func_adamw,
        optim_inputs_func_sgd,
    )

OPTIMIZERS = [NPC, NPCAdamW, CPC, EWC, MAS, SI, SSL]
every_optimizer = pytest.mark.parametrize("kind", OPTIMIZERS)
NOT_OURS = {"dampening", "amsgrad", "foreach", "fused", "capturable", "differentiable"}
CASES = [
    pytest.param(kind, case.kwargs, id=f"{kind.__name__}-{case.desc}")
    for kind in OPTIMIZERS
    for case in (optim_inputs_func_adamw if kind is NPCAdamW else optim_inputs_func_sgd)("cpu")
    if not NOT_OURS & case.kwargs.keys()
]
every_input = pytest.mark.parametrize(("kind", "options"), CASES)


def moving(kind: Any) -> dict[str, Any]:
    """Options with which an optimizer keeps something of every parameter."""
    return {} if kind is NPCAdamW else {"momentum": 0.9}


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))


def make(kind: Any, model: nn.Module, **options: Any) -> Any:
    """Builds an optimizer with copies of the tensors among its options."""
    options = {name: value.clone() if isinstance(value, Tensor) else value for name, value in options.items()}
    return kind(model, **{"lr": 0.01, **options}, **({"sparsity": 0.0} if kind is SSL else {}))


def data(seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(8, 4, generator=generator), torch.randint(3, (8,), generator=generator)


def step(model: nn.Module, optimizer: Any, *seeds: int) -> None:
    """Takes a step for each seed, one if there is none."""
    train(model, optimizer, map(data, seeds or [0]))


ERRORS = get_error_inputs_for_all_optims("cpu", torch.float32)


@every_optimizer
@pytest.mark.parametrize("error", ERRORS, ids=[error.optimizer_error_input.desc for error in ERRORS])
def test_errors(kind: Any, error: Any) -> None:
    given = error.optimizer_error_input
    model = network()
    # PyTorch makes parameters for its inputs. Ours belong to a model, so they replace PyTorch's.
    parameters = list(model[0].parameters())
    seen: dict[int, nn.Parameter] = {}

    def replaced(value: Any) -> Any:
        if isinstance(value, nn.Parameter):
            if id(value) not in seen:
                seen[id(value)] = parameters[len(seen)]
            return seen[id(value)]
        if isinstance(value, (list, tuple)):
            return type(value)(replaced(member) for member in value)
        return {key: replaced(member) for key, member in value.items()} if isinstance(value, dict) else value

    if error.error_type is UserWarning:
        with pytest.warns(UserWarning, match=error.error_regex):
            make(kind, model, params=replaced(given.params), **given.kwargs)
        return
    with pytest.raises((TypeError, ValueError)) as caught:
        make(kind, model, params=replaced(given.params), **given.kwargs)
    if given.kwargs:  # values that we refuse in other words
        assert "lr is tensor" in str(caught.value) and "expected a finite number" in str(caught.value)
    else:
        assert caught.match(error.error_regex)


@every_input
def test_goes_right_direction(kind: Any, options: dict[str, Any]) -> None:
    model = network()
    optimizer = make(kind, model, **options)
    x, y = data()
    before = F.cross_entropy(model(x), y).item()
    train(model, optimizer, 20 * [(x, y)])
    after = F.cross_entropy(model(x), y).item()
    assert after > before if options.get("maximize") else after < before


@every_optimizer
def test_tensor_lr(kind: Any) -> None:
    ends = []
    for lr in (0.05, torch.tensor(0.05, dtype=torch.float64)):
        model = network()
        step(model, make(kind, model, lr=lr), *range(5))
        ends.append(weights(model))
    assert same(*ends)


@every_optimizer
def test_param_groups_lr(kind: Any) -> None:
    model = network()
    groups = [{"params": list(model[0].parameters()), "lr": 0.0}, {"params": list(model[2].parameters())}]
    optimizer = make(kind, model, params=groups)
    before = weights(model)
    step(model, optimizer)
    assert same(before[:2], weights(model)[:2]) and not same(before[2:], weights(model)[2:])


@every_optimizer
def test_param_groups_weight_decay(kind: Any) -> None:
    ends = []
    for decay in (0.0, 0.5):
        model = network()
        groups = [{"params": [*model[i].parameters()], "weight_decay": value} for i, value in ((0, decay), (2, 0.0))]
        step(model, make(kind, model, params=groups))
        ends.append(weights(model))
    assert not same(ends[0][:2], ends[1][:2]) and same(ends[0][2:], ends[1][2:])


@every_input
def test_step_is_noop_when_params_have_no_grad(kind: Any, options: dict[str, Any]) -> None:
    model = network()
    optimizer = make(kind, model, **options)
    before = weights(model)
    optimizer.step()
    assert same(before, model)


@every_optimizer
def test_step_is_noop_for_zero_grads(kind: Any) -> None:
    model = network()
    optimizer = make(kind, model, **moving(kind), weight_decay=0.0)
    before = weights(model)
    (model(data()[0]) * 0.0).sum().backward()
    optimizer.step()
    assert same(before, model)


@every_input
def test_optimizer_can_be_printed(kind: Any, options: dict[str, Any]) -> None:
    text = repr(make(kind, network(), **options))
    assert kind.__name__ in text and "weight_decay" in text


@every_input
def test_state_dict_deterministic(kind: Any, options: dict[str, Any]) -> None:
    """test_save_load_equality_with_weights_only, and what was loaded continues to the same numbers."""
    model = network()
    optimizer = make(kind, model, **options)
    step(model, optimizer, *range(5))
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    twin = copy.deepcopy(model)
    other = make(kind, twin, **options)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert other.state_dict()["param_groups"] == optimizer.state_dict()["param_groups"]
    assert same(everything(twin, other), everything(model, optimizer))
    step(model, optimizer, *range(5, 10))
    step(twin, other, *range(5, 10))
    assert same(model, twin)


@every_optimizer
@pytest.mark.parametrize("named", [(True, False), (False, True), (True, True)])
def test_can_load_from_to_named_state_dict(kind: Any, named: tuple[bool, bool]) -> None:
    model = network()
    models, optimizers = [model, copy.deepcopy(model)], []
    for trained, with_names in zip(models, named, strict=True):
        params = trained.named_parameters() if with_names else trained.parameters()
        optimizers.append(make(kind, trained, params=params, **moving(kind)))
        names = [name for name, _ in trained.named_parameters()] if with_names else None
        assert optimizers[-1].param_groups[0].get("param_names") == names
    step(models[0], optimizers[0])
    models[1].load_state_dict(models[0].state_dict())
    optimizers[1].load_state_dict(copy.deepcopy(optimizers[0].state_dict()))
    for trained, optimizer in zip(models, optimizers, strict=True):
        step(trained, optimizer, 1)
    assert same(*models)


@every_optimizer
def test_deepcopy_copies_all_public_attrs(kind: Any) -> None:
    model = network()
    optimizer = make(kind, model)
    step(model, optimizer)

    def public(one: Any) -> set[str]:
        return {name for name, _ in inspect.getmembers(one) if not name.startswith("_")}

    assert public(copy.deepcopy(optimizer)) == public(optimizer)


@every_optimizer
def test_step_hooks(kind: Any) -> None:
    """test_step_post_hook, test_step_pre_hook, test_step_all_hooks."""
    model = network()
    optimizer = make(kind, model)
    called: list[str] = []
    handles = [
        optimizer.register_step_pre_hook(lambda *_: called.append("before")),
        optimizer.register_step_post_hook(lambda *_: called.append("after")),
    ]
    step(model, optimizer)
    assert called == ["before", "after"]
    for handle in handles:
        handle.remove()
    step(model, optimizer)
    assert called == ["before", "after"]


@every_optimizer
def test_state_dict_hooks(kind: Any) -> None:
    """test_state_dict_pre_hook, _post_hook, test_load_state_dict_pre_hook_and_prepend, _post_hook."""
    model = network()
    optimizer = make(kind, model)
    called: list[str] = []
    optimizer.register_state_dict_pre_hook(lambda _: called.append("state_dict pre"))
    optimizer.register_state_dict_post_hook(lambda *_: called.append("state_dict post"))
    optimizer.register_load_state_dict_pre_hook(lambda *_: called.append("load pre"))
    optimizer.register_load_state_dict_post_hook(lambda _: called.append("load post"))
    saved = optimizer.state_dict()
    assert called == ["state_dict pre", "state_dict post"]
    called.clear()
    optimizer.load_state_dict(saved)
    assert called == ["load pre", "load post"]


@every_optimizer
def test_complex_is_refused(kind: Any) -> None:
    with pytest.raises(ValueError, match="complex"):
        make(kind, nn.Linear(3, 2, dtype=torch.complex64))


@every_optimizer
def test_sparse_gradients_are_refused(kind: Any) -> None:
    model = nn.Sequential(nn.Embedding(5, 4, sparse=True), nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
    optimizer = make(kind, model)
    model(torch.tensor([0, 3])).sum().backward()
    with refused(
        model, optimizer, ValueError, r"the gradient of '0.weight' is sparse; expected a dense one.*sparse=False"
    ):
        optimizer.step()
