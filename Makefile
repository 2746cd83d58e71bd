# make demo: set up, search a cell on the embedded digits, train what was found    make test: set up, run the tests
# make lint: ruff                                                                  make clean: remove what make made

PYTHON ?= python3
BIN := .venv/bin

# The demo's size: three to ten minutes on two CPU cores. The search network is the default one.
SEARCH ?= --epochs 8
AUGMENT ?= --epochs 30 --layers 8 --init-channels 16 --batch-size 64

.PHONY: setup demo test lint clean

setup: .venv/ready

.venv/ready: requirements.txt setup.sh
	PYTHON=$(PYTHON) ./setup.sh

demo: setup
	$(BIN)/python search.py --name demo --overwrite --print-freq 4 $(SEARCH)
	$(BIN)/python augment.py --name demo --overwrite --genotype runs/search/demo $(AUGMENT)
	@echo
	@echo "the found cell     runs/search/demo/genotype.json, drawn in runs/search/demo/plots/"
	@echo "the results        runs/search/demo/summary.json and runs/augment/demo/summary.json"
	@echo "the curves         $(BIN)/tensorboard --logdir runs"

test: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

clean:
	rm -rf .venv runs/search/demo runs/augment/demo .pytest_cache .ruff_cache
