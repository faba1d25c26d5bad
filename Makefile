# `make test` does all its own set-up.
PYTHON ?= python3
RUN := .venv/bin/python

# uv when it is there (much faster), pip when not.
ifneq ($(shell command -v uv 2>/dev/null),)
  VENV := uv venv --quiet --allow-existing --python $(PYTHON) .venv
  INSTALL := uv pip install --quiet --python $(RUN)
else
  VENV := $(PYTHON) -m venv .venv
  INSTALL := $(RUN) -m pip install --quiet
endif

.PHONY: setup setup-dev test slow lint clean

setup: .venv/installed
setup-dev: .venv/installed-dev

.venv/installed: requirements.txt pyproject.toml
	$(VENV)
	$(INSTALL) -r requirements.txt
	$(INSTALL) --no-deps -e .
	touch $@

.venv/installed-dev: requirements-dev.txt .venv/installed
	$(INSTALL) -r requirements-dev.txt
	touch $@

test: setup-dev lint
	$(RUN) -m pytest

slow: setup-dev
	$(RUN) -m pytest -m slow

lint: setup-dev
	$(RUN) -m ruff check .
	.venv/bin/lint-imports

clean:
	rm -rf .venv runs
