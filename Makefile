# make demo   merge tokens in the embedded sample pipeline; pictures, a plot and a table in demo/
#             (a quarter of an hour on one CPU core)
# make test   the default test suite (add: make test-slow)
# make test-faults   the fault tests alone: kills, Ctrl-C, damages, full disks (6 minutes)
# make lint   ruff and mypy; make format corrects what ruff can
# make bench  measure this machine: clustering, self-attention, torch.compile; rows go to docs/ (half an hour)
# make clean  remove .venv, demo/ and caches
# Every target first sets up .venv when it is missing or pyproject.toml or constraints.txt changed.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

CORES := $(shell $(PYTHON) -c "import os; print(len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count())")
export OMP_NUM_THREADS ?= $(CORES)

DEMO := demo
DEMO_IMAGES_PER_CLASS ?= 4
DEMO_REFERENCES_PER_CLASS ?= 40

.PHONY: help demo test test-slow test-faults lint format bench clean
.DEFAULT_GOAL := help

help:
	@sed -n '/^#/!q; s/^# \{0,1\}//p' $(firstword $(MAKEFILE_LIST))

demo: $(READY)
	$(BIN)/python scripts/render_sample_world.py --out $(DEMO)/reference \
		--images-per-class $(DEMO_REFERENCES_PER_CLASS)
	$(BIN)/sd-tokenmerge sweep --model samples/pipeline \
		--methods "atc:linkage=average tome-sd random" --keep-rates "100%,70%,50%,40%" \
		--images-per-class $(DEMO_IMAGES_PER_CLASS) --batch-size 4 \
		--reference $(DEMO)/reference --extractor efficientnet-lite0 \
		--cache $(DEMO)/cache --out $(DEMO)/sweep
	@echo "The table is above; see also $(DEMO)/sweep: distance.png, contact_sheet.jpg, side_by_side.png"

# one thread: the tensors of the default suite are tiny, and results then repeat to the last bit
test: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest

test-slow: $(READY)
	$(BIN)/python -m pytest -m slow --timeout=1800

# each of its processes takes one thread
test-faults: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slow --timeout=600 \
		tests/sampling/test_faults.py tests/sweep/test_faults.py

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(READY)
	$(BIN)/python scripts/bench.py clustering
	$(BIN)/python scripts/bench.py unet --part self-attention --cases sd15-512 --minutes 8
	$(BIN)/python scripts/bench.py compile
	$(BIN)/python scripts/bench.py quality --part time --minutes 5
	$(BIN)/python scripts/render.py

clean:
	rm -rf $(VENV) $(DEMO) build *.egg-info .pytest_cache .mypy_cache .ruff_cache

# torch first and by its pin: an unpinned torch may bring several GB of CUDA libraries
$(READY): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@
