"""A language model learns English and then Python, with AdamW and with NPCAdamW. Needs `transformers`.

    python -m bench.continual.language_model

A small Llama reads bytes: first the prose of Python's documentation, then the source of the standard library without
docstrings and comments. How much does it forget of the prose? A smaller learning rate forgets less, too, so single
numbers say little. Compared is the trade-off over the settings in `SETTINGS`: how well the first domain is still
predicted against how well the second one is. Writes a table, a figure and all numbers to bench/results/language_model.
"""

from __future__ import annotations

import argparse
import ast
import math
import multiprocessing
import sysconfig
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import cache
from itertools import chain
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from npc_ext import NPCAdamW

from .. import command_line, environment
from ..arguments import output_folder
from ..tables import markdown, with_error
from . import results

LENGTH = 64
BATCH = 16
WARM_UP = 20
PRETRAINING_RATE = 3e-3
MEASURE_ONLY = 1e9  # a beta above every importance: neurons are measured and keep their full rate
POINTS = 5  # points of a curve, not counting its start


@dataclass(frozen=True)
class Setting:
    """How the second domain is learned and, with `protect_always`, also the first one.

    Attributes:
        method: "AdamW" or "NPCAdamW".
        lr: learning rate in the second domain.
        beta: importance at or above which a neuron is frozen (NPCAdamW only).
        protect_always: protect neurons from the first step on, instead of only measuring them in the first domain.
    """

    method: str
    lr: float
    beta: float | None = None
    protect_always: bool = False

    @property
    def name(self) -> str:
        """The label in a table."""
        beta = "" if self.beta is None else f", β = {self.beta:g}"
        return f"{self.method}, lr {self.lr:g}{beta}" + (", protected from the first step" * self.protect_always)


SETTINGS = (
    Setting("AdamW", 1e-4),
    Setting("AdamW", 3e-4),
    Setting("AdamW", 6e-4),
    Setting("AdamW", 1e-3),
    Setting("NPCAdamW", 1e-3, beta=0.5),
    Setting("NPCAdamW", 1e-3, beta=1),
    Setting("NPCAdamW", 3e-3, beta=1),
    Setting("NPCAdamW", 1e-3, beta=2),
    Setting("NPCAdamW", 3e-3, beta=2),
    Setting("NPCAdamW", 1e-3, beta=1, protect_always=True),
)


@dataclass(frozen=True)
class Size:
    """How much to train and test: steps in each domain, and windows of validation text."""

    first_steps: int = 500
    second_steps: int = 250
    windows: int = 128

    @property
    def delta(self) -> float:
        """A delta with which half of the importance of the first domain survives the second one."""
        return float(0.5 ** (1 / self.second_steps))


@dataclass
class Run:
    """Perplexity per byte on validation prose and code: before the second domain, and at points during it."""

    setting: Setting
    seed: int
    curve: list[tuple[float, float]]


# ---------------------------------------------------------------------------------------------------------------- text


@cache
def corpora() -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Prose and code as bytes, each for training and for validation (every eighth text)."""
    prose = [topics[name] for name in sorted(topics)]
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    return _split(prose), _split([bare_code(path.read_bytes()) for path in files[:120]])


def bare_code(source: bytes) -> str:
    """Python source without docstrings and comments, so that it contains little prose."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if not isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        if ast.get_docstring(node, clean=False) is not None:
            node.body = node.body[1:] or [ast.Pass()]
    return ast.unparse(tree)


def _split(texts: Sequence[str]) -> tuple[Tensor, Tensor]:
    return tuple(  # type: ignore[return-value]
        torch.frombuffer(bytearray("\n\n".join(part).encode()), dtype=torch.uint8)
        for part in ([text for index, text in enumerate(texts) if index % 8], texts[::8])
    )


def windows(text: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Random windows of a text: (count, LENGTH + 1) int64."""
    begin = torch.randint(len(text) - LENGTH, (count, 1), generator=generator)
    return text[begin + torch.arange(LENGTH + 1)].long()


# --------------------------------------------------------------------------------------------------------------- model


def small_llama(seed: int) -> LlamaForCausalLM:
    """A Llama with two layers of width 64, and ReLU as in the paper's networks."""
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=256,
            hidden_size=64,
            intermediate_size=256,
            hidden_act="relu",
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=LENGTH,
            use_cache=False,
        )
    )


def loss_of(model: nn.Module, pieces: Tensor) -> Tensor:
    """The mean loss over all predicted bytes."""
    logits = model(input_ids=pieces[:, :-1]).logits
    return F.cross_entropy(logits.flatten(0, 1), pieces[:, 1:].flatten())


