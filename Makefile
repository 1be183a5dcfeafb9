# Every target sets itself up: `make test` on a fresh machine is enough.
# PYTHON picks the interpreter of the virtual environment (3.10 to 3.13): make test PYTHON=python3.12

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
# The exact version that is tested. A looser request may resolve to another build and fetch gigabytes.
TORCH := torch==2.13.0
PIP_INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check
# Two processes fit the two cores of a small CI machine; torch and the emulator bring threads of their own.
PYTEST := $(BIN)/python -m pytest -n 2
FAST := not slow and not gpu and not fa4

.PHONY: help test demo lint format slow fa4 clean

help: ## list the targets
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/make \1\t\2/p' Makefile

test: $(INSTALLED) lint ## lint, then every test that needs no GPU and ends in seconds
	$(PYTEST) -m '$(FAST)'

demo: $(INSTALLED) ## attention over a small video made from a photograph, with pictures in .demo/
	$(BIN)/fgattn demo

lint: $(INSTALLED) ## ruff: errors and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(INSTALLED) ## let ruff repair what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

slow: $(INSTALLED) ## the long tests
	$(PYTEST) -m 'slow and not gpu and not fa4'

fa4: $(INSTALLED) ## FlashAttention-4's Hopper kernels on the emulator; installs flash-attn-4
	$(PIP_INSTALL) --no-deps flash-attn-4==4.0.0b36 quack-kernels==0.6.5 einops torch-c-dlpack-ext
	$(PYTEST) -m fa4

bench: $(INSTALLED) ## what can be measured without a GPU: host overhead, compile times, kernels' figures
	$(BIN)/python -m perf.host --compile
	$(BIN)/python -m perf.gate
	$(BIN)/python -m perf.static

# A machine that can download nothing sets GPU_PYTHON to an interpreter with torch and the runtime wheels; no
# environment is made then. docs/performance.md says how to bring wheels and kernels along.
GPU_PYTHON ?= $(BIN)/python
GPU_MINUTES ?= 20

gpu: $(if $(filter $(BIN)/python,$(GPU_PYTHON)),$(INSTALLED)) ## on a Hopper: tests, tuner, benchmarks, pictures; 20 minutes
	$(GPU_PYTHON) -m perf.gpu --minutes $(GPU_MINUTES)

clean: ## remove what the other targets made
	rm -rf $(VENV) .demo .gpu-results build *.egg-info .pytest_cache .ruff_cache .hypothesis

$(INSTALLED): pyproject.toml Makefile
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; (3, 10) <= v <= (3, 13) or \
	  sys.exit("fgattn_cute needs Python 3.10 to 3.13, $(PYTHON) is %d.%d: make PYTHON=/path/to/another" % v)'
	@echo "installing into $(VENV), once; torch and the CUTLASS DSL take a minute or a few"
	$(PYTHON) -m venv $(VENV)
	$(PIP_INSTALL) '$(TORCH)'
	$(PIP_INSTALL) --editable '.[cli,perf,demo,diffusers,dev]'
	@touch $@
