#!/usr/bin/env bash
# Check style and types, then run all tests, offline: bash scripts/test.sh [pytest arguments]
set -euo pipefail
source "$(dirname "$0")/environment.sh" requirements-dev.txt
$PYTHON -m ruff check --quiet .
$PYTHON -m ruff format --check --quiet .
$PYTHON -m mypy --no-error-summary
$PYTHON -m pytest "$@"
