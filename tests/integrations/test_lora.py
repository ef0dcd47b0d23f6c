"""Low-rank adapters of PEFT: the rows of B are the output neurons of the layer that they adapt."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from npc_ext import NPC, reference

from ..training import train

peft = pytest.importorskip("peft", reason="peft is not installed")
A, B = "base_model.model.0.lora_A.default", "base_model.model.0.lora_B.default"


def adapted(**options: Any) -> Any:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 3))
    return peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["0"], **options))


def batch(seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(6, 8, generator=generator), torch.randint(3, (6,), generator=generator)


def test_b_is_measured_where_base_and_adapter_are_added() -> None:
    model = adapted()
    optimizer = NPC(model, delta=0.5)
    outputs: list[Tensor] = []
    layer = model.base_model.model[0]

    def keep(module: nn.Module, inputs: Any, output: Tensor) -> None:
        output.retain_grad()
        outputs.append(output)

    layer.register_forward_hook(keep)
    x, y = batch(0)
    F.cross_entropy(model(x), y).backward()
    assert not layer.lora_B["default"].weight.any()  # so the output of B is zero, but that of its neurons is not
    want = reference.importance(outputs[0].detach(), outputs[0].grad)
    # Six samples, summed in another order.
    torch.testing.assert_close(optimizer.neurons[B].sink.grad, want, rtol=1e-6, atol=0)
    assert want.all() and "output of base_model.model.0 " in str(optimizer.neurons)


def test_frozen_rows_of_b_stay_and_the_base_does_anyway() -> None:
    model = adapted()
    optimizer = NPC(model, lr=0.5, delta=0.9999, weight_decay=0.1)
    layer = model.base_model.model[0]
    train(model, optimizer, map(batch, range(3)))
    optimizer.state[layer.lora_B["default"].weight]["importance"][:5] = 3.0
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    train(model, optimizer, map(batch, range(3, 80)))
    after = layer.lora_B["default"].weight
    moved = (after != before[f"{B}.weight"]).any(1)
    assert not moved[:5].any() and moved[5:].any()
    assert torch.equal(layer.base_layer.weight, before["base_model.model.0.base_layer.weight"])
    assert (layer.lora_A["default"].weight != before[f"{A}.weight"]).any()
    assert optimizer.plasticity()[A].importance.any()  # the units of the bottleneck are neurons, too


def test_a_may_train_at_the_plain_rate() -> None:
    optimizer = NPC(adapted(), layers={"*lora_A*": {"protect": False}})
    assert A not in optimizer.plasticity() and B in optimizer.plasticity()


def test_only_the_adapter_in_use_is_measured_and_moves() -> None:
    model = adapted()
    model.add_adapter("second", peft.LoraConfig(r=2, target_modules=["0"]))
    model.set_adapter("second")
    optimizer = NPC(model, lr=0.5)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    train(model, optimizer, map(batch, range(3)))
    moved = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert moved == {f"base_model.model.0.lora_{part}.second.weight" for part in "AB"}
    assert optimizer.plasticity()[B.replace("default", "second")].importance.any()
    assert not optimizer.plasticity()[B].importance.any()


def test_an_adapter_that_is_added_later_is_trained_once_its_parameters_are_in_a_group() -> None:
    model = adapted()
    optimizer = NPC(model, lr=0.5, half_life=10)
    train(model, optimizer, map(batch, range(3)))
    model.add_adapter("second", peft.LoraConfig(r=2, target_modules=["0"]))
    model.set_adapter("second")
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer.add_param_group({"params": [p for name, p in model.named_parameters() if ".second." in name]})
    train(model, optimizer, map(batch, range(3)))
    moved = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert moved == {f"base_model.model.0.lora_{part}.second.weight" for part in "AB"}
    assert optimizer.plasticity()[B.replace("default", "second")].importance.any()


def test_a_saved_module_has_neurons_and_the_magnitudes_of_dora_have_none() -> None:
    optimizer = NPC(adapted(modules_to_save=["2"]))
    assert [layer.name for layer in optimizer.neurons if layer.trains()] == [
        A,
        B,
        "base_model.model.2.modules_to_save.default",
    ]
    of_dora = NPC(adapted(use_dora=True))
    assert [layer.name for layer in of_dora.neurons if layer.trains()] == [A, B]
    assert "lora_magnitude_vector.default.weight" in str(of_dora.neurons).partition("in no neuron")[2]


def test_conv1d_of_gpt2_has_adapters_too() -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    sizes = {"n_layer": 1, "n_embd": 16, "n_head": 2, "vocab_size": 50, "bos_token_id": 0, "eos_token_id": 0}
    base = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes))
    model: Any = peft.get_peft_model(base, peft.LoraConfig(r=4, target_modules=["c_attn"], fan_in_fan_out=True))
    optimizer = NPC(model)
    tokens = torch.randint(50, (3, 6))
    model(input_ids=tokens, labels=tokens).loss.backward()
    optimizer.step()
    name = "base_model.model.transformer.h.0.attn.c_attn.lora_B.default"
    assert optimizer.plasticity()[name].importance.shape == (48,)
    assert optimizer.plasticity()[name].importance.any()


def test_convolutions_have_adapters_too() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(216, 3))
    both: Any = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["0"]))
    optimizer = NPC(both)
    F.cross_entropy(both(torch.randn(4, 1, 8, 8)), torch.randint(3, (4,))).backward()
    optimizer.step()
    assert optimizer.plasticity()[B].importance.shape == (6,)
    assert optimizer.plasticity()[B].importance.any()


def test_packed_base_layers_have_no_neurons_and_the_adapter_has() -> None:
    class Packed(nn.Linear):
        """Stores its weights in bytes, like a quantized layer."""

        def __init__(self, inputs: int, outputs: int) -> None:
            super().__init__(inputs, outputs)
            self.weight = nn.Parameter(torch.zeros(inputs * outputs // 2, 1, dtype=torch.uint8), requires_grad=False)

        def forward(self, x: Tensor) -> Tensor:
            return x @ torch.ones(self.in_features, self.out_features)

    model = adapted()
    model.base_model.model[0].base_layer = Packed(8, 12).requires_grad_(False)
    optimizer = NPC(model)
    train(model, optimizer, [batch(0)])
    assert [layer.name for layer in optimizer.neurons] == [A, B, "base_model.model.2"]
    assert "base_layer.weight" in str(optimizer.neurons)
    assert {layer.neurons for layer in optimizer.neurons if layer.trains()} == {4, 12}
    held = [parameter for parameter in model.parameters() if optimizer.state[parameter]]
    assert [p.requires_grad for p in held] == [True, True]
    assert "(100 %), in 16 neurons of 2 layers" in repr(optimizer)
