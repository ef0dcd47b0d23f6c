"""A program that uses the whole public interface: `test_types.py` checks it as a user with strict settings would."""

# pyright: strict, reportUnnecessaryTypeIgnoreComment=true

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter
from typing_extensions import assert_type

import npc_ext
from npc_ext import (
    CPC,
    EWC,
    MAS,
    NPC,
    SI,
    SSL,
    CapacityWarning,
    ConnectionPlasticity,
    ImportanceWarning,
    LayerPlasticity,
    NPCAdamW,
    PlasticityWrapper,
    check_capacity,
    find_neurons,
    log_plasticity,
    ops,
    plot_plasticity,
    reference,
)
from npc_ext.columns import Layer, LayerStepOptions, Network

Batch = tuple[Tensor, Tensor]


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(8, 16), npc_ext.nn.ReLU(), nn.Linear(16, 4))


def train(model: nn.Module, optimizer: torch.optim.Optimizer, loader: Iterable[Batch]) -> None:
    for images, labels in loader:
        optimizer.zero_grad()
        torch.autograd.backward(nn.functional.cross_entropy(model(images), labels))  # Tensor.backward has no types
        optimizer.step()


def use_npc(model: nn.Module, loader: list[Batch], writer: SummaryWriter) -> None:
    optimizer = NPC(
        model,
        lr=torch.tensor(0.1),
        momentum=0.9,
        nesterov=True,
        half_life=500,
        params=[{"params": model.parameters(), "beta": 1.0}],
        layers={"2": {"normalize": "active", "half_life": 100}, "0*": {"protect": True}},
        other_parameters="freeze",
        skip_gradients="rows",
        process_group=None,
        backend="reference",
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)
    scaler = torch.amp.GradScaler("cpu")
    images, labels = loader[0]
    with torch.autocast("cpu", torch.bfloat16):
        loss = nn.functional.cross_entropy(model(images), labels)
    torch.autograd.backward(scaler.scale(loss))
    scaler.unscale_(optimizer)
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    scaler.step(optimizer)
    scaler.update()
    schedule.step()
    optimizer.zero_grad(set_to_none=True)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss: Tensor = model(images).square().sum()
        torch.autograd.backward(loss)
        return loss

    result: Tensor = optimizer.step(closure)
    print(result, optimizer)
    for group in optimizer.param_groups:
        group.update(half_life=None, delta=1 - 2e-4)
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))

    plasticity = optimizer.plasticity()
    assert_type(plasticity, dict[str, LayerPlasticity])
    layer = plasticity["2"]
    assert_type(layer.importance, Tensor)
    assert_type(layer.learning_rate, Tensor)
    assert_type(layer.frozen_for, Tensor)
    assert_type(layer.frozen, float)
    assert_type(layer.gradients_skipped, float)
    assert_type(layer.nonfinite_steps, int)
    constants: dict[str, Any] = optimizer.constants("2")
    print(constants["beta"], len(optimizer.neurons), optimizer.neurons["2"].neurons)
    for found in optimizer.neurons:
        assert_type(found.name, str)
        assert_type(found.sink, Tensor)
        assert_type(found.parameters[0].parameter, nn.Parameter)
    optimizer.neurons.detach()

    assert_type(check_capacity(optimizer, full=0.9, learning={"2": [0, 1]}), list[str])
    log_plasticity(writer, optimizer, 1, prefix="npc")
    print(plot_plasticity(optimizer).axes)


def use_others(model: nn.Module, loader: list[Batch], writer: SummaryWriter) -> None:
    rate: float | Tensor = 1e-3
    adam = NPCAdamW(model, lr=rate, betas=(0.9, 0.99), weight_decay=0.1, half_life=500, layers=None)
    adam.add_param_group({"params": [nn.Parameter(torch.zeros(2))], "lr": 0.1})
    sgd = NPC(model, skip_gradients="none").load_importance(adam)
    assert_type(sgd, NPC)
    wrapper = PlasticityWrapper(
        torch.optim.RMSprop(model.parameters(), lr=1e-3), model, half_life=500, normalize="all"
    ).load_importance(sgd.state_dict())
    assert_type(wrapper, PlasticityWrapper)
    wrapper.set_constants(beta=1.0)
    assert_type(wrapper.plasticity(), dict[str, LayerPlasticity])
    schedule = torch.optim.lr_scheduler.LambdaLR(wrapper, lambda step: 0.9**step)
    train(model, wrapper, loader)
    schedule.step()
    check_capacity(wrapper)
    log_plasticity(writer, wrapper, 2)
    plot_plasticity(wrapper)
    inner: torch.optim.Optimizer = wrapper.optimizer
    print(inner, wrapper.neurons)

    cpc = CPC(model, lr=rate, delta=0.99, layers={"2": {"protect": False}}).load_importance(None)
    assert_type(cpc, CPC)
    assert_type(cpc.plasticity(), dict[str, ConnectionPlasticity])


