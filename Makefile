# Every command of this project. Each sets up .venv first if it has to.
.PHONY: help venv servers hosts ray peers gpu demo test test-states test-quick test-lightning-versions test-floors test-newest check wheel-test bench bench-against bench-storage bench-cli bench-performance bench-ranks bench-lightning bench-transformers docs format clean

PYTHON ?= python3
VENV ?= .venv
PYTEST_ARGS ?= -n auto --dist worksteal

BIN := $(abspath $(VENV))/bin
STAMP := $(VENV)/.installed
EXAMPLES := $(wildcard examples/*.py)

help:
	@echo "make demo        train a small net, kept and resumed by a manager"
	@echo "make test        every test"
	@echo "make test-states  search the orders of the operations of several writers of one run, most of them to the end; an hour or more"
	@echo "make test-quick  every test but those that kill processes"
	@echo "make test-lightning-versions  the tests of Lightning with its versions 2.4, 2.5 and 2.6"
	@echo "make test-floors  the quick tests with the oldest versions that pyproject.toml allows"
	@echo "make test-newest  the quick tests with the newest versions that there are"
	@echo "make check       format, lint, types, import contracts, doctests, README, examples"
	@echo "make wheel-test  build the wheel and use it in an empty environment; compare the commands with Python 3.10's"
	@echo "make servers     install the servers and fault tools that some tests use"
	@echo "make docs        build the documentation into docs/_build, offline"
	@echo "make hosts       install the frameworks that some tests and pages use"
	@echo "make ray         run every test of Ray Train and its page; ten minutes"
	@echo "make bench       measure beside the raw operations"
	@echo "make bench-against REV=...  measure steps, saves and opening beside those of another commit; seven minutes"
	@echo "make bench-cli   measure each command on 10 000 checkpoints and on 2 GB; five minutes"
	@echo "make bench-storage  measure 1 GB to S3 beside plain s3fs and botocore; needs make servers"
	@echo "make peers       install what bench-performance compares with, into .venv-peers"
	@echo "make bench-performance BEFORE=...  one table of what saves and restores of 1 GB cost, beside others; 15 minutes"
	@echo "make gpu         what a CUDA device adds, measured and checked in six minutes; DEVICE=cpu is a dry run"
	@echo "make bench-ranks BEFORE=...  measure what several processes pay: agreement, saves and restores of shards beside DCP's"
	@echo "make bench-transformers  measure a Trainer's step with the callback; needs make hosts"
	@echo "make bench-lightning  measure saves in Lightning beside its own class"
	@echo "make format      let ruff format and fix"

venv: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	"$(BIN)/python" -m pip install --quiet -c constraints.txt pip setuptools
	"$(BIN)/python" -m pip install --quiet -c constraints.txt --no-build-isolation -e '.[test]'
	@touch $@ $(VENV)/.demo

servers: venv
	"$(BIN)/python" -m pip install --quiet -c constraints.txt --no-build-isolation -e '.[test,servers]'
	PYTHON="$(BIN)/python" .ci/install-servers

hosts: venv
	"$(BIN)/python" -m pip install --quiet -c constraints.txt --no-build-isolation -e '.[test,hosts,pages,ray]'

# CI runs the page, and of the tests the one that kills workers, once.
ray: servers hosts
	"$(BIN)/python" -m pytest -n 0 tests/hosts/test_ray.py docs/ray.md

# Apart from .venv, because the tests must not depend on what is installed here.
PEERS := $(abspath .venv-peers)

peers: $(PEERS)/.installed

$(PEERS)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv "$(PEERS)"
	"$(PEERS)/bin/python" -m pip install --quiet -c constraints.txt pip setuptools
	"$(PEERS)/bin/python" -m pip install --quiet -c constraints.txt --no-build-isolation -e '.[peers]'
	@touch $@

# Without the packages of the tests. If they are installed, so is this.
demo: $(VENV)/.demo
	"$(BIN)/python" examples/digits_loop.py

$(VENV)/.demo: pyproject.toml constraints.txt
	@echo "Installing into $(VENV) what the demo needs: this package, torch, scikit-learn, rich, typer"
	$(PYTHON) -m venv $(VENV)
	"$(BIN)/python" -m pip install --quiet -c constraints.txt pip setuptools
	"$(BIN)/python" -m pip install -c constraints.txt --no-build-isolation -e '.[demo]'
	@touch $@

test: venv
	"$(BIN)/python" -m pytest $(PYTEST_ARGS)

test-states: venv
	CHECKPOINTER_STATES=all "$(BIN)/python" -m pytest -n 0 -s -k no_order tests/commit/test_interleavings.py

test-quick: venv
	"$(BIN)/python" -m pytest $(PYTEST_ARGS) -m 'not slow'

test-lightning-versions:
	PYTHON="$(PYTHON)" .ci/test-lightning-versions $(LIGHTNING)

test-floors:
	PYTHON="$(PYTHON)" .ci/test-versions lowest-direct

test-newest:
	PYTHON="$(PYTHON)" .ci/test-versions highest

check: venv
	"$(BIN)/ruff" format --check
	"$(BIN)/ruff" check
	"$(BIN)/mypy"
	"$(BIN)/lint-imports"
	"$(BIN)/python" .ci/check-words
	"$(BIN)/python" -m pytest --doctest-modules checkpointer adapters/checkpointer_torch
	"$(BIN)/python" -m pytest README.md docs
	@# In an empty folder, and then in the one that this left: people start their programs more than once.
	@set -e; for example in $(EXAMPLES); do \
		case $$example in *lightning*|*fabric*) "$(BIN)/python" -c "import lightning" 2>/dev/null || \
			{ echo "$$example skipped: needs torch-checkpointer[lightning]"; continue; };; \
		*transformers*|*accelerate*) "$(BIN)/python" -c "import accelerate, transformers" 2>/dev/null || \
			{ echo "$$example skipped: needs torch-checkpointer[transformers]"; continue; };; \
		*_ray*) echo "$$example skipped: tests/hosts/test_ray.py runs it"; continue;; esac; \
		echo "$$example"; \
		folder=$$(mktemp -d); \
		(cd "$$folder" && for again in 1 2; do "$(BIN)/python" "$(CURDIR)/$$example" || exit 1; done); \
		rm -rf "$$folder"; \
	done

wheel-test: venv
	rm -rf build dist
	"$(BIN)/python" -m build --wheel --no-isolation
	set -e; folder=$$(mktemp -d); trap 'rm -rf "$$folder"' EXIT; \
	$(PYTHON) -m venv "$$folder/venv"; \
	"$$folder/venv/bin/python" -m pip install --quiet --no-compile -c constraints.txt dist/*.whl; \
	cp tests/smoke.py "$$folder"; \
	cd "$$folder"; \
	venv/bin/python -I smoke.py
	.ci/test-oldest-python "$(BIN)/python"

bench: venv
	"$(BIN)/python" benchmarks/run.py
	"$(BIN)/python" benchmarks/loop.py

bench-against: venv
	"$(BIN)/python" benchmarks/against.py $(REV)

bench-cli: venv
	"$(BIN)/python" benchmarks/cli.py

bench-storage: servers
	PYTHONPATH=tests "$(BIN)/python" benchmarks/storage.py

bench-performance: peers
	"$(PEERS)/bin/python" benchmarks/performance.py $(if $(BEFORE),--before $(BEFORE))

# On a machine with a GPU and no network there is no .venv: see CONTRIBUTING.md.
gpu: venv
	"$(BIN)/python" benchmarks/on_gpu.py $(if $(DEVICE),--device $(DEVICE))

bench-lightning: hosts
	PYTHONPATH=tests "$(BIN)/python" benchmarks/beside_lightning.py

bench-ranks: venv
	PYTHONPATH=tests "$(BIN)/python" benchmarks/ranks.py $(if $(BEFORE),--before $(BEFORE))

bench-transformers: venv
	"$(BIN)/python" benchmarks/transformers_overhead.py

docs: venv
	"$(BIN)/python" -m pip install --quiet -c constraints.txt --no-build-isolation -e '.[docs]'
	"$(BIN)/python" -m sphinx -q -W --keep-going -b html docs docs/_build
	@echo "docs/_build/index.html"

format: venv
	"$(BIN)/ruff" check --fix
	"$(BIN)/ruff" format

clean:
	rm -rf $(VENV) .venv-peers .venv-lightning-* .venv-lowest-direct* .venv-highest* build dist docs/_build docs/reference *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
