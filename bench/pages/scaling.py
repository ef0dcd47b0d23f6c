"""Memory and traffic of NPC in theory, for transformers from 10^8 to 10^11 weights."""

from __future__ import annotations

from ..tables import markdown

SIZES = {"10⁸": (768, 14), "10⁹": (2048, 20), "10¹⁰": (5120, 32), "10¹¹": (10240, 79)}  # width, layers
FLOAT = 4  # bytes


def weights(width: int, layers: int) -> int:
    """Weights of a transformer: 12 d^2 in each layer."""
    return 12 * layers * width**2


def neurons(width: int, layers: int) -> int:
    """Neurons of a transformer: 9 d in each layer."""
    return 9 * layers * width


def sent(numbers: int, processes: int) -> float:
    """Bytes that each process sends in a ring all-reduce of float32 numbers."""
    return 2 * (processes - 1) / processes * FLOAT * numbers


def size(amount: float) -> str:
    """Bytes with two digits, in MB or GB."""
    for factor, unit in ((1e9, "GB"), (1e6, "MB")):
        if amount >= 0.1 * factor:
            return f"{_two_digits(amount / factor)} {unit}"
    return "0" if amount == 0 else f"{_two_digits(amount / 1e3)} kB"


def _two_digits(number: float) -> str:
    return f"{number:.1f}" if number < 9.95 else f"{float(f'{number:.2g}'):.0f}"


def table() -> str:
    """Neurons, importance, and what each process sends in a step."""
    header = ["weights (width, layers)", "neurons", "importance"]
    header += [f"{sends}, R = {processes}" for sends in ("NPC sends", "gradients") for processes in (8, 1024)]
    lines = []
    for name, shape in SIZES.items():
        n, p = neurons(*shape), weights(*shape)
        traffic = [size(sent(numbers, processes)) for numbers in (n, p) for processes in (8, 1024)]
        count = f"{n / 1e6:.1f} million" if n >= 1e6 else f"{n / 1e3:.0f} thousand"
        lines.append([f"{name} ({shape[0]}, {shape[1]})", count, size(FLOAT * n), *traffic])
    return markdown(header, lines)


def sharded(name: str, processes: int) -> tuple[str, str]:
    """Bytes of importance, and of one process's share of the weights, if only the weights are sharded."""
    shape = SIZES[name]
    return size(FLOAT * neurons(*shape)), size(FLOAT * weights(*shape) / processes)