@torch.no_grad()
def perplexity(model: nn.Module, pieces: Tensor) -> float:
    """The perplexity per byte: e to the mean loss."""
    model.eval()
    loss = sum(float(loss_of(model, part)) * len(part) for part in pieces.split(64)) / len(pieces)
    model.train()
    return math.exp(loss)


def optimizer_for(setting: Setting, model: nn.Module, size: Size, *, second: bool) -> torch.optim.Optimizer:
    """Builds the optimizer of the first or of the second domain.

    In the second domain NPCAdamW freezes parameters outside neurons: the embedding and the scales of norms.
    """
    lr = setting.lr if second else PRETRAINING_RATE
    if setting.beta is None:
        return torch.optim.AdamW(model.parameters(), lr=lr, fused=True)
    beta = setting.beta if second or setting.protect_always else MEASURE_ONLY
    return NPCAdamW(model, lr=lr, beta=beta, delta=size.delta, other_parameters="freeze" if second else "train")


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    text: Tensor,
    steps: int,
    seed: int,
    warm_up: int = 0,
    after_step: Callable[[int], None] = lambda step: None,
) -> None:
    """Trains for some steps. The same seed gives the same windows of text."""
    generator = torch.Generator().manual_seed(seed)
    rates = [group["lr"] for group in optimizer.param_groups]
    for step in range(1, steps + 1):
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * min(1, step / warm_up) if warm_up else rate
        optimizer.zero_grad()
        loss_of(model, windows(text, BATCH, generator)).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        after_step(step)


def learn_both(settings: Sequence[Setting], seed: int, size: Size) -> list[Run]:
    """Learns the first domain once, and then the second one with each of the settings.

    All settings must learn the first domain in the same way. The second domain continues with the optimizer's state.
    """
    (prose, prose_left_out), (code, code_left_out) = corpora()
    generator = torch.Generator().manual_seed(1234)  # the same validation for all
    left_out = [windows(text, size.windows, generator) for text in (prose_left_out, code_left_out)]

    first_model = small_llama(seed)
    first = optimizer_for(settings[0], first_model, size, second=False)
    train(first_model, first, prose, size.first_steps, seed, WARM_UP)
    before = _both(first_model, left_out)
    runs = []
    for setting in settings:
        model = small_llama(seed)
        model.load_state_dict(first_model.state_dict())
        optimizer = optimizer_for(setting, model, size, second=True)
        take_over(optimizer, first)
        run = Run(setting, seed, [before])

        def after_step(step: int, run: Run = run, model: nn.Module = model) -> None:
            if step * POINTS % size.second_steps < POINTS:
                run.curve.append(_both(model, left_out))

        train(model, optimizer, code, size.second_steps, 1000 + seed, after_step=after_step)
        runs.append(run)
    return runs


def take_over(optimizer: torch.optim.Optimizer, first: torch.optim.Optimizer) -> None:
    """Loads the state of the first domain's optimizer, but keeps the constants of the second domain."""
    constants = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
    optimizer.load_state_dict(first.state_dict())
    for group, values in zip(optimizer.param_groups, constants, strict=True):
        group.update(values)


def _both(model: nn.Module, left_out: Sequence[Tensor]) -> tuple[float, float]:
    prose, code = (perplexity(model, pieces) for pieces in left_out)
    return prose, code


# ------------------------------------------------------------------------------------------------------------- results


def grouped(settings: Sequence[Setting]) -> list[list[Setting]]:
    """Groups the settings that learn the first domain in the same way."""
    kinds: dict[Any, list[Setting]] = {}
    for setting in settings:
        kinds.setdefault((setting.method, setting.protect_always and setting), []).append(setting)
    return list(kinds.values())


def table_of(runs: Mapping[Setting, Sequence[Run]]) -> str:
    """A Markdown table over seeds: perplexity on prose and code before and after the second domain."""
    rows = []
    for setting, repeated in runs.items():
        points = [[run.curve[when][domain] for run in repeated] for domain in (0, 1) for when in (0, -1)]
        rows.append([setting.name, *(with_error(values, 2) for values in points)])
    return markdown(["", "prose before", "prose after", "code before", "code after"], rows)


