# `make demo` and `make test` need Python 3.11, for which the pins are, and, for the optional TensorRT
# plugin, a C++ compiler, CMake and nvcc.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

MODEL := smollm2-135m
DEMO := build/demo/$(MODEL)
PROMPT := What is the capital of France? Answer in one sentence.

.DEFAULT_GOAL := help
.PHONY: help venv headers demo test test-heavy test-faults test-gated lint clean

help:
	@echo "make demo        compile $(MODEL) to W8A8, measure it, let it speak (starts from what is there)"
	@echo "make test        the test suite"
	@echo "make test-heavy  what it leaves out for its time: more engines of $(MODEL), and W4A16"
	@echo "make test-faults kills, full disks, processes at once, mutations, signals: an hour"
	@echo "make test-gated  Gemma-3-270M in half and W8A8; you accept https://ai.google.dev/gemma/terms"
	@echo "make lint        ruff and mypy"
	@echo "make clean       remove $(VENV) and build/"

venv: $(INSTALLED)

# Written last: an interrupted installation is done again.
$(INSTALLED): pyproject.toml constraints.txt
	test -x $(BIN)/python || "$(PYTHON)" -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check \
	    --constraint constraints.txt --editable ".[compile,rtx,plugin,test,dev]"
	touch $@

# TensorRT's headers let the plugin be compiled where nvcc is; without them the engine is built from the
# sink ops' function bodies, and the plugin's tests are skipped.
headers: $(INSTALLED)
	@$(BIN)/python tools/fetch_trt_headers.py || echo "going on without TensorRT's headers: no plugin"

# The bundle appears whole or not at all, so the manifest is as good as a stamp. The other graphs are
# kept beside it for `eval`, which would make them again.
$(DEMO)/manifest.json: | $(INSTALLED) headers
	$(BIN)/iq-export compile $(MODEL) $(DEMO) --recipe w8a8 --target rtx-ampere --keep-work

build/demo/boolq.txt: | $(INSTALLED)
	$(BIN)/python tools/fetch_boolq.py --output $@

# `eval` writes its table into the manifest, hence a stamp of its own.
build/demo/evaluated: $(DEMO)/manifest.json build/demo/boolq.txt
	$(BIN)/iq-export eval $(DEMO) --text build/demo/boolq.txt
	touch $@

demo: build/demo/evaluated
	$(BIN)/iq-export inspect $(DEMO)
	$(BIN)/iq-export run $(DEMO) --prompt "$(PROMPT)"

test: $(INSTALLED) headers
	$(BIN)/python -m pytest -m "not heavy" --numprocesses 2 --no-loadscope-reorder

test-heavy: $(INSTALLED) headers
	$(BIN)/python -m pytest -m heavy

test-faults: $(INSTALLED)
	$(BIN)/python -m tests.faults --minutes 60

# 238 MB to download, 5 GB of memory. Running it accepts the model's terms.
test-gated: $(INSTALLED)
	IQ_EXPORT_ACCEPT_TERMS=gemma3-270m $(BIN)/python -m pytest tests/cli/test_gated_heavy.py

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) build
