# make            set up, train what is not trained, benchmark every backend, write tables and charts
# make QUICK=1    the same path at small sizes in about a minute, into results/quick
# make test       the tests           make lint    ruff, check and format
PYTHON ?= $(shell for p in python3 python3.12 python3.11; do $$p -c 'import sys; sys.exit(sys.version_info[:2] not in ((3, 11), (3, 12)))' 2>/dev/null && echo $$p && break; done)
PY := .venv/bin/python
FLAGS := $(if $(QUICK),--quick)
INSTALL := $(PY) -m pip install --quiet --disable-pip-version-check

all: .venv/installed
	$(PY) train.py $(FLAGS)
	$(PY) benchmark.py $(FLAGS)

test: .venv/installed
	$(PY) -m pytest -n 2 --dist worksteal

lint: .venv/installed
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m pyright

.venv/installed: requirements.txt requirements-tensorrt.txt
	@test -n "$(PYTHON)" || { echo "error: Python 3.11 or 3.12 is needed; install one, or name it: make PYTHON=/path/to/python3.12" >&2; exit 2; }
	@test -x $(PY) || $(PYTHON) -m venv .venv
	@echo "installing the packages (PyTorch alone is about 3 GB) ..."
	@if ! nvidia-smi >/dev/null 2>&1; then \
		echo "requirements.txt, without TensorRT: nvidia-smi finds no NVIDIA GPU here"; $(INSTALL) -r requirements.txt; \
	elif $(INSTALL) -r requirements-tensorrt.txt; then \
		echo "requirements-tensorrt.txt: nvidia-smi finds an NVIDIA GPU"; \
	else \
		echo "requirements.txt, without TensorRT: nvidia-smi finds an NVIDIA GPU, but requirements-tensorrt.txt could not be installed (above)"; \
		$(INSTALL) -r requirements.txt; \
	fi
	@touch $@

.PHONY: all test lint
