.PHONY: setup test quick lint docs

setup:  ## the environment, with the documentation's tools
	uv sync --group docs

test:   ## what must pass before main moves
	uv run pytest

quick:  ## for daily work
	uv run pytest -m "not slow"

lint:   ## format, lint, spelling, types
	uv run ruff format . && uv run ruff check . && uv run codespell && uv run mypy

docs:   ## build/site
	uv run --group docs mkdocs build --strict
