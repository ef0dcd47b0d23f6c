"""Every equation of the documentation is TeX that the manual can show."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator

import pytest

from .pages import CODE, PAGES, ROOT, name_of

KATEX = ROOT / "docs" / "assets" / "katex" / "katex.min.js"
# In the order in which they are looked for: code, `$$...$$`, and `$...$`, as pymdownx.arithmatex reads them.
EQUATION = re.compile(r"`[^`\n]*`|\$\$(.+?)\$\$|(?<![\\$\w])\$(?!\s)([^$\n]+?)(?<!\s)\$(?![\d$])", re.DOTALL)
RENDER = """
const katex = require(process.argv[1]);
const wrong = [];
for (const [where, tex, displayMode] of JSON.parse(require("fs").readFileSync(0, "utf8"))) {
  try {
    katex.renderToString(tex, { displayMode, throwOnError: true, strict: "error" });
  } catch (error) {
    wrong.push(`${where}: ${tex}: ${error.message}`);
  }
}
console.log(JSON.stringify(wrong));
"""


def equations(where: str, text: str) -> Iterator[tuple[str, str, bool]]:
    """The equations of a text: where it stands, TeX, and whether it has a line of its own."""
    for display, inline in EQUATION.findall(CODE.sub("", text)):
        if display or inline:
            yield where, display or inline, bool(display)


def wrong(found: list[tuple[str, str, bool]]) -> list[str]:
    """Those that KaTeX does not take, with its messages."""
    node = shutil.which("node")
    if node is None:
        pytest.skip("node is not installed")
    run = [node, "-e", RENDER, str(KATEX)]
    done = subprocess.run(run, input=json.dumps(found), capture_output=True, text=True, check=True, timeout=60)
    messages: list[str] = json.loads(done.stdout)
    return messages


def test_every_equation_is_valid() -> None:
    found = [equation for page in PAGES for equation in equations(name_of(page), page.read_text())]
    assert len(found) > 100
    assert not wrong(found)


def test_wrong_equations_are_found() -> None:
    text = "$a_1$ costs `$5` and $$\n\\frac{1}{2}\n$$ and $\\frac{1$ and $\\nosuch$\n```sh\necho $A $B\n```\n"
    found = [*equations("page.md", text)]
    assert [(tex.strip(), display) for _, tex, display in found] == [
        ("a_1", False),
        (r"\frac{1}{2}", True),
        (r"\frac{1", False),
        (r"\nosuch", False),
    ]
    assert len(wrong(found)) == 2
