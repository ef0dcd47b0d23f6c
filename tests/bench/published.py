"""Small files in the forms in which the data sets are published."""

from __future__ import annotations

import gzip
import pickle
import struct
from pathlib import Path
from typing import Any

import numpy as np

from bench.continual.datasets import MNIST_FILES, NORB_FILES

RANDOM = np.random.default_rng(0)
IMAGES = RANDOM.integers(0, 256, (6, 28, 28), np.uint8)
LABELS = np.array([3, 1, 4, 1, 5, 9], np.uint8)
PAIRS = RANDOM.integers(0, 256, (4, 2, 96, 96), np.uint8)
CATEGORIES = np.array([0, 4, 2, 1], np.int32)


def idx(array: np.ndarray) -> bytes:
    return struct.pack(f">{1 + array.ndim}I", 0x0800 + array.ndim, *array.shape) + array.tobytes()


def norb(array: np.ndarray) -> bytes:
    magic = {"uint8": 0x1E3D4C55, "int32": 0x1E3D4C54}[str(array.dtype)]
    sizes = (*array.shape, 1, 1)[: max(3, array.ndim)]
    return struct.pack(f"<{2 + len(sizes)}I", magic, array.ndim, *sizes) + array.tobytes()


def cifar(**changes: Any) -> dict[bytes, Any]:
    content = {
        "filenames": [b"a.png", b"b.png"],
        "fine_labels": [99, 0],
        "coarse_labels": [1, 2],
        "data": np.arange(2 * 3072).reshape(2, 3072).astype(np.uint8),
    }
    return {key.encode(): value for key, value in (content | changes).items()}


def write(folder: Path, contents: dict[str, bytes]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    return folder


def write_idx(folder: Path, names: tuple[str, ...] = MNIST_FILES, compress: bool = True) -> Path:
    contents = {name: idx(array) for name, array in zip(names, (IMAGES, LABELS, IMAGES[:2], LABELS[:2]), strict=True)}
    if compress:
        contents = {f"{name}.gz": gzip.compress(content) for name, content in contents.items()}
    return write(folder, contents)


def write_norb(folder: Path) -> Path:
    halves = (PAIRS, CATEGORIES, PAIRS[1:], CATEGORIES[1:])
    return write(folder, {f"{n}.gz": gzip.compress(norb(a)) for n, a in zip(NORB_FILES, halves, strict=True)})


def write_cifar(folder: Path, train: Any, protocol: int = 2) -> Path:
    return write(folder, {"train": pickle.dumps(train, protocol), "test": pickle.dumps(cifar(), protocol)})


def write_small_cifar100(folder: Path) -> Path:
    """Files in the form of CIFAR-100's, with four images of each class in each half."""
    pixels = RANDOM.integers(0, 256, (400, 3072), np.uint8)
    halves = pickle.dumps(cifar(data=pixels, fine_labels=list(range(100)) * 4), 2)
    return write(folder, {"train": halves, "test": halves})
