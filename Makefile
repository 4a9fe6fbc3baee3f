# make demo         merge tokens in the sample pipeline: pictures, clusters and a small table in demo/
#                   (2 minutes)
# make demo-full    measure Fréchet distances of three methods; writes tables, plots and pictures to
#                   demo/full (480 pictures)
# make test         run the default test suite
# make test-slow    run the slow tests
# make test-faults  run the fault tests only: kills, Ctrl-C, damage, full disks (6 minutes)
# make test-oldest  run the tests of patching, sampling, the sample pipeline and the command line with the
#                   oldest versions that pyproject.toml allows, in .venv-oldest
# make lint         run ruff and mypy
# make wheel        build the sdist and the wheel in dist/
# make test-wheel   install the wheel in an environment without the checkout, and use it
# make format       format and fix with ruff
# make docs         build the documentation site in site/; fails at a broken link
# make tour         execute docs/tour.ipynb, and draw the methods' clusters for the documentation
# make bench        measure clustering, self-attention, torch.compile and the time of denoising on this
#                   machine; adds rows to docs/benchmarks/ (half an hour)
# make clean        remove .venv, .venv-oldest, demo/, build files and caches
# Each of these except clean first sets up .venv if it is missing or its requirements changed.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
OLDEST := .venv-oldest
DOCS_READY := $(VENV)/.docs-ready

CORES := $(shell $(PYTHON) -c "import os; print(len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count())")
export OMP_NUM_THREADS ?= $(CORES)

DEMO := demo
DEMO_IMAGES_PER_CLASS ?= 4
DEMO_REFERENCES_PER_CLASS ?= 40

.PHONY: help demo demo-full test test-slow test-faults test-oldest wheel test-wheel lint format docs tour bench clean
.DEFAULT_GOAL := help

help:
	@sed -n '/^#/!q; s/^# \{0,1\}//p' $(firstword $(MAKEFILE_LIST))

demo: $(READY)
	$(BIN)/sd-tokenmerge demo --out $(DEMO)

demo-full: $(READY)
	$(BIN)/python scripts/render_sample_world.py --out $(DEMO)/full/reference \
		--images-per-class $(DEMO_REFERENCES_PER_CLASS)
	$(BIN)/sd-tokenmerge sweep \
		--methods "atc:linkage=average tome-sd random" --keep-rates "100%,70%,50%,40%" \
		--images-per-class $(DEMO_IMAGES_PER_CLASS) --batch-size 4 \
		--reference $(DEMO)/full/reference --extractor efficientnet-lite0 \
		--cache $(DEMO)/full/cache --out $(DEMO)/full/sweep
	@echo "The table is above; see also $(DEMO)/full/sweep: distance.png, contact_sheet.jpg, side_by_side.png"

# one process per core, one thread each: the tensors are tiny, and results are reproducible
test: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses $(CORES)

test-slow: $(READY)
	$(BIN)/python -m pytest -m slow --timeout=1800

# one thread for each of the processes that the tests start
test-faults: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slow --timeout=600 \
		tests/sampling/test_faults.py tests/sweep/test_faults.py

test-oldest: $(OLDEST)/.ready
	OMP_NUM_THREADS=1 $(OLDEST)/bin/python -m pytest --numprocesses $(CORES) tests/patching \
		tests/sampling tests/cli tests/test_samples.py tests/test_first_minutes.py

wheel: $(READY)
	$(BIN)/python -m hatchling build

test-wheel: $(READY)
	$(BIN)/python -m pytest -m slow --timeout=1800 tests/test_wheel.py

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(DOCS_READY)
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --quiet --strict

# not `jupyter execute`, which stores when each cell ran
tour: $(READY)
	$(BIN)/python -c "import nbformat, nbclient; tour = nbformat.read('docs/tour.ipynb', 4); \
		nbclient.NotebookClient(tour, record_timing=False, resources={'metadata': {'path': 'docs'}}).execute(); \
		nbformat.write(tour, 'docs/tour.ipynb')"
	$(BIN)/python scripts/draw_methods.py

bench: $(READY)
	$(BIN)/python scripts/bench.py clustering
	$(BIN)/python scripts/bench.py unet --part self-attention --cases sd15-512 --minutes 8
	$(BIN)/python scripts/bench.py compile
	$(BIN)/python scripts/bench.py quality --part time --minutes 5
	$(BIN)/python scripts/render.py

clean:
	rm -rf $(VENV) $(OLDEST) $(DEMO) build dist site .cache *.egg-info .pytest_cache .mypy_cache .ruff_cache

# pinned torch first: an unpinned one may bring several GB of CUDA libraries
$(READY): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@

$(DOCS_READY): $(READY)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[docs]"
	touch $@

# every lower bound of pyproject.toml as a pin, except torch's: its pin is that of constraints.txt
$(OLDEST)/.ready: pyproject.toml constraints.txt
	test -x $(OLDEST)/bin/python || $(PYTHON) -m venv $(OLDEST)
	grep '^torch==' constraints.txt > $(OLDEST)/pins.txt
	sed -n '/"torch>=/d; s/^  "\(.*\)>=\([0-9.]*\)[";].*/\1==\2/p' pyproject.toml >> $(OLDEST)/pins.txt
	$(OLDEST)/bin/python -m pip install --quiet --constraint $(OLDEST)/pins.txt torch
	$(OLDEST)/bin/python -m pip install --quiet --constraint $(OLDEST)/pins.txt --editable ".[dev]"
	touch $@
