"""What all tests share: seeds, GPU selection, and the instruction sets of this machine."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import settings

from npc_ext import _native

settings.register_profile("npc_ext", deadline=None, derandomize=True, max_examples=60)
settings.load_profile("npc_ext")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(params=["baseline", "avx2", "avx512"])
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs a test once per instruction set that this machine has."""
    native = _native.module()
    if request.param not in native.isas():
        pytest.skip(f"this processor does not run {request.param}")
    before = native.isa_in_use()
    native.use_isa(request.param)
    yield request.param
    native.use_isa(before)
