# From a fresh clone: `make demo` and `make test`. They need Python 3.10 or newer, and g++ 11 or clang 14 or newer.
# All that is installed goes into .venv, once for each extra, and again where the build has changed.
PYTHON ?= python3
OUT ?= out
IN = . .venv/bin/activate &&

.PHONY: demo test lint docs bench wheel gpu

demo: .venv/with-demo
	$(IN) convinit demo

test: .venv/with-test
	$(IN) python -m pytest -n auto

lint: .venv/with-dev
	$(IN) ruff check && ruff format --check && mypy && lint-imports --no-logo

# The site, in build/site; a warning is an error.
docs: .venv/with-docs
	$(IN) NO_MKDOCS_2_WARNING=1 mkdocs build --strict

bench: .venv/with-test
	$(IN) python benchmarks/run.py --suite quick --out $(OUT)

# For all GPU generations; CONVINIT_CUDA=0 makes one with the CPU ops alone.
wheel: export CONVINIT_CUDA ?= 1
wheel: .venv/with-dev
	$(IN) python -m build --no-isolation

# Every check and benchmark that needs a GPU.
gpu: .venv/with-test
	$(IN) bash scripts/gpu_check.sh $(OUT)

.venv/with-torch:
	$(PYTHON) -m venv .venv
	$(IN) python -m pip install torch setuptools wheel ninja
	touch $@

.venv/with-%: .venv/with-torch setup.py pyproject.toml $(wildcard csrc/*)
	$(IN) python -m pip install --no-build-isolation -e '.[$*]'
	touch $@
