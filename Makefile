# Every target makes the environment it needs. `make demo` and `make test` are all a newcomer has to know.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: demo test quick check package plain sanitize bench bench-gpu clean

demo: $(STAMP)
	$(BIN)/kvshrink demo --out demo

test: $(STAMP)
	$(BIN)/python -m pytest -q -n 2 --dist loadfile

quick: $(STAMP)
	$(BIN)/python -m pytest -q -n 2 --dist loadfile -m "not slow"

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/test_tree.py

# The wheel and the source distribution, each installed beside the environment's other packages and run.
package: $(STAMP)
	rm -rf dist build/package
	$(BIN)/pip wheel --quiet --no-deps --wheel-dir dist .
	$(BIN)/python -m tests.package

# The core where there is no compiler.
plain: $(STAMP)
	CXX=/no/compiler $(BIN)/python -m pytest -q -n 2 --dist loadfile $(CORE)

# Ratios of one run, into bench/results: minutes each. With transformers' quantised caches: see bench/decode.py.
bench: $(STAMP)
	$(BIN)/python bench/decode.py --sweep context
	$(BIN)/python bench/generate.py
	$(BIN)/python bench/prefill.py

# With the Python at hand, since it needs a torch built for the GPU; triton comes with that.
bench-gpu:
	PYTHONPATH=src $(PYTHON) bench/decode.py --device cuda --attention-only --batch 8 --sweep context \
		--out bench/results/decode_gpu.json

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt torch
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $(STAMP)

clean:
	rm -rf $(VENV) demo build dist
