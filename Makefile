# `make demo` and `make test` set up what they need from nothing, into .venv.

PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed
# Releases of transformers, beside the one in constraints.txt, that `make compat` runs the integration's tests on.
COMPAT ?= 4.57.6
COMPAT_TESTS := $(wildcard tests/integrations/test_transformers*.py)

# The extra that brings CuPy and NVRTC, with which kernels are compiled without a GPU. macOS has neither.
CUDA ?= $(if $(filter Darwin,$(shell uname)),,cuda13)

# Releases of NVRTC, beside the one in constraints.txt, with which `make compat` compiles some of every kernel: the oldest.
COMPAT_NVRTC ?= $(if $(CUDA),12.4.127)

# Tests at a time, one for each core but 8 at most, which share a GPU; 0 runs them in one process.
JOBS ?= auto

comma := ,

.DEFAULT_GOAL := help
.PHONY: help venv test lint format types pytest compat compile sanitize demo doctor clean

help:  ## print this
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-8s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

venv: $(STAMP)  ## install the package and its development tools into .venv

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "twilight needs Python 3.10 or newer: make PYTHON=...")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[hf,eval,sweep,report,dev$(CUDA:%=$(comma)%)]'
	@touch $@

test: lint types $(CUDA:%=compile) pytest compat  ## lint, types, kernels, tests, and what `compat` does

lint: $(STAMP)  ## ruff: rules and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(STAMP)  ## let ruff repair what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: $(STAMP)  ## mypy
	$(BIN)/mypy

pytest: $(STAMP)  ## the tests, JOBS at a time
	$(BIN)/python -m pytest -n $(JOBS) --maxprocesses 8 --dist worksteal

compat: $(COMPAT:%=compat-%) $(COMPAT_NVRTC:%=compat-nvrtc-%)  ## the integration's tests on the releases of transformers in COMPAT, some of every kernel with those of NVRTC in COMPAT_NVRTC

compat-%: .compat/%/.installed
	.compat/$*/bin/python -m pytest --quiet $(COMPAT_TESTS)

compat-nvrtc-%: .compat/nvrtc-%/.installed
	.compat/nvrtc-$*/bin/python -W ignore tests/compat/nvrtc.py sm_90

# Kept: make would remove them as intermediate files.
.PRECIOUS: .compat/%/.installed .compat/nvrtc-%/.installed

# A venv that sees .venv behind its own packages: pip then adds what is to be older, and leaves torch where it is.
# addsitedir, unlike a plain path, also follows the editable install.
.compat/nvrtc-%/.installed: $(STAMP)
	$(behind_venv)
	$(BIN)/python -m pip --python $(@D)/bin/python install --quiet --disable-pip-version-check --no-deps -c constraints.txt \
		cupy-cuda12x 'nvidia-cuda-nvrtc-cu12==$*' 'nvidia-cuda-runtime-cu12==$*'
	@touch $@

.compat/%/.installed: $(STAMP)
	$(behind_venv)
	$(BIN)/python -m pip --python $(@D)/bin/python install --quiet --disable-pip-version-check 'transformers==$*'
	@touch $@

define behind_venv
rm -rf $(@D)
$(BIN)/python -m venv --without-pip $(@D)
site=$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))'); \
echo "import site; site.addsitedir('$$site')" > $$($(@D)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/outer.pth
endef

compile: $(STAMP)  ## compile every CUDA kernel, which needs no GPU; what has not changed is not compiled twice
	$(BIN)/twilight kernels compile

sanitize:  ## run every kernel under compute-sanitizer, which needs a GPU; SANITIZE='--tool racecheck --kernel top_p'
	$(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON)) tests/sanitizer/sweep.py $(SANITIZE)

demo: $(STAMP)  ## decode a long prompt with the small model, and show what that saved
	$(BIN)/python examples/decode.py selector=quest p=0.95 task.plot=outputs/budget.png

doctor: $(STAMP)  ## check what works on this machine
	$(BIN)/twilight doctor

clean:  ## remove what the other targets made
	rm -rf .venv .compat .compiled build dist *.egg-info outputs multirun .pytest_cache .hypothesis .mypy_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
