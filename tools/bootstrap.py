"""Makes .venv and builds the extension, for the Makefile. Every expected failure ends in one sentence.

`bootstrap.py requirements` makes .venv with the Python that runs it, and installs requirements.txt.
`bootstrap.py build`, run with .venv's Python, compiles the package and installs it in place.

This file uses the standard library only, and syntax that Python 3.6 can read. So a Python that is too
old for the package gets a clear message. This is why `from __future__ import annotations` is missing.
"""

import argparse
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from typing import NoReturn

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
VENV = os.path.join(ROOT, ".venv")
VENV_PYTHON = os.path.join(VENV, "bin", "python")
VENV_PIP = os.path.join(VENV, "bin", "pip")
LOG = os.path.join(ROOT, "setup.log")
OLDEST = (3, 10)

PYTHON = "python{}.{}".format(*sys.version_info[:2])
NO_VENV = f"Python's venv module is missing or incomplete; install it (for example 'apt install {PYTHON}-venv')"
NO_COMPILER = "install one (for example 'apt install g++') or set CXX to one"
NO_HEADERS = f"Python's headers are missing; install them (for example 'apt install {PYTHON}-dev')"
NO_NETWORK = "the package index cannot be reached; check the network and run the command again"

# Texts in the output of a failing command, each with the sentence to print. The first match is used.
# pip names network errors only in its warnings about retries, and then ends with "No matching
# distribution found".
CAUSES = [
    ("No space left on device", "the disk is full; free some space and run the command again"),
    ("ensurepip is not available", NO_VENV),
    ("No module named ensurepip", NO_VENV),
    ("No module named venv", NO_VENV),
    ("no C++ compiler", "there is no C++ compiler; " + NO_COMPILER),
    ("Python.h is missing", NO_HEADERS),
    ("the compiled module does not load", "the compiled module does not load; the loader's message is in the log"),
    ("the C++ compiler failed", "the C++ compiler could not compile the extension; its messages are in the log"),
    ("the CUDA compiler failed", "nvcc could not compile the CUDA kernels; its messages are in the log"),
    ("CERTIFICATE_VERIFY_FAILED", "the package index's certificate is not trusted; check the clock, and PIP_CERT"),
    ("connection broken by", NO_NETWORK),
    ("Read timed out", NO_NETWORK),
    (
        "No matching distribution found",
        "the package index has no build of a pinned version for this Python and machine",
    ),
]


def fail(sentence: str) -> NoReturn:
    """Ends the program with one sentence."""
    sys.exit(f"npc_ext: {sentence}")


def run(what: str, command: "list[str]") -> None:
    """Runs a command with its output in the log. On failure, prints the cause in one sentence."""
    print(f"npc_ext: {what} ...", file=sys.stderr, flush=True)
    with open(LOG, "a") as log:
        log.write("\n$ {}\n".format(" ".join(command)))
        log.flush()
        start = log.tell()
        status = subprocess.call(command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT)
    with open(LOG, errors="replace") as log:
        log.seek(start)
        output = log.read()
    if status == 0:
        for notice in re.findall(r"^\s*(npc_ext: the CUDA kernels are left out.*)$", output, re.MULTILINE):
            print(notice, file=sys.stderr, flush=True)
        return
    for sign, sentence in CAUSES:
        if sign in output:
            fail(f"{what} failed: {sentence} (log: {LOG})")
    fail(f"{what} failed with exit status {status}; the end of {LOG} says why")


def check_python() -> None:
    """Refuses a Python that is too old."""
    version = sys.version_info[:2]
    if version < OLDEST:
        fail(
            f"Python {OLDEST[0]}.{OLDEST[1]} or newer is needed, {sys.executable} is {version[0]}.{version[1]}; "
            "name a newer one: make PYTHON=/path/to/python3"
        )


def check_compiler() -> None:
    """Fails for a missing compiler now, and not in the build after minutes of installation."""
    value = os.environ.get("CXX", "").strip()
    try:
        wanted = [value] if shutil.which(value) else shlex.split(value)[:1]
    except ValueError as error:
        fail(f"CXX={value} cannot be read as a command: {error}; correct it or unset CXX")
    if not any(shutil.which(name) for name in wanted or ["c++", "g++", "clang++"]):
        got = f"CXX={wanted[0]} names no program" if wanted else "none of c++, g++, clang++ is on the PATH"
        fail(f"there is no C++ compiler ({got}); {NO_COMPILER}")
    if not os.path.exists(os.path.join(sysconfig.get_paths()["include"], "Python.h")):
        fail(NO_HEADERS)


def stamp(name: str) -> None:
    """Marks a step as done, for make. An interrupted step is not marked."""
    with open(os.path.join(VENV, name + ".stamp"), "w"):
        pass


def install_requirements() -> None:
    """Makes .venv and installs the pinned versions."""
    check_python()
    check_compiler()
    if os.path.exists(LOG):
        os.remove(LOG)
    # venv makes python first and pip last. If one is missing, it was interrupted or its Python was removed.
    if not (os.path.exists(VENV_PYTHON) and os.path.exists(VENV_PIP)):
        run("making .venv", [sys.executable, "-m", "venv", "--clear", VENV])
    # At least one retry: pip reports a broken connection only when it tries again.
    pip = [VENV_PYTHON, "-m", "pip", "--disable-pip-version-check", "--retries", "2", "--timeout", "20"]
    what = "installing the versions in requirements.txt (torch among them, this takes a while)"
    run(what, [*pip, "install", "-r", "requirements.txt"])
    stamp("requirements")


def build() -> None:
    """Compiles the extension and installs the package in place."""
    check_compiler()
    # Verbose, because pip hides the output of a successful build.
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-v"]
    run("compiling the extension", [*pip, "install", "--no-build-isolation", "--no-deps", "--no-index", "-e", "."])
    stamp("build")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Makes .venv and builds the extension, for the Makefile.")
    parser.add_argument("step", choices=["requirements", "build"])
    try:
        {"requirements": install_requirements, "build": build}[parser.parse_args().step]()
    except KeyboardInterrupt:
        fail("interrupted; run the command again, and it continues where it can")
    except OSError as error:
        fail(f"{error}; fix that and run the command again")