def use_baselines(model: nn.Module, loader: list[Batch]) -> None:
    rate: float | Tensor = 0.01

    def outputs(y: Tensor) -> Tensor:
        return y[:, :2]

    ewc = EWC(model, lr=rate, strength=20, params=model.parameters())
    mas = MAS(model, lr=rate, strength=1.0, implicit=False)
    ssl = SSL(model, lr=rate, sparsity=1e-5, inhibited=["0"], scaler=torch.amp.GradScaler("cpu"))
    si = SI(model, lr=rate, damping=1e-3, momentum=0.9)
    for optimizer in (ewc, mas, ssl, si):
        train(model, optimizer, loader)
        assert_type(optimizer.penalty(), Tensor)
    ewc.consolidate(loader, outputs=outputs, labels="data", samples=100, chunk_size=10)
    mas.consolidate(loader, forward=lambda model, batch: model(batch[0]))
    ssl.consolidate(loader, outputs=lambda y: y[:, :2])
    si.consolidate()
    assert_type(MAS(model).load_importance(ewc), MAS)
    print(npc_ext.baselines.consolidation.fisher(model, loader))


def use_operations(model: nn.Module) -> None:
    activation, gradient = torch.ones(2, 3), torch.ones(2, 3)
    assert_type(ops.importance(activation, gradient, channel_dim=-1), Tensor)
    assert_type(reference.importance(activation, gradient, channel_dim=-1), Tensor)
    assert_type(ops.relu_backward_importance(activation, gradient), tuple[Tensor, Tensor])
    assert_type(reference.relu_backward_importance(activation, gradient), tuple[Tensor, Tensor])
    weight, importance = torch.ones(3, 4), torch.zeros(3)
    layer = Layer(activation, gradient, importance, torch.zeros(1, dtype=torch.int64), [0], [1])
    network = Network([weight], [torch.ones(3, 4)])
    ops.layer_step_(layer, network, LayerStepOptions(channel_dim=-1, lr=0.1))
    reference.layer_step_(layer, network)
    rates: Tensor = reference.learning_rate(importance, lr=0.1, alpha=0.5, beta=0.5)
    print(rates, find_neurons(model), npc_ext.__version__)


def make_mistakes(model: nn.Module) -> None:
    """Checkers report each line, and that an `ignore` is not needed where they do not."""
    NPC(model.parameters())  # type: ignore[arg-type]
    NPC(model, skip_gradients="all")  # type: ignore[arg-type]
    NPC(model, skip_frozen=True)  # type: ignore[call-arg]
    NPCAdamW(model, betas=0.9)  # type: ignore[arg-type]
    PlasticityWrapper(model, model)  # type: ignore[arg-type]
    CPC(model, half_life="1000")  # type: ignore[arg-type]
    EWC(model).consolidate([], label="data")  # type: ignore[call-arg]
    check_capacity(torch.optim.SGD(model.parameters()))  # type: ignore[arg-type]
    npc_ext.nn.GELU()  # type: ignore[attr-defined]


def main() -> None:
    model, loader = network(), [(torch.randn(4, 8), torch.tensor([0, 1, 0, 1]))]
    writer = SummaryWriter()
    warnings.simplefilter("ignore", CapacityWarning)
    warnings.simplefilter("ignore", ImportanceWarning)
    use_npc(model, loader, writer)
    use_others(model, loader, writer)
    use_baselines(model, loader)
    use_operations(model)


if __name__ == "__main__":
    main()
