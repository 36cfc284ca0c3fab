# Each target works alone from a bare clone: it makes .venv, installs the pinned dependencies and goes on.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo plugin test lint clean
.DEFAULT_GOAL := test

$(VENV)/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "fqonnx needs Python 3.11 or newer: make PYTHON=/path/to/python3.11")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[cuda-build,dev,samples,tensorrt-rtx,text]'
	@touch $@

demo: $(VENV)/installed ## build MiniLM W4A4 and print what it proved
	$(BIN)/python samples/minilm.py

plugin: $(VENV)/installed ## compile the kernels' library
	$(BIN)/fqonnx plugin build

test: $(VENV)/installed ## run the tests, with the coverage gate
	$(BIN)/python -m pytest --cov --cov-report=term-missing:skip-covered

lint: $(VENV)/installed ## style, format, types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) build dist out *.egg-info .coverage .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
