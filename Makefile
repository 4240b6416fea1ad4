# Commands for people who work on imgfs; each sets up what it needs.
PYTHON_BIN = .venv/bin
# Most tests wait more than they work.
JOBS ?= 3

.PHONY: test check crash stress bench format setup clean

test: setup
	$(PYTHON_BIN)/python -m pytest --numprocesses $(JOBS) --dist loadfile $(ARGS)

crash: export IMGFS_CRASH_POINTS ?= 400
crash: export IMGFS_CRASH_LIVES ?= 4
crash: export IMGFS_CRASH_SECONDS ?= 4
crash: export IMGFS_CRASH_FILESYSTEMS ?= ext4 xfs
crash: setup
	$(PYTHON_BIN)/python -m pytest -s tests/crash $(ARGS)

stress: export IMGFS_STRESS_SECONDS ?= $(or $(DURATION),600)
stress: setup
	$(PYTHON_BIN)/python -m pytest -s tests/stress $(ARGS)

check: setup
	$(PYTHON_BIN)/ruff check .
	$(PYTHON_BIN)/ruff format --check .
	$(PYTHON_BIN)/mypy
	$(PYTHON_BIN)/lint-imports

format: setup
	$(PYTHON_BIN)/ruff check --fix .
	$(PYTHON_BIN)/ruff format .

bench: # imgfs beside its peers, below 10 minutes; with ARGS (--help) only into build/benchmarks
	tools/setup.sh bench
	$(PYTHON_BIN)/python -m compileall -q imgfs benchmarks # as installed packages are
	$(PYTHON_BIN)/python -m benchmarks $(or $(ARGS),--output docs/benchmarks --readme README.md)

setup:
	tools/setup.sh test

clean:
	rm -rf .venv build *.egg-info .pytest_cache .mypy_cache .ruff_cache
