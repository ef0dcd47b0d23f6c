"""Resumed runs and copies continue exactly as the originals."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch

from ..methods import METHODS, consolidate
from ..models import Attending, paper_cnn
from ..training import batches, everything, same, sequences, train


@pytest.mark.parametrize("method", METHODS)
def test_a_run_resumed_from_a_checkpoint_is_bit_identical(method: str) -> None:
    model, data = paper_cnn(), batches(20)
    optimizer = METHODS[method](model)
    train(model, optimizer, data[:10])
    consolidate(optimizer, data[0])
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    train(model, optimizer, data[10:])
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    torch.manual_seed(99)
    resumed = paper_cnn()
    resumed.load_state_dict(saved["model"])
    not_saved = {"sparsity": 0.0} if method == "SSL" else {}
    later = METHODS[method].func(resumed, **not_saved)
    later.load_state_dict(saved["optimizer"])
    train(resumed, later, data[10:])
    assert same(everything(resumed, later), everything(model, optimizer))


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # of torch.func, under attention
@pytest.mark.parametrize(
    "twin_of", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))], ids=["deepcopy", "pickle"]
)
@pytest.mark.parametrize(
    ("network", "data"), [(paper_cnn, batches(6)), (Attending, sequences(6))], ids=["CNN", "attention"]
)
@pytest.mark.parametrize("method", METHODS)
def test_copies_of_model_and_optimizer_continue_like_the_originals(
    method: str, network: Any, data: Any, twin_of: Any
) -> None:
    model = network()
    optimizer = METHODS[method](model)
    train(model, optimizer, data[:3])
    consolidate(optimizer, data[0])
    twin, other = twin_of((model, optimizer))
    train(model, optimizer, data[3:])
    train(twin, other, data[3:])
    assert same(everything(model, optimizer), everything(twin, other))
    if hasattr(other, "neurons"):
        other.neurons.detach()
    assert not any("forward" in vars(module) for module in twin.modules())
