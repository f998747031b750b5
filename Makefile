# Everything runs in .venv, which the first target makes.
PYTHON ?= python3
VENV ?= .venv
# torch's exact version, because an open range may take another build than the one that is wanted.
TORCH ?= torch==2.13.0
# The pair of that torch; a torch for CUDA brings its own.
TRITON ?= triton==3.7.1
# Processes of pytest where it runs in several; each takes about a gigabyte.
JOBS ?= $(shell nproc 2>/dev/null || echo 2)

BIN := $(VENV)/bin
# Threads of one process that wait must not spin while another's work: it made the tests twice as long.
PYTEST := OMP_WAIT_POLICY=passive $(BIN)/pytest -n $(JOBS) --dist worksteal
BUILD_INPUTS := pyproject.toml setup.py setup_cuda.py $(wildcard csrc/*.cpp csrc/*.h csrc/*/*.cpp csrc/*/*.h csrc/cuda/*.cu*)
CPP := $(wildcard csrc/*.cpp csrc/*.h csrc/*/*.cpp csrc/*/*.h csrc/cuda/*.cu* tests/csrc/*.cpp tests/csrc/*.h \
	tests/csrc/*/*.h tests/gpu/shim/*)

.PHONY: help install demo test test-all test-gpu test-gpu-emulated bench-gpu sanitize lint format bench bench-charts bench-sweep bench-memory clean

help:
	@echo "make demo      set up, then compress a pretrained model and measure it"
	@echo "make test      set up, then lint, type check and the fast tests"
	@echo "make test-all  the slow tests too"
	@echo "make sanitize  the kernels alone, under the address and undefined-behaviour sanitizers"
	@echo "make test-gpu-emulated  GPU kernels interpreted, compiled, emulated; no GPU needed"
	@echo "make test-gpu  GPU kernels against the references, on this machine's GPU; with TORCH=torch for a torch with CUDA"
	@echo "make bench-gpu the same kernels' times, beside torch's"
	@echo "make bench     benchmarks against other libraries, each in a process of its own; over an hour"
	@echo "make bench-charts  tables and pictures of their results, in docs/benchmarks"
	@echo "make bench-sweep   our layer and attention, and torch's, against the number of tokens and of zeros"
	@echo "make bench-memory  memory of one attention against the number of tokens"
	@echo "make format    format all sources"

install: $(VENV)/.installed

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.torch: | $(BIN)/python
	$(BIN)/python -m pip install -q "$(TORCH)" numpy
	$(BIN)/python -m pip install -q "setuptools>=77" wheel "pybind11>=2.12" ninja
	touch $@

# The build is incremental: ninja compiles only what changed.
$(VENV)/.installed: $(VENV)/.torch $(BUILD_INPUTS)
	TCOMPRESS_REQUIRE_EXT=1 $(BIN)/python -m pip install -q --no-build-isolation -e ".[dev]"
	touch $@

demo: install
	$(BIN)/python -m tcompress demo

test: lint
	$(PYTEST)

test-all: lint
	$(PYTEST) -m "slow or not slow"

# The emulators, interpreters and compilers of GPU code: what can be shown without a GPU.
test-gpu-emulated: $(VENV)/.gpu
	OMP_NUM_THREADS=1 $(PYTEST) tests/gpu -m "slow or not slow"

test-gpu: $(VENV)/.gpu
	$(BIN)/pytest tests/gpu/test_on_gpu.py

bench-gpu: $(VENV)/.gpu
	$(BIN)/python benchmarks/gpu_ops.py

$(VENV)/.gpu: $(VENV)/.installed
	$(BIN)/python -c "import triton" 2>/dev/null || $(BIN)/python -m pip install -q "$(TRITON)"
	touch $@

sanitize: install
	$(BIN)/pytest tests/csrc/test_kernels_standalone.py -m "slow or not slow"

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(CPP)
	$(BIN)/mypy

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP)

$(VENV)/.bench: $(VENV)/.installed
	$(BIN)/python -m pip install -q --no-build-isolation -e ".[bench]"
	touch $@

RESULTS := docs/benchmarks

bench: $(VENV)/.bench
	$(BIN)/python benchmarks/run.py --op int8_linear --json $(RESULTS)/int8_linear.json
	$(BIN)/python benchmarks/run.py --op int4_linear --json $(RESULTS)/int4_linear.json
	$(BIN)/python benchmarks/run.py --op sparse_linear --shape=-80% --shape=2:4 --json $(RESULTS)/sparse_linear.json
	$(BIN)/python benchmarks/run.py --op attention --json $(RESULTS)/attention.json
	$(BIN)/python benchmarks/run.py --op decode_attention --json $(RESULTS)/decode_attention.json

bench-charts: $(VENV)/.bench
	$(BIN)/python benchmarks/chart.py $(RESULTS)/int8_linear.json
	$(BIN)/python benchmarks/chart.py $(RESULTS)/int4_linear.json
	$(BIN)/python benchmarks/chart.py $(RESULTS)/sparse_linear.json
	$(BIN)/python benchmarks/chart.py $(RESULTS)/attention.json
	$(BIN)/python benchmarks/chart.py $(RESULTS)/decode_attention.json

bench-sweep: $(VENV)/.bench
	$(BIN)/python benchmarks/sweep_m.py
	$(BIN)/python benchmarks/sweep_s.py
	$(BIN)/python benchmarks/sweep_sparsity.py

bench-memory: $(VENV)/.bench
	$(BIN)/python benchmarks/attention_memory.py

clean:
	rm -rf build tcompress/_C*.so *.egg-info
