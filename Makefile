# Two commands on a fresh machine with Python 3.11-3.13, git and make: `make book` and `make test`.

PYTHON ?= python3
MODEL ?= smollm2-135m
# Of `make gpu`: which device, how much, how long, where to, and with which data (files; default the embedded facts).
DEVICE ?= cuda
SIZES ?= full
MINUTES ?= 12
OUT ?= runs/gpu
COUNTERFACT ?=
ZSRE ?=
TEXT ?=
VENV := .venv
BIN := $(VENV)/bin
BUILD := _build

# Installed once per content of the files that decide what is installed.
STAMP := $(VENV)/.installed-$(shell cat requirements.txt requirements-grid.txt pyproject.toml | cksum | tr ' ' '-')
NOTEBOOKS := $(wildcard notebooks/*.ipynb)
RUNS := $(NOTEBOOKS:notebooks/%=$(BUILD)/notebooks-run/%)
# Pages run side by side, as many as there are cores (or as `make -jN book` says), each with one thread: two threads
# of one page would wait for each other whenever the machine has something else to do.
CORES = $(shell getconf _NPROCESSORS_ONLN 2>/dev/null || echo 1)
SIDE_BY_SIDE = $(if $(filter -j%,$(MAKEFLAGS)),,-j$(CORES)) $(if $(filter output-sync,$(.FEATURES)),--output-sync=line)
SOURCES := $(shell find metake results -type f ! -name '*.pyc' ! -path 'results/verdicts/*' 2>/dev/null)

# Images of containers set this, and then every process compiles torch anew, an eighth of all that the tests take.
unexport PYTHONDONTWRITEBYTECODE

PYTEST := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

.DEFAULT_GOAL := help
.PHONY: help setup book pages html test processors torture browser pdf zip notebooks record fetch clean distclean gpu gpu-import grid

help:  ## this list
	@echo "make <target>"
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-11s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

setup: $(STAMP)  ## only install what the others need, into .venv

book: $(STAMP)  ## run every notebook at its default parameters, build the book, print where it is
	@$(MAKE) --no-print-directory $(SIDE_BY_SIDE) pages
	@$(MAKE) --no-print-directory html

pages: $(RUNS)

html: $(STAMP)  ## only build the book, from the committed outputs; a warning is an error
	@rm -rf $(BUILD)/html $(BUILD)/.doctrees
	$(BIN)/jupyter-book build . -W -n --keep-going --all
	@echo "The book: $(CURDIR)/$(BUILD)/html/index.html"

# Pages are tested with another instruction set than the one that computed them: what they print must not depend on it.
test: $(STAMP)  ## unit, contract and notebook tests
	$(PYTEST) tests --ignore tests/browser
	ATEN_CPU_CAPABILITY=default $(PYTEST) notebooks --nbval

processors: $(STAMP)  ## tests and pages under other instruction sets and orders of summation (ARGS="scalar -- notebooks --nbval")
	$(BIN)/python tools/processors.py $(ARGS)

torture: $(STAMP)  ## a quarter of an hour: 200 kills, 50,000 damaged files, sequences of actions, every method on every architecture, every mistake of tests/mutants.py (ARGS="--scale 0.1")
	OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 $(BIN)/python tools/torture.py $(ARGS)

browser: $(STAMP)  ## check every page of the built book in a headless Chromium (after `make html`)
	METAKE_BROWSER=required OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/browser -n 2 --dist loadgroup

pdf: $(STAMP)  ## the whole book as one PDF, printed by a headless Chromium
	@rm -rf $(BUILD)/singlehtml $(BUILD)/.doctrees
	$(BIN)/jupyter-book build . --builder singlehtml -W -n --keep-going --all
	$(BIN)/python tools/print_book.py $(BUILD)/singlehtml $(BUILD)/metake-book.pdf
	@echo "The PDF: $(CURDIR)/$(BUILD)/metake-book.pdf"

zip: html  ## the built book as one archive that needs neither server nor network: unpack, open index.html
	@rm -f $(BUILD)/metake-book.zip
	cd $(BUILD) && $(CURDIR)/$(BIN)/python -m zipfile -c metake-book.zip html
	@echo "The archive: $(CURDIR)/$(BUILD)/metake-book.zip"

notebooks: $(STAMP)  ## run the notebooks again and keep the new outputs, figures and verdicts
	$(BIN)/python tools/refresh.py

record: $(STAMP)  ## record the experiments on a real model into results/ (MODEL=smollm2-135m ARGS=...)
	$(BIN)/metake record --model "$(MODEL)" $(ARGS)
	$(BIN)/python tools/records.py

fetch: $(STAMP)  ## download the real model, check it, convert it (MODEL=smollm2-135m)
	$(BIN)/metake fetch "$(MODEL)"

# Nothing is installed: the Python of a machine that has torch for its GPU is the one to take. MODEL is a folder here,
# and its default, a name that needs a network, is left out.
gpu:  ## the first hour on a GPU in one folder, with PYTHON as it is (OUT=runs/gpu MINUTES=12 MODEL=folder DEVICE=cpu SIZES=tiny)
	$(PYTHON) tools/gpu.py --device "$(DEVICE)" --sizes "$(SIZES)" --minutes "$(MINUTES)" --out "$(OUT)" \
	  $(if $(filter-out file,$(origin MODEL)),--model "$(MODEL)") $(if $(COUNTERFACT),--counterfact "$(COUNTERFACT)") \
	  $(if $(ZSRE),--zsre "$(ZSRE)") $(if $(TEXT),--text "$(TEXT)") $(ARGS)

gpu-import: $(STAMP)  ## what `make gpu` wrote on another machine, into results/ (FOLDER=runs/gpu)
	$(BIN)/python tools/gpu.py --take "$(or $(FOLDER),$(OUT))"
	$(BIN)/python tools/records.py

clean:  ## remove what was built
	rm -rf $(BUILD) build metake.egg-info .pytest_cache .hypothesis
	find metake tests tools book -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean  ## remove the virtual environment too
	rm -rf $(VENV)

# A run lands under its final name only when it has succeeded. Its figures and verdicts go to the build folder:
# the committed ones change only through `make notebooks`.
$(BUILD)/notebooks-run/%.ipynb: export METAKE_FIGURES = $(CURDIR)/$(BUILD)/figures
$(BUILD)/notebooks-run/%.ipynb: export METAKE_VERDICTS = $(CURDIR)/$(BUILD)/verdicts
$(BUILD)/notebooks-run/%.ipynb: export MPLBACKEND = agg
$(BUILD)/notebooks-run/%.ipynb: export TQDM_DISABLE = 1
$(BUILD)/notebooks-run/%.ipynb: export OMP_NUM_THREADS = 1
$(BUILD)/notebooks-run/%.ipynb: export MKL_NUM_THREADS = 1
$(BUILD)/notebooks-run/%.ipynb: notebooks/%.ipynb $(SOURCES) $(STAMP)
	@echo "running $<"
	@mkdir -p $(@D)
	@$(BIN)/python tools/run_page.py $< $@.part.ipynb
	@mv $@.part.ipynb $@

grid: $(STAMP)  ## the paper's grid of cells in small, as a rehearsal (book/grid.md; ARGS=... for snakemake)
	$(BIN)/snakemake --profile profiles/local $(ARGS)

# Not compiled beforehand: Python compiles what is imported, a small part, which halves the time of the installation.
$(STAMP):
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 11) <= v <= (3, 13) else "metake needs Python 3.11, 3.12 or 3.13, and $(PYTHON) is %d.%d. Name another: make PYTHON=python3.12 ..." % v)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check --quiet --upgrade pip
	@echo "Installing the pinned requirements; the first time this takes some minutes, most of them for torch."
	$(BIN)/python -m pip install --disable-pip-version-check --no-compile --requirement requirements.txt
	PYTHONWARNINGS=ignore $(BIN)/python -m pip install --disable-pip-version-check --quiet --no-build-isolation --no-deps --editable .
	@rm -f $(VENV)/.installed-*
	@touch $@
