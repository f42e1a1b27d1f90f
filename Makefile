# `make demo` and `make test` do everything on a fresh machine; each makes .venv when it is missing.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo census test quick lint package bench clean

demo: $(VENV)/installed
	$(BIN)/moe-lens demo --output report.html

# Every active expert at every token of all bundled text: 9.6 million ablations, by what a part of it took 8 minutes on
# two free cores and 25 on one busy one. A killed one goes on where it was. The page is census/index.html.
census: $(VENV)/installed
	$(BIN)/moe-lens census mini --corpus bundled --dtype float32 --output census

# A worker on each core; a file's tests stay together, and with them the checkpoints that they share.
test: $(VENV)/installed
	$(BIN)/python -m pytest -n auto --dist loadfile

quick: $(VENV)/installed
	$(BIN)/python -m pytest -m "not slow"

lint: $(VENV)/installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	# pyright reads the package as it is installed, where moe_lens.converters is in its place.
	# What an earlier build left would be installed with it.
	rm -rf build/installed build/lib
	$(BIN)/pip install --quiet --no-deps --target build/installed .
	$(BIN)/pyright --pythonpath $(BIN)/python

package: $(VENV)/installed
	rm -rf build/lib dist
	$(BIN)/python -m build --wheel --outdir dist .

bench: $(VENV)/installed
	$(BIN)/python benchmarks/forward.py
	$(BIN)/python benchmarks/contributions.py
	$(BIN)/python benchmarks/census.py
	$(BIN)/python benchmarks/load_memory.py
	$(BIN)/python benchmarks/interop.py
	$(BIN)/python benchmarks/peers.py

# torch first and pinned, so that nothing pulls another build of it.
$(VENV)/installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt torch
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[test]"
	touch $@

clean:
	rm -rf build dist $(VENV) report.html report-tables *.egg-info
