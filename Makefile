# make demo: train a GPT on 8 ranks beside its serial twin.   make test: run the tests.   Both set up everything first, with the
# versions of requirements.lock.   make lock: renew that file.   make test-newest: the same tests on the newest releases.
# make wheels: wheels of HEAD into dist/ for the interpreters in WHEELS="python3.11 python3.12".
# TEXT=file or folder to train on;  TORCH_INDEX=https://download.pytorch.org/whl/cpu for the small CPU-only torch;
# TORCH=torch for the newest torch in make lock and make test-newest.
PYTHON := $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
TORCH ?= torch==2.13.0
LOCK := requirements.lock
TORCH_INDEX ?=
TEXT ?=
WHEELS ?= python3.11 python3.12
export OMP_NUM_THREADS ?= 1
export GINGHAM_WERROR ?= ON

SOURCES := CMakeLists.txt cmake/cuda.cmake setup.py pyproject.toml $(shell find csrc bench -name '*.cc' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh' 2>/dev/null)

.PHONY: demo test test-all test-newest lock build lint sanitizers sanitize wheels clean
demo: build
	$(BIN)/python -m gingham train --ranks 8 --mode 2.5d --depth 2 --steps 200 --compare-serial $(if $(TEXT),--text "$(TEXT)")

test: build
	$(BIN)/python -m pytest -m "not matrix" --durations=15

test-all: build
	$(BIN)/python -m pytest

build: $(VENV)/built
# all that the C++ half needs by itself
$(VENV)/tools: $(LOCK)
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), "gingham needs Python 3.11 or newer"'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet $$(grep -E '^(cmake|ninja)==' $(LOCK))
	touch $@

$(VENV)/ready: $(VENV)/tools
	$(BIN)/python -m pip install --quiet $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) $$(grep '^torch==' $(LOCK))
	$(BIN)/python -m pip install --quiet --requirement $(LOCK)
	touch $@

# the editable install serves the Python half from python/, so that only a change of C++ builds again; without build
# isolation it finds the objects of last time
$(VENV)/built: $(SOURCES) | $(VENV)/ready
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python -m pip install --quiet --no-build-isolation --no-deps --editable .
	touch $@

# The newest releases that the ranges of pyproject.toml allow, in an environment of their own.
NEWEST := .venv-newest
.PHONY: newest
newest:
	rm -rf $(NEWEST) && $(PYTHON) -m venv $(NEWEST)
	$(NEWEST)/bin/python -m pip install --quiet $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) '$(TORCH)'
	PATH="$(abspath $(NEWEST)/bin):$$PATH" $(NEWEST)/bin/python -m pip install --quiet 'setuptools>=77' 'pybind11>=2.13' 'cmake>=3.24,<4' ninja
	PATH="$(abspath $(NEWEST)/bin):$$PATH" $(NEWEST)/bin/python -m pip install --quiet --no-build-isolation '.[dev]'

test-newest: newest
	$(NEWEST)/bin/python -m pytest -m "not matrix"

# All packages with their versions, without the local part of torch's (+cpu) and without gingham itself.
lock: newest
	{ echo '# Made by make lock: what make demo and make test install. pyproject.toml has the ranges.'; \
	  $(NEWEST)/bin/python -m pip freeze --all --exclude pip --exclude gingham | sed 's/+cpu$$//'; } > $(LOCK)

lint: $(VENV)/built
	$(BIN)/ruff check python tests bench examples setup.py wheels.py
	$(BIN)/ruff format --check python tests bench examples setup.py wheels.py
	$(BIN)/mypy
	find csrc bench tests -name '*.cc' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh' | grep -v third_party | xargs --no-run-if-empty $(BIN)/clang-format --dry-run --Werror

# With nvcc's headers at hand the thread build also runs the CUDA backend's host side on fake devices
FAKE := $(if $(shell command -v nvcc),-DGINGHAM_FAKE_CUDA=ON -DGINGHAM_FAKE_KERNELS=ON)
sanitizers: $(VENV)/tools
	for kind in address thread; do \
	  $(BIN)/cmake -S . -B build/$$kind -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN)/ninja) -DGINGHAM_SANITIZE=$$kind -DGINGHAM_WERROR=ON \
	    $$([ $$kind = thread ] && echo "$(FAKE)") > /dev/null && \
	  $(BIN)/cmake --build build/$$kind --target core_tests $$([ $$kind = thread ] && echo "$(if $(FAKE),pipeline_tests)") || exit 1; \
	done

UCX = $(addprefix GINGHAM_UCX=,$(firstword $(wildcard $(abspath $(VENV))/lib/python3*/site-packages/libucx/lib)))
sanitize: sanitizers $(VENV)/built
	for kind in address thread; do $(UCX) GINGHAM_BLAS=plain build/$$kind/core_tests || exit 1; done
	$(if $(FAKE),FAKE_CUDA_JITTER=100 GINGHAM_BLAS=plain \
	  GINGHAM_NCCL=$(abspath build/thread/libfakecuda.so) TSAN_OPTIONS=halt_on_error=1 build/thread/pipeline_tests "products over copies")

# an sdist and a wheel for each interpreter in dist/, of HEAD, with the CUDA backend where nvcc is
wheels:
	$(PYTHON) wheels.py --out dist $(WHEELS)

clean:
	rm -rf build python/gingham/_C*.so python/gingham/bin $(VENV)/built
