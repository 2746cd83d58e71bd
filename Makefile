# make demo: set up, search a cell on the embedded digits, train the network that it makes
# make check: set up, lint, and the tests that are quick and start no process: for daily work
# make test: set up, run all tests          make lint: ruff, ty          make clean: remove what make made
# make oldest: the tests of make check, with the oldest versions that requirements*.txt allow; Python 3.11 or 3.12

PYTHON ?= python3
BIN := .venv/bin

# The demo: two to four minutes after the set-up. A search settles within this time only if it is small and its alphas
# learn fast: cells of two nodes, three candidates, and a learning rate of 0.01, 33 times the default. Of the seeds 1
# to 10 six settled (docs/demo.json), the default one among them. The eigenvalue would add a minute.
SEARCH ?= --epochs 50 --layers 3 --init-channels 8 --nodes 2 --alpha-lr 0.01 --eigenvalue-images 0 \
	--primitives max_pool_3x3,skip_connect,sep_conv_3x3
AUGMENT ?= --epochs 20 --layers 5 --init-channels 16 --batch-size 64

.PHONY: setup setup-dev demo check test oldest lint clean

setup: .venv/ready
setup-dev: .venv/ready-dev

.venv/ready: requirements.txt setup.sh
	PYTHON=$(PYTHON) ./setup.sh requirements.txt
	touch $@

.venv/ready-dev: .venv/ready requirements-dev.txt requirements-export.txt
	PYTHON=$(PYTHON) ./setup.sh requirements-dev.txt
	touch $@

.venv-oldest/ready: requirements.txt requirements-dev.txt requirements-export.txt setup.sh
	mkdir -p .venv-oldest
	sed -n 's/^\([^ #]*\)>=/\1==/p' requirements*.txt >.venv-oldest/constraints.txt
	PYTHON=$(PYTHON) VENV=.venv-oldest PIP_CONSTRAINT=.venv-oldest/constraints.txt ./setup.sh requirements-dev.txt
	touch $@

demo: setup
	$(BIN)/python search.py --name demo --overwrite --print-freq 4 $(SEARCH)
	$(BIN)/python augment.py --name demo --overwrite --genotype runs/search/demo $(AUGMENT)
	@echo
	@echo "the searched cell  runs/search/demo/genotype.json, drawn in runs/search/demo/plots/"
	@echo "the results        runs/search/demo/summary.json and runs/augment/demo/summary.json"
	@echo "the curves         $(BIN)/tensorboard --logdir runs"

QUICK := -m pytest -q -n 2 --dist worksteal -m "not process and not long and not slow"

check: lint
	OMP_NUM_THREADS=1 $(BIN)/python $(QUICK)

oldest: .venv-oldest/ready
	OMP_NUM_THREADS=1 .venv-oldest/bin/python $(QUICK)

test: setup-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

lint: setup-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/ty check --quiet

clean:
	rm -rf .venv .venv-oldest runs/search/demo runs/augment/demo .pytest_cache .ruff_cache
