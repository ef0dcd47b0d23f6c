"""The data sets of the experiments: reads the published files, and downloads them if they are missing.

| name      | images  | classes | train / test                                                       |
|-----------|---------|---------|--------------------------------------------------------------------|
| digits    | 1x8x8   | 10      | 1,437 / 360 (inside scikit-learn, no files)                        |
| mnist     | 1x28x28 | 10      | 60,000 / 10,000                                                    |
| fashion   | 1x28x28 | 10      | 60,000 / 10,000                                                    |
| emnist    | 1x28x28 | 47      | 112,800 / 18,800 (the official balanced split), or a re-split |
| cifar100  | 3x32x32 | 100     | 50,000 / 10,000                                                    |
| smallnorb | 1x32x32 | 5       | 24,300 / 24,300 (the first image of each pair, scaled from 96x96)  |

Files may be compressed with gzip. A file that does not match its format is rejected with an error that names it.
"""

from __future__ import annotations

import gzip
import io
import math
import os
import pickle
import tempfile
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

_REPLACE = "replace it by the published file, or delete it to have it fetched anew"


class DatasetError(ValueError):
    """A data set is missing, cannot be fetched, or is not what its format says."""


class MissingDatasetError(DatasetError):
    """Files of a data set are missing, and the download is not allowed or fails."""


@dataclass(frozen=True)
class Dataset:
    """Images uint8 (B, C, H, W) with values from 0 to 255, and labels int64 (B,) from 0 to `classes` - 1.

    `name` is the name in reports.
    """

    name: str
    classes: int
    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor


def load(name: str, folder: Path | None = None, download: bool = True) -> Dataset:
    """The data set of one of `NAMES`.

    Args:
        name: one of `NAMES`. "emnist" is the official balanced split or, if only `emnist47/` is there, the re-split;
            the result's name says which.
        folder: the folder of all data sets, with a folder for each: `mnist/` or, as in torchvision, `MNIST/raw/`.
            None: the folder that the environment variable NPC_DATA names, or else the user's cache.
        download: fetch missing files from their official addresses into `folder`.

    Raises:
        DatasetError: there is no such data set, a file is missing and is not downloaded, or a file is damaged or has
            another format. The message names the file.
    """
    if name not in NAMES:
        raise DatasetError(f"there is no data set {name!r}; there are {', '.join(NAMES)}")
    if name == "digits":
        return _digits()
    folder = Path(folder or os.environ.get("NPC_DATA") or cache_folder()).expanduser()
    source, paths = _locate(SOURCES[name], folder, download)
    half = len(paths) // 2
    return Dataset(source.name, source.classes, *_read_half(source, paths[:half]), *_read_half(source, paths[half:]))


def read_idx(path: Path, dimensions: int) -> np.ndarray:
    """The uint8 array in an IDX file (MNIST's format: big-endian magic number, sizes, then the bytes).

    Raises:
        DatasetError: not an IDX file of bytes with this number of dimensions, or its length disagrees with its sizes.
    """
    content = _content(path)
    (magic,) = _integers(path, content, ">u4", 1)
    _expect_magic(path, magic, 0x0800 + dimensions, f"an IDX file of bytes in {dimensions} dimensions")
    return _array(path, content, 4 + 4 * dimensions, _integers(path, content, ">u4", dimensions, 4), "u1")


def read_norb(path: Path, dtype: str, dimensions: int) -> np.ndarray:
    """The array in a file of NORB's matrix format: little-endian magic number, number of sizes, sizes, elements.

    Args:
        path: the file.
        dtype: "u1" for bytes, "<i4" for integers.
        dimensions: how many there must be.

    Raises:
        DatasetError: not a matrix of this type, or the file's length disagrees with its sizes.
    """
    content = _content(path)
    magic, sizes = _integers(path, content, "<u4", 2)
    expected, meaning = {"u1": (0x1E3D4C55, "bytes"), "<i4": (0x1E3D4C54, "integers")}[dtype]
    _expect_magic(path, magic, expected, f"a NORB matrix of {meaning}")
    if sizes != dimensions:
        raise DatasetError(f"{path} has {sizes} dimensions; expected {dimensions}; {_REPLACE}")
    stored = max(3, dimensions)  # the format pads fewer sizes with ones
    shape = _integers(path, content, "<u4", stored, 8)[:dimensions]
    return _array(path, content, 8 + 4 * stored, shape, dtype)


