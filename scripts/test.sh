#!/usr/bin/env bash
# Lint and run all tests, offline: bash scripts/test.sh [pytest arguments]
set -euo pipefail
source "$(dirname "$0")/environment.sh"
$PYTHON -m ruff check --quiet .
$PYTHON -m ruff format --check --quiet .
$PYTHON -m pytest "$@"
