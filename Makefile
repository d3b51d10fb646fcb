# Every target makes the environment it needs, once, and repeats nothing.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: demo test test-families test-loaded test-zoo test-training test-benchmarks bench-quick quality docs peft-suite clean

# Markers: made when the installation succeeded, older than the files that it depends on when it must be repeated.
$(VENV)/.made:
	$(PYTHON) -m venv $(VENV)
	touch $@

$(VENV)/.demo: $(VENV)/.made setup.cfg pyproject.toml constraints.txt
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[cli,examples]'
	touch $@

$(VENV)/.dev: $(VENV)/.made setup.cfg pyproject.toml constraints.txt
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

$(VENV)/.bench: $(VENV)/.made setup.cfg pyproject.toml constraints.txt
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[bench]'
	touch $@

$(VENV)/.peft-suite: $(VENV)/.made setup.cfg pyproject.toml constraints.txt
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[peft_suite]'
	touch $@

$(VENV)/.docs: $(VENV)/.made setup.cfg pyproject.toml constraints.txt
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[docs]'
	touch $@

# Trains two small teachers on data that installed packages carry, and slims them. `make demo QUICK=--quick` is shorter.
demo: $(VENV)/.demo
	$(BIN)/hawada demo $(QUICK)

# A file's tests share what they build, so a file stays in one process; tests/conftest.py says which begin.
PARALLEL := --numprocesses 2 --dist loadfile --no-loadscope-reorder

test: $(VENV)/.dev
	$(BIN)/python -m pytest $(PARALLEL)

# All cases, those as well that another one stands for, most often a family (`further` in tests/conftest.py).
test-families: $(VENV)/.dev
	$(BIN)/python -m pytest $(PARALLEL) --all-families

# The suite three times in a row with four busy loops beside it: no test may depend on how fast the machine is just now.
LOOPS ?= 4
TIMES ?= 3
test-loaded: $(VENV)/.dev
	tests/under_load.sh $(LOOPS) $(TIMES) $(BIN)/python -m pytest $(PARALLEL)

# What can be removed of every type of the zoo, proved; writes the table of docs/families.md. About ten minutes of one core.
test-zoo: $(VENV)/.dev
	$(BIN)/python tests/zoo_table.py

# A training and an export for each modality; writes a table of docs/families.md. About a minute of one core.
test-training: $(VENV)/.dev
	$(BIN)/python tests/training_table.py

# The benchmarks' own tests: they run on tiny models, and time nothing.
test-benchmarks: $(VENV)/.bench
	$(BIN)/python -m pytest benchmarks/tests

# One column of the benchmarks from nothing but the installed packages, resumable. About ten minutes of one core.
bench-quick: $(VENV)/.bench
	$(BIN)/python benchmarks/quick.py

quality: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The docs site, in site/; warnings are errors. MkDocs would add an advertisement of its successors to them.
docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build

# PEFT's own tests, pointed at this tuner; fetches PEFT's source distribution.
peft-suite: $(VENV)/.peft-suite
	$(BIN)/python tests/peft_suite/run.py

clean:
	rm -rf $(VENV) demo-output quick-output build site *.egg-info .pytest_cache .mypy_cache .ruff_cache
