# Two commands for a fresh clone: `make demo` and `make test`. Both make the environment in .venv.
# PYTHON chooses the interpreter, PIP_ARGS is handed to pip (the README says when a CPU-only
# machine wants it).
PYTHON ?= $(shell command -v python3.11 || command -v python3)
PIP_ARGS ?=
BIN := .venv/bin

.PHONY: demo test slow check env clean
.DEFAULT_GOAL := demo

env: .venv/.installed

.venv/.installed: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "error: $(PYTHON) is older than Python 3.11; try make PYTHON=python3.12" >&2; exit 3; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install $(PIP_ARGS) --progress-bar off -e '.[test]'
	@touch $@

# Trains the default model (about two minutes on two cores), samples from it, and compares three
# mixers on a small recall task.
demo: env
	$(BIN)/glactl train
	$(BIN)/glactl generate --prompt "The built-in function " --max-tokens 200 --temperature 0.7
	$(BIN)/glactl mqar --dims 64 --out sweeps/demo

# One torch thread a worker: two workers on two cores slow each other down several times otherwise.
test: env check
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 -m "not slow and not gpu"

slow: env
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 -m "slow and not gpu"

check: env
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf .venv build dist *.egg-info
