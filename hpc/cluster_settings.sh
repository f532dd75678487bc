# shellcheck shell=bash disable=SC2034
# Sourced by the jobs: reads hpc/cluster.toml, if there is one, into `container` and `runner` (arrays), sets
# TILLER_CACHE_DIR unless the caller did, and runs the environment lines. Called from the repository root.

container=()
runner=(uv run --no-sync)
environment=()
cache_dir=

read_cluster_settings() {
  [[ -e hpc/cluster.toml ]] || return 0
  local python=python3 assignments
  [[ -x .venv/bin/python ]] && python=.venv/bin/python
  assignments=$("$python" - <<'PYTHON'
import shlex
import sys

try:
    import tomllib
except ImportError:
    sys.exit(f"hpc/cluster.toml: Python {sys.version.split()[0]} cannot read TOML; load a module with Python 3.11 or later")

try:
    with open("hpc/cluster.toml", "rb") as file:
        settings = tomllib.load(file)
except ValueError as error:
    sys.exit(f"hpc/cluster.toml: {error}")
known = {"account", "partition", "constraint", "cache_dir", "environment", "container", "runner"}
if unknown := sorted(set(settings) - known):
    sys.exit(f"hpc/cluster.toml: unknown key {unknown[0]!r}; expected {', '.join(sorted(known))}")
for name in ("environment", "container", "runner"):
    words = settings.get(name)
    if isinstance(words, list) and all(isinstance(word, str) for word in words):
        print(f"{name}=({shlex.join(words)})")
    elif words is not None:
        sys.exit(f"hpc/cluster.toml: {name} is {words!r}; expected a list of strings")
print(f"cache_dir={shlex.quote(settings.get('cache_dir', ''))}")
PYTHON
  ) || return
  eval "$assignments"
}

apply_cluster_settings() {
  local line
  # `module` and conda's scripts read variables that are not set.
  set +u
  for line in "${environment[@]}"; do
    eval "$line"
  done
  set -u
  export TILLER_CACHE_DIR=${TILLER_CACHE_DIR:-$cache_dir}
  [[ -n $TILLER_CACHE_DIR ]] || unset TILLER_CACHE_DIR
}

read_cluster_settings
apply_cluster_settings
