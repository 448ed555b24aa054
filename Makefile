# make train   makes an environment, compiles the kernels and trains a Helmholtz machine on the digits (runs/digits)
# make test    makes the same environment and runs the everyday tests
# make help    lists all targets

VENV ?= .venv
CUDA_VENV ?= .venv-cuda
PYTHON ?= python3
RUN ?= runs/digits
TESTS ?= tests
CUDA_ARCHITECTURES ?= 9.0
RESULT ?= benchmarks/results/0.2.0-intel-xeon-avx512-1-thread.json
STEP_RESULT ?= benchmarks/results/0.2.0-intel-xeon-avx512-1-thread-step.json
ON_EVERY_CORE := --numprocesses auto --dist loadgroup
# pip would compile every module to bytecode, which takes a minute. Python compiles the modules that it imports.
PIP := -m pip install --quiet --disable-pip-version-check --no-compile
EXTRAS := train diagnostics tensorboard bench test lint docs examples
BUILD_TOOLS := setuptools wheel ninja pybind11
# Returns the packages of an extra. pyproject.toml lists each extra on one line.
extra = $(shell sed -n 's/^$(1) = \[\(.*\)\]$$/\1/p' pyproject.toml | tr -d ',')

SOURCES := $(shell find csrc build_support -type f -not -name '*.pyc') setup.py pyproject.toml
SHELL := /bin/bash

.PHONY: help train extras test test-thorough lint format benchmark readme mnist docs cuda-check cuda-test \
	cuda-on-cpu-asan cuda-on-cpu-asan-subset sass-report mutants gpu-check clean
.DELETE_ON_ERROR:
.NOTPARALLEL:

help:
	@sed -n 's/^# \(make .*\)/\1/p' Makefile
	@echo "make test-thorough  runs every test, the sanitizers and the CUDA build, in an hour or two"
	@echo "make mutants     plants one fault at a time and checks that a test fails, in 90 minutes; ONLY selects faults"
	@echo "make lint        runs ruff, mypy and clang-format"
	@echo "make format      formats the sources with ruff and clang-format"
	@echo "make benchmark   measures ops and steps on one CPU thread, in half an hour; writes RESULT, STEP_RESULT and docs/benchmarks.md"
	@echo "make readme      updates the tables and pictures of README.md and docs/benchmarks.md from committed results"
	@echo "make mnist       trains every objective on the MNIST in the folder DATA, in hours; writes benchmarks/results/mnist"
	@echo "make docs        builds the documentation, build/docs/index.html; a warning is an error"
	@echo "make cuda-check  compiles the CUDA kernels for CUDA_ARCHITECTURES and checks their machine code; needs nvcc, no GPU"
	@echo "make cuda-test   also runs the everyday tests with the CUDA build, on a GPU if there is one"
	@echo "make cuda-on-cpu-asan  runs the CUDA kernels on the CPU under the address and undefined-behaviour sanitizers"
	@echo "make cuda-on-cpu-asan-subset  the same for the tests that .ci/run requires"
	@echo "make sass-report prints registers, spills and loads of every kernel; needs nvcc, no GPU"
	@echo "make gpu-check   builds, tests, sanitizes and measures on a GPU; OUT names the folder for the results"
	@echo "make clean       removes build products, but not the environments"

train: $(VENV)/.installed
	@echo "Training a Helmholtz machine on the digits (half a minute)"
	@$(VENV)/bin/wakesleep train --out $(RUN) --overwrite

test: $(VENV)/.installed $(VENV)/.diagnostics $(VENV)/.tensorboard $(VENV)/.bench $(VENV)/.test
	@echo "Compiling the CUDA kernels to run on the CPU (a minute on two cores; later, only what changed)"
	@PYTHONPATH=tests $(VENV)/bin/python tests/cuda_on_cpu/emulation.py
	@echo "Running the everyday tests (6 minutes on two cores)"
	@$(VENV)/bin/python -m pytest $(ON_EVERY_CORE) $(TESTS)

# Installs what .ci/run needs, so that none of its parallel stages runs pip.
extras: $(VENV)/.train $(VENV)/.diagnostics $(VENV)/.tensorboard $(VENV)/.bench $(VENV)/.test $(VENV)/.lint $(VENV)/.docs

test-thorough: $(VENV)/.examples docs
	@echo "Running every test (half an hour on two cores), then the sanitizers and the CUDA build"
	@$(VENV)/bin/python -m pytest --thorough $(ON_EVERY_CORE) $(TESTS)
	@$(MAKE) cuda-on-cpu-asan
	@if command -v nvcc >/dev/null; then $(MAKE) cuda-test; else echo "No nvcc: the CUDA build is left out"; fi

mutants: $(VENV)/.installed $(VENV)/.diagnostics $(VENV)/.test
	@$(VENV)/bin/python scripts/mutants.py --only '$(ONLY)'

lint: $(VENV)/.train $(VENV)/.bench $(VENV)/.lint
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/clang-format --dry-run -Werror $(shell find csrc -type f)

format: $(VENV)/.lint
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .
	$(VENV)/bin/clang-format -i $(shell find csrc -type f)

