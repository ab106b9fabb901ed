"""tests/run.sh on a machine that has nothing: what it runs, what it leaves out, and what it says of that."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.deploy.documents import ROOT


@pytest.fixture
def bare_machine(tmp_path: Path) -> Path:
    """A folder with a shell and the least beside it; its `python` prints its arguments and exits as told."""
    for name in ("bash", "dirname", "id"):
        program = shutil.which(name)
        assert program is not None
        (tmp_path / name).symlink_to(program)
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\necho "ran: $*"\nexit "${PYTHON_EXIT_CODE:-0}"\n')
    python.chmod(0o755)
    return tmp_path


def run_suite(programs: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    environment = {"PATH": str(programs), "BIN": str(programs)} | environment
    return subprocess.run(
        [ROOT / "tests" / "run.sh"], env=environment, capture_output=True, text=True, check=False, timeout=30
    )


def add_program(programs: Path, name: str) -> None:
    (programs / name).symlink_to(shutil.which("true") or os.devnull)


def test_each_group_that_cannot_run_is_named_with_its_cure(bare_machine: Path) -> None:
    done = run_suite(bare_machine)
    assert done.returncode == 0, done.stderr
    ran, *not_run = done.stdout.splitlines()
    left_out = " and ".join(
        f"not {group}" for group in ("docker", "int8", "redis", "kubectl", "promtool", "gpu")
    )
    assert ran == f"ran: -m pytest -m {left_out}"
    named = [line.partition(",")[0] for line in not_run]
    assert named == [
        f"not run: {group}" for group in ("redis", "kubectl", "promtool", "gpu", "int8", "docker")
    ]
    assert all("; enable with: " in line for line in not_run)


def add_kubectl(programs: Path, kustomize: str) -> None:
    (programs / "kubectl").write_text(f"#!/bin/sh\necho 'Kustomize Version: {kustomize}'\n")
    (programs / "kubectl").chmod(0o755)


def test_a_group_runs_where_its_program_is_there(bare_machine: Path) -> None:
    for name in ("redis-server", "promtool", "nvidia-smi", "docker", "pip"):
        add_program(bare_machine, name)
    add_kubectl(bare_machine, "v5.5.0")
    done = run_suite(bare_machine)
    groups = ["not docker and not int8", "int8", "docker"]
    assert done.stdout.splitlines() == [f"ran: -m pytest -m {group}" for group in groups]


def test_a_kubectl_that_is_too_old_is_none(bare_machine: Path) -> None:
    add_kubectl(bare_machine, "v2.0.3")
    assert "not run: kubectl, no kubectl with kustomize 5" in run_suite(bare_machine).stdout


def test_a_failing_group_fails_the_suite(bare_machine: Path) -> None:
    assert run_suite(bare_machine, PYTHON_EXIT_CODE="1").returncode == 1


def test_a_suite_in_which_no_test_ran_fails(bare_machine: Path) -> None:
    assert run_suite(bare_machine, PYTHON_EXIT_CODE="5").returncode == 5


def test_a_group_may_be_empty_where_another_is_not(bare_machine: Path) -> None:
    add_program(bare_machine, "docker")
    only_docker = '#!/bin/sh\necho "ran: $*"\n[ "$4" = docker ] || exit 5\n'
    (bare_machine / "python").write_text(only_docker)
    assert run_suite(bare_machine).returncode == 0


def test_arguments_of_the_caller_reach_pytest(bare_machine: Path) -> None:
    [ran, *_] = run_suite(bare_machine, PYTEST_ARGS="-x tests/service").stdout.splitlines()
    assert ran.endswith("and not gpu -x tests/service")