def read_cifar100(path: Path) -> tuple[Tensor, Tensor]:
    """Images uint8 (B, 3, 32, 32) and fine labels int64 (B,) of a file of CIFAR-100's Python version, a pickle.

    Unpickling runs only this module's code, so files from any source are safe to read.

    Raises:
        DatasetError: not a pickle of bytes, lists, dictionaries and arrays, or not of CIFAR-100's content.
    """
    content = _content(path)
    try:
        batch = _CifarUnpickler(io.BytesIO(content), encoding="bytes").load()
    except Exception as error:  # a damaged pickle can raise nearly anything
        raise DatasetError(f"{path} cannot be unpickled: {error}; {_REPLACE}") from error
    match batch:
        case {
            b"data": _PickledArray(
                state=(_, (int(count), 3072), _PickledArray(arguments=("u1" | b"u1", *_)), False, bytes(pixels))
            ),
            b"fine_labels": list(labels),
        } if 0 < count * 3072 == len(pixels) and set(map(type, labels)) == {int} and set(labels) <= set(range(100)):
            return torch.tensor(np.frombuffer(pixels, np.uint8).reshape(count, 3, 32, 32)), torch.tensor(labels)
    raise DatasetError(
        f"{path} does not hold b'data', an array uint8 (B, 3072), and b'fine_labels', integers from 0 to 99; {_REPLACE}"
    )


class _PickledArray:
    """Replaces numpy's arrays and types while unpickling. Keeps their arguments and state, and builds nothing.

    A pickle from an unknown source may give numpy's objects a state that makes them read other memory.
    """

    arguments: tuple[Any, ...]
    state: Any

    def __init__(self, *arguments: Any) -> None:
        self.arguments = arguments

    def __setstate__(self, state: Any) -> None:
        self.state = state


# All that a pickle can call. It could also set attributes of these objects, but none of them has any.
_ALLOWED: dict[tuple[str, str], Callable[..., Any]] = {
    ("numpy.core.multiarray", "_reconstruct"): _PickledArray,
    ("numpy._core.multiarray", "_reconstruct"): _PickledArray,
    ("numpy", "ndarray"): _PickledArray,
    ("numpy", "dtype"): _PickledArray,
    ("_codecs", "encode"): str.encode,  # so Python 3 writes bytes in the pickles that Python 2 reads
}


class _CifarUnpickler(pickle.Unpickler):
    """Reads bytes, text, numbers, lists, dictionaries and (as `_PickledArray`) arrays."""

    def find_class(self, module: str, name: str) -> Callable[..., Any]:
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which CIFAR-100 does not need")
        return _ALLOWED[module, name]


def _idx_images(images: Path, labels: Path) -> tuple[Tensor, Tensor]:
    return torch.tensor(read_idx(images, 3)).unsqueeze(1), torch.tensor(read_idx(labels, 1), dtype=torch.int64)


def _upright_images(images: Path, labels: Path) -> tuple[Tensor, Tensor]:
    """EMNIST's authors store each image column by column."""
    pixels, targets = _idx_images(images, labels)
    return pixels.mT.contiguous(), targets


def _norb_images(images: Path, labels: Path) -> tuple[Tensor, Tensor]:
    """The first image of each stereo pair, its 96x96 pixels averaged to 32x32."""
    pairs = read_norb(images, "u1", 4)
    if pairs.shape[1:] != (2, 96, 96):
        raise DatasetError(f"{images} holds arrays of {_by(pairs.shape[1:])}; expected pairs, 2x96x96; {_REPLACE}")
    return averaged(torch.tensor(pairs[:, :1]), 3), torch.tensor(read_norb(labels, "<i4", 1), dtype=torch.int64)


