# Everything runs in .venv, made on first use and kept. `make demo` and `make test` are all that a
# machine with Python 3.11 and make needs; what is already installed is not installed again.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
# The core packages and pytest alone, for `make test-core`.
CORE := .venv-core
INSTALL := -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
PIP := $(BIN)/python $(INSTALL)
# What must not be in .venv itself: other versions; and libtpu, where jax would look for a TPU.
OVERLAY := $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --target
PROJECT := setup.cfg pyproject.toml constraints.txt

# PyPI's Linux wheel of torch is the CUDA build, gigabytes of it; the local version label +cpu can
# only match a CPU build: one that pip finds by itself, or PyTorch's own index of CPU builds.
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
ifeq ($(shell uname -s),Linux)
TORCH := torch==2.13.0+cpu
else
TORCH := torch==2.13.0
endif

# Linux: memory in huge pages, without which a training step on a CPU spends a tenth of its time
# on page faults. It is read when a process starts, so no program can set it for itself.
export GLIBC_TUNABLES ?= glibc.malloc.hugetlb=1

.PHONY: help install bridges libtpu demo benchmark test test-fast test-core lint clean

help:
	@echo "make demo       pretrain a small model on real English (about 6 minutes on 2 cores)"
	@echo "make benchmark  speed against transformers 4 and 5, side by side (two to three hours)"
	@echo "make test       the whole test suite"
	@echo "make test-fast  the same without slow tests"
	@echo "make test-core  the tests that need neither PyTorch, TensorFlow nor transformers (minutes)"
	@echo "make lint       ruff, mypy, and a check of words"
	@echo "make install    only the environment, .venv"
	@echo "make bridges    the same with PyTorch, TensorFlow and ONNX (CPU builds)"
	@echo "make libtpu     only what --compile_topology needs: the compiler of TPU programs"
	@echo "make clean      remove .venv and caches; runs/ stays"

install: $(VENV)/installed

$(VENV)/installed: $(PROJECT)
	@echo "setting up $(VENV) (once; takes a minute or two)"
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=/path/to/python3.11")'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(PIP) --editable '.[viz]'
	@touch $@

$(VENV)/bridged: $(VENV)/installed
	@echo "adding PyTorch and TensorFlow (CPU) and ONNX to $(VENV) (once)"
	@$(PIP) '$(TORCH)' 2>/dev/null || $(PIP) '$(TORCH)' --index-url $(TORCH_INDEX)
	@$(PIP) --editable '.[viz,torch,tf,onnx]'
	@touch $@

$(VENV)/libtpu: $(VENV)/installed
	@echo "adding the compiler of TPU programs to $(VENV) (once)"
	@$(OVERLAY) $@ --constraint constraints.txt libtpu
	@touch $@

$(VENV)/tested: $(VENV)/bridged $(VENV)/libtpu tests/oracle/requirements.txt
	@echo "adding the test tools to $(VENV) (once)"
	@$(PIP) --editable '.[viz,torch,tf,onnx,test,dev]'
	@rm -rf $(VENV)/transformers4
	@$(OVERLAY) $(VENV)/transformers4 --requirement tests/oracle/requirements.txt
	@touch $@

$(CORE)/tested: $(PROJECT)
	@echo "setting up $(CORE) with the core packages (once; takes a minute)"
	@test -x $(CORE)/bin/python || $(PYTHON) -m venv $(CORE)
	@$(CORE)/bin/python $(INSTALL) --editable '.[test]'
	@touch $@

bridges: $(VENV)/bridged

libtpu: $(VENV)/libtpu

demo: $(VENV)/installed
	$(BIN)/python -m experiments.demo

benchmark: $(VENV)/tested
	$(BIN)/python -m experiments.benchmark

# Most of the time is compiling, on one core each: files are shared out among processes.
PYTEST := -m pytest --numprocesses=auto --maxprocesses=4 --dist=loadfile

test: $(VENV)/tested
	$(BIN)/python $(PYTEST)

test-fast: $(VENV)/tested
	$(BIN)/python $(PYTEST) -m "not slow"

# tests/conftest.py leaves out the modules of these markers before they are imported.
test-core: $(CORE)/tested
	$(CORE)/bin/python $(PYTEST) -m "not (torch or tensorflow or oracle or libtpu or slow)"

lint: $(VENV)/tested
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy --package prelnroberta
	$(BIN)/python tests/programs/check_words.py

clean:
	rm -rf $(VENV) $(CORE) build *.egg-info .pytest_cache .ruff_cache .hypothesis
