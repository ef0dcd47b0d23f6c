"""The data sets are read from their published formats, fetched with a check, and damaged files are refused by name."""

from __future__ import annotations

import gzip
import hashlib
import lzma
import os
import pickle
import struct
import sys
import tarfile
import threading
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from bench.continual import datasets, shards
from bench.continual.datasets import EMNIST_FILES, MNIST_FILES, NORB_FILES, DatasetError, MissingDatasetError, load
from bench.continual.store import Store

from .programs import python
from .published import (
    CATEGORIES,
    IMAGES,
    LABELS,
    PAIRS,
    RANDOM,
    cifar,
    idx,
    norb,
    write,
    write_cifar,
    write_idx,
    write_norb,
    write_small_cifar100,
)


def short(value: object) -> str | None:
    """What pytest calls a parameter: bytes would fill the screen."""
    return "content" if isinstance(value, bytes) else None


# Reading


def test_digits_need_no_file_and_are_stretched_to_bytes() -> None:
    pytest.importorskip("sklearn")
    data = load("digits", Path("no such folder"), download=False)
    assert (data.name, data.classes) == ("Digits", 10)
    assert data.train_images.shape == (1437, 1, 8, 8) and data.test_images.shape == (360, 1, 8, 8)
    assert data.train_images.dtype == torch.uint8 and data.train_labels.dtype == torch.int64
    assert set(data.train_images.flatten().tolist()) == {round(value * 255 / 16) for value in range(17)}
    assert (data.train_labels.bincount() - 4 * data.test_labels.bincount()).abs().max() <= 4  # stratified


@pytest.mark.parametrize("compress", [True, False])
@pytest.mark.parametrize(
    ("name", "place", "title"),
    [
        ("mnist", "mnist", "MNIST"),
        ("mnist", "MNIST/raw", "MNIST"),
        ("fashion", "fashion-mnist", "Fashion-MNIST"),
        ("fashion", "FashionMNIST/raw", "Fashion-MNIST"),
        ("emnist", "emnist47", "EMNIST-47 (re-split)"),
    ],
)
def test_idx_files_are_found_and_read(tmp_path: Path, name: str, place: str, title: str, compress: bool) -> None:
    write_idx(tmp_path / place, compress=compress)
    data = load(name, tmp_path, download=False)
    assert (data.name, data.classes) == (title, 47 if name == "emnist" else 10)
    assert data.train_images.dtype == torch.uint8 and data.train_labels.dtype == torch.int64
    assert np.array_equal(data.train_images, IMAGES[:, None]) and np.array_equal(data.train_labels, LABELS)
    assert np.array_equal(data.test_images, IMAGES[:2, None]) and np.array_equal(data.test_labels, LABELS[:2])


@pytest.mark.parametrize("place", ["emnist", "EMNIST/raw"])
def test_official_emnist_goes_before_the_re_split_and_is_set_upright(tmp_path: Path, place: str) -> None:
    write_idx(tmp_path / "emnist47")
    write_idx(tmp_path / place, EMNIST_FILES)
    data = load("emnist", tmp_path, download=False)
    assert (data.name, data.classes) == ("EMNIST (balanced)", 47)
    assert np.array_equal(data.train_images, IMAGES.transpose(0, 2, 1)[:, None])
    assert data.train_images.is_contiguous()


@pytest.mark.parametrize("protocol", [2, 4])
def test_cifar100_is_read_from_its_pickles(tmp_path: Path, protocol: int) -> None:
    write_cifar(tmp_path / "cifar-100-python", cifar(), protocol)
    data = load("cifar100", tmp_path, download=False)
    assert (data.name, data.classes) == ("CIFAR-100", 100)
    assert np.array_equal(data.train_images, cifar()[b"data"].reshape(2, 3, 32, 32))
    assert data.train_labels.dtype == torch.int64 and data.train_labels.tolist() == [99, 0]