def averaged(images: Tensor, square: int) -> Tensor:
    """Images (B, C, H, W) uint8, averaged over squares of `square` x `square` pixels."""
    # Part by part, because all images in float32 may take gigabytes.
    parts = [F.avg_pool2d(part.float(), square).round().to(torch.uint8) for part in images.split(1024)]
    return torch.cat(parts)


@dataclass(frozen=True)
class Download:
    """A file to fetch: its address, its checksum ("md5:..." or "sha256:...") and, of an archive, the needed members.

    `unpack` is the class of pooch that opens the archive.
    """

    url: str
    checksum: str
    unpack: Literal["", "Unzip", "Untar"] = ""
    members: tuple[str, ...] = ()

    def names(self) -> list[str]:
        """The names of the files that it contains."""
        return [PurePosixPath(path).name for path in self.members or (self.url,)]


@dataclass(frozen=True)
class Source:
    """A published form of a data set.

    name, classes, image: what it holds; `image` is (C, H, W).
    read: makes images and labels of the files of one half.
    files: those of the training half, then as many of the test half; each may also end with `.gz`.
    folders: their possible folders in the folder of all data sets; downloads go to the first.
    """

    name: str
    classes: int
    image: tuple[int, int, int]
    read: Callable[..., tuple[Tensor, Tensor]]
    files: tuple[str, ...]
    folders: tuple[str, ...]
    downloads: tuple[Download, ...] = ()


MNIST_FILES = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")
EMNIST_FILES = tuple(f"emnist-balanced-{name.replace('t10k', 'test')}" for name in MNIST_FILES)
NORB_FILES = (
    "smallnorb-5x46789x9x18x6x2x96x96-training-dat.mat",
    "smallnorb-5x46789x9x18x6x2x96x96-training-cat.mat",
    "smallnorb-5x01235x9x18x6x2x96x96-testing-dat.mat",
    "smallnorb-5x01235x9x18x6x2x96x96-testing-cat.mat",
)


def _downloads(site: str, files: Sequence[str], *checksums: str) -> tuple[Download, ...]:
    """Each of `files`, compressed, from one site."""
    return tuple(Download(f"{site}/{file}.gz", checksum) for file, checksum in zip(files, checksums, strict=True))


# The checksums are those that torchvision lists; smallNORB's are those of TensorFlow Datasets.
_MNIST = _downloads(
    "https://ossci-datasets.s3.amazonaws.com/mnist",
    MNIST_FILES,
    "md5:f68b3c2dcbeaaa9fbdd348bbdeb94873",
    "md5:d53e105ee54ea40749a09fcbcd1e9432",
    "md5:9fb629c4189551a2d022fa330f9573f3",
    "md5:ec29112dd5afa0611ce80d1b7f02629c",
)
_FASHION = _downloads(
    "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com",
    MNIST_FILES,
    "md5:8d4fb7e6c68d591d4c3dfef9ec88bf0d",
    "md5:25c81989df183df01b3e8a0aad5dffbe",
    "md5:bef4ecab320f06d8554ea6380940ec79",
    "md5:bb300cfdad3c16e7a12a480ee83cd310",
)
_EMNIST = Download(
    "https://biometrics.nist.gov/cs_links/EMNIST/gzip.zip",
    "md5:58c8d27c78d21e728a6bc7b3cc06412e",
    "Unzip",
    tuple(f"gzip/{file}.gz" for file in EMNIST_FILES),
)
_CIFAR100 = Download(
    "https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz",
    "md5:eb9058c3a382ffc7106e4002c42a8d85",
    "Untar",
    ("cifar-100-python/train", "cifar-100-python/test"),
)
_NORB = _downloads(
    "https://cs.nyu.edu/~ylclab/data/norb-v1.0-small",
    NORB_FILES,
    "sha256:5ffd6272a07d32695ee1082a26a41a93a37aab8c28da047f8c34ed348d214873",
    "sha256:2784e542c1922060691090952b6cd6278879a216c90f81476f0f00256d42cdaa",
    "sha256:cf7104eed3e51174d2f65b66d1e5878b9da233b886f161b0d88f4510ba2c7474",
    "sha256:ecaf6d5bb8c3bc5eab9cf0258f6d2198dd474e016e374836fc097f2e5ff509ff",
)

