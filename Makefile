# make demo       converts, fine-tunes, generates, exports and reloads a small Qwen3-MoE; a few minutes on two cores
# make test       the test suite, on the CPU, in WORKERS processes (default: 2), then test-kernels.
#                 PYTEST_ARGS selects tests; then test-kernels does not run
# make test-kernels   the tests of the GPU kernels in JAX's interpreter, on the CPU, with the newest supported jax
# make test-mesh  training, generation and captures on sixteen virtual CPU devices, and in two to eight processes, against
#                 one device; about 15 minutes on two cores. make test runs the part that has all pairs of axes, in less
#                 than two
# make dist       builds the sdist and the wheel into dist/, checks them, installs the wheel into an empty environment, and
#                 runs every command from there; half a minute
# make lint       ruff and pyright
# make test-gpu   the test suite on a machine with a GPU, with the packages of $(PYTHON); installs nothing
# make notebooks  executes the notebooks in place; a few minutes
# make docs       the site with the API reference and the notebooks, in site/; a broken link is an error
# make bench      the CPU benchmarks of docs/performance.md
# make bench-gpu  the GPU benchmarks, with the packages of $(PYTHON): training step, prefill, decoding, MoE block, first
#                 step, loading, training and watching the router
# make parity     transformers, torch_ref and jaxmoe on the demo checkpoint, number by number, with a report
# make parity-gpu the same on a GPU, with a 24-layer model trained there and the shape of Qwen3-30B-A3B; installs nothing
# make peer-tests TRANSFORMERS=DIR PEFT=DIR   tests of transformers and PEFT on torch_ref's classes; docs/peer-tests.md
# make bench-torch-gpu   a LoRA step of torch_ref beside transformers + PEFT at Qwen3-30B-A3B's size; needs 80 GB or more
# make kill N=100 SEED=0 JOBS=1   kill -9, SIGTERM and SIGINT at random moments of every command that writes;
#                 SIGNALS=INT,TERM chooses among them
# make full-disk N=84   a disk that is full from some write on, in every command that writes
# make bit-flips N=300  flipped bits in training checkpoints; also with SEED and JOBS, as make kill
# make fuzz N=1000    mutated files, odd flags and odd environments against every command; also with SEED and JOBS
# make clean      removes what the other targets made
#
# demo, test, lint, notebooks, docs, parity and bench create their own environment in .venv the first time: CPU builds,
# every version pinned. They need Python 3.11 or newer with pip, and a package index. PyTorch's CPU build comes from pip's
# own index if it has one, otherwise from TORCH_INDEX: `make demo TORCH_INDEX=https://a.mirror/whl/cpu`.
#
# test-kernels creates a second environment, .venv-kernels, without PyTorch. It needs Python 3.12 or newer, found on PATH
# or in pyenv, or named with KERNELS_PYTHON=... Without one it does nothing.

PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
VENV ?= .venv
WORKERS ?= 2
PYTEST_ARGS ?=

KERNELS_VENV ?= .venv-kernels
KERNELS_PYTHON ?= $(shell for p in python3.13 python3.12 python3 $(wildcard $(or $(PYENV_ROOT),$(HOME)/.pyenv)/versions/3.1[2-9]*/bin/python); do \
	$$p -c 'import ensurepip, sys; sys.exit(sys.version_info < (3, 12))' 2>/dev/null && echo $$p && break; done)
# The longest come first; otherwise one process would still run them while the others are idle.
KERNEL_TESTS := $(addprefix tests/test_,decoding_mosaic.py few_rows.py swiglu_gradient.py norm_rotary.py kernels.py hopper_e4m3.py ampere.py flash.py implementations.py cudnn.py)

INSTALLED := $(VENV)/.installed
KERNELS_INSTALLED := $(KERNELS_VENV)/.installed
RUN := $(VENV)/bin/python
PIP := $(RUN) -m pip install --quiet --quiet --disable-pip-version-check --constraint constraints-cpu.txt
verdict = && echo "make $@: passed" || { echo "make $@: FAILED"; exit 1; }

