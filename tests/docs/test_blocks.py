"""Every Python block of the documentation runs, page by page and in order, and prints what the page shows."""

from __future__ import annotations

import contextlib
import doctest
import io
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import SkipTest

import pytest
from sybil import Document, Region
from sybil.evaluators.skip import Skipper
from sybil.example import Example
from sybil.parsers.markdown import CodeBlockParser, PythonCodeBlockParser, SkipParser

from . import setups
from .pages import PAGES as PATHS
from .pages import ROOT, name_of

PRINTED = "what the block before this one printed"


def shows_what_was_printed(example: Example) -> None:
    assert example.parsed == example.namespace[PRINTED]


# A file that the site shows in this place.
SHOWN_FILE = re.compile(r'--8<-- "(examples/\w+\.py)"\n')


def python_blocks(document: Document) -> Iterator[Region]:
    """All but the programs of examples/, which tests/test_examples.py runs."""
    for region in PythonCodeBlockParser(doctest_optionflags=doctest.ELLIPSIS)(document):
        if not SHOWN_FILE.search(document.text, region.start, region.end):
            yield region


def text_blocks(document: Document) -> Iterator[Region]:
    """All but those on pages of examples, which show what commands print: tests/test_examples.py compares them."""
    if Path(document.path).parent.name != "examples":
        yield from CodeBlockParser(language="text", evaluator=shows_what_was_printed)(document)


PARSERS = (
    python_blocks,
    text_blocks,
    SkipParser(),
)
PAGES = {name_of(path): Document.parse(str(path), *PARSERS) for path in PATHS}
EXAMPLES = {name: list(page.examples()) for name, page in PAGES.items()}
# These import libraries that take seconds to import.
SLOW_PAGES = {
    f"docs/guides/{library}.md" for library in ("accelerate", "avalanche", "hugging-face", "lightning", "lora")
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The working directory of all blocks."""
    return tmp_path_factory.mktemp("docs")


@pytest.fixture(scope="module")
def prepare() -> Iterator[Callable[[str], None]]:
    """Gives a page the names that it uses without defining them, before its first block."""
    prepared = set()
    with contextlib.ExitStack() as stack:

        def prepare(page: str) -> None:
            if page in setups.SETUPS and page not in prepared:
                prepared.add(page)
                PAGES[page].namespace.update(setups.SETUPS[page](stack))

        yield prepare


@pytest.mark.parametrize(
    ("page", "example"),
    [
        pytest.param(name, example, id=f"{name}:{example.line}", marks=[pytest.mark.slow] if name in SLOW_PAGES else [])
        for name, examples in EXAMPLES.items()
        for example in examples
    ],
)
def test_block(
    page: str, example: Example, folder: Path, prepare: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    prepare(page)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        try:
            example.evaluate()
        except SkipTest as skipped:
            pytest.skip(str(skipped))
    example.namespace[PRINTED] = printed.getvalue()


@pytest.mark.parametrize("page", PAGES)
def test_every_python_block_is_run_or_skipped_with_a_reason(page: str) -> None:
    fences = list(re.finditer(r"^[ \t>]*(```+|~~~+)(.*)\n(?s:.*?)^[ \t>]*\1$", PAGES[page].text, re.MULTILINE))
    python = [fence for fence in fences if re.match(r"[\s{.]*(i?py|python)", fence[2], re.IGNORECASE)]
    shown = [SHOWN_FILE.fullmatch(fence[0].partition("\n")[2].removesuffix(fence[1])) for fence in python]
    assert all((ROOT / file[1]).exists() for file in shown if file)
    python = [fence for fence, file in zip(python, shown, strict=True) if not file]
    found = [example.region for example in EXAMPLES[page]]
    for fence in python:
        assert any(fence.start() <= region.start < fence.end() for region in found), f"not run: {fence[0]}"
    skips = [region.parsed for region in found if isinstance(region.evaluator, Skipper)]
    assert all(action == "next" and reason for action, reason in skips), f"skipped without a reason: {skips}"
    if page == "README.md":
        assert len(python) >= 3


def accuracies(old: str, new: str) -> list[str]:
    """What the README's program prints in percent if a part of it is replaced."""
    program = next(str(example.parsed) for example in EXAMPLES["README.md"])
    changed, replaced = re.subn(old, new, program, flags=re.MULTILINE)
    assert replaced == 1
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(changed, {})
    return re.findall(r": (\d+)%", printed.getvalue())


@pytest.mark.slow
@pytest.mark.parametrize("half_life", ["", "half_life=60, "], ids=["much longer, by default", "much shorter"])
def test_a_half_life_that_does_not_fit_the_task_protects_little(half_life: str) -> None:
    assert min(map(int, accuracies("half_life=300, ", half_life))) < 70


def test_sgd_forgets_what_the_readme_says_it_does() -> None:
    percents = accuracies(r"^optimizer = NPC\(.*\)$", "optimizer = torch.optim.SGD(model.parameters(), lr=0.1)")
    assert f"SGD in its place ends with {', '.join(percents[:-1])} and {percents[-1]} %" in PAGES["README.md"].text
