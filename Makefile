# Every target is a plain command or two; the README shows them without make.
PYTHON ?= python3
VENV ?= .venv

.PHONY: demo test lint slow

$(VENV)/.installed: requirements.txt pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --editable .
	touch $@

$(VENV)/.installed-dev: requirements.txt requirements-dev.txt pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --requirement requirements-dev.txt --editable .
	touch $@

demo: $(VENV)/.installed
	$(VENV)/bin/python -m lawcat_jax.train --config=configs/tiny.py --workdir=runs/tiny

test: $(VENV)/.installed-dev
	$(VENV)/bin/python -m pytest

slow: $(VENV)/.installed-dev
	$(VENV)/bin/python -m pytest -m slow

lint: $(VENV)/.installed-dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/lint-imports --no-cache
	$(VENV)/bin/pyright --pythonpath $(VENV)/bin/python