.PHONY: help demo test test-kernels test-mesh dist lint notebooks test-gpu parity parity-gpu bench bench-gpu bench-torch-gpu clean

help:
	@sed -n 's/^# \(make [a-z-]*  *\)/\1/p' Makefile

$(INSTALLED): pyproject.toml constraints-cpu.txt
	@test -n "$(PYTHON)" || { echo "make: needs Python 3.11 or newer, found none; name one with PYTHON=..." >&2; exit 2; }
	@echo "Setting up $(VENV) with $$($(PYTHON) --version): about 0.7 GB to download, a few minutes the first time ..."
	@$(PYTHON) -m venv $(VENV)
	@$(PIP) --no-deps torch 2>/dev/null || { echo "PyTorch's CPU build: trying $(TORCH_INDEX)"; \
		$(PIP) --no-deps torch --index-url $(TORCH_INDEX); }
	@$(PIP) --editable '.[torch,notebooks,dev]'
	@touch $@

demo: $(INSTALLED)
	@$(RUN) -m examples.demo

# The tests of the kernels run once: in test-kernels, if that has an interpreter. With worksteal each process gets whole
# modules, so most of what the tests of a module share is made once.
test: $(INSTALLED)
	@JAX_PLATFORMS=cpu $(RUN) -m pytest --numprocesses $(WORKERS) --dist worksteal \
		$(or $(PYTEST_ARGS),$(if $(KERNELS_PYTHON),$(KERNEL_TESTS:%=--ignore=%))) $(verdict)
	@$(if $(PYTEST_ARGS),:,$(MAKE) --no-print-directory test-kernels)

$(KERNELS_INSTALLED): pyproject.toml constraints-kernels.txt
	@echo "Setting up $(KERNELS_VENV) with $$($(KERNELS_PYTHON) --version): about 0.3 GB to download ..."
	@$(KERNELS_PYTHON) -m venv $(KERNELS_VENV)
	@$(KERNELS_VENV)/bin/python -m pip install --quiet --quiet --disable-pip-version-check \
		--constraint constraints-kernels.txt --editable . beartype hypothesis pytest pytest-xdist
	@touch $@

ifeq ($(KERNELS_PYTHON),)
test-kernels:
	@echo "make test-kernels: skipped, needs Python 3.12 or newer and found none; name one with KERNELS_PYTHON=..."
else
test-kernels: $(KERNELS_INSTALLED)
	@JAX_PLATFORMS=cpu $(KERNELS_VENV)/bin/python -m pytest --numprocesses $(WORKERS) --dist worksteal \
		$(KERNEL_TESTS) $(verdict)
endif

test-mesh: $(INSTALLED)
	@JAX_PLATFORMS=cpu XLA_FLAGS=--xla_force_host_platform_device_count=16 $(RUN) -m pytest tests/mesh $(verdict)

dist: $(INSTALLED)
	@$(RUN) -m tests.dist $(verdict)

lint: $(INSTALLED)
	@$(VENV)/bin/ruff check . && $(VENV)/bin/ruff format --check . && $(VENV)/bin/pyright --pythonpath $(RUN) $(verdict)

# Float32 in full precision and deterministic kernels, as on the CPU. No autotuning, because hundreds of small programs
# would be tuned to run once. PYTEST_ARGS="-n 12" uses several processes, with pytest-xdist.
test-gpu:
	@$(PYTHON) -c 'import jax, sys; sys.exit(jax.default_backend() != "gpu" and "make test-gpu: JAX finds no GPU")'
	@JAX_DEFAULT_MATMUL_PRECISION=highest XLA_FLAGS="$(XLA_FLAGS) --xla_gpu_deterministic_ops=true --xla_gpu_autotune_level=0" \
		$(PYTHON) -m pytest $(PYTEST_ARGS) $(verdict)

notebooks: $(INSTALLED)
	@JAX_PLATFORMS=cpu $(RUN) -m notebooks $(verdict)

