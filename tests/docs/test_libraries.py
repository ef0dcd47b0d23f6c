"""The programs in the guides to other libraries run in two processes, which stay equal."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from sybil.example import Example

from ..distributed.processes import HAS_SHARDS_ON_CPU
from .names import installed
from .pages import ROOT
from .test_blocks import EXAMPLES

pytestmark = pytest.mark.slow
SECONDS = 300

GROUP = "torch.distributed.group.WORLD"


@dataclass(frozen=True)
class Program:
    """The first `blocks` of a page, with the `changes` that it advises for several processes."""

    optimizer: str
    package: str = "torch"
    blocks: int | None = None
    changes: dict[str, str] = field(default_factory=dict)
    continuation: str = ""


PROGRAMS = {
    "ddp": Program(
        "optimizer",
        continuation="""
for batch, answers in loader:
    optimizer.zero_grad()
    cross_entropy(model(batch), answers % 5).backward()
    optimizer.step()
""",
    ),
    "fsdp2": Program("optimizer"),
    "accelerate": Program("optimizer.optimizer", "accelerate", blocks=3),
    "hugging-face": Program(
        "optimizer",
        "transformers",
        blocks=2,
        changes={'"half_life": 10}': f'"half_life": 10, "process_group": {GROUP}}}'},
    ),
    "lightning": Program(
        "trainer.optimizers[0]",
        "lightning",
        blocks=1,
        changes={
            "half_life=100)": f"half_life=100, process_group={GROUP})",
            "devices=1": 'devices=2, strategy="ddp"',
        },
    ),
}
# Writes one number that depends on every bit of weights and importance.
CHECK = """
import os, torch
tensors = [tensor.detach() for group in {0}.param_groups for tensor in group["params"]]
tensors += [layer.importance for layer in {0}.plasticity().values()]
whole = [tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor for tensor in tensors]
assert torch.distributed.get_world_size() == 2 and all(tensor.any() for tensor in whole)
bits = torch.cat([tensor.flatten() for tensor in whole]).view(torch.int32).long()
open("result" + os.environ["RANK"], "w").write(str(int((bits * torch.arange(1, len(bits) + 1)).sum())))
"""


@pytest.mark.parametrize("library", PROGRAMS)
def test_a_program_runs_in_two_processes_that_stay_equal(library: str, tmp_path: Path) -> None:
    program = PROGRAMS[library]
    if not installed(program.package):
        pytest.skip(f"{program.package} is not installed")
    if library == "fsdp2" and not HAS_SHARDS_ON_CPU:
        pytest.skip("this torch runs fully_shard on GPUs only")
    blocks = [str(example.parsed) for example in EXAMPLES[f"docs/guides/{library}.md"] if is_visible(example)]
    source = "\n".join(blocks[: program.blocks]) + program.continuation
    for old, new in program.changes.items():
        assert old in source
        source = source.replace(old, new)
    (tmp_path / "train.py").write_text(source + CHECK.format(program.optimizer))
    environment = {"GLOO_SOCKET_IFNAME": "lo", "ACCELERATE_USE_CPU": "true", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "train.py"]
    result = subprocess.run(
        command,
        cwd=tmp_path,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    first, second = ((tmp_path / f"result{rank}").read_text() for rank in range(2))
    assert first == second


def is_visible(example: Example) -> bool:
    """Whether an example is a block of Python that the page shows."""
    return example.document.text.startswith("```python", example.region.start)