def test_cifar100_is_read_as_python_2_wrote_it(tmp_path: Path) -> None:
    pixels = bytes(range(256)) * 12
    content = (
        b"\x80\x02}(U\x04datacnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R"
        b"(K\x01K\x01M\x00\x0c\x86cnumpy\ndtype\nU\x02u1K\x00K\x01\x87R(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
        b"\x89T\x00\x0c\x00\x00" + pixels + b"tbU\x0bfine_labels]K\x13au."
    )
    images, labels = datasets.read_cifar100(write(tmp_path, {"train": content}) / "train")
    assert images.shape == (1, 3, 32, 32) and images.numpy().tobytes() == pixels
    assert labels.tolist() == [19]


def test_smallnorb_is_the_first_image_of_each_pair_averaged_to_a_third(tmp_path: Path) -> None:
    write_norb(tmp_path / "smallnorb")
    data = load("smallnorb", tmp_path, download=False)
    assert (data.name, data.classes) == ("smallNORB", 5)
    expected = np.rint(PAIRS[:, 0].astype(float).reshape(4, 32, 3, 32, 3).mean((2, 4)))
    assert data.train_images.dtype == torch.uint8 and np.array_equal(data.train_images, expected[:, None])
    assert data.train_labels.dtype == torch.int64 and np.array_equal(data.train_labels, CATEGORIES)
    assert len(data.test_images) == len(data.test_labels) == 3


@settings(max_examples=20)
@given(array=arrays.arrays(np.uint8, arrays.array_shapes(max_dims=4, max_side=5)), compress=st.booleans())
def test_idx_and_norb_arrays_of_any_shape_return(
    tmp_path_factory: pytest.TempPathFactory, array: np.ndarray, compress: bool
) -> None:
    path = tmp_path_factory.getbasetemp() / "array"
    for pack, read in ((idx, datasets.read_idx), (norb, lambda path, size: datasets.read_norb(path, "u1", size))):
        path.write_bytes(gzip.compress(pack(array)) if compress else pack(array))
        assert np.array_equal(read(path, array.ndim), array)


@pytest.mark.parametrize(
    ("name", "train", "test", "image"),
    [
        ("mnist", [60000], [10000], (1, 28, 28)),
        ("fashion", [60000], [10000], (1, 28, 28)),
        ("emnist", [112800, 35720], [18800, 7050], (1, 28, 28)),
        ("cifar100", [50000], [10000], (3, 32, 32)),
        ("smallnorb", [24300], [24300], (1, 32, 32)),
    ],
)
def test_published_files_hold_what_their_authors_say(
    name: str, train: list[int], test: list[int], image: tuple[int, ...]
) -> None:
    if "NPC_DATA" not in os.environ:
        pytest.skip("NPC_DATA names no folder of published files")
    try:
        data = load(name, download=False)
    except MissingDatasetError as error:
        pytest.skip(str(error))
    assert len(data.train_images) in train and len(data.test_images) in test
    for images, labels in ((data.train_images, data.train_labels), (data.test_images, data.test_labels)):
        assert images.shape[1:] == image and images.max() == 255
        assert (labels.bincount() > 0).sum() == data.classes


# Finding


def test_the_folder_is_the_argument_then_npc_data_then_the_users_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for variable, folder in ((None, "cache/npc_ext"), ("", "cache/npc_ext"), ("environment", "environment")):
        if variable is not None:
            monkeypatch.setenv("NPC_DATA", str(variable and tmp_path / variable))
        else:
            monkeypatch.delenv("NPC_DATA", raising=False)
        with pytest.raises(DatasetError) as refusal:
            load("mnist", download=False)
        assert f" in {tmp_path / folder / 'mnist'} or {tmp_path / folder / 'MNIST/raw'} (" in str(refusal.value)
    write_idx(tmp_path / "argument" / "mnist")
    assert len(load("mnist", tmp_path / "argument", download=False).train_images) == 6


