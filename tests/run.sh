#!/usr/bin/env bash
# Runs the whole suite in groups; called by `make test`. A group that cannot run is named at the end, with the
# command that enables it.
#   BIN           directory of the environment's programs (.venv/bin)
#   PYTEST_ARGS   further arguments of pytest, split at spaces: make test PYTEST_ARGS='-x tests/service'
#   TEST_PUBLIC   directory with configurations and tokenizers of published checkpoints. Default: none
#   TEST_INSTALL  no: install nothing. Default: install missing Debian packages (as root only), and torchao with pip
set -euo pipefail
cd "$(dirname "$0")/.."
BIN=${BIN:-.venv/bin}
torchao="$(dirname "$BIN")/torchao"
read -ra pytest_args <<<"${PYTEST_ARGS:-}"
selected="not docker and not int8"
not_run=()
ran=no
status=0

has() { command -v "$1" >/dev/null; }

may_install() { [ "${TEST_INSTALL:-yes}" != no ]; }

has_kustomize() { # Debian's kubectl is too old for k8s/components
  [[ $(kubectl version --client 2>/dev/null) == *"Kustomize Version: v"[5-9]* ]]
}

install_packages() {
  local packages=()
  has redis-server || packages+=(redis-server)
  has promtool || packages+=(prometheus)
  if [ ${#packages[@]} -eq 0 ] || ! may_install || [ "$(id -u)" -ne 0 ] || ! has apt-get; then return; fi
  echo "installing Debian packages as root: ${packages[*]} (TEST_INSTALL=no forbids this)"
  # In the maintenance runlevel, no package starts its server.
  { apt-get update && RUNLEVEL=1 DEBIAN_FRONTEND=noninteractive \
    apt-get install -y --no-install-recommends "${packages[@]}"; } \
    </dev/null >/dev/null 2>&1 || echo "could not install ${packages[*]}"
}

install_torchao() { # transformers imports torchao wherever it is installed: it stays out of the environment
  may_install || return 1
  echo "installing torchao into $torchao (TEST_INSTALL=no forbids this)"
  "$BIN/pip" install --quiet --disable-pip-version-check --no-deps --constraint constraints.txt \
    --target "$torchao" torchao
}

leave_out() { # GROUP, reason, command
  selected+=" and not $1"
  not_run+=("not run: $1, $2; enable with: $3")
}

run_group() { # marker expression, further arguments of pytest
  local code=0
  "$BIN/python" -m pytest -m "$@" ${pytest_args[@]+"${pytest_args[@]}"} || code=$?
  case $code in
    0) ran=yes ;;
    5) ;; # PYTEST_ARGS may select tests of one group only
    *) status=$code ;;
  esac
}

install_packages
has redis-server || leave_out redis "no redis-server" "apt-get install redis-server"
has_kustomize || leave_out kubectl "no kubectl with kustomize 5" "kubectl 1.27 or newer, from kubernetes.io"
has promtool || leave_out promtool "no promtool" "apt-get install prometheus"
[ -n "${TEST_PUBLIC:-}" ] || leave_out public "TEST_PUBLIC names no published files" \
  "TEST_PUBLIC=DIR make test, see CONTRIBUTING.md"
nvidia-smi -L >/dev/null 2>&1 || leave_out gpu "no CUDA device" "$BIN/python -m pytest -m gpu, on a machine with one"

# One process per core, with one torch thread each. Tests of time limits follow, alone on the machine.
OMP_NUM_THREADS=1 run_group "$selected and not serial" -n auto --maxprocesses=4 --dist=worksteal
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-2}
run_group "$selected and serial"

if [ -d "$torchao" ] || install_torchao; then
  PYTHONPATH=$torchao run_group int8
else
  leave_out int8 "torchao is not installed" "make test, or $BIN/pip install --no-deps --target $torchao torchao"
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
