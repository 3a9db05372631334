# Development commands. `make help` describes each target. Every target sets up the environment that it needs: Python 3.10
# or newer and a C++ compiler are enough.

PYTHON ?= python3
VENV := .venv
CORE_VENV := .venv-core
CORE_TORCH := 2.13.0
# The previous major version of transformers, in a folder that Python searches before $(VENV).
TRANSFORMERS4 := build/transformers4
TRANSFORMERS4_PINS := transformers==4.57.6 huggingface_hub==0.36.2 tokenizers==0.22.2
BUILD_INPUTS := pyproject.toml setup.py constraints.txt $(shell find csrc -type f)

# One process per processor with one thread each: the thread pools of several PyTorch processes slow each other down.
WORKERS ?= $(shell getconf _NPROCESSORS_ONLN)
PYTEST := -m pytest --durations=15 -n $(WORKERS) --dist worksteal
QUICK := -m "not slow and not emulated and not interpreted and not harness"
TRANSFORMERS_TESTS = tests/adapters $(shell find tests -path tests/adapters -prune \
  -o \( -name 'test_*huggingface.py' -o -name test_save_checkpoint.py \) -print)
CPP_FILES = $(shell find csrc tests/csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')

SANITIZE := build/sanitize
SANITIZE_FLAGS := -O1 -g -w -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover=undefined
SANITIZE_LIBRARIES = $(foreach name,asan stdc++,$(shell g++ -print-file-name=lib$(name).so))

test test-all test-core test-transformers4 sanitize race: export OMP_NUM_THREADS = 1

.DEFAULT_GOAL := help
.PHONY: help lint format test test-all test-core test-transformers4 demo docs bench sanitize race gpu clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / { printf "make %-20s %s\n", $$1, $$2 }' Makefile

lint: $(VENV)/dev  ## check style, format and types: ruff, clang-format, mypy
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/clang-format --dry-run -Werror $(CPP_FILES)
	$(VENV)/bin/mypy

format: $(VENV)/dev  ## format the code and fix the lint findings that have an automatic fix
	$(VENV)/bin/ruff check --fix-only .
	$(VENV)/bin/ruff format .
	$(VENV)/bin/clang-format -i $(CPP_FILES)

test: $(VENV)/installed  ## quick tests: every public behavior, in minutes
	$(VENV)/bin/python $(PYTEST) $(QUICK)

test-all: $(VENV)/installed  ## all tests: also slow, emulated, interpreted and harness
	$(VENV)/bin/python $(PYTEST)

# The extension does not depend on torch, so its tests do not run twice.
test-core: $(CORE_VENV)/installed  ## quick tests on a newer torch without the optional packages
	$(CORE_VENV)/bin/python $(PYTEST) $(QUICK) --ignore=tests/csrc

test-transformers4: export PYTHONPATH = $(CURDIR)/$(TRANSFORMERS4)
test-transformers4: $(TRANSFORMERS4)/installed  ## adapter, checkpoint and Trainer tests on transformers 4.57
	$(VENV)/bin/python -c 'import transformers; v = transformers.__version__; assert v.startswith("4.57."), v'
	$(VENV)/bin/python $(PYTEST) $(TRANSFORMERS_TESTS)

demo: $(VENV)/installed  ## train, evaluate and predict on synthetic sounds
	$(VENV)/bin/python python/demo.py

docs: $(VENV)/docs  ## build the documentation as a website in build/site
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/python -m mkdocs build --strict

bench: $(VENV)/installed  ## time operators, blocks, models and alternatives; writes to bench/results
	$(VENV)/bin/python -m pytest bench --benchmark-only

# The folder holds a package with the instrumented extension only. `pythonpath` puts it before the package of this
# checkout, which pyproject.toml would make the first.
sanitize: $(VENV)/installed  ## tests of the CPU kernels under AddressSanitizer and UndefinedBehaviorSanitizer (GCC)
	mkdir -p $(SANITIZE)/pruneattn
	touch $(SANITIZE)/pruneattn/__init__.py
	cp setup.py $(SANITIZE)
	rm -f $(SANITIZE)/pyproject.toml
	ln -sfn $(CURDIR)/csrc $(SANITIZE)/csrc
	cd $(SANITIZE) && CXXFLAGS="$(SANITIZE_FLAGS)" PRUNEATTN_CUDA_ARCHS=none \
	  $(CURDIR)/$(VENV)/bin/python setup.py -q build_ext --inplace
	cd $(SANITIZE) && LD_PRELOAD="$(SANITIZE_LIBRARIES)" ASAN_OPTIONS=detect_leaks=0 PYTHONMALLOC=malloc \
	  $(CURDIR)/$(VENV)/bin/python $(PYTEST) --capture=sys -o pythonpath=$(CURDIR)/$(SANITIZE) \
	  -k "not emulated and not device and not cuda" $(CURDIR)/tests/csrc/test_kernels.py \
	  $(CURDIR)/tests/csrc/test_attention_kernels.py $(CURDIR)/tests/csrc/test_int8_kernels.py

race: $(VENV)/installed  ## CUDA kernels on the CPU: report accesses to memory that no barrier orders
	EMULATED_RACE=1 $(VENV)/bin/python $(PYTEST) -m emulated -k "not split and not ops_on_cuda" tests/csrc

gpu:  ## build, test, benchmark and sanitize on a CUDA device with PYTHON; writes to bench/results
	$(PYTHON) -m tools.gpu_run

$(VENV)/installed: $(BUILD_INPUTS)
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install -q -c constraints.txt -e '.[test]'
	touch $@

$(VENV)/dev: $(VENV)/installed
	$(VENV)/bin/python -m pip install -q -c constraints.txt -e '.[dev]'
	touch $@

$(VENV)/docs: $(VENV)/installed
	$(VENV)/bin/python -m pip install -q -c constraints.txt -e '.[docs]'
	touch $@

$(CORE_VENV)/installed: $(BUILD_INPUTS)
	test -x $(CORE_VENV)/bin/python || $(PYTHON) -m venv $(CORE_VENV)
	$(CORE_VENV)/bin/python -m pip install -q torch==$(CORE_TORCH) pytest pytest-timeout pytest-xdist -e .
	touch $@

$(TRANSFORMERS4)/installed: Makefile $(VENV)/installed
	rm -rf $(TRANSFORMERS4)
	$(VENV)/bin/python -m pip install -q --no-deps --target $(TRANSFORMERS4) $(TRANSFORMERS4_PINS)
	touch $@

clean:  ## remove environments, caches and build outputs
	rm -rf build dist $(VENV) $(CORE_VENV) .mypy_cache .pytest_cache .ruff_cache pruneattn/_C*.so
