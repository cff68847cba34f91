# Development commands of this project; `make help` lists them.
.DEFAULT_GOAL := help
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed

.PHONY: help install demo serve test soak test-docker test-ray test-cluster test-slow mutants attack audit docs check format train clean weights up down logs

help: ## list these targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

install: $(STAMP) ## install everything into .venv

$(STAMP): pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || { echo "flux2: $(PYTHON) was not found; install Python 3.11 or newer, or set PYTHON=..."; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "flux2: $(PYTHON) is older than 3.11; set PYTHON=... to a newer one"; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { echo "flux2: $(PYTHON) has no module venv; install it (Debian: apt install python3-venv)"; exit 1; }
	@echo "installing into .venv (once)"
	@$(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

# Each extra has its own venv on top of .venv, so that it does not change the environment of `make test`.
.venv-%/.installed: $(STAMP)
	@echo "installing the extra $* into .venv-$* (once)"
	@$(BIN)/python -m venv .venv-$*
	@.venv-$*/bin/python tests/layered_venv.py $(BIN)/python
	@.venv-$*/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[$*]'
	@touch $@

demo: install ## generate one image in five cache modes with the demo model, on any machine
	@$(BIN)/python -m demo_model.demo

serve: install ## run both services with the demo model until Ctrl-C
	@$(BIN)/python -m demo_model.serve

test: install ## run the test suite, in two processes
	@$(BIN)/python -m pytest -q -n 2 --dist worksteal -m "not docker and not cluster and not slow"

soak: install ## run the long versions of tests/threats (most of an hour)
	@$(BIN)/python -m pytest -q -s --soak tests/threats

test-docker: install ## test the containers; needs a Docker engine
	@$(BIN)/python -m pytest -q -m docker tests/docker

test-ray: .venv-ray/.installed ## run the tests that need Ray but no cluster
	@.venv-ray/bin/python -m pytest -q tests/deploy tests/test_kubernetes.py

test-cluster: .venv-ray/.installed ## test both services on a simulated Ray cluster whose nodes are killed
	@.venv-ray/bin/python -m pytest -q -s -m cluster tests/cluster

test-slow: .venv-quantization/.installed ## run the slow tests: compilation, 8-bit weights, and all benchmarks at a tiny size
	@.venv-quantization/bin/python -m pytest -q -m slow

mutants: install ## mutation testing: the tests must detect each mutant (up to half an hour)
	@$(BIN)/python -m tests.mutants

attack: install ## attack both services with the demo model: one line with the figures each (up to 15 minutes)
	@$(BIN)/python -m tests.attacks $(WORD)

audit: .venv-audit/.installed ## look the pinned packages up in an advisory database, if one can be reached
	@.venv-audit/bin/python tests/audit.py

docs: .venv-docs/.installed ## build the documentation into site/; broken links are errors
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

format: install ## format the code
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

train: install ## train the demo model from scratch (hours on two cores)
	$(BIN)/python -m demo_model.train

weights: ## download FLUX.2 [dev] into the Docker volume; resumes an interrupted download
	docker compose run --rm weights

up: ## start both services on the GPUs with Docker Compose, and wait until they are ready
	docker compose up --detach --wait

down: ## stop and remove the containers; volumes are kept
	docker compose --profile '*' down

logs: ## follow the logs of the containers
	docker compose --profile '*' logs --follow --tail 100

clean: ## remove everything that these targets created
	rm -rf .venv .venv-audit .venv-docs .venv-ray .venv-quantization site demo-output .mypy_cache .ruff_cache .pytest_cache .hypothesis
