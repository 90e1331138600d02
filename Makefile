# FoloVLLM: one verb per thing that people do, the same verbs for every stage. `make help` lists them.
#
# A verb installs what it needs into $(VENV) (empty stamp files there remember what is done), then prints and runs one
# command. A stage is a folder m1_* to m7_* with an __init__.py: nothing here names one.

# ------------------------------------------------------------------------------------------------ settings
# Where packages go. `make … NO_VENV=1 PYTHON=python3` uses that interpreter as it is and installs nothing.
VENV ?= .venv
# First interpreter that is new enough.
PYTHON ?= $(shell for python in python3 python3.14 python3.13 python3.12 python3.11; do \
    $$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$python && break; done)
# Index for torch alone, e.g. PyTorch's own for CPU wheels. Empty: what pip is configured to use.
TORCH_INDEX ?=
# Local directory, Hub id, or preset (with ARGS="--load-format dummy"). Empty: the embedded model, fetched if missing.
MODEL ?=
PROMPT ?= What is the capital of France?
WORKLOAD ?= fixed:batch=4,input=64,output=32
# Engines of a server; with more than one, Ray is installed and runs them.
REPLICAS ?= 1
# Anything, for `make compare`: put the results among the project's own and the table into the documents.
PUBLISH ?=
# Folder that a quantised model is written to.
OUTPUT ?= build/quantised
# Further arguments for the command that a verb runs, and for pytest.
ARGS ?=
PYTEST_ARGS ?=

# ------------------------------------------------------------------------------------------------ what is here
STAGES := $(patsubst %/__init__.py,%,$(sort $(wildcard m[1-7]_*/__init__.py)))
SHORT_NAMES := $(foreach stage,$(STAGES),$(firstword $(subst _, ,$(stage))))
PACKAGES := shared/folovllm m0_infra $(STAGES) compare
LAST := $(lastword $(SHORT_NAMES))
# Stages that have a command of their own: those with the file that does the work.
QUANTIZERS := $(foreach file,$(sort $(wildcard m[1-7]_*/quantize_model.py)),$(firstword $(subst _, ,$(file))))

# What mkdocs.yml calls docs_dir: written before every build.
BOOK := build/book
EMBEDDED := models/SmolLM2-135M-Instruct/model.safetensors
ifdef NO_VENV
  PY := $(PYTHON)
  READY :=
  RUNTIME :=
  DEV :=
  SERVE :=
  RAY :=
  DOCS :=
else
  PY := $(VENV)/bin/python
  # Python alone: what compares files needs no package.
  READY := $(VENV)/.stamp-venv
  RUNTIME := $(VENV)/.stamp-runtime
  DEV := $(VENV)/.stamp-dev
  SERVE := $(VENV)/.stamp-serve
  RAY := $(VENV)/.stamp-ray
  # The book is made from texts: no torch.
  DOCS := $(VENV)/.stamp-docs
endif
RUN := PYTHONPATH=.:shared $(PY)
MODEL_FILES := $(if $(MODEL),,$(EMBEDDED))
# With a space in front where there is something, so that the printed commands have no gaps.
space := $(subst ,, )
MODEL_OPTION := $(if $(MODEL),$(space)--model $(MODEL))
REPLICAS_OPTION := $(if $(filter-out 1,$(REPLICAS)),$(space)--replicas $(REPLICAS))
EXTRA = $(if $(ARGS),$(space)$(ARGS))
EXTRA_PYTEST = $(if $(PYTEST_ARGS),$(space)$(PYTEST_ARGS))

# $(call quote,text): text as one word of the shell, whatever is in it.
quote = '$(subst ','\'',$(1))'

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help setup model doctor test lint format check-stages propagate compare charts pictures microbench \
    docs docs-serve \
    shared-test m0-test compare-test ray-test

