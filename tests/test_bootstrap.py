"""Setting up: every expected failure ends in one sentence with its fix, and nothing is done twice."""

from __future__ import annotations

import ast
import importlib.metadata
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
PYTHON = f"python3.{sys.version_info.minor}"
# Variables that an outer `make test` leaves in the environment, and those that change where pip looks for packages.
OF_MAKE = ("MAKEFLAGS", "MAKELEVEL", "MFLAGS", "MAKEOVERRIDES", "PYTHON", "CI", "CXX")
OF_PIP = ("PIP_FIND_LINKS", "PIP_EXTRA_INDEX_URL")
# Python's venv module in Debian without python3-venv: it leaves a .venv without pip.
VENV_WITHOUT_ENSUREPIP = """
import pathlib, sys
folder = pathlib.Path(sys.argv[-1], "bin"); folder.mkdir(parents=True); (folder / "python").symlink_to(sys.executable)
print("The virtual environment was not created successfully because ensurepip is not available."); sys.exit(1)
"""
VENV_THAT_WORKS = """
import pathlib, sys
folder = pathlib.Path(sys.argv[-1], "bin"); folder.mkdir(parents=True, exist_ok=True)
for name in ("python", "pip"):
    (folder / name).unlink(missing_ok=True); (folder / name).write_text("#!/bin/sh\\n"); (folder / name).chmod(0o755)
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of the files for setting up, in a folder with a space in its name. It requires a package that does not exist."""
    root = tmp_path / "a checkout"
    ignored = shutil.ignore_patterns("*.so", "__pycache__", "csrc")
    shutil.copytree(ROOT / "npc_ext", root / "npc_ext", ignore=ignored)
    for name in ("csrc", "tools"):
        shutil.copytree(ROOT / name, root / name)
    for name in ("Makefile", "setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, root)
    (root / "requirements.txt").write_text("npc-ext-needs-no-such-package==1\n")
    return root


def script(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return path


def made_venv(checkout: Path, python: str = f'exec "{sys.executable}" "$@"') -> None:
    """Makes a .venv with a shell command as its Python: by default the Python of this test, with its pip."""
    for name in ("python", "pip"):
        script(checkout / ".venv" / "bin" / name, f"#!/bin/sh\n{python}\n")


def environment(**more: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name not in (*OF_MAKE, *OF_PIP)}
    return {**kept, "PIP_CONFIG_FILE": os.devnull, **more}


def bootstrap(checkout: Path, step: str, first: str = "", **more: str) -> subprocess.Popen[str]:
    """Starts tools/bootstrap.py. `first` is Python code that runs before it, to imitate another machine."""
    path = checkout / "tools" / "bootstrap.py"
    program = (
        f"import runpy, sys; sys.argv = ['', {step!r}]\n{first}\nrunpy.run_path({str(path)!r}, run_name='__main__')"
    )
    return subprocess.Popen(
        [sys.executable, "-c", program],
        env=environment(**more),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def sentence(process: subprocess.Popen[str], checkout: Path) -> str:
    """The sentence of a failed run. The lines before it name the steps, and no step is marked as done."""
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    assert not output
    *progress, last = errors.splitlines()
    assert all(line.startswith("npc_ext: ") and line.endswith(" ...") for line in progress), errors
    assert last.startswith("npc_ext: ")
    assert not list(checkout.glob(".venv/*.stamp"))
    return last


def make(checkout: Path, *arguments: str, **more: str) -> str:
    """The output of make: the commands that it would run, or its messages."""
    command = ["make", "-C", str(checkout), "--no-print-directory", *arguments]
    result = subprocess.run(command, env=environment(**more), capture_output=True, text=True, check=False)
    return result.stdout + result.stderr


def test_a_python_too_old_is_named_with_the_way_to_a_newer_one(checkout: Path) -> None:
    said = sentence(bootstrap(checkout, "requirements", "sys.version_info = (3, 8, 18)"), checkout)
    assert said.startswith(f"npc_ext: Python 3.10 or newer is needed, {sys.executable} is 3.8; ")
    assert said.endswith("make PYTHON=/path/to/python3")


def test_a_python_too_old_can_read_what_tells_it_so() -> None:
    tree = ast.parse((ROOT / "tools" / "bootstrap.py").read_text(), feature_version=(3, 6))
    assert "__future__" not in {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}


def test_a_missing_python_is_named(checkout: Path) -> None:
    said = make(checkout, "test", "PYTHON=python-nowhere")
    assert "npc_ext: no program named 'python-nowhere'; install Python 3.10 or newer, or name it" in said


@pytest.mark.parametrize("step", ["requirements", "build"])
@pytest.mark.parametrize(
    ("setting", "got"),
    [
        ({"CXX": "/nowhere/c++ -v"}, "CXX=/nowhere/c++ names no program"),
        ({"PATH": "/nowhere"}, "none of c++, g++, clang++ is on the PATH"),
    ],
    ids=["CXX", "PATH"],
)
def test_a_missing_compiler_is_named_before_anything_is_installed(
    checkout: Path, step: str, setting: dict[str, str], got: str
) -> None:
    said = sentence(bootstrap(checkout, step, **setting), checkout)
    assert said == (
        f"npc_ext: there is no C++ compiler ({got}); install one (for example 'apt install g++') or set CXX to one"
    )
    assert not (checkout / ".venv").exists()


def test_cxx_may_carry_quotes_and_arguments(checkout: Path, tmp_path: Path) -> None:
    made_venv(checkout, "exit 0")
    process = bootstrap(checkout, "requirements", CXX=f"'{script(tmp_path / 'a folder' / 'c++', '')}' -v")
    assert process.wait(timeout=60) == 0
    assert (checkout / ".venv" / "requirements.stamp").exists()


def test_a_quote_that_does_not_end_in_cxx_is_named(checkout: Path) -> None:
    said = sentence(bootstrap(checkout, "build", CXX="g++ 'x"), checkout)
    assert said == "npc_ext: CXX=g++ 'x cannot be read as a command: No closing quotation; correct it or unset CXX"


def test_missing_headers_of_python_are_named(checkout: Path) -> None:
    first = "import sysconfig; sysconfig.get_paths = lambda: {'include': '/nowhere'}"
    said = sentence(bootstrap(checkout, "requirements", first), checkout)
    assert said == f"npc_ext: Python's headers are missing; install them (for example 'apt install {PYTHON}-dev')"


def test_an_incomplete_venv_module_is_named_and_what_it_left_is_replaced(checkout: Path, tmp_path: Path) -> None:
    fake = script(tmp_path / "fake" / "venv.py", VENV_WITHOUT_ENSUREPIP)
    said = sentence(bootstrap(checkout, "requirements", PYTHONPATH=str(fake.parent)), checkout)
    assert f"venv module is missing or incomplete; install it (for example 'apt install {PYTHON}-venv')" in said
    assert (checkout / ".venv" / "bin" / "python").exists()

    script(fake, VENV_THAT_WORKS)
    again = bootstrap(checkout, "requirements", PYTHONPATH=str(fake.parent))
    assert "making .venv" in again.communicate(timeout=60)[1]
    assert again.returncode == 0
    assert (checkout / ".venv" / "requirements.stamp").exists()


@pytest.mark.parametrize("more", [{}, {"PIP_PROXY": "http://127.0.0.1:9"}], ids=["refused", "proxy"])
def test_an_unreachable_package_index_is_named(checkout: Path, more: dict[str, str]) -> None:
    made_venv(checkout)
    process = bootstrap(checkout, "requirements", PIP_INDEX_URL="https://127.0.0.1:9/simple", NO_PROXY="", **more)
    said = sentence(process, checkout)
    assert "the package index cannot be reached; check the network and run the command again" in said
    assert said.endswith(f"(log: {checkout / 'setup.log'})")
    assert "connection broken by" in (checkout / "setup.log").read_text()


def test_a_version_that_the_index_does_not_have_is_told_from_a_missing_network(checkout: Path) -> None:
    made_venv(checkout)
    said = sentence(bootstrap(checkout, "requirements", PIP_NO_INDEX="1"), checkout)
    assert "the package index has no build of a pinned version for this Python and machine" in said


def test_a_full_disk_is_named(checkout: Path) -> None:
    made_venv(checkout, "echo 'ERROR: Could not install packages: [Errno 28] No space left on device'; exit 1")
    said = sentence(bootstrap(checkout, "requirements"), checkout)
    assert "the disk is full; free some space and run the command again" in said


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_log_that_cannot_be_written_is_named(checkout: Path) -> None:
    (checkout / "setup.log").symlink_to("/dev/full")
    said = sentence(bootstrap(checkout, "build"), checkout)
    assert said == "npc_ext: [Errno 28] No space left on device; fix that and run the command again"


def test_a_failing_compiler_is_named_and_its_words_are_in_the_log(checkout: Path, tmp_path: Path) -> None:
    compiler = script(tmp_path / "c++", "#!/bin/sh\necho 'internal compiler error: tired' >&2\nexit 1\n")
    said = sentence(bootstrap(checkout, "build", CXX=str(compiler)), checkout)
    assert "the C++ compiler could not compile the extension; its messages are in the log" in said
    assert "internal compiler error: tired" in (checkout / "setup.log").read_text()


def test_cuda_kernels_that_are_left_out_are_told(checkout: Path, tmp_path: Path) -> None:
    made_venv(checkout)
    notice = "npc_ext: the CUDA kernels are left out: CUDA_HOME=/nowhere has no bin/nvcc"
    python = script(tmp_path / "python", f"#!/bin/sh\necho '  {notice}'\n")
    process = bootstrap(checkout, "build", f"sys.executable = {str(python)!r}")
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 0
    assert errors.splitlines() == ["npc_ext: compiling the extension ...", notice]


def test_an_unexpected_failure_names_the_log(checkout: Path) -> None:
    made_venv(checkout, "echo 'something new'; exit 7")
    said = sentence(bootstrap(checkout, "requirements"), checkout)
    assert said.endswith(f"failed with exit status 7; the end of {checkout / 'setup.log'} says why")
    assert (checkout / "setup.log").read_text().endswith("something new\n")


def test_an_interrupted_installation_is_not_taken_for_a_finished_one(checkout: Path) -> None:
    made_venv(checkout, "touch started; exec sleep 50")
    # By default, Python ignores the interrupt when it runs in the background.
    process = bootstrap(
        checkout, "requirements", "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"
    )
    deadline = time.monotonic() + 30
    while not (checkout / "started").exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    said = sentence(process, checkout)
    assert said == "npc_ext: interrupted; run the command again, and it continues where it can"


@pytest.fixture
def finished(checkout: Path) -> Path:
    """A checkout that was just set up, from the view of make."""
    for path in checkout.rglob("*"):
        os.utime(path, (1000, 1000))
    for name, at in [("requirements.stamp", 2000), ("build.stamp", 3000)]:
        os.utime(script(checkout / ".venv" / name, ""), (at, at))
    return checkout


def test_a_second_run_sets_nothing_up_again(finished: Path) -> None:
    (everything,) = make(finished, "--dry-run", "test").splitlines()
    assert everything.startswith(".venv/bin/python -m pytest ")
    assert make(finished, "--dry-run", "test-fast").splitlines() == [f'{everything} -m "not slow"']


@pytest.mark.parametrize(
    ("changed", "steps"),
    [
        ("requirements.txt", ["requirements", "build"]),
        ("tools/bootstrap.py", ["requirements", "build"]),
        ("csrc/rules.h", ["build"]),
        ("csrc/cpu/isa.cpp", ["build"]),
        ("npc_ext/kernels/build.py", ["build"]),
        ("npc_ext/kernels/compilers.py", ["build"]),
        ("setup.py", ["build"]),
        ("pyproject.toml", ["build"]),
        ("npc_ext/optim/npc.py", []),
    ],
)
def test_a_change_repeats_the_steps_that_read_it(finished: Path, changed: str, steps: list[str]) -> None:
    os.utime(finished / changed, (4000, 4000))
    assert re.findall(r"bootstrap\.py (\w+)", make(finished, "--dry-run", "demo")) == steps


def test_the_manual_names_the_python_that_it_needs(finished: Path) -> None:
    command = next(line for line in make(finished, "--dry-run", "docs").splitlines() if "import mkdocs" in line)
    run = ["sh", "-c", command.replace(".venv/bin/python", "false")]
    done = subprocess.run(run, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith("npc_ext: the manual needs Python 3.11 or newer: make clean, then make PYTHON=")


def test_lint_writes_formats_for_a_person_and_only_checks_them_for_ci(finished: Path) -> None:
    writes, checks = (make(finished, "--dry-run", "lint", **more) for more in ({}, {"CI": "true"}))
    assert "--check" not in writes
    assert "clang-format -i csrc/" in writes
    assert "ruff format --check ." in checks
    assert "clang-format --dry-run -Werror csrc/" in checks


def test_every_requirement_is_pinned_and_so_is_what_it_needs() -> None:
    lines = [line for line in (ROOT / "requirements.txt").read_text().splitlines() if not line.startswith("#")]
    pinned = {canonicalize_name(Requirement(line).name) for line in lines}
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+(; .+)?", line) for line in lines)
    for name in pinned:
        try:
            needs = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:  # for another version of Python
            continue
        for need in map(Requirement, needs):
            # torch pins the GPU libraries that it needs itself, to one version each.
            applies = need.marker is None or need.marker.evaluate({"extra": ""})
            if applies and not re.match(r"nvidia-|cuda-|triton", need.name):
                assert canonicalize_name(need.name) in pinned, f"{name} needs {need.name}"


def test_no_message_names_an_index_that_does_not_have_the_package() -> None:
    folders = ("npc_ext", "bench", "examples", "tools")
    files = [path for folder in folders for path in (ROOT / folder).rglob("*.py")]
    advice = re.compile(r"pip install (?:-\S+ |')*npc_ext\b|npc_ext\[\w+\]'")
    assert [str(path) for path in files if advice.search(path.read_text(encoding="utf-8"))] == []
