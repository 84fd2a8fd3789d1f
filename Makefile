# Set-up happens in .venv, at the first use of any target.
PYTHON ?= python3
BIN = .venv/bin

.PHONY: run test lint format bench
run: .venv/installed
	$(BIN)/tspc $(ARGS)

test: .venv/installed
	$(BIN)/pytest --slow $(ARGS)

lint: .venv/installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/basedpyright --pythonpath $(BIN)/python

format: .venv/installed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# make bench DATA=cifar WEIGHTS=resnet32.pt
bench: .venv/installed
	$(BIN)/python -m benchmarks.cifar10_table --data $(DATA) --weights $(WEIGHTS)

.venv/installed: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -e '.[dev]'
	touch $@