# If a data set has several sources, the first is the official one.
SOURCES: dict[str, tuple[Source, ...]] = {
    "mnist": (Source("MNIST", 10, (1, 28, 28), _idx_images, MNIST_FILES, ("mnist", "MNIST/raw"), _MNIST),),
    "fashion": (
        Source(
            "Fashion-MNIST", 10, (1, 28, 28), _idx_images, MNIST_FILES, ("fashion-mnist", "FashionMNIST/raw"), _FASHION
        ),
    ),
    "emnist": (
        Source(
            "EMNIST (balanced)", 47, (1, 28, 28), _upright_images, EMNIST_FILES, ("emnist", "EMNIST/raw"), (_EMNIST,)
        ),
        Source("EMNIST-47 (re-split)", 47, (1, 28, 28), _idx_images, MNIST_FILES, ("emnist47",)),
    ),
    "cifar100": (
        Source("CIFAR-100", 100, (3, 32, 32), read_cifar100, ("train", "test"), ("cifar-100-python",), (_CIFAR100,)),
    ),
    "smallnorb": (Source("smallNORB", 5, (1, 32, 32), _norb_images, NORB_FILES, ("smallnorb",), _NORB),),
}

NAMES = ("digits", *SOURCES)
"""What `load` takes."""


def cache_folder() -> Path:
    """The folder of the data sets in the user's cache, the one that `pooch.os_cache` names on Linux."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "npc_ext"


def _digits() -> Dataset:
    """The handwritten digits, their values 0 to 16 stretched to 0 to 255."""
    pixels, labels, train, test = sklearn_digits()
    images = (pixels * 255 / 16).round().to(torch.uint8)
    return Dataset("Digits", 10, images[train], labels[train], images[test], labels[test])


def sklearn_digits() -> tuple[Tensor, Tensor, list[int], list[int]]:
    """The handwritten digits inside scikit-learn, and the indices of training and test samples (a fifth).

    Images are float64 (B, 1, 8, 8) with values from 0 to 16, labels int64 (B,).
    """
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    pixels, labels = load_digits(return_X_y=True)
    train, test = train_test_split(range(len(labels)), test_size=0.2, stratify=labels, random_state=0)
    return torch.tensor(pixels).view(-1, 1, 8, 8), torch.tensor(labels, dtype=torch.int64), train, test


def _locate(sources: tuple[Source, ...], folder: Path, download: bool) -> tuple[Source, list[Path]]:
    """The first source with all files, and their paths. If no source has all files, fetches those of the first."""
    for source in sources:
        if paths := _find(source, folder):
            return source, paths
    if download:
        official = sources[0]
        for file in official.downloads:
            _fetch(file, folder / official.folders[0])
        return _locate(sources, folder, download=False)
    looked_for = ", and for ".join(
        f"{', '.join(source.files)} in {' or '.join(str(folder / place) for place in source.folders)}"
        for source in sources
    )
    raise MissingDatasetError(
        f"{sources[0].name} is missing or incomplete; looked for {looked_for} (each also with .gz); name the folder of "
        "the data sets by --data DIR or NPC_DATA, or allow the download"
    )


def _find(source: Source, folder: Path) -> list[Path]:
    """The source's files, all in one of its folders; nothing if no folder has them all."""
    for place in source.folders:
        choices = [(folder / place / file, folder / place / f"{file}.gz") for file in source.files]
        paths = [path for choice in choices if (path := next(filter(Path.is_file, choice), None))]
        if len(paths) == len(choices):
            return paths
    return []


