# make test    a virtual environment with the tested versions (constraints.txt), then all tests
# make demo    train, evaluate and predict on synthetic sounds, in the same environment
# make docs    the documentation as a web site, in build/site
# make bench   ops, blocks, models, training and their peers on this machine, side by side; writes bench/results/
# make test-core   the tests again on a newer torch, without torchaudio and the other optional packages; what is below the
#                  extension knows nothing of torch and is not tested twice
# make sanitize    the CPU kernels' tests once more, under AddressSanitizer and UndefinedBehaviorSanitizer (GCC)
# make race    the CUDA kernels' tests on the CPU, where two accesses to memory that no barrier orders are an error
# make gpu     build, tests, benchmarks and sanitizer on a CUDA device in the environment of PYTHON; writes bench/results/

PYTHON ?= python3
VENV := .venv
CORE_VENV := .venv-core
CORE_TORCH := 2.13.0
BUILD_INPUTS := pyproject.toml setup.py constraints.txt $(shell find csrc -type f)
# Tests in as many processes as there are processors, with one thread each: PyTorch's would wait for each other.
WORKERS ?= $(shell getconf _NPROCESSORS_ONLN)
PYTEST := -m pytest --durations=15 -n $(WORKERS) --dist worksteal

SANITIZE := build/sanitize
SANITIZE_FLAGS := -O1 -g -w -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover=undefined
SANITIZE_LIBRARIES = $(foreach name,asan stdc++,$(shell g++ -print-file-name=lib$(name).so))

test test-core sanitize race: export OMP_NUM_THREADS = 1

.PHONY: test test-core demo docs bench sanitize race gpu clean

test: $(VENV)/installed
	$(VENV)/bin/python $(PYTEST)

test-core: $(CORE_VENV)/installed
	$(CORE_VENV)/bin/python $(PYTEST) --ignore=tests/csrc

demo: $(VENV)/installed
	$(VENV)/bin/python python/demo.py

docs: $(VENV)/docs
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/python -m mkdocs build --strict

bench: $(VENV)/installed
	$(VENV)/bin/python -m pytest bench --benchmark-only

# A package with nothing but the instrumented extension, found first because Python starts beside it; no torch in it.
sanitize: $(VENV)/installed
	mkdir -p $(SANITIZE)/pruneattn
	touch $(SANITIZE)/pruneattn/__init__.py
	cp setup.py pyproject.toml $(SANITIZE)
	ln -sfn $(CURDIR)/csrc $(SANITIZE)/csrc
	cd $(SANITIZE) && CXXFLAGS="$(SANITIZE_FLAGS)" PRUNEATTN_CUDA_ARCHS=none \
	  $(CURDIR)/$(VENV)/bin/python setup.py -q build_ext --inplace
	cd $(SANITIZE) && LD_PRELOAD="$(SANITIZE_LIBRARIES)" ASAN_OPTIONS=detect_leaks=0 PYTHONMALLOC=malloc \
	  $(CURDIR)/$(VENV)/bin/python $(PYTEST) --capture=sys -k "not shim and not device and not cuda" \
	  $(CURDIR)/tests/csrc/test_kernels.py $(CURDIR)/tests/csrc/test_attention_kernels.py

# The shim of tests/csrc with each access checked; neither nvcc nor a GPU is needed.
race: $(VENV)/installed
	SHIM_RACE=1 $(VENV)/bin/python $(PYTEST) tests/csrc -k shim

gpu:
	$(PYTHON) -m tools.gpu_run

$(VENV)/installed: $(BUILD_INPUTS)
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install -q -c constraints.txt -e '.[test]'
	touch $@

$(VENV)/docs: $(VENV)/installed
	$(VENV)/bin/python -m pip install -q -c constraints.txt -e '.[docs]'
	touch $@

$(CORE_VENV)/installed: $(BUILD_INPUTS)
	test -x $(CORE_VENV)/bin/python || $(PYTHON) -m venv $(CORE_VENV)
	$(CORE_VENV)/bin/python -m pip install -q torch==$(CORE_TORCH) pytest pytest-timeout pytest-xdist -e .
	touch $@

clean:
	rm -rf build $(VENV) $(CORE_VENV) pruneattn/_C*.so
