"""nn.MultiheadAttention: queries, keys and values are neurons of its input projection."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from npc_ext import NPC

from ..methods import METHODS
from ..models import Attending
from ..training import sequences, train


class AttendingByLayers(nn.Module):
    """The same computation; the input projection is three linear layers."""

    def __init__(self, like: Attending) -> None:
        super().__init__()
        self.head = copy.deepcopy(like.head)
        weights = [*like.attention.in_proj_weight.chunk(3), like.attention.out_proj.weight]
        biases = [*like.attention.in_proj_bias.chunk(3), like.attention.out_proj.bias]
        for name, weight, bias in zip("qkvo", weights, biases, strict=True):
            layer = nn.Linear(8, 8)
            layer.load_state_dict({"weight": weight, "bias": bias})
            self.add_module(name, layer)

    def forward(self, x: Tensor) -> Tensor:
        projected = self.q(x[:, :3]), self.k(x[:, 3:]), self.v(x[:, 3:])
        q, k, v = (t.unflatten(2, (2, 4)).transpose(1, 2) for t in projected)
        return self.head(self.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)).mean(1))


def test_attention_learns_as_with_linear_layers_for_queries_keys_and_values() -> None:
    model = Attending()
    twin = AttendingByLayers(model)
    optimizer, by_layers = (NPC(network, lr=0.05, alpha=1e9, beta=1e9) for network in (model, twin))
    train(model, optimizer, sequences(1))
    train(twin, by_layers, sequences(1))
    importance, want = optimizer.plasticity()["attention.in_proj"].importance, by_layers.plasticity()
    for part, name in zip(importance.chunk(3), "qkv", strict=True):
        # Eq. 3 divides by the mean over all three parts in `model`, and by the mean over one part in `twin`.
        single = want[name].importance
        torch.testing.assert_close(part / part.mean(), single / single.mean(), rtol=1e-4, atol=1e-6)
    train(model, optimizer, sequences(20)[1:])
    train(twin, by_layers, sequences(20)[1:])
    torch.testing.assert_close(model.attention.in_proj_weight, torch.cat([twin.q.weight, twin.k.weight, twin.v.weight]))


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("method", ["NPC, momentum", "NPCAdamW", "PlasticityWrapper"])
@pytest.mark.parametrize("options", [{}, {"bias": False}, {"kdim": 6, "vdim": 5}], ids=str)
def test_frozen_rows_of_attentions_input_projection_stay_bit_identical(method: str, options: Any, backend: str) -> None:
    torch.manual_seed(0)
    model = Attending(**options)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.5)
    optimizer = METHODS[method](model, delta=0.8, beta=1.0, backend=backend)
    train(model, optimizer, sequences(10))
    for batch in sequences(30)[10:]:
        before = rows(model.attention)
        train(model, optimizer, [batch])
        frozen = optimizer.plasticity()["attention.in_proj"].learning_rate == 0
        for was, now in zip(before, rows(model.attention), strict=True):
            moved = (now != was).flatten(1).any(1)
            assert not moved[frozen].any()
            assert moved[~frozen].float().mean() > 0.9  # the key's bias changes nothing, and hardly moves
        assert 0 < frozen.sum() < 24


def rows(attention: nn.MultiheadAttention) -> list[Tensor]:
    """The weights of all 24 neurons, padded to the same width, and their biases."""
    parts = (attention.q_proj_weight, attention.k_proj_weight, attention.v_proj_weight)
    weight = attention.in_proj_weight
    if weight is None:
        weight = torch.cat([F.pad(part, (0, 8 - part.shape[1])) for part in parts])
    tensors = [weight] if attention.in_proj_bias is None else [weight, attention.in_proj_bias.unsqueeze(1)]
    return [tensor.detach().clone() for tensor in tensors]


def test_attention_is_as_it_was_when_the_optimizer_has_gone() -> None:
    model = Attending()
    first, second = NPC(model), NPC(model)
    del first
    assert "forward" in vars(model.attention)
    train(model, second, sequences(1))
    second.neurons.detach()
    assert "forward" not in vars(model.attention)
