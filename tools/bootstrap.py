"""Makes .venv and builds the extension, for the Makefile. Every failure to be expected ends in one sentence.

`bootstrap.py requirements` makes .venv with the Python that runs it and installs requirements.txt.
`bootstrap.py build`, run with .venv's Python, compiles and installs the package in place.

Standard library only, and in a syntax that Python versions too old for the package can still read.
"""

import argparse
import os
import shutil
import subprocess
import sys
import sysconfig

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
VENV = os.path.join(ROOT, ".venv")
VENV_PYTHON = os.path.join(VENV, "bin", "python")
LOG = os.path.join(ROOT, "setup.log")
OLDEST = (3, 10)

# What a failing command's output says, and the sentence for it.
CAUSES = [
    ("No space left on device", "the disk is full; free some space and run the command again"),
    ("ensurepip is not available", "Python's venv module is incomplete; install it (for example 'apt install python3-venv')"),
    ("No module named venv", "Python's venv module is missing; install it (for example 'apt install python3-venv')"),
    ("No module named ensurepip", "Python's venv module is incomplete; install it (for example 'apt install python3-venv')"),
    ("no C++ compiler", "there is no C++ compiler; install one (for example 'apt install g++') or set CXX to one"),
    ("Python.h is missing", "Python's headers are missing; install them (for example 'apt install python3-dev')"),
    ("the C++ compiler failed", "the C++ compiler could not compile the extension; its messages are in the log"),
    ("Failed to establish a new connection", "the package index cannot be reached; check the network and run the command again"),
    ("Temporary failure in name resolution", "the package index cannot be reached; check the network and run the command again"),
    ("Connection refused", "the package index cannot be reached; check the network and run the command again"),
    ("Read timed out", "the package index does not answer; check the network and run the command again"),
    ("Network is unreachable", "the package index cannot be reached; check the network and run the command again"),
    ("No matching distribution found", "the package index has no build of a pinned version for this Python and machine, or cannot be reached"),
]


def fail(sentence):
    """Ends the program with one sentence."""
    sys.exit("npc_ext: " + sentence)


def run(what, command):
    """Runs a command quietly, its output in the log; on failure says what went wrong in one sentence."""
    sys.stderr.write("npc_ext: " + what + " ...\n")
    sys.stderr.flush()
    with open(LOG, "a") as log:
        log.write("\n$ " + " ".join(command) + "\n")
        log.flush()
        start = log.tell()
        status = subprocess.call(command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT)
    if status == 0:
        return
    with open(LOG, errors="replace") as log:
        log.seek(start)
        output = log.read()
    for sign, sentence in CAUSES:
        if sign in output:
            fail(what + " failed: " + sentence + " (log: " + LOG + ")")
    fail(what + " failed with exit status " + str(status) + "; the end of " + LOG + " says why")


def check_python():
    """Refuses a Python that is too old."""
    if sys.version_info[:2] < OLDEST:
        fail(
            "Python %d.%d or newer is needed, %s is %d.%d; name a newer one: make PYTHON=/path/to/python3"
            % (OLDEST + (sys.executable,) + tuple(sys.version_info[:2]))
        )


def check_compiler():
    """Refuses before minutes of installation what the build would refuse after them."""
    wanted = os.environ.get("CXX", "").split()[:1]
    if not any(shutil.which(name) for name in wanted or ["c++", "g++", "clang++"]):
        got = "CXX names " + wanted[0] + ", which is no program" if wanted else "none of c++, g++, clang++ is on the PATH"
        fail("there is no C++ compiler (" + got + "); install one (for example 'apt install g++') or set CXX to one")
    if not os.path.exists(os.path.join(sysconfig.get_paths()["include"], "Python.h")):
        fail("Python's headers are missing; install them (for example 'apt install python3-dev')")


def stamp(name):
    """Marks a step as done, for make; nothing is marked that was interrupted."""
    with open(os.path.join(VENV, name + ".stamp"), "w"):
        pass


def install_requirements():
    """Makes .venv and installs the pinned versions."""
    check_python()
    check_compiler()
    if os.path.exists(LOG):
        os.remove(LOG)
    if not os.path.exists(VENV_PYTHON):
        run("making .venv", [sys.executable, "-m", "venv", "--clear", VENV])
    pip = [VENV_PYTHON, "-m", "pip", "--disable-pip-version-check", "--retries", "2", "--timeout", "20"]
    run("installing the versions in requirements.txt (torch among them, this takes a while)", pip + ["install", "-r", "requirements.txt"])
    stamp("requirements")


def build():
    """Compiles the extension and installs the package in place."""
    check_compiler()
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    run("compiling the extension", pip + ["install", "--no-build-isolation", "--no-deps", "--no-index", "-e", "."])
    stamp("build")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("step", choices=["requirements", "build"])
    try:
        {"requirements": install_requirements, "build": build}[parser.parse_args().step]()
    except KeyboardInterrupt:
        fail("interrupted; run the command again, it goes on where it can")
    except OSError as error:
        fail(str(error) + "; mend that and run the command again")
