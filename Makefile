.PHONY: help quickstart test lint format clean
.DEFAULT_GOAL := help

help:  ## this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

quickstart:  ## train a tiny search agent in a small world, with a report (flags: scripts/quickstart.sh --help)
	@bash scripts/quickstart.sh

test:  ## run every test
	@bash scripts/test.sh

lint:  ## check style, formatting and types; changes nothing
	@bash -c 'source scripts/env.sh && ruff check . && ruff format --check . && mypy searche1 megatron_ext'

format:  ## mend style and formatting
	@bash -c 'source scripts/env.sh && ruff check --fix . && ruff format .'

clean:  ## remove caches and build folders; keeps the environment and runs/
	@find . -name __pycache__ -not -path './.venv*' -prune -exec rm -rf {} +
	@rm -rf build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache
