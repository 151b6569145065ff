# Everything starts here. `make pipeline` and `make test` do their own set-up.

PYTHON ?= python3.11
VENV   := .venv
BIN    := $(VENV)/bin
RECIPE ?= tiny
SEED   ?=
CONFIG ?=
TESTS  ?=

# Offline and quiet: nothing is looked up on a hub, no telemetry is sent.
export HF_HUB_OFFLINE ?= 1
export DO_NOT_TRACK := true
export PREFECT_SERVER_ANALYTICS_ENABLED := false
export MLFLOW_DISABLE_TELEMETRY := true

.PHONY: pipeline test server-test distributed-test slow-test cluster-test lint docs setup up down seeds recipes clean

INSTALLED := $(VENV)/.installed

pipeline: setup ## Run the full pipeline; CONFIG=mine.toml lays your settings over the recipe
	@$(BIN)/python -m flows --recipe $(RECIPE) $(if $(CONFIG),--config $(CONFIG)) $(if $(SEED),--seed $(SEED))

test: setup ## The fast tests: offline, on the CPU, 5 minutes on two cores; SERVERS=1 with those of server-test
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "not distributed and not slow$(if $(SERVERS),, and not servers)"

server-test: setup ## Flows, retries and cancelling on real servers of Prefect and MLflow
	$(BIN)/python -m pytest -m servers

distributed-test: setup ## Tests that start several processes: layouts, launchers, planted faults
	$(BIN)/python -m pytest -m distributed -rs $(TESTS)

slow-test: setup ## Tests that take minutes each: more processes, more kills
	$(BIN)/python -m pytest -m slow -rs --timeout 3600

cluster-test: setup ## Tasks and workers on a real Slurm and Ray of this host; says what to install for those it skips
	$(BIN)/python -m pytest tests/data/executors/test_slurm.py tests/data/executors/test_ray.py tests/launch/test_srun.py -rs

lint: setup ## Style, the order of imports, and types
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/lint-imports && $(BIN)/pyright

docs: setup ## The documentation site in build/site; warnings are errors
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

up: setup ## Start Prefect, a worker and MLflow on loopback, and register the deployments
	@$(BIN)/python -m flows.servers up

down: ## Stop what `make up` started
	@if [ -x $(BIN)/python ]; then $(BIN)/python -m flows.servers down; fi

seeds: setup ## The pipeline on three seeds, and the table over them
	$(BIN)/python -m tests.benchmarks.three_seeds

recipes: setup ## The four recipes of post-training on three seeds, and the table over them
	$(BIN)/python -m tests.benchmarks.four_recipes

setup: $(INSTALLED) ## Create .venv with the pinned packages; every other target does it first

# Plain pip: it takes a CPU build of torch 2.13.0 where one is on offer.
$(INSTALLED): pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || { echo "error: $(PYTHON) not found; install Python 3.11 or set PYTHON=..." >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch==2.13.0
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

clean: ## Delete the environment; the store in .lilpipe stays
	rm -rf $(VENV)
