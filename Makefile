# The only door to this project: `make help` lists what it can do.
.DEFAULT_GOAL := help
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed

.PHONY: help install demo serve test soak test-docker test-ray test-cluster test-slow mutants docs check format train clean weights up down logs

help: ## list these targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

install: $(STAMP) ## install everything into .venv

$(STAMP): pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || { echo "flux2: $(PYTHON) was not found: install Python 3.11 or newer, or set PYTHON=..."; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "flux2: $(PYTHON) is older than 3.11: set PYTHON=... to a newer one"; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { echo "flux2: $(PYTHON) has no venv: install it (Debian: apt install python3-venv)"; exit 1; }
	@echo "installing into .venv (once)"
	@$(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

# An extra has a venv of its own, which sees what .venv has: what `make test` runs with never depends on what ran before.
.venv-%/.installed: $(STAMP)
	@echo "installing the extra $* into .venv-$* (once)"
	@$(BIN)/python -m venv .venv-$*
	@.venv-$*/bin/python tests/layered_venv.py $(BIN)/python
	@.venv-$*/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[$*]'
	@touch $@

demo: install ## make one picture in five cache modes, with the demo model, on any machine
	@$(BIN)/python -m demo_model.demo

serve: install ## run both services with the demo model until Ctrl-C
	@$(BIN)/python -m demo_model.serve

test: install ## run the test suite
	@$(BIN)/python -m pytest -q -m "not docker and not cluster and not slow"

soak: install ## the tests of tests/threats in their long forms (most of an hour)
	@$(BIN)/python -m pytest -q -s --soak tests/threats

test-docker: install ## run the containers for real, where a Docker engine can be reached
	@$(BIN)/python -m pytest -q -m docker tests/docker

test-ray: .venv-ray/.installed ## test what needs Ray, but no cluster
	@.venv-ray/bin/python -m pytest -q tests/deploy tests/test_kubernetes.py

test-cluster: .venv-ray/.installed ## run both services on a simulated Ray cluster, and kill its nodes
	@.venv-ray/bin/python -m pytest -q -s -m cluster tests/cluster

test-slow: .venv-quantization/.installed ## compile for real, compute in 8 bits, run every benchmark at a tiny size
	@.venv-quantization/bin/python -m pytest -q -m slow

mutants: install ## make mistakes in copies of the code, one at a time: the tests must notice each (half an hour at most)
	@$(BIN)/python -m tests.mutants

docs: .venv-docs/.installed ## build the site of the documents into site/, refusing broken links
	@NO_MKDOCS_2_WARNING=1 .venv-docs/bin/python -m mkdocs build --strict # --quiet would hide warnings from --strict

check: install ## format, lint, types, imports, dead code, spelling, words, Dockerfile
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/vulture
	$(BIN)/codespell
	$(BIN)/python -m tests.glossary
	$(BIN)/hadolint Dockerfile

format: install ## rewrite the code in the project's format
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

train: install ## train the demo model again from nothing (hours on two cores)
	$(BIN)/python -m demo_model.train

weights: ## fetch FLUX.2 [dev] into Docker's volume, once; goes on where it was interrupted
	docker compose run --rm weights

up: ## start both services on this machine's GPUs with Docker, and wait until they are ready
	docker compose up --detach --wait

down: ## stop and remove the containers; volumes stay
	docker compose --profile '*' down

logs: ## follow the containers' logs
	docker compose --profile '*' logs --follow --tail 100

clean: ## remove what these targets made
	rm -rf .venv .venv-docs .venv-ray .venv-quantization site demo-output .mypy_cache .ruff_cache .pytest_cache .hypothesis
