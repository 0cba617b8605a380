# Two commands set everything up on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
VENV ?= .venv
JOBS ?= 2
# Extra words for the torch install, such as `--index-url ...` for another build of it.
TORCH_ARGS ?=
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
READY := $(VENV)/.ready

# Without it two busy cores spend most of their time waiting for each other.
export OMP_WAIT_POLICY := PASSIVE

.PHONY: help install demo test lint format type docs browser bench clean
help:
	@echo "make demo    render data, train, evaluate and predict on the embedded default (minutes)"
	@echo "make test    all tests, doctests and documented code blocks"
	@echo "make lint type docs browser bench format clean"

install: $(READY)
$(READY): pyproject.toml constraints.txt requirements/headless.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install -q -c constraints.txt torch $(TORCH_ARGS)
	$(PIP) install -q -c constraints.txt -r requirements/headless.txt
	$(PIP) install -q -c constraints.txt --no-deps mediapipe
	$(PIP) install -q -c constraints.txt --no-deps torchaudio
	# Its wheel is linked to CUDA; beside a CPU torch only its Python part can load, and does.
	$(BIN)/python -c "import torch, sys; sys.exit(torch.version.cuda is None)" \
	  || find $(VENV)/lib -path '*/torchaudio/*' -name '*.so' -delete
	$(PIP) install -q -c constraints.txt hatchling editables
	$(PIP) install -q -c constraints.txt --no-build-isolation -e ".[encoders,video,plot,docs,dev]"
	touch $@

demo: $(READY)
	$(BIN)/python recipes/affwild2_au.py demo

test: $(READY)
	$(BIN)/python -m pytest -q -n $(JOBS) --dist loadfile -m "not gpu and not browser"

lint: $(READY)
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .

format: $(READY)
	$(BIN)/python -m ruff check --fix .
	$(BIN)/python -m ruff format .

type: $(READY)
	$(BIN)/python -m mypy

# A strict build writes before it fails, so the site is published only when it succeeded.
docs: $(READY)
	$(BIN)/python docs/_gallery.py examples build/gallery
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --site-dir build/site
	rm -rf site && mv build/site site

browser: $(READY)
	$(BIN)/python -m pytest -q -m browser tests/docs

bench: $(READY)
	for script in benchmarks/[!_]*.py; do $(BIN)/python $$script || exit 1; done

clean:
	rm -rf build dist site .pytest_cache .mypy_cache .ruff_cache .hypothesis
