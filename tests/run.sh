#!/usr/bin/env bash
# The whole suite, in groups; called by `make test`. Installs what is missing where it can (Debian, as root), and
# names at the end each group that could not run, with the command that enables it.
#   BIN           where the environment's programs are (.venv/bin)
#   PYTEST_ARGS   more arguments for pytest, split at spaces: make test PYTEST_ARGS='-x tests/service'
set -euo pipefail
cd "$(dirname "$0")/.."
BIN=${BIN:-.venv/bin}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-2}
read -ra pytest_args <<<"${PYTEST_ARGS:-}"
selected="not docker and not int8"
not_run=()
ran=no
status=0

has() { command -v "$1" >/dev/null; }

knows_components() { # Debian's kubectl, for one, is too old
  [[ $(kubectl version --client 2>/dev/null) == *"Kustomize Version: v"[5-9]* ]]
}

install_missing() {
  local packages=()
  has redis-server || packages+=(redis-server)
  has promtool || packages+=(prometheus)
  if [ ${#packages[@]} -eq 0 ] || [ "$(id -u)" -ne 0 ] || ! has apt-get; then return; fi
  echo "installing ${packages[*]}"
  # In the runlevel for maintenance, no package starts the server that it brings.
  { apt-get update && RUNLEVEL=1 DEBIAN_FRONTEND=noninteractive \
    apt-get install -y --no-install-recommends "${packages[@]}"; } \
    </dev/null >/dev/null 2>&1 || echo "could not install ${packages[*]}"
}

leave_out() { # GROUP, reason, command
  selected+=" and not $1"
  not_run+=("not run: $1, $2; enable with: $3")
}

run_group() { # the marker expression
  local code=0
  "$BIN/python" -m pytest -m "$1" ${pytest_args[@]+"${pytest_args[@]}"} || code=$?
  case $code in
    0) ran=yes ;;
    5) ;; # PYTEST_ARGS may pick tests of one group only
    *) status=$code ;;
  esac
}

install_missing
has redis-server || leave_out redis "no redis-server" "apt-get install redis-server"
knows_components || leave_out kubectl "no kubectl with kustomize 5" "kubectl 1.27 or newer, from kubernetes.io"
has promtool || leave_out promtool "no promtool" "apt-get install prometheus"
nvidia-smi -L >/dev/null 2>&1 || leave_out gpu "no CUDA device" "$BIN/python -m pytest -m gpu, on a machine with one"
run_group "$selected"

# transformers imports torchao wherever it is installed, which then talks: it stays out of the environment.
torchao="$(dirname "$BIN")/torchao"
if [ -d "$torchao" ] || "$BIN/pip" install --quiet --disable-pip-version-check --no-deps --constraint constraints.txt \
  --target "$torchao" torchao; then
  PYTHONPATH=$torchao run_group int8
else
  leave_out int8 "torchao cannot be installed" "make setup, then $BIN/pip install torchao and $BIN/python -m pytest -m int8"
fi

if docker info >/dev/null 2>&1 && { docker compose version || docker-compose version; } >/dev/null 2>&1; then
  run_group docker
else
  leave_out docker "no Docker engine with compose answers" \
    "apt-get install docker.io docker-compose, then $BIN/python -m pytest -m docker"
fi

for line in ${not_run[@]+"${not_run[@]}"}; do echo "$line"; done
if [ $ran = no ] && [ $status -eq 0 ]; then status=5; fi
exit "$status"