@pytest.mark.parametrize("cache", [None, "", "/somewhere"])
def test_the_users_cache_is_the_one_that_pooch_names(monkeypatch: pytest.MonkeyPatch, cache: str | None) -> None:
    pooch = pytest.importorskip("pooch")
    if cache is None:
        monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    else:
        monkeypatch.setenv("XDG_CACHE_HOME", cache)
    assert datasets.cache_folder().expanduser() == Path(pooch.os_cache("npc_ext"))


def test_missing_files_are_named_with_the_ways_to_fix_it(tmp_path: Path) -> None:
    (write_idx(tmp_path / "emnist47") / "t10k-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(DatasetError, match=r"EMNIST \(balanced\) is missing or incomplete; looked for ") as refusal:
        load("emnist", tmp_path, download=False)
    where = str(tmp_path / "emnist47")
    for text in (*EMNIST_FILES, *MNIST_FILES, where, "--data DIR", "NPC_DATA", "allow the download"):
        assert text in str(refusal.value)


def test_an_unknown_name_is_refused_with_the_known_ones() -> None:
    known = "digits, mnist, fashion, emnist, cifar100, smallnorb"
    with pytest.raises(DatasetError, match=f"no data set 'svhn'; there are {known}"):
        load("svhn")


# Refusing

GZIP = gzip.compress(idx(IMAGES))
HUGE = struct.pack(">4I", 0x803, *[2**32 - 1] * 3)
AFTER = "bytes after its header, which announces"
FORMS = {"mnist": (write_idx, MNIST_FILES), "smallnorb": (write_norb, NORB_FILES)}


@pytest.mark.parametrize(
    ("name", "file", "content", "message"),
    [
        ("mnist", 0, GZIP[:-100], "cannot be read: Compressed file ended"),
        ("mnist", 0, GZIP[:5], "cannot be read: Compressed file ended"),
        ("mnist", 0, GZIP[:-8] + bytes(8), "cannot be read: CRC check failed"),
        ("mnist", 0, GZIP[:200] + bytes(200) + GZIP[400:], "cannot be read: "),
        ("mnist", 0, idx(IMAGES)[:-1], f"holds 4703 {AFTER} 6x28x28 elements, 4704 bytes"),
        ("mnist", 0, idx(IMAGES) + b"!", f"holds 4705 {AFTER} 6x28x28 elements, 4704 bytes"),
        ("mnist", 0, idx(IMAGES[:0]), f"holds 0 {AFTER} 0x28x28 elements"),
        ("mnist", 0, idx(IMAGES)[:10], "has 10 bytes; its header alone needs 16"),
        ("mnist", 0, b"", "has 0 bytes; its header alone needs 4"),
        ("mnist", 0, idx(LABELS), "begins with 0x00000801; expected 0x00000803, an IDX file of bytes in 3 dimensions"),
        ("mnist", 0, b"<!DOCTYPE html>", "begins with 0x3c21444f; expected 0x00000803"),
        ("mnist", 0, HUGE, f"holds 0 {AFTER} 4294967295x4294967295x4294967295 elements"),
        ("mnist", 1, idx(LABELS[:5]), "6 images and 5 labels; they must agree"),
        ("mnist", 2, idx(IMAGES[:2, :27]), "and .*: the images are 1x27x28; MNIST has 1x28x28"),
        ("mnist", 3, idx(LABELS[:2] + 9), "the labels go from 10 to 12; MNIST has 0 to 9"),
        ("smallnorb", 0, norb(CATEGORIES), "begins with 0x1e3d4c54; expected 0x1e3d4c55, a NORB matrix of bytes"),
        ("smallnorb", 1, norb(LABELS), "begins with 0x1e3d4c55; expected 0x1e3d4c54, a NORB matrix of integers"),
        ("smallnorb", 0, norb(PAIRS[:, 0]), "has 3 dimensions; expected 4"),
        ("smallnorb", 0, norb(PAIRS)[:-1], f"holds 73727 {AFTER} 4x2x96x96 elements, 73728 bytes"),
        ("smallnorb", 0, norb(PAIRS)[:20], "has 20 bytes; its header alone needs 24"),
        ("smallnorb", 0, norb(PAIRS[:, :, :90]), "holds arrays of 2x90x96; expected pairs, 2x96x96"),
        ("smallnorb", 1, norb(CATEGORIES)[:-4], f"holds 12 {AFTER} 4 elements, 16 bytes"),
        ("smallnorb", 1, norb(CATEGORIES - 1), "the labels go from -1 to 3; smallNORB has 0 to 4"),
    ],
    ids=short,
)
def test_a_damaged_file_is_refused_by_name(tmp_path: Path, name: str, file: int, content: bytes, message: str) -> None:
    write_all, files = FORMS[name]
    folder = write_all(tmp_path / name)
    (folder / f"{files[file]}.gz").unlink()
    write(folder, {files[file]: content})
    with pytest.raises(DatasetError, match=f"{files[file]}:? {message}.*; replace it by the published file"):
        load(name, tmp_path, download=False)


class Harmful:
    """What a hostile pickle asks for: the function is called while unpickling, before any check of the content."""

    def __init__(self, call: Callable[..., Any], *arguments: Any) -> None:
        self.call = call, arguments

    def __reduce__(self) -> tuple[Callable[..., Any], Any]:
        return self.call


@pytest.mark.parametrize("call", [os.mkdir, eval, pickle.loads, np.frombuffer, getattr])
def test_a_pickle_that_calls_what_cifar100_does_not_need_is_refused_uncalled(
    tmp_path: Path, call: Callable[..., Any]
) -> None:
    victim = tmp_path / "made by the pickle"
    write_cifar(tmp_path / "cifar-100-python", cifar(fine_labels=Harmful(call, str(victim))))
    refusal = r"cifar-100-python/train cannot be unpickled: it asks for \w+\..*does not need"
    with pytest.raises(DatasetError, match=refusal):
        load("cifar100", tmp_path, download=False)
    assert not victim.exists()


@pytest.mark.parametrize(
    "content",
    [
        [],
        {},
        cifar(data=b"pixels"),
        cifar(data=np.zeros((2, 3071), np.uint8)),
        cifar(data=np.zeros((2, 3072), np.float32)),
        cifar(data=np.zeros((2, 3072), np.uint8, order="F")),
        cifar(data=np.zeros((2, 3072), object)),
        cifar(data=np.zeros((0, 3072), np.uint8), fine_labels=[]),
        cifar(fine_labels=None),
        cifar(fine_labels=[0, 1.0]),
        cifar(fine_labels=[[0], [1]]),
        cifar(fine_labels=[0, 100]),
        cifar(fine_labels=[-1, 2**70]),
    ],
)
def test_a_pickle_of_other_content_is_refused_by_name(tmp_path: Path, content: Any) -> None:
    write_cifar(tmp_path / "cifar-100-python", content, protocol=4)
    with pytest.raises(DatasetError, match="cifar-100-python/train does not hold b'data', an array uint8"):
        load("cifar100", tmp_path, download=False)


@pytest.mark.parametrize("size", [0, 1, 50, 3000, -1])
def test_a_cut_pickle_is_refused_by_name(tmp_path: Path, size: int) -> None:
    folder = write_cifar(tmp_path / "cifar-100-python", cifar())
    write(folder, {"train": (folder / "train").read_bytes()[:size]})
    with pytest.raises(DatasetError, match="cifar-100-python/train cannot be unpickled: "):
        load("cifar100", tmp_path, download=False)


def test_a_pickle_that_changes_what_it_may_call_is_refused(tmp_path: Path) -> None:
    for target in (b"cnumpy\nndarray\n", b"c_codecs\nencode\n"):
        folder = write(tmp_path, {"train": b"\x80\x02" + target + b"N}X\x05\x00\x00\x00stateK\x01s\x86b."})
        with pytest.raises(DatasetError, match="train cannot be unpickled: "):
            datasets.read_cifar100(folder / "train")
    assert not hasattr(datasets._PickledArray, "state")


def test_labels_that_are_missing_from_a_pickle_are_counted(tmp_path: Path) -> None:
    write_cifar(tmp_path / "cifar-100-python", cifar(fine_labels=[1]))
    with pytest.raises(DatasetError, match="cifar-100-python/train: 2 images and 1 labels"):
        load("cifar100", tmp_path, download=False)


# Fetching


class Site:
    """A web server on this machine that serves the files of a folder, only half of each if `cut`, and lists requests."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self.monkeypatch = folder, monkeypatch
        self.requests: list[str] = []
        self.cut = False
        site = self

        class Handler(SimpleHTTPRequestHandler):
            def copyfile(self, source: Any, outputfile: Any) -> None:
                content = source.read()
                outputfile.write(content[: len(content) // 2] if site.cut else content)

            def log_request(self, *arguments: Any) -> None:
                site.requests.append(self.path.removeprefix("/"))

            def log_error(self, *arguments: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=folder))
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def publish(self, name: str) -> None:
        """Serves the folder's files at the addresses of a data set, on this machine and with their own checksums."""
        official, *others = datasets.SOURCES[name]
        downloads = []
        for file in official.downloads:
            base = file.url.rsplit("/", 1)[1]
            checksum = f"sha256:{hashlib.sha256((self.folder / base).read_bytes()).hexdigest()}"
            downloads.append(replace(file, url=f"{self.url}/{base}", checksum=checksum))
        self.monkeypatch.setitem(datasets.SOURCES, name, (replace(official, downloads=tuple(downloads)), *others))


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    pytest.importorskip("pooch")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    site = Site(tmp_path / "published", monkeypatch)
    thread = threading.Thread(target=site.server.serve_forever, args=(0.01,))
    thread.start()
    yield site
    site.server.shutdown()
    thread.join()
    site.server.server_close()


@pytest.fixture
def site_of_mnist(site: Site) -> Site:
    write_idx(site.folder)
    site.publish("mnist")
    return site


def everything_in(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_missing_files_are_fetched_once_and_those_there_are_kept(tmp_path: Path, site_of_mnist: Site) -> None:
    own = {f"{MNIST_FILES[1]}.gz": gzip.compress(idx(LABELS[::-1]))}
    write(tmp_path / "data" / "mnist", own)
    for _ in range(2):
        data = load("mnist", tmp_path / "data")
        assert np.array_equal(data.train_images[:, 0], IMAGES) and np.array_equal(data.train_labels, LABELS[::-1])
    assert site_of_mnist.requests == [f"{MNIST_FILES[file]}.gz" for file in (0, 2, 3)]
    assert everything_in(tmp_path / "data") == {f"mnist/{file}.gz" for file in MNIST_FILES}


def test_smallnorb_is_fetched(tmp_path: Path, site: Site) -> None:
    write_norb(site.folder)
    site.publish("smallnorb")
    assert load("smallnorb", tmp_path / "data").train_labels.tolist() == CATEGORIES.tolist()
    assert everything_in(tmp_path / "data") == {f"smallnorb/{file}.gz" for file in NORB_FILES}


def test_what_is_missing_of_cifar100_is_taken_out_of_its_archive(tmp_path: Path, site: Site) -> None:
    folder = write_cifar(site.folder, cifar())
    with tarfile.open(folder / "cifar-100-python.tar.gz", "w:gz") as archive:
        for name in ("train", "test"):
            archive.add(folder / name, f"cifar-100-python/{name}")
    site.publish("cifar100")
    write(tmp_path / "data" / "cifar-100-python", {"train": pickle.dumps(cifar(fine_labels=[7, 8]), 2)})
    for _ in range(2):
        data = load("cifar100", tmp_path / "data")
        assert (data.train_labels.tolist(), data.test_labels.tolist()) == ([7, 8], [99, 0])
    assert site.requests == ["cifar-100-python.tar.gz"]
    assert everything_in(tmp_path / "data") == {"cifar-100-python/train", "cifar-100-python/test"}


def test_emnist_is_taken_out_of_its_archive(tmp_path: Path, site: Site) -> None:
    files = list(write_idx(site.folder, EMNIST_FILES).iterdir())
    with zipfile.ZipFile(site.folder / "gzip.zip", "w") as archive:
        for path in files:
            archive.write(path, f"gzip/{path.name}")
        archive.writestr("gzip/emnist-letters-train-images-idx3-ubyte.gz", b"another split")
    site.publish("emnist")
    assert load("emnist", tmp_path / "data").name == "EMNIST (balanced)"
    assert everything_in(tmp_path / "data") == {f"emnist/{file}.gz" for file in EMNIST_FILES}


def test_a_wrong_checksum_is_refused_and_leaves_nothing(tmp_path: Path, site_of_mnist: Site) -> None:
    name = f"{MNIST_FILES[0]}.gz"
    published = site_of_mnist.folder / name
    expected, got = (hashlib.sha256(content).hexdigest() for content in (published.read_bytes(), b"other"))
    published.write_bytes(b"other")
    with pytest.raises(DatasetError, match=rf"{name} is not the published file: .*{expected} but got {got}"):
        load("mnist", tmp_path / "data")
    assert not everything_in(tmp_path / "data")


def test_an_interrupted_download_leaves_nothing_and_the_next_one_succeeds(tmp_path: Path, site_of_mnist: Site) -> None:
    name = f"{MNIST_FILES[0]}.gz"
    site_of_mnist.cut = True
    with pytest.raises(DatasetError, match=f"{name} cannot be fetched into .*; try again, or put {name} there"):
        load("mnist", tmp_path / "data")
    assert list((tmp_path / "data" / "mnist").iterdir()) == []
    site_of_mnist.cut = False
    assert len(load("mnist", tmp_path / "data").train_images) == 6


def test_an_address_that_does_not_answer_is_named(tmp_path: Path, site_of_mnist: Site) -> None:
    (site_of_mnist.folder / f"{MNIST_FILES[0]}.gz").unlink()
    with pytest.raises(DatasetError, match=rf"{site_of_mnist.url}/{MNIST_FILES[0]}.gz cannot be fetched into .*404"):
        load("mnist", tmp_path / "data")


def test_without_pooch_files_are_read_and_missing_ones_are_an_error_that_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pooch", None)
    write_idx(tmp_path / "mnist")
    assert len(load("mnist", tmp_path).train_images) == 6
    (tmp_path / "mnist" / f"{MNIST_FILES[0]}.gz").unlink()
    with pytest.raises(MissingDatasetError, match=r"the package pooch is not installed; run `pip install") as refusal:
        load("mnist", tmp_path)
    for text in (MNIST_FILES[0], str(tmp_path / "mnist"), "put the files there", "--data DIR", "NPC_DATA"):
        assert text in str(refusal.value)


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    write(tmp_path, {"data": b"a file"})
    with pytest.raises(DatasetError, match=rf"cannot be fetched into {tmp_path / 'data' / 'mnist'}"):
        load("mnist", tmp_path / "data")


def test_no_file_is_fetched_where_the_download_is_not_allowed(tmp_path: Path, site_of_mnist: Site) -> None:
    with pytest.raises(DatasetError, match="allow the download"):
        load("mnist", tmp_path / "data", download=False)
    assert site_of_mnist.requests == []


# None among the modules refuses an import, but not the question whether the package is there, which torch asks.
ALONE = """
import pathlib, sys
sys.modules.update(dict.fromkeys(("pooch", "sklearn", "scipy")))
from bench.continual import experiments
from bench.continual.__main__ import main
file, *arguments = sys.argv[1:]
assert main(arguments) == 0
pathlib.Path(file).unlink()
experiments.load.cache_clear()
main(arguments)
"""


@pytest.mark.slow
def test_runs_on_files_that_are_there_need_neither_pooch_nor_scikit_learn(tmp_path: Path) -> None:
    """Runs a command twice: with all files, and without one of them."""
    folder = write_small_cifar100(tmp_path / "data" / "cifar-100-python")
    changes = ["tasks=2", "epochs=1", "epoch_samples=64"]
    arguments = ["run", "--experiment", "icifar100", "--methods", "npc", "--seeds", "1", "--set", *changes]
    folders = ["--data", str(tmp_path / "data"), "--store", str(tmp_path / "store")]
    result = python("-c", ALONE, str(folder / "test"), *arguments, *folders)
    (record,) = Store(tmp_path / "store").records()
    assert record.steps == [2, 2]
    assert result.returncode == 2, result.stderr
    assert "the package pooch is not installed; run `pip install pooch`" in result.stderr


# Shards


def sharded(folder: Path, pixels: np.ndarray) -> tuple[Path, Path]:
    """A folder of two halves of CIFAR-100's form, and one of their shards."""
    write_cifar(folder / "data" / "cifar-100-python", cifar(data=pixels, fine_labels=list(range(len(pixels)))), 4)
    shards.cut(folder / "data", folder / "shards")
    return folder / "data", folder / "shards"


def test_shards_join_to_the_same_files(tmp_path: Path) -> None:
    data, pieces = sharded(tmp_path, RANDOM.integers(0, 256, (23, 3072), np.uint8))
    assert everything_in(pieces) == {"index.xz", *(f"{number}.xz" for number in range(10))}
    shards.join(pieces, tmp_path / "joined")
    assert everything_in(tmp_path / "joined") == everything_in(data)
    for file in everything_in(data):
        assert (tmp_path / "joined" / file).read_bytes() == (data / file).read_bytes()


def test_shards_of_smooth_images_are_small(tmp_path: Path) -> None:
    smooth = np.indices((23, 3, 32, 32)).sum(0).astype(np.uint8).reshape(23, 3072)
    _, pieces = sharded(tmp_path, smooth)
    assert sum(path.stat().st_size for path in pieces.glob("?.xz")) < smooth.size / 20


def test_missing_damaged_and_mixed_shards_are_named(tmp_path: Path) -> None:
    _, pieces = sharded(tmp_path, RANDOM.integers(0, 256, (23, 3072), np.uint8))
    good = (pieces / "3.xz").read_bytes()
    for content, message in (
        (good[:-20], "3.xz is damaged: "),
        (lzma.compress(b"text"), "3.xz does not hold whole images; copy it again"),
        ((pieces / "4.xz").read_bytes(), "do not make the train that was cut; copy them again"),
    ):
        (pieces / "3.xz").write_bytes(content)
        with pytest.raises(DatasetError, match=message):
            shards.join(pieces, tmp_path / "joined")
    (pieces / "3.xz").unlink()
    with pytest.raises(DatasetError, match=r"lacks 3.xz; copy all shards there"):
        shards.join(pieces, tmp_path / "joined")
    assert not (tmp_path / "joined").exists()


def test_shards_are_cut_from_published_files_only(tmp_path: Path) -> None:
    write_cifar(tmp_path / "cifar-100-python", cifar(), protocol=2)  # Python 3 writes text for bytes there
    with pytest.raises(DatasetError, match="train does not hold its pixels in one piece"):
        shards.cut(tmp_path, tmp_path / "shards")


def test_the_program_cuts_and_joins_and_answers_errors_in_a_sentence(tmp_path: Path) -> None:
    write_cifar(tmp_path / "data" / "cifar-100-python", cifar(), protocol=4)
    data, pieces, joined = (str(tmp_path / name) for name in ("data", "shards", "joined"))
    assert shards.main(["cut", data, pieces]) is None
    assert shards.main(["join", pieces, joined]) is None
    assert everything_in(tmp_path / "joined") == everything_in(tmp_path / "data")
    (tmp_path / "shards" / "7.xz").unlink()
    assert shards.main(["join", pieces, joined]) == f"{pieces} lacks 7.xz; copy all shards there"
    assert "shards cut DATA SHARDS" in str(shards.main(["burn", data, pieces]))
