# make demo       five tasks in a row, with SGD, NPC and two controls: a table and figures
# make test       all tests
# make test-fast  all tests but the slow ones, in under three minutes
# make bench      micro-benchmarks
# make docs       the manual, in site/ (open site/index.html); fails if a link or a reference leads nowhere
# make docs-serve the manual on http://127.0.0.1:8000, built anew when a page changes
# make lint       format, lint and type-check Python, format C++ and CUDA (CI=true: check the formats only)
#
# Each target first sets up .venv if it is missing or out of date. PYTHON=python3.12 chooses the interpreter for it.

PYTHON ?= python3
BIN := .venv/bin
REQUIREMENTS := .venv/requirements.stamp
BUILD := .venv/build.stamp
# A test process on each core, up to four: each takes a gigabyte, and some tests start processes themselves. "logical",
# because two cores of a virtual machine may count as one physical core. The tests of a file stay together, because many
# share what they compile or compute.
PYTEST := $(BIN)/python -m pytest -n logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder
# NO_MKDOCS_2_WARNING: MkDocs 1.6 is pinned, so a page of advertising in every output helps nobody.
MKDOCS := NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs
HAS_MKDOCS = $(BIN)/python -c "import mkdocs" 2>/dev/null || \
	{ echo "npc_ext: the manual needs Python 3.11 or newer: make clean, then make PYTHON=python3.11 docs" >&2; exit 1; }
CHECK_FORMAT := $(filter true,$(CI))
NATIVE = $(shell find csrc tests bench -name '*.h' -o -name '*.cpp' -o -name '*.cu')
SOURCES := setup.py pyproject.toml npc_ext/kernels/build.py npc_ext/kernels/compilers.py $(shell find csrc -type f)

.PHONY: demo test test-fast bench docs docs-serve lint clean
.DELETE_ON_ERROR:

demo: $(BUILD)
	@$(BIN)/python -m bench.continual.demo

test: $(BUILD)
	@$(PYTEST)

test-fast: $(BUILD)
	@$(PYTEST) -m "not slow"

bench: $(BUILD)
	@$(BIN)/python -m bench.micro

docs: $(BUILD)
	@$(HAS_MKDOCS)
	@$(MKDOCS) build

docs-serve: $(BUILD)
	@$(HAS_MKDOCS)
	@$(MKDOCS) serve --no-strict

lint: $(BUILD)
	@$(BIN)/ruff format $(if $(CHECK_FORMAT),--check) .
	@$(BIN)/ruff check .
	@$(BIN)/mypy
	@$(BIN)/clang-format $(if $(CHECK_FORMAT),--dry-run -Werror,-i) $(NATIVE)

clean:
	rm -rf .venv build dist site *.egg-info npc_ext/_C.* npc_ext/csrc

$(REQUIREMENTS): requirements.txt tools/bootstrap.py
	@command -v $(PYTHON) >/dev/null || { echo "npc_ext: no program named '$(PYTHON)'; install Python 3.10 or newer, or name it: make PYTHON=/path/to/python3" >&2; exit 1; }
	@$(PYTHON) tools/bootstrap.py requirements

$(BUILD): $(REQUIREMENTS) $(SOURCES)
	@$(BIN)/python tools/bootstrap.py build
