# `make demo` and `make test` set everything up; they need only Python 3.11+, pip and make.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
RUN := runs/demo

.PHONY: demo test parity lint format clean

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.demo: $(BIN)/python pyproject.toml constraints.txt
	$(PIP) -e '.[demo]'
	touch $@

$(VENV)/.dev: $(BIN)/python pyproject.toml constraints.txt
	$(PIP) -e '.[dev]'
	touch $@ $(VENV)/.demo

# A stopped demo goes on and a finished one is shown again; `make clean` begins anew.
demo: $(VENV)/.demo
	$(BIN)/python examples/smollm2/base.py
	@if [ -f $(RUN)/config.json ]; then $(BIN)/evomerge resume $(RUN); else $(BIN)/evomerge search $(RUN).yaml; fi

test: lint
	$(BIN)/python examples/smollm2/base.py
	$(BIN)/python -m pytest

# Many more random recipes than `make test` draws, of every method, through mergekit and through us.
parity: $(VENV)/.dev
	EVOMERGE_PARITY=$${EVOMERGE_PARITY:-25} $(BIN)/python -m pytest tests/parity

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) $(RUN)
