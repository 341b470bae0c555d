#!/usr/bin/env bash
# Install what the tests need and run them all: linter, formatter, types, import contracts, tests.
#   bash launch/test.sh                 the default suite
#   bash launch/test.sh -m slow         the long versions; arguments go to pytest
# Two files of tests at a time: many tests wait for processes to start or to end. One at a time: --numprocesses 0
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root"
bash launch/setup.sh test
export PATH="$root/.venv/bin:$PATH"
ruff check .
ruff format --check .
mypy
lint-imports
exec pytest --numprocesses 2 --dist loadfile "$@"
