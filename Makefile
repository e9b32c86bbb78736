# make            set up, train what is not trained, benchmark every backend, write tables and charts
# make QUICK=1    the same path at small sizes in about a minute, into results/quick
# make test       the tests           make lint    ruff and pyright
# On Windows make.bat takes the same words.
PYTHON ?= $(shell for p in python3 python3.12 python3.11; do $$p -c 'import sys; sys.exit(sys.version_info[:2] not in ((3, 11), (3, 12)))' 2>/dev/null && echo $$p && break; done)
PY := .venv/bin/python
FLAGS := $(if $(QUICK),--quick)

all: .venv/installed
	$(PY) train.py $(FLAGS)
	$(PY) benchmark.py $(FLAGS)

test: .venv/installed
	$(PY) -m pytest -n 2 --dist worksteal

lint: .venv/installed
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m pyright --project pyproject.toml

.venv/installed: install.py $(wildcard requirements*.txt)
	@test -n "$(PYTHON)" || { echo "error: Python 3.11 or 3.12 is needed; install one, or name it: make PYTHON=/path/to/python3.12" >&2; exit 2; }
	@$(PYTHON) install.py

.PHONY: all test lint
