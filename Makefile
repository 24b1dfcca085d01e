# Everything a user or developer runs. Each Python version has a virtual environment of its own, .venv-<version>; files
# called .installed-* in it remember what is there, so that a second run starts at once.
#
#   make demo                      answers a question with a real model
#   make test                      all tests but the slow ones   (TESTS="tests/quant tests/cli" takes a part)
#   make aot                       compiles the kernels for TPUs and GPUs that are not here (downloads 1 GB of compilers)
#   make lint                      ruff and pyright
#   make oracles                   what other programs say, again, beside what is recorded of them (tests/oracles)
#   make demo PYTHON=python3.12    any of them with another interpreter (3.11 or newer)
#   make clean                     removes what these made; downloaded models stay in the cache folder

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.NOTPARALLEL:
.PHONY: help demo test aot lint oracles clean python

OLDEST := (3, 11)
PYTHON ?= $(shell for python in python3.11 python3; do \
	"$$python" -c 'import sys; sys.exit(sys.version_info < $(OLDEST))' >/dev/null 2>&1 && { echo "$$python"; break; }; done)
VERSION := $(if $(strip $(PYTHON)),$(shell "$(PYTHON)" -c 'import sys; \
	print("%d.%d" % sys.version_info[:2] if sys.version_info >= $(OLDEST) else "")' 2>/dev/null))
VENV := .venv-$(VERSION)
BIN := $(VENV)/bin
TESTS ?=
QUESTION ?= What is the capital of France, and what is it known for?

help:
	@sed -n '/^#   make/s/^#   //p' $(firstword $(MAKEFILE_LIST))

demo: $(VENV)/.installed-package
	@$(BIN)/trustcore pull smollm2
	@$(BIN)/trustcore generate smollm2 --chat --stats --max-tokens 200 "$(QUESTION)"

# Tests that measure time run by themselves, before the others; exit status 5 means that TESTS has none of them. A file's
# tests stay in one process, where they share compiled programs.
test: $(VENV)/.installed-test
	$(BIN)/python -m pytest -m "serial and not slow" $(TESTS) || [ $$? -eq 5 ]
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "not slow and not serial" $(TESTS)

# libtpu and CUDA's compiler lie in folders of their own: where jax finds them, it looks for a TPU or GPU.
aot: $(VENV)/.installed-test $(VENV)/.libtpu $(VENV)/.cuda
	TRUSTCORE_LIBTPU=$(abspath $(VENV)/libtpu) TRUSTCORE_CUDA=$(abspath $(VENV)/cuda) \
		$(BIN)/python -m pytest -m aot tests/kernels_pallas tests/tune

$(VENV)/.cuda: $(VENV)/.installed-test
	@echo "Installing CUDA's compiler into $(VENV)/cuda"
	@version=$$($(BIN)/python -c 'import jax; print(jax.__version__)') && \
		$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --target $(VENV)/cuda \
		"jax-cuda13-plugin==$$version" "jax-cuda13-pjrt==$$version" nvidia-cuda-nvcc nvidia-nvvm
	@touch $@

$(VENV)/.libtpu: $(VENV)/.installed-test
	@echo "Installing libtpu into $(VENV)/libtpu"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --target $(VENV)/libtpu \
		"$$($(BIN)/python -c 'import importlib.metadata as m; print(next(r.split(";")[0] for r in m.requires("jax") if r.startswith("libtpu")))')"
	@touch $@

lint: $(VENV)/.installed-lint
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m pyright --pythonpath $(BIN)/python

# The oracles have an environment of their own, unless ORACLE_PYTHON names the Python of one that has some of them; what
# it lacks is then not run. ORACLES="decoders families" takes a part. llama.cpp is built from source: ten minutes.
ORACLES ?=
ifdef ORACLE_PYTHON
oracles: $(VENV)/.installed-test
	$(BIN)/python tests/oracles/run.py --python $(ORACLE_PYTHON) $(ORACLES)
else
oracles: $(VENV)/.installed-test .venv-oracles/.installed-oracles
	$(BIN)/python tests/oracles/run.py --all --python .venv-oracles/bin/python $(ORACLES)

.venv-oracles/.installed-oracles: tests/oracles/requirements.txt pyproject.toml | python
	@echo "Installing the oracles into .venv-oracles"
	@"$(PYTHON)" -m venv --clear .venv-oracles
	@.venv-oracles/bin/python -m pip install --quiet --disable-pip-version-check --requirement $< --editable .
	@touch $@
endif

clean:
	rm -rf .venv-* build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

WRONG := $(if $(strip $(PYTHON)),$(PYTHON) is not Python 3.11 or newer.,no Python 3.11 or newer on the path.)
EXAMPLE := make $(or $(firstword $(MAKECMDGOALS)),demo) PYTHON=/path/to/python3.12

python:
	@test -n "$(VERSION)" || { echo >&2 "make: $(WRONG) Name one: $(EXAMPLE)"; exit 1; }

$(VENV)/.made: | python
	@echo "Making $(VENV) with $(PYTHON)"
	@"$(PYTHON)" -m venv --clear $(VENV)
	@touch $@

$(VENV)/.installed-%: pyproject.toml $(VENV)/.made
	@echo "Installing trustcore and what it needs into $(VENV) (a minute or two)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.$(if $(filter-out package,$*),[$*])'
	@touch $@
