# Targets: setup, serve-only, demo, docs, test, test-slow, test-browser, test-real, test-vllm, results, results-real, lint, audit,
# wheel, clean. All work in .venv, which the first of them creates.
#
# make demo MODEL=model.gguf TEXT=my/files OUT=folder    the main job, on your own model and text
# make test ARGS="-k identity -x"       options for pytest
# make setup GPU=1                      vLLM's CUDA build instead of the pinned CPU set; .venv remembers which it holds
# make setup PYTHON=/path/to/python3.12 another Python than the first of 3.11, 3.12 and 3.13 that runs; .venv remembers it
# make setup TORCH_INDEX=address        where torch's CPU build stands, if pip does not find it by itself
# make setup VENV=folder                another environment than .venv

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := setup

VENV := .venv
$(if $(word 2,$(VENV)),$(error VENV=$(VENV): make takes no spaces here))
BIN := $(VENV)/bin
GPU ?= $(if $(wildcard $(VENV)/.deps-gpu),1,0)
KIND := $(if $(filter-out 0,$(GPU)),gpu,cpu)
WORKERS ?= 2
# PyTorch's own index of CPU builds: PyPI has builds for CUDA only, except for macOS.
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu

# Running each passes over version managers' stand-ins that do not run.
VERSION := import sys; print("%d.%d" % sys.version_info[:2])
PYTHON ?= $(shell for python in $(BIN)/python python3.11 python3.12 python3.13 python3; do \
	case $$($$python -c '$(VERSION)' 2>/dev/null) in (3.11|3.12|3.13) echo $$python; break;; esac; done)

.PHONY: deps setup serve-only demo docs test test-slow test-browser test-real test-vllm results results-real lint audit wheel
.PHONY: clean anew

deps: $(VENV)/.deps-$(KIND)
setup: $(VENV)/.setup-$(KIND)

# Another Python was asked for than the environment has.
ifneq ($(origin PYTHON),file)
ifneq ($(shell "$(BIN)/python" -c '$(VERSION)' 2>/dev/null),$(shell "$(PYTHON)" -c '$(VERSION)' 2>/dev/null))
$(VENV)/.deps-$(KIND): anew
endif
endif

define suitable
	@version=$$("$(PYTHON)" -c '$(VERSION)' 2>/dev/null) || version="no Python that runs"; \
	case "$$version" in (3.11|3.12|3.13) ;; (*) \
		echo "Loopwise needs Python 3.11, 3.12 or 3.13, and $(or $(PYTHON),python3) is $$version:" \
			"name one with PYTHON=/path/to/python3.11" >&2; exit 1;; esac
endef

# An environment that is only out of date is brought up to date. One that is half-made, of the other kind or of another
# Python is made anew. The marker goes in first and the stamp last, so that a setup killed in between is never taken
# for a finished one. The Python that makes it is the base, as the one that was named may stand in the environment itself.
define environment
	$(suitable)
	@if [ -z "$(wildcard $(VENV)/.deps-* $(VENV)/.unfinished)" ] && [ -n "$$(ls -A $(VENV) 2>/dev/null)" ]; then \
		echo "$(VENV) is there, but make setup did not make it: remove it, or name another with VENV=" >&2; exit 1; fi
	@base=$$("$(PYTHON)" -c 'import sys; print(sys._base_executable)'); \
	kept=$$("$(BIN)/python" -c '$(VERSION)' 2>/dev/null || true); \
	if [ ! -e $@ ] || [ -e $(VENV)/.unfinished ] || [ "$$kept" != "$$("$$base" -c '$(VERSION)')" ]; then fresh=1; fi; \
	mkdir -p $(VENV); touch $(VENV)/.unfinished; rm -f $(VENV)/.deps-* $(VENV)/.setup-*; \
	if [ -n "$${fresh:-}" ]; then \
		find $(VENV)/ -mindepth 1 -maxdepth 1 ! -name .unfinished -exec rm -rf {} +; fi; \
	echo "$$base -m venv $(VENV)"; "$$base" -m venv $(VENV)
endef

# torch goes in first and by itself, so that nothing else is taken from PyTorch's index, whose hashes no lock has.
define torch
	@grep '^torch==' constraints.txt > $(1)/torch.txt; \
	pip="$(1)/bin/pip install --no-deps -r $(1)/torch.txt"; echo "$$pip"; \
	$$pip 2>/dev/null || { echo "$$pip --index-url $(TORCH_INDEX)"; $$pip --index-url "$(TORCH_INDEX)"; } || { \
		echo "torch's CPU build is neither where pip looks by itself nor at $(TORCH_INDEX): check the network, or name" \
			"an index that has it with TORCH_INDEX=address" >&2; exit 1; }
	$(call setuptools,$(1),cpu)
endef

# setuptools of the lock $(2), by its hashes: it builds the few packages that have no wheel.
define setuptools
	@sed -n '/^setuptools==/,/[^\\]$$/p' supply/$(2).txt > $(1)/setuptools.txt
	$(1)/bin/pip install --no-deps --require-hashes -r $(1)/setuptools.txt
endef

# Runs pip; where it fails, the last line says what to do.
define install
	@echo "$(1)"; $(1) || { \
		echo "Not every package could be installed, pip says why above: the same make again begins anew" >&2; exit 1; }
