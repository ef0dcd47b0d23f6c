"""Cuts CIFAR-100's two files into ten shards of 10 MiB and joins them, for machines that take only small files.

    python -m bench.continual.shards cut DATA SHARDS     reads DATA/cifar-100-python/train and test
    python -m bench.continual.shards join SHARDS DATA    writes them, the same bytes (checked by SHA-256)

SHARDS then holds 0.xz to 9.xz, each with a tenth of all images, and index.xz with the rest of the files. Pixels are
stored as differences modulo 256: red and blue minus green, each row minus the one above, each column minus the one
before. This way xz compresses them to 56 % (74 % without). Sums undo the differences.
"""

from __future__ import annotations

import hashlib
import json
import lzma
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from . import datasets
from .datasets import DatasetError
from .store import write

FOLDER = "cifar-100-python"
SHARDS = 10
# Differences of pixels hardly repeat, so a small window and a short search are as good, and eight times as fast.
_SEARCH = {"dict_size": 4096, "mf": lzma.MF_HC4, "depth": 4, "nice_len": 16}
_XZ = [{"id": lzma.FILTER_LZMA2, "mode": lzma.MODE_NORMAL, "lc": 0, "lp": 0, "pb": 0, **_SEARCH}]


def cut(data: Path, shards: Path) -> None:
    """Writes the shards of the files in data/cifar-100-python. Raises DatasetError if one is not the published file."""
    index, rest, images = {}, b"", []
    for path in (data / FOLDER / half for half in ("train", "test")):
        pixels = datasets.read_cifar100(path)[0].numpy()
        content = path.read_bytes()
        before, found, after = content.partition(pixels.tobytes())
        if not found:
            raise DatasetError(f"{path} does not hold its pixels in one piece; replace it by the published file")
        index[path.name] = len(pixels), len(before), len(after), hashlib.sha256(content).hexdigest()
        rest += before + after
        images.append(pixels)
    shards.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor() as pool:  # xz releases Python's lock
        for number, packed in enumerate(pool.map(_packed, np.array_split(np.concatenate(images), SHARDS))):
            write(shards / f"{number}.xz", packed)
    write(shards / "index.xz", lzma.compress(json.dumps(index).encode() + b"\n" + rest))


def join(shards: Path, data: Path) -> None:
    """Writes the files into data/cifar-100-python. Raises DatasetError if a shard is missing or damaged."""
    paths = [shards / f"{number}.xz" for number in range(SHARDS)]
    if missing := [path.name for path in (shards / "index.xz", *paths) if not path.is_file()]:
        raise DatasetError(f"{shards} lacks {', '.join(missing)}; copy all shards there")
    index, _, rest = _content(shards / "index.xz").partition(b"\n")
    with ThreadPoolExecutor() as pool:
        images = np.concatenate(list(pool.map(_unpacked, paths)))
    for name, (count, before, after, checksum) in json.loads(index).items():
        content = rest[:before] + images[:count].tobytes() + rest[before : before + after]
        rest, images = rest[before + after :], images[count:]
        if hashlib.sha256(content).hexdigest() != checksum:
            raise DatasetError(f"the shards in {shards} do not make the {name} that was cut; copy them again")
        write(data / FOLDER / name, content)


def _packed(images: np.ndarray) -> bytes:
    """Compressed differences of images uint8 (B, 3, 32, 32)."""
    differences = images.copy()
    differences[:, ::2] -= images[:, 1:2]
    for axis in (2, 3):
        differences = np.diff(differences, axis=axis, prepend=np.uint8(0))
    return lzma.compress(differences.tobytes(), filters=_XZ)


def _unpacked(path: Path) -> np.ndarray:
    """The images in a shard."""
    content = _content(path)
    if len(content) % 3072:
        raise DatasetError(f"{path} does not hold whole images; copy it again")
    images = np.frombuffer(content, np.uint8).reshape(-1, 3, 32, 32).cumsum(3, np.uint8).cumsum(2, np.uint8)
    images[:, ::2] += images[:, 1:2]
    return images


def _content(path: Path) -> bytes:
    try:
        return lzma.decompress(path.read_bytes())
    except lzma.LZMAError as error:
        raise DatasetError(f"{path} is damaged: {error}; copy it again") from error


def main(arguments: Sequence[str]) -> str | None:
    """Runs the program; returns what went wrong."""
    match arguments:
        case ["cut" | "join" as action, source, target]:
            try:
                (cut if action == "cut" else join)(Path(source), Path(target))
            except DatasetError as error:
                return str(error)
            return None
    return __doc__


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
