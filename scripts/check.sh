#!/usr/bin/env bash
# What must pass before a commit: format, lint, layers, fast tests. Stops at the first that fails and names it.
# usage: scripts/check.sh [pytest arguments for the fast tests]
set -euo pipefail
cd "$(dirname "$0")/.."

step() {
  local name=$1
  shift
  echo "== $name"
  "$@" || {
    local code=$?
    echo "check.sh: $name failed (exit code $code): $*" >&2
    exit "$code"
  }
}

# --no-sync: a check must not change the environment that it checks, nor need the network.
step "format" uv run --no-sync ruff format --check
step "lint" uv run --no-sync ruff check
# Seconds, and a wrong arrow makes the rest moot: before the other tests.
step "layers" uv run --no-sync -m pytest -q tests/test_layers.py
step "fast tests" uv run --no-sync -m pytest -q -m "not slow" "$@"
echo "check.sh: all passed"