endef

# The packages of a lock, each file by its hash.
locked = $(call install,$(BIN)/pip install --no-deps --no-build-isolation --require-hashes -r supply/$(1).txt)

$(VENV)/.deps-cpu: constraints.txt supply/cpu.txt
	$(environment)
	$(call torch,$(VENV))
	$(call locked,cpu)
	@touch $@ && rm $(VENV)/.unfinished

$(VENV)/.deps-gpu: supply/gpu.txt
	$(environment)
	$(call setuptools,$(VENV),gpu)
	$(call locked,gpu)
	@touch $@ && rm $(VENV)/.unfinished

# The part of the CPU set that serving needs: the image `serve`.
$(VENV)/.deps-serve: constraints.txt supply/serve.txt
	$(environment)
	$(call torch,$(VENV))
	$(call locked,serve)
	@touch $@ && rm $(VENV)/.unfinished

$(VENV)/.setup-$(KIND): pyproject.toml $(VENV)/.deps-$(KIND)
	$(BIN)/pip install --no-deps --no-build-isolation -e .
	@touch $@

serve-only: $(VENV)/.deps-serve
	$(BIN)/pip install --no-deps --no-build-isolation -e .

# The values reach the command through the environment, so that a path may hold spaces and quotes.
demo: setup
	$(BIN)/python -m loopwise.demo \
		$(if $(MODEL),--model "$$MODEL") $(if $(TEXT),--text "$$TEXT") $(if $(OUT),--out "$$OUT")

# The documentation's site, in build/site. Its reference is written from the code; a warning is an error.
docs: setup
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict
	@echo "to read it: $(BIN)/python -m http.server --directory build/site 8001"

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/codespell
	$(BIN)/pyright
	$(BIN)/pyright -p pyright-strict.json

test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadgroup $(ARGS)

# What takes minutes a test: every launcher, many kills.
test-slow: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadgroup -m slow $(ARGS)

# The page of `loopwise serve` in headless Chromium, such as Debian's (apt-get install chromium). CHROMIUM=path names another.
CHROMIUM ?= $(shell command -v chromium || command -v chromium-browser || command -v google-chrome)
test-browser: setup
	@test -x "$(CHROMIUM)" || { \
		echo "no Chromium here: apt-get install chromium, or name one with CHROMIUM=path" >&2; exit 1; }
	LOOPWISE_BROWSER="$(CHROMIUM)" OMP_NUM_THREADS=1 \
		$(BIN)/python -m pytest -m slow tests/serve/vllm/test_browser.py $(ARGS)

# What runs on a real model, SmolLM2-135M-Instruct: downloaded once into the user's cache, or LOOPWISE_SMOLLM2=its.gguf.
test-real: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile -m real $(ARGS)

# The names of vLLM that Loopwise relies on, looked up in the wheel of another release, which is downloaded and never run.
VLLM ?= 0.33.0
WHEEL := build/vllm-$(VLLM)
test-vllm: setup
	[ -e $(WHEEL) ] || $(BIN)/pip download --no-deps --only-binary=:all: --platform=manylinux_2_28_x86_64 --dest=$(WHEEL) vllm==$(VLLM)
	LOOPWISE_VLLM_WHEEL=$$(echo $(WHEEL)/*.whl) $(BIN)/python -m pytest -m "slow or not slow" tests/serve/vllm/test_releases.py $(ARGS)

# docs/results.md: (b) to (e) on small models, under two hours of two quiet cores. Killed, the same command goes on.
results: setup
	$(BIN)/python -m bench.results $(ARGS)

# (a) on SmolLM2-135M, for hours. `python -m bench.gained` makes (f) on a GPU, and says how its files get into the page.
results-real: setup
	$(BIN)/python -m bench.results real $(ARGS)

# Locks, licences and the wheel's bytes by tests; bills of materials into build/sbom; known advisories. Where no database of
# these can be reached, a line says so, and NEED=1 makes it an error.
AUDIT := .venv-audit
audit: setup $(AUDIT)/.setup
	$(BIN)/python -m pytest -q tests/test_supply.py
	$(BIN)/python -m supply.sbom build/sbom
	$(AUDIT)/bin/python -m supply.advisories $(if $(NEED),--need)

$(AUDIT)/.setup: supply/tools.txt
	$(suitable)
	"$(PYTHON)" -m venv --clear $(AUDIT)
	$(AUDIT)/bin/pip install --no-deps --require-hashes -r supply/tools.txt
	@touch $@

# The source distribution first, then the wheel from it: each shows that the other is whole. Dates of files are those of the
# commit, so that the same commit gives the same bytes.
SOURCE_DATE_EPOCH ?= $(shell git log -1 --format=%ct 2>/dev/null || echo 315532800)
wheel: setup
	SOURCE_DATE_EPOCH=$(SOURCE_DATE_EPOCH) $(BIN)/python -m build --no-isolation --outdir dist

# Build products and caches only: not .venv, and never what the demo or a training run wrote.
clean:
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find $(wildcard loopwise convert train serve evaluation recipes tests bench) -name __pycache__ -prune -exec rm -rf {} +
