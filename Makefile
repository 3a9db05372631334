# make test    a virtual environment with the tested versions (constraints.txt), then all tests
# make demo    train, evaluate and predict on synthetic sounds, in the same environment
# make bench   benchmarks of the ops on this machine
# make bench-cpu   ops, models and their peers on this CPU, side by side; writes bench/results/
# make test-core   the tests again on a newer torch, without torchaudio and the other optional packages
# make gpu     build, tests, sanitizer and benchmarks on a CUDA device in the environment of PYTHON; writes bench/results/

PYTHON ?= python3
VENV := .venv
CORE_VENV := .venv-core
CORE_TORCH := 2.13.0
BUILD_INPUTS := pyproject.toml setup.py constraints.txt $(shell find csrc -type f)
PYTEST := -m pytest --durations=15

.PHONY: test test-core demo bench bench-cpu gpu clean

test: $(VENV)/installed
	$(VENV)/bin/python $(PYTEST)

test-core: $(CORE_VENV)/installed
	$(CORE_VENV)/bin/python $(PYTEST)

demo: $(VENV)/installed
	$(VENV)/bin/python python/demo.py

bench: $(VENV)/installed
	$(VENV)/bin/python -m pytest bench --benchmark-only

bench-cpu: $(VENV)/installed
	$(VENV)/bin/python bench/cpu_run.py

gpu:
	$(PYTHON) bench/gpu_run.py

$(VENV)/installed: $(BUILD_INPUTS)
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install -q -c constraints.txt -e '.[test]'
	touch $@

$(CORE_VENV)/installed: $(BUILD_INPUTS)
	test -x $(CORE_VENV)/bin/python || $(PYTHON) -m venv $(CORE_VENV)
	$(CORE_VENV)/bin/python -m pip install -q torch==$(CORE_TORCH) pytest pytest-timeout -e .
	touch $@

clean:
	rm -rf build $(VENV) $(CORE_VENV) pruneattn/_C*.so
