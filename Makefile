# The verbs of this repository. They need make, Python 3.11 or newer with venv, and a C++ compiler; the rest is fetched.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
MODEL ?= smol
KERNELS := $(wildcard runtimes/native/*.py runtimes/native/src runtimes/native/src/*)

.DELETE_ON_ERROR:
.PHONY: help picture run setup test lint types clean

help:
	@sed -n 's/^#: //p' $(MAKEFILE_LIST)

#: make run IMAGE=photo.jpg [PROMPT="What is this?"]   install what is missing, then answer about a picture
run: picture $(VENV)/run.native
	@$(BIN)/llava-edge info $(MODEL) >/dev/null 2>&1 || $(BIN)/llava-edge models pull --force $(MODEL)
	@$(BIN)/llava-edge run --model $(MODEL) --image "$$IMAGE" $${PROMPT:+--prompt "$$PROMPT"}

# Before minutes of installing, not after.
picture:
	@test -n "$$IMAGE" || { echo 'Say which picture: make run IMAGE=photo.jpg [PROMPT="What is this?"]' >&2; exit 2; }
	@test -f "$$IMAGE" || { echo "$$IMAGE does not exist." >&2; exit 66; }

#: make setup    .venv with everything for development
setup: $(VENV)/dev.native

#: make test     lint, types, then the fast tests
test: lint types
	@$(BIN)/python -m pytest -n 2 --dist loadfile

#: make lint     ruff
lint: setup
	@$(BIN)/ruff check .

#: make types    mypy --strict over package and tests
types: setup
	@$(BIN)/mypy

#: make clean    remove what the verbs above made in this folder
clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo 'Python 3.11 or newer is needed. Name one with make PYTHON=python3.12 ...' >&2; exit 69; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	  echo 'Python cannot make virtual environments. On Debian or Ubuntu: sudo apt-get install -y python3-venv' >&2; exit 69; }
	@$(PYTHON) -m venv $(VENV)

$(VENV)/run.done: $(BIN)/python setup.py scripts/install_llama_cpp.sh
	@scripts/install_llama_cpp.sh $(BIN)/python
	@$(BIN)/python -m pip install --editable '.[export]' >&2
	@touch $@

$(VENV)/dev.done: $(BIN)/python setup.py scripts/install_llama_cpp.sh
	@scripts/install_llama_cpp.sh $(BIN)/python
	@$(BIN)/python -m pip install --editable '.[dev]' >&2
	@touch $@

# What was built of other sources is not used. The folder is named for files that are gone.
$(VENV)/run.native $(VENV)/dev.native: $(VENV)/%.native: $(VENV)/%.done $(KERNELS)
	@$(BIN)/python -m llava_edge.runtimes.native || true
	@touch $@