# ------------------------------------------------------------------------------------------------ verbs
help: ## list the verbs
	@echo 'usage: make VERB [NAME=value …]'
	@echo
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / { printf "  %-14s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))
	@echo
	@echo '  Stages here: $(SHORT_NAMES). For each of them, as for $(LAST):'
	@echo '  $(LAST)             answer a prompt (PROMPT="…", MODEL=…, ARGS=…)'
	@echo '  $(LAST)-chat        talk with the model (MODEL=…, ARGS=…)'
	@echo '  $(LAST)-serve       answer the API of OpenAI at http://127.0.0.1:8000 (MODEL=…, ARGS="--port 8001",'
	@echo '                 REPLICAS=2 for two engines behind the address, under Ray)'
	@echo '  $(LAST)-bench       measure one run on a workload (WORKLOAD="$(WORKLOAD)", MODEL=…, ARGS=…)'
	@echo '  $(LAST)-compare     measure it beside the stage before it, on the workload that shows its idea: a sentence and'
	@echo '                 a chart within two minutes (MODEL=…, ARGS=…; from m2 on)'
	@echo '  $(LAST)-test        run the tests of the stage (PYTEST_ARGS=…)'
	@$(foreach name,$(QUANTIZERS),echo '  $(name)-quantize    write a model with few bits per weight (MODEL=…, OUTPUT=$(OUTPUT), ARGS=…)';)
	@echo '  diff-$(LAST)        show what the stage changes in the stage before it'
	@echo
	@echo '  Everywhere: VENV=DIR, PYTHON=python3.12, TORCH_INDEX=URL for torch alone, and NO_VENV=1 to use PYTHON as it'
	@echo '  is and install nothing (all in docs/guides/setup.md).'

setup: $(RUNTIME) $(DEV) ## install everything into .venv: run-time and development packages

model: $(EMBEDDED) ## fetch the embedded model into models/

doctor: $(RUNTIME) ## say what this machine can run
	$(RUN) -m m0_infra doctor$(EXTRA)

test: $(DEV) $(EMBEDDED) check-stages ## run all tests; without PYTEST_ARGS also ask for 80 % coverage
	PYTHONPATH=.:shared OMP_NUM_THREADS=1 $(PY) -m pytest -n auto --maxprocesses 4 --timeout 600 \
	    $(if $(PYTEST_ARGS),$(PYTEST_ARGS),$(COVERAGE))

COVERAGE = $(addprefix --cov=,$(PACKAGES)) --cov-report=term:skip-covered --cov-fail-under=80

lint: $(DEV) ## check style, format and types
	$(PY) -m ruff check . && $(PY) -m ruff format --check . && $(PY) -m mypy

format: $(DEV) ## rewrite the files in the project's format
	$(PY) -m ruff check --fix . && $(PY) -m ruff format .

check-stages: | $(READY) ## check that the stages differ only where stages.toml says so
	$(RUN) -m m0_infra check-stages$(EXTRA)

propagate: | $(READY) ## carry a change of one file to the later stages (STAGE=m1 FILE=engine.py)
	$(if $(and $(STAGE),$(FILE)),,$(error propagate needs the stage with the change and its file: make propagate STAGE=m1 FILE=engine.py))
	$(RUN) -m m0_infra propagate --stage $(STAGE) --file $(FILE)$(EXTRA)

compare: $(RUNTIME) $(MODEL_FILES) ## run every stage on one workload: gate, table, charts, HTML report (PUBLISH=1: into the documents)
	$(RUN) -m compare run$(if $(PUBLISH),$(space)--publish --repeats 3)$(EXTRA)

charts: $(RUNTIME) ## draw table, charts and report again from the stored results
	$(RUN) -m compare charts$(EXTRA)

pictures: $(RUNTIME) ## draw the pictures of the notes again
	$(RUN) -m compare.pictures$(EXTRA)

docs: $(DOCS) ## build the book into build/site; a dead link is an error
	@mkdir -p $(BOOK)
	NO_MKDOCS_2_WARNING=1 $(RUN) -m mkdocs build --strict

docs-serve: $(DOCS) ## show the book at http://127.0.0.1:8000, and follow changes (ARGS="--dev-addr 127.0.0.1:8001")
	@mkdir -p $(BOOK)
	NO_MKDOCS_2_WARNING=1 $(RUN) -m mkdocs serve$(EXTRA)

microbench: $(DEV) ## time the host-side pieces, and how they grow with queue, batch and history
	$(RUN) -m pytest --benchmark-only$(EXTRA_PYTEST) compare/microbench

shared-test: $(DEV) ## run the tests of the package folovllm
	$(RUN) -m pytest$(EXTRA_PYTEST) shared

m0-test: $(DEV) ## run the tests of m0_infra
	$(RUN) -m pytest$(EXTRA_PYTEST) m0_infra

ray-test: $(DEV) $(RAY) ## run the tests of several replicas, which start a Ray cluster
	$(RUN) -m pytest -m ray$(EXTRA_PYTEST) shared

compare-test: $(DEV) ## run the tests of compare
	$(RUN) -m pytest$(EXTRA_PYTEST) compare

# $(call stage_verbs,m2,m2_batching): the verbs of one stage.
define stage_verbs
.PHONY: $(1) $(1)-chat $(1)-serve $(1)-bench $(1)-test diff-$(1)

$(1): $$(RUNTIME) $$(MODEL_FILES)
	$$(RUN) -m $(2) generate$$(MODEL_OPTION)$$(EXTRA) $$(call quote,$$(value PROMPT))

$(1)-chat: $$(RUNTIME) $$(MODEL_FILES)
	$$(RUN) -m $(2) chat$$(MODEL_OPTION)$$(EXTRA)

$(1)-serve: $$(SERVE) $$(if $$(REPLICAS_OPTION),$$(RAY)) $$(MODEL_FILES)
	$$(RUN) -m $(2) serve$$(MODEL_OPTION)$$(REPLICAS_OPTION)$$(EXTRA)

$(1)-bench: $$(RUNTIME) $$(MODEL_FILES)
	$$(RUN) -m $(2) bench$$(MODEL_OPTION) --workload $$(call quote,$$(value WORKLOAD)) \
	    --output build/bench/$(2).json$$(EXTRA)

$(1)-test: $$(DEV)
	$$(RUN) -m pytest$$(EXTRA_PYTEST) $(2)

diff-$(1): | $$(READY)
	$$(RUN) -m m0_infra diff --stage $(1)$$(EXTRA)
endef

# $(call against_previous,m2): for all but the first stage, which has none before it.
define against_previous
.PHONY: $(1)-compare

$(1)-compare: $$(RUNTIME) $$(MODEL_FILES)
	$$(RUN) -m compare show --stage $(1)$$(MODEL_OPTION)$$(EXTRA)
endef

# $(call quantizer,m7,m7_gptq): for the stages that quantise. The embedded model has to be named: the command has no default.
define quantizer
.PHONY: $(1)-quantize

$(1)-quantize: $$(RUNTIME) $$(MODEL_FILES)
	$$(RUN) -m $(2) quantize --model $$(or $$(MODEL),$$(dir $$(EMBEDDED))) --output $$(OUTPUT)$$(EXTRA)
endef

$(foreach stage,$(STAGES),$(eval $(call stage_verbs,$(firstword $(subst _, ,$(stage))),$(stage))))
$(foreach stage,$(STAGES),$(if $(wildcard $(stage)/quantize_model.py),\
    $(eval $(call quantizer,$(firstword $(subst _, ,$(stage))),$(stage)))))
$(foreach name,$(wordlist 2,$(words $(SHORT_NAMES)),$(SHORT_NAMES)),$(eval $(call against_previous,$(name))))

# ------------------------------------------------------------------------------------------------ set-up
# A stamp is written last: an interrupted step has none and runs again.
$(VENV)/.stamp-venv:
	@test -n "$(PYTHON)" || { echo 'error: found no Python >= 3.11 (tried python3, python3.14 to python3.11).' \
	    'Install one, or name it: make setup PYTHON=/path/to/python3.12' >&2; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo 'error: PYTHON=$(PYTHON) is missing' \
	    'or older than Python 3.11. Name another one, or name none: make setup PYTHON=' >&2; exit 1; }
	"$(PYTHON)" -m venv $(VENV)
	@touch $@

$(VENV)/.stamp-torch: constraints.txt | $(VENV)/.stamp-venv
	$(PY) -m pip install -c constraints.txt$(if $(TORCH_INDEX),$(space)--index-url $(TORCH_INDEX)) torch
	@touch $@

$(VENV)/.stamp-runtime: $(VENV)/.stamp-torch requirements.txt constraints.txt
	$(PY) -m pip install -c constraints.txt -r requirements.txt
	@touch $@

$(VENV)/.stamp-serve: $(VENV)/.stamp-runtime requirements-serve.txt
	$(PY) -m pip install -c constraints.txt -r requirements-serve.txt
	@touch $@

$(VENV)/.stamp-ray: $(VENV)/.stamp-serve requirements-ray.txt
	$(PY) -m pip install -c constraints.txt -r requirements-ray.txt
	@touch $@

$(VENV)/.stamp-dev: $(VENV)/.stamp-runtime requirements-dev.txt requirements-serve.txt
	$(PY) -m pip install -c constraints.txt -r requirements-dev.txt
	@touch $@

$(VENV)/.stamp-docs: requirements-docs.txt constraints.txt | $(VENV)/.stamp-venv
	$(PY) -m pip install -c constraints.txt -r requirements-docs.txt
	@touch $@

$(EMBEDDED): | $(RUNTIME)
	$(RUN) -m m0_infra fetch

# Without a rule of their own, `make -B` would take them for unknown verbs.
Makefile constraints.txt requirements.txt requirements-serve.txt requirements-ray.txt requirements-dev.txt requirements-docs.txt: ;

.DEFAULT:
	@echo "error: '$@' is no verb and no file that can be made; stages here: $(SHORT_NAMES). 'make help' lists the verbs." >&2; exit 2