.PHONY: docs
DOCS := $(VENV)/.docs
$(DOCS): $(INSTALLED)
	@$(PIP) --editable '.[docs]'
	@touch $@

# Not --quiet: with it, warnings do not count as errors.
docs: $(DOCS)
	@NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build --strict $(verdict)

parity: $(INSTALLED)
	@rm -rf parity-output/demo
	@$(RUN) -m tests.parity.suite demo --device cpu --out parity-output/demo $(verdict)

# Needs 70 GB in a folder on DISK, which should be memory-backed. The folder is removed at the end. The report needs matplotlib.
DISK ?= /dev/shm
SCRATCH = $(DISK)/jaxmoe-parity
SUITES = demo deep large
parity-gpu:
	@rm -rf $(SCRATCH) $(SUITES:%=parity-output/%-gpu) && mkdir -p $(SCRATCH) $(SUITES:%=parity-output/%-gpu)
	@PYTHON=$(PYTHON) bash examples/pretrain/run.sh deep $(SCRATCH)/trained
	@$(PYTHON) -m tests.parity.large $(SCRATCH)/checkpoint-large
	@{ $(PYTHON) -m tests.parity.suite demo --device gpu --parallel 10 --out $(SCRATCH)/demo; \
	  $(PYTHON) -m tests.parity.suite deep --checkpoint $(SCRATCH)/trained/run/model --device gpu --parallel 6 --out $(SCRATCH)/deep; \
	  $(PYTHON) -m tests.parity.suite large --checkpoint $(SCRATCH)/checkpoint-large --device gpu --out $(SCRATCH)/large; \
	  for suite in $(SUITES); do for what in results.json flips.csv.gz report minimal; do \
	    cp -r $(SCRATCH)/$$suite/$$what parity-output/$$suite-gpu/ 2>/dev/null; done; done; rm -rf $(SCRATCH); \
	  $(PYTHON) -m tests.parity.results $(SUITES:%=parity-output/%-gpu/results.json); } $(verdict)

.PHONY: peer-tests
peer-tests: $(INSTALLED)
	@$(RUN) -m tests.peer "$(TRANSFORMERS)" "$(PEFT)" $(verdict)

bench: $(INSTALLED)
	@JAX_PLATFORMS=cpu $(RUN) -m benchmarks.train_cpu
	@JAX_PLATFORMS=cpu $(RUN) -m benchmarks.compile_time

bench-gpu:
	@$(PYTHON) -m benchmarks.train_step --stages
	@$(PYTHON) -m benchmarks.prefill --stages
	@$(PYTHON) -m benchmarks.decode
	@$(PYTHON) -m benchmarks.decode --quantize nf4
	@$(PYTHON) -m benchmarks.moe_block
	@$(PYTHON) -m benchmarks.grouped_matmul
	@$(PYTHON) -m benchmarks.first_step
	@$(PYTHON) -m benchmarks.load --converted
	@$(PYTHON) -m benchmarks.routing_lab --layers 12

# As in test-gpu, with the packages of $(PYTHON), which must include bitsandbytes.
bench-torch-gpu:
	@$(PYTHON) -m benchmarks.torch_ref_step

# Trials of docs/reliability.md: each prints tried, refused, accepted and wrong, and fails if anything was wrong.
SEED ?= 0
JOBS ?= 1
TRIALS = JAX_PLATFORMS=cpu $(RUN) -m reliability.$(1) --seed $(SEED) --jobs $(JOBS) $(if $(N),--number $(N))

.PHONY: kill full-disk bit-flips fuzz
kill: $(INSTALLED)
	@SIGNALS=$(SIGNALS) $(call TRIALS,kill)

full-disk: $(INSTALLED)
	@$(call TRIALS,full_disk)

bit-flips: $(INSTALLED)
	@$(call TRIALS,bit_flips)

fuzz: $(INSTALLED)
	@$(call TRIALS,fuzz)

clean:
	rm -rf $(VENV) $(KERNELS_VENV) build dist demo-output pretrain-output parity-output *.egg-info .pytest_cache .ruff_cache .hypothesis
	rm -rf site .cache
