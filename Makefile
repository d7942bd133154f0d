# Every target sets up the virtual environment by itself on a fresh clone.
#
#   RECIPE  recipe file                      make distill RECIPE=recipes/wiki.toml
#   SIZE    student, LAYERSxWIDTH            make student-train SIZE=4x312
#   SIZES   students of student-sweep        make student-sweep SIZES="6x768 4x512" SEEDS="0 1"
#   VARY    fields of student-sweep          make student-sweep VARY="train.alpha_cos=0,1"
#   SET     recipe fields, no spaces within  make distill SET="train.lr=3e-4 train.steps=1600"
#   PLAN    options of plan                  make plan PLAN="--tokens 4.4e9 --tflops 150"
#   TASKS   to be fine-tuned on              make evaluate TASKS=sst2,rte,stsb
#   CACHE   of verify, inspect, view         make verify CACHE=runs/demo/cache
#   BENCH   benchmarks                       make bench BENCH=fidelity
#   PYTHON  interpreter of the environment   make setup PYTHON=python3.12
#   EXTRAS  optional parts to install        make setup EXTRAS=dev,ray,s3

RECIPE ?= recipes/demo.toml
SIZE ?=
SIZES ?= $(SIZE)
SEEDS ?=
VARY ?=
SET ?=
PLAN ?=
TASKS ?=
CACHE ?=
PYTEST_ARGS ?=
BENCH ?= fidelity offline_equals_online
PYTHON ?= python3
VENV ?= .venv
EXTRAS ?= dev

BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
SITE_TOOLS := $(VENV)/.site-tools
OPTIONS = --recipe '$(RECIPE)' $(foreach field,$(SET),--set '$(field)')

.DEFAULT_GOAL := help
# The stages of one command line follow each other, with -j too.
.NOTPARALLEL:
.PHONY: help setup plan distill corpus teacher-cache student-train student-sweep evaluate verify inspect view test lint docs bench gpu-check clean

help: ## Show the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-15s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))
	@echo
	@sed -n 's/^#   /  /p' $(firstword $(MAKEFILE_LIST))

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv '$(VENV)'
	$(BIN)/python -m pip install -c constraints.txt -e '.[$(EXTRAS)]'
	@touch $@

setup: $(STAMP) ## Create the virtual environment and install the project in it (EXTRAS=...)
ifneq ($(origin EXTRAS),file)
	$(BIN)/python -m pip install -c constraints.txt -e '.[$(EXTRAS)]'
endif

plan: $(STAMP) ## Tokens, bytes and hours of a recipe, before anything runs
	$(BIN)/distilcache plan $(OPTIONS) $(foreach size,$(SIZE),--size '$(size)') $(PLAN)

distill: $(STAMP) ## Everything: corpus, teacher, cache, students, evaluation
	$(BIN)/distilcache distill $(OPTIONS) $(foreach size,$(SIZE),--size '$(size)')

corpus: $(STAMP) ## Text to token blocks
	$(BIN)/distilcache corpus $(OPTIONS)

teacher-cache: $(STAMP) ## Run the teacher once and store its signals (makes the corpus first)
	$(BIN)/distilcache teacher-cache $(OPTIONS)

student-train: $(STAMP) ## Train students from the cache
	$(BIN)/distilcache student-train $(OPTIONS) $(foreach size,$(SIZE),--size '$(size)')

student-sweep: $(STAMP) ## Train students of several sizes and seeds from the cache, and compare them
	$(BIN)/distilcache student-sweep $(OPTIONS) --evaluate \
		$(foreach size,$(SIZES),--size '$(size)') $(foreach seed,$(SEEDS),--seed '$(seed)') \
		$(foreach field,$(VARY),--vary '$(field)')

evaluate: $(STAMP) ## Quality, size and speed of teacher and students, side by side
	$(BIN)/distilcache evaluate $(OPTIONS) $(if $(TASKS),--tasks '$(TASKS)')

verify: $(STAMP) ## Re-read every checksum of a cache (CACHE=...)
	@test -n '$(CACHE)' || { echo 'make verify: CACHE must name a cache; try CACHE=runs/demo/cache' >&2; exit 2; }
	$(BIN)/distilcache verify '$(CACHE)'

inspect: $(STAMP) ## Show what a cache holds (CACHE=...)
	@test -n '$(CACHE)' || { echo 'make inspect: CACHE must name a cache; try CACHE=runs/demo/cache' >&2; exit 2; }
	$(BIN)/distilcache inspect '$(CACHE)'

view: $(STAMP) ## Write a page on a cache and its students for any browser (CACHE=...)
	@test -n '$(CACHE)' || { echo 'make view: CACHE must name a cache; try CACHE=runs/demo/cache' >&2; exit 2; }
	$(BIN)/distilcache view '$(CACHE)'

test: $(STAMP) ## Run the default tests, a file per core at a time (PYTEST_ARGS="-k corpus -n 0")
	$(BIN)/python -m pytest -n logical --maxprocesses 8 --dist loadfile --no-loadscope-reorder $(PYTEST_ARGS)

lint: $(STAMP) ## Style, formatting and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

$(SITE_TOOLS): $(STAMP)
	$(BIN)/python -m pip install -c constraints.txt -e '.[docs]'
	@touch $@

docs: $(SITE_TOOLS) ## Write the tables of docs/recipes.md and build the site (site/index.html)
	$(BIN)/python docs/recipe_fields.py
	$(BIN)/mkdocs build --strict

bench: $(STAMP) ## Run the benchmarks, about an hour each on 2 cores (BENCH=fidelity)
	@set -e; for name in $(BENCH); do $(BIN)/python -m benchmarks.$$name; done

gpu-check: $(STAMP) ## Measure on a GPU, about eight minutes; tables in docs/benchmarks.md
	$(BIN)/python -m benchmarks.gpu --write-docs

clean: ## Remove the virtual environment; results in runs/ stay
	rm -rf '$(VENV)'