benchmark: $(VENV)/.installed $(VENV)/.bench
	$(VENV)/bin/wakesleep bench --device cpu --threads 1 --goals --json $(RESULT)
	$(VENV)/bin/wakesleep bench --suite step --device cpu --threads 1 --goals --json $(STEP_RESULT)
	$(MAKE) readme

readme: $(VENV)/.installed
	$(VENV)/bin/python scripts/update_readme.py

# Checks addresses and undefined behaviour in every kernel as the tests run it on the CPU. Python loads the instrumented
# library, so the sanitizer runtimes are preloaded. Leaks are ignored, as they would be Python's. The subset runs every
# kernel in float32 with the shuffled schedule. The full run excludes tests that call an op many times.
SANITIZED_SUBSET := shuffled and (values_and_gradients and float32 or a_step_is_that or rows_apart or layer_in_several_chunks) \
	or emulator
SANITIZED := not gradcheck and not opcheck and not every_way
cuda-on-cpu-asan-subset: SANITIZED := $(SANITIZED_SUBSET)
cuda-on-cpu-asan cuda-on-cpu-asan-subset: $(VENV)/.installed $(VENV)/.test
	@echo "Compiling the CUDA kernels with sanitizers, and running them on the CPU"
	@WAKESLEEP_SANITIZE=1 ASAN_OPTIONS=detect_leaks=0 \
		LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libubsan.so)" \
		$(VENV)/bin/python -m pytest $(ON_EVERY_CORE) --capture=sys -k "$(SANITIZED)" tests/cuda_on_cpu

# The checks run in the tests folder, so that Python imports the installed wheel rather than the source tree.
cuda-check: $(CUDA_VENV)/.installed
	@cd tests && ../$(CUDA_VENV)/bin/python ../scripts/cuda_check.py
	@cd tests && ../$(CUDA_VENV)/bin/pytest -q -c ../pyproject.toml --rootdir . test_machine_code.py

cuda-test: cuda-check
	@cd tests && ../$(CUDA_VENV)/bin/pytest -c ../pyproject.toml --rootdir . $(ON_EVERY_CORE) -m "not source_tree" .

sass-report: $(CUDA_VENV)/.installed
	cd tests && ../$(CUDA_VENV)/bin/python ../scripts/sass_report.py

docs: $(VENV)/.installed $(VENV)/.test $(VENV)/.docs
	@echo "Building the documentation into build/docs (a minute)"
	@rm -rf build/docs
	@$(VENV)/bin/sphinx-build --quiet --fail-on-warning --fresh-env docs build/docs
	@WAKESLEEP_DOCS=build/docs $(VENV)/bin/python -m pytest -q tests/test_docs.py

mnist: $(VENV)/.installed
	$(VENV)/bin/python scripts/mnist_objectives.py --data $(DATA) --runs runs/mnist

# Uses the torch of $(PYTHON), so that a computer with a GPU downloads nothing.
gpu-check:
	$(PYTHON) scripts/gpu_check.py

clean:
	rm -rf build dist *.egg-info wakesleep_ext/_C*.so wakesleep_ext/_build.py $(VENV)/.installed $(CUDA_VENV)/.installed

$(VENV)/.environment: constraints.txt pyproject.toml
	@echo "Installing torch into $(VENV) (1 GB or more, a minute)"
	@test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	@$(VENV)/bin/python $(PIP) -c constraints.txt torch $(BUILD_TOOLS)
	@touch $@

# Installs only the packages of an extra, so nothing is compiled.
$(EXTRAS:%=$(VENV)/.%): $(VENV)/.%: $(VENV)/.environment
	@echo "Installing the packages of the extra '$*' into $(VENV)"
	@$(VENV)/bin/python $(PIP) -c constraints.txt $(call extra,$*)
	@touch $@

$(VENV)/.installed: $(VENV)/.environment $(VENV)/.train $(SOURCES)
	@echo "Compiling the kernels (3 minutes on two cores; later, only what changed)"
	@$(VENV)/bin/python $(PIP) --no-build-isolation --no-deps -e .
	@touch $@

# The same packages as in the other environment, except for a torch with CUDA.
$(CUDA_VENV)/.environment: constraints.txt pyproject.toml
	@echo "Installing a torch with CUDA into $(CUDA_VENV) (several GB, minutes)"
	@test -x $(CUDA_VENV)/bin/python || $(PYTHON) -m venv $(CUDA_VENV)
	@$(CUDA_VENV)/bin/python $(PIP) -c <(sed '/^torch==/d' constraints.txt) torch==2.14.1 $(BUILD_TOOLS) \
		$(call extra,train) $(call extra,test)
	@touch $@

$(CUDA_VENV)/.installed: $(CUDA_VENV)/.environment $(SOURCES)
	@echo "Compiling the kernels for CUDA $(CUDA_ARCHITECTURES) (minutes)"
	@WAKESLEEP_FORCE_CUDA=1 TORCH_CUDA_ARCH_LIST="$(CUDA_ARCHITECTURES)" $(CUDA_VENV)/bin/python $(PIP) \
		--no-build-isolation --no-deps --force-reinstall .
	@touch $@
