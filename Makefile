# make demo   calibrates a trained Diffusion Transformer and compares it with the dense one (four to nine minutes, two cores)
# make test   passes the tests (make nightly: with many times as many cases of each law)
# Both make their own virtual environment. They use two: the tests' model zoo needs timm, and so torchvision, which fails to
# import beside a CPU build of torch unless the tests' set-up mends it.

PYTHON ?= python3
ARGS ?=

.PHONY: demo test nightly lint types check clean

demo: .venv/ready
	.venv/bin/python examples/demo.py $(ARGS)

test: .venv-test/ready
	.venv-test/bin/python -m pytest -n 2 $(ARGS)

# thousands of cases of each law, and every cell of the matrix: hours
nightly: .venv-test/ready
	HYPOTHESIS_PROFILE=nightly .venv-test/bin/python -m pytest -n 2 $(ARGS)

lint: .venv-test/ready
	.venv-test/bin/ruff check --no-cache .
	.venv-test/bin/ruff format --no-cache --check .

# Type checkers can't follow the package map of pyproject.toml, so an installed copy is checked.
types: .venv-test/ready
	rm -rf build/types && .venv-test/bin/pip install -q --no-deps --no-build-isolation --target build/types .
	cd build/types && ../../.venv-test/bin/mypy --config-file ../../pyproject.toml -p diffcr_compile

check: lint types test

.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	.venv/bin/pip install -q -c constraints.txt torch
	.venv/bin/pip install -q -c constraints.txt -e ".[demo]"
	touch $@

.venv-test/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-test
	.venv-test/bin/pip install -q -c constraints.txt torch setuptools
	.venv-test/bin/pip install -q -c constraints.txt -e ".[test]"
	touch $@

clean:
	rm -rf .venv .venv-test build dist out