def _fetch(download: Download, folder: Path) -> None:
    """Fetches the files of a download that `folder` lacks. A file appears only when it is complete and checked."""
    if all((folder / name).exists() for name in download.names()):
        return
    try:
        import pooch  # only here: machines that have the files do without it
    except ImportError as error:
        raise MissingDatasetError(
            f"{', '.join(download.names())} cannot be fetched into {folder}, because the package pooch is not "
            "installed; run `pip install pooch`, put the files there yourself, or name the folder of the data sets by "
            "--data DIR or NPC_DATA"
        ) from error
    unpack = getattr(pooch, download.unpack) if download.unpack else None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # In a folder next to the destination, so that each file moves in one step. Nothing else of an archive stays.
        with tempfile.TemporaryDirectory(dir=folder, prefix="download-") as scratch:
            pooch.retrieve(
                download.url,
                download.checksum,
                fname=PurePosixPath(download.url).name,
                path=scratch,
                processor=unpack and unpack(list(download.members), extract_dir="."),
                # pooch's default pieces of 1 KiB would take half a million writes for the largest archive.
                downloader=pooch.HTTPDownloader(progressbar=True, chunk_size=2**16),
            )
            for path, name in zip(download.members or download.names(), download.names(), strict=True):
                if not (folder / name).exists():
                    os.replace(Path(scratch, path), folder / name)
    except ValueError as error:
        raise DatasetError(f"{download.url} is not the published file: {error}") from error
    except OSError as error:
        raise MissingDatasetError(
            f"{download.url} cannot be fetched into {folder}: {error}; try again, or put {', '.join(download.names())} "
            "there yourself"
        ) from error


def _read_half(source: Source, paths: Sequence[Path]) -> tuple[Tensor, Tensor]:
    """Images and labels of the training or the test half, checked against each other and against the source."""
    images, labels = source.read(*paths)
    where = " and ".join(map(str, paths))
    if len(images) != len(labels):
        raise DatasetError(f"{where}: {len(images)} images and {len(labels)} labels; they must agree; {_REPLACE}")
    if tuple(images.shape[1:]) != source.image:
        raise DatasetError(
            f"{where}: the images are {_by(images.shape[1:])}; {source.name} has {_by(source.image)}; {_REPLACE}"
        )
    if labels.min() < 0 or labels.max() >= source.classes:
        raise DatasetError(
            f"{where}: the labels go from {labels.min()} to {labels.max()}; {source.name} has 0 to "
            f"{source.classes - 1}; {_REPLACE}"
        )
    return images, labels


def _content(path: Path) -> bytes:
    """The bytes of a file, compressed or not, whatever its name says."""
    try:
        content = path.read_bytes()
        return gzip.decompress(content) if content.startswith(b"\x1f\x8b") else content
    except (OSError, EOFError, zlib.error) as error:
        raise DatasetError(f"{path} cannot be read: {error}; {_REPLACE}") from error


def _integers(path: Path, content: bytes, dtype: str, count: int, offset: int = 0) -> list[int]:
    """Integers of a file's header, four bytes each."""
    if len(content) < offset + 4 * count:
        raise DatasetError(f"{path} has {len(content)} bytes; its header alone needs {offset + 4 * count}; {_REPLACE}")
    return np.frombuffer(content, dtype, count, offset).tolist()


def _expect_magic(path: Path, magic: int, expected: int, meaning: str) -> None:
    if magic != expected:
        raise DatasetError(f"{path} begins with {magic:#010x}; expected {expected:#010x}, {meaning}; {_REPLACE}")


def _array(path: Path, content: bytes, offset: int, shape: Sequence[int], dtype: str) -> np.ndarray:
    """What follows a file's header, and must be as long as the header says."""
    expected = math.prod(shape) * np.dtype(dtype).itemsize
    if not 0 < expected == len(content) - offset:
        raise DatasetError(
            f"{path} holds {len(content) - offset} bytes after its header, which announces {_by(shape)} elements, "
            f"{expected} bytes; {_REPLACE}"
        )
    return np.frombuffer(content, dtype, offset=offset).reshape(shape)


def _by(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape))