def trade_off(runs: Mapping[Setting, Sequence[Run]]) -> Figure:
    """Perplexity on prose over perplexity on code during the second domain. Lower left is better."""
    figure = Figure(figsize=(6.8, 4.4), layout="constrained")
    axes: Any = figure.subplots()
    shown: dict[str, int] = {}
    for setting, repeated in runs.items():
        if setting.protect_always:
            continue
        kind = setting.method if setting.beta is None else f"{setting.method}, β = {setting.beta:g}"
        color = {"AdamW": "#c44e52", "NPCAdamW, β = 0.5": "#64b5cd", "NPCAdamW, β = 1": "#4c72b0"}.get(kind, "#55a868")
        curves = torch.tensor([run.curve for run in repeated])  # seeds, points, domains
        prose, code = curves.mean(0)[1:].T
        shown[kind] = shown.get(kind, 0) + 1
        axes.plot(code, prose, color=color, linewidth=1, alpha=0.6, label=kind if shown[kind] == 1 else None)
        axes.plot(code[:-1], prose[:-1], ".", color=color, markersize=4, alpha=0.6)
        error = curves[:, -1].std(0) / len(repeated) ** 0.5
        axes.errorbar(code[-1], prose[-1], error[0], error[1], fmt="o", color=color, markersize=5)
        place = {"xytext": (-6, -10), "ha": "right"} if setting.beta is None else {"xytext": (6, 5)}
        axes.annotate(f"lr {setting.lr:g}", (code[-1], prose[-1]), textcoords="offset points", fontsize=8, **place)
    before = [run.curve[0][0] for setting, repeated in runs.items() if not setting.protect_always for run in repeated]
    axes.axhline(sum(before) / len(before), color="#999999", linestyle="--", linewidth=1, label="before fine-tuning")
    axes.margins(x=0.16)
    axes.set_xlabel("perplexity per byte on code, while it is learned")
    axes.set_ylabel("perplexity per byte on prose, learned before")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#dddddd", linewidth=0.7)
    axes.set_axisbelow(True)
    figure.legend(*axes.get_legend_handles_labels(), frameon=False, loc="outside right upper", fontsize=9)
    return figure


def run_all(settings: Sequence[Setting], seeds: int, size: Size, jobs: int) -> dict[Setting, list[Run]]:
    """Runs all settings with all seeds in several processes of one thread each, or in this process (jobs=1)."""
    work = [(kind, seed, size) for seed in range(seeds) for kind in grouped(settings)]
    runs: dict[Setting, list[Run]] = {setting: [] for setting in settings}
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, context, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        apply: Any = map if jobs == 1 else pool.map  # a pool starts its processes only when it gets work
        for run in chain.from_iterable(apply(learn_both, *zip(*work, strict=True))):
            runs[run.setting].append(run)
            print(f"{run.setting.name}, seed {run.seed}: prose {run.curve[-1][0]:.2f}, code {run.curve[-1][1]:.2f}")
    return runs


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the comparison."""
    parser = argparse.ArgumentParser(prog="python -m bench.continual.language_model", description=__doc__)
    parser.add_argument("--seeds", type=int, default=3, help="repetitions (at least 2, default 3)")
    parser.add_argument(
        "--jobs", type=int, default=2, help="processes of one thread each (default 2); 1: only this process"
    )
    parser.add_argument("--first-steps", type=int, default=Size.first_steps, help="steps on prose (%(default)s)")
    parser.add_argument("--second-steps", type=int, default=Size.second_steps, help="steps on code (%(default)s)")
    parser.add_argument("--windows", type=int, default=Size.windows, help="pieces of validation text (%(default)s)")
    parser.add_argument(
        "--out", type=output_folder, default=Path("bench/results/language_model"), help="folder for the results"
    )
    options = parser.parse_args(arguments)
    if options.seeds < 2:
        parser.error(f"--seeds is {options.seeds}; a standard error needs at least 2")
    if options.second_steps < POINTS:
        parser.error(f"--second-steps is {options.second_steps}; a curve needs at least {POINTS}")

    options.out.mkdir(parents=True, exist_ok=True)

    size = Size(options.first_steps, options.second_steps, options.windows)
    started = time.perf_counter()
    runs = run_all(SETTINGS, options.seeds, size, options.jobs)
    seconds = time.perf_counter() - started

    table = table_of(runs)
    print(f"\nPerplexity per byte, {options.seeds} seeds, ± standard error:\n\n{table}")
    numbers = {
        "environment": {**environment.describe(), **({"threads": 1} if options.jobs > 1 else {})},
        "jobs": options.jobs,
        "bytes": [[len(part) for part in parts] for parts in corpora()],
        "size": {**asdict(size), "delta": size.delta},
        "runs": [asdict(run) for repeated in runs.values() for run in repeated],
    }
    command = command_line("bench.continual.language_model", arguments)
    results.write(options.out, command, seconds, table, {"trade-off": trade_off(runs)}, numbers)


if __name__ == "__main__":
    main()
