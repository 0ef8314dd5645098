# make figures | test | lab | setup.   MODEL=<name, folder or hub id> and SAMPLES=<questions> pass through to the notebooks.
PYTHON ?= python3
MODEL ?=
SAMPLES ?=
PYTEST_ARGS ?= -n 2 --dist loadfile

BIN := .venv/bin
STAMP := .venv/.installed
HERE := $(abspath .)

# Packages are compiled when first imported, into .venv; without this every kernel would compile them again.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: figures test lab setup
.DEFAULT_GOAL := figures

figures: $(STAMP)  ## run every notebook in order; figures go to figures/<model>/
	$(BIN)/python -m lvlm_utils.notebooks $(if $(MODEL),--model "$(MODEL)") $(if $(SAMPLES),--samples $(SAMPLES))

test: $(STAMP)  ## run the tests on both cores
	OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false $(BIN)/python -m pytest $(PYTEST_ARGS)

lab: $(STAMP)  ## open the notebooks
	$(BIN)/jupyter lab notebooks

setup: $(STAMP)  ## only build .venv

# Rebuilt whenever the pins change. Compiling all of it would double the time. The pins need their dependencies resolved: torch brings different ones for CPU and CUDA.
$(STAMP): requirements.txt pyproject.toml
	@echo "Building .venv from requirements.txt (torch is large; this takes minutes once)"
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --no-compile -r requirements.txt
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation -e "$(HERE)"
	touch $(STAMP)
