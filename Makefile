# Everything sets itself up: `make demo` and `make test` need only Python 3.11+ and pip.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip --disable-pip-version-check
# One process a core; what is left of one's tests goes to the next. WORKERS= runs them in one process.
WORKERS ?= -n auto --dist worksteal
KERNEL_TESTS := $(addprefix tests/test_,$(addsuffix .py,attack_faults attack_folder attacks attacks_first_order \
	attacks_foreign attacks_minimal attacks_options autoattack \
	blackbox ead fmn hopskipjump sparse_rs transfer_attacks jsma patch attackers fused_copy models_at_the_door evaluation grid cascade ladder benchmarking identity door \
	own_parts))

.PHONY: demo reproduce test test-kernels lint bench docs clean

demo: $(VENV)/.installed
	$(BIN)/unperturb demo

# The paper's tables and figures: all, or PARTS="mnist table1-cifar10". Goes on where it was stopped.
reproduce: $(VENV)/.installed
	$(BIN)/unperturb reproduce $(PARTS)

test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest $(WORKERS)

# The tests of attacks and evaluation once more with the plainest kernels: a verdict that hangs on last bits fails here.
test-kernels: $(VENV)/.installed-dev
	ATEN_CPU_CAPABILITY=default ONEDNN_MAX_CPU_ISA=SSE41 $(BIN)/python -m pytest $(WORKERS) $(KERNEL_TESTS)

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/.installed-dev
	$(BIN)/python benchmarks/training.py

# The documentation site, in site/. A broken link or anchor, or a page that stands nowhere, is an error.
docs: $(VENV)/.installed-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict
	@echo "Open site/index.html. While you write: $(BIN)/mkdocs serve"

$(VENV)/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install -q -c constraints.txt -e .
	touch $@

$(VENV)/.installed-docs: $(VENV)/.installed
	$(PIP) install -q -c constraints.txt -e ".[docs]"
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(PIP) install -q -c constraints.txt -e ".[dev,docs,onnx,serve,app,ray]"
	# Without its dependencies: torchattacks 3.5.1 pins old versions of packages that `datasets` needs newer.
	$(PIP) install -q --no-deps torchattacks==3.5.1
	touch $@

clean:
	rm -rf $(VENV) site .mypy_cache .pytest_cache .ruff_cache
