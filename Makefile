# make explore: the main job on the shipped network and data.   make test: lint-free unit to multi-process tests.
PYTHON ?= python3
PARAXIS = .venv/bin/paraxis

.PHONY: explore test slow lint bench clean sanitize arm64

explore: .venv/installed
	$(PARAXIS) explore cnn $(ARGS)

test: .venv/installed
	.venv/bin/python -m pytest $(ARGS)

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
	rm -rf .venv build paraxis-study

# AddressSanitizer, UndefinedBehaviorSanitizer and ThreadSanitizer on the native runtime; a seeded race must be found.
sanitize:
	csrc/tests/sanitize.sh

# The native runtime and its NEON kernels in an emulator.
arm64:
	csrc/tests/arm64.sh
