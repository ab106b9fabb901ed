"""tests/run.sh on a machine without programs: what it installs, runs, skips and reports."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.deploy.documents import ROOT

PARALLEL = "-n auto --maxprocesses=4 --dist=worksteal"


@pytest.fixture
def bare_machine(tmp_path: Path) -> Path:
    """Create a directory of few programs; `python` prints its arguments and exits with PYTHON_EXIT_CODE."""
    for name in ("bash", "dirname"):
        program = shutil.which(name)
        assert program is not None
        (tmp_path / name).symlink_to(program)
    add_script(tmp_path, "id", "echo 0")
    add_script(tmp_path, "python", 'echo "ran: $*"; exit "${PYTHON_EXIT_CODE:-0}"')
    return tmp_path


def run_suite(programs: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    environment = {"PATH": str(programs), "BIN": str(programs)} | environment
    return subprocess.run(
        [ROOT / "tests" / "run.sh"], env=environment, capture_output=True, text=True, check=False, timeout=30
    )


def add_script(programs: Path, name: str, command: str) -> None:
    (programs / name).write_text(f"#!/bin/sh\n{command}\n")
    (programs / name).chmod(0o755)


def add_program(programs: Path, name: str) -> None:
    (programs / name).symlink_to(shutil.which("true") or os.devnull)


def lines_of(done: subprocess.CompletedProcess[str], beginning: str) -> list[str]:
    return [line for line in done.stdout.splitlines() if line.startswith(beginning)]


def test_each_group_that_cannot_run_is_named_with_its_cure(bare_machine: Path) -> None:
    done = run_suite(bare_machine, TEST_INSTALL="no")
    assert done.returncode == 0, done.stderr
    parallel, serial, *not_run = done.stdout.splitlines()
    left_out = " and ".join(
        f"not {group}" for group in ("docker", "int8", "redis", "kubectl", "promtool", "public", "gpu")
    )
    assert parallel == f"ran: -m pytest -m {left_out} and not serial {PARALLEL}"
    assert serial == f"ran: -m pytest -m {left_out} and serial"
    named = [line.partition(",")[0] for line in not_run]
    assert named == [
        f"not run: {group}" for group in ("redis", "kubectl", "promtool", "public", "gpu", "int8", "docker")
    ]
    assert all("; enable with: " in line for line in not_run)


def test_what_is_installed_as_root_is_announced_first_with_the_variable_that_forbids_it(
    bare_machine: Path,
) -> None:
    add_script(bare_machine, "apt-get", f'echo "$*" >>{bare_machine}/apt-get.log')
    first, *_ = run_suite(bare_machine).stdout.splitlines()
    assert first == (
        "installing Debian packages as root: redis-server prometheus (TEST_INSTALL=no forbids this)"
    )
    assert (bare_machine / "apt-get.log").read_text().splitlines() == [
        "update",
        "install -y --no-install-recommends redis-server prometheus",
    ]


def test_nothing_is_installed_where_that_is_forbidden(bare_machine: Path) -> None:
    for name in ("apt-get", "pip"):
        add_script(bare_machine, name, f"echo {name} >>{bare_machine}/installed.log")
    done = run_suite(bare_machine, TEST_INSTALL="no")
    assert lines_of(done, "installing") == []
    assert not (bare_machine / "installed.log").exists()
    assert len(lines_of(done, "not run: int8, torchao is not installed")) == 1


def test_a_user_who_is_not_root_installs_no_packages(bare_machine: Path) -> None:
    add_script(bare_machine, "id", "echo 1000")
    add_script(bare_machine, "apt-get", f"touch {bare_machine}/installed.log")
    done = run_suite(bare_machine)
    assert lines_of(done, "installing Debian packages") == []
    assert not (bare_machine / "installed.log").exists()
    assert len(lines_of(done, "not run: redis, no redis-server; enable with: ")) == 1


def add_kubectl(programs: Path, kustomize: str) -> None:
    add_script(programs, "kubectl", f"echo 'Kustomize Version: {kustomize}'")


def test_a_group_runs_where_its_program_or_its_files_are_there(bare_machine: Path) -> None:
    for name in ("redis-server", "promtool", "nvidia-smi", "docker", "pip"):
        add_program(bare_machine, name)
    add_kubectl(bare_machine, "v5.5.0")
    done = run_suite(bare_machine, TEST_PUBLIC="published")
    anywhere = "not docker and not int8"
    groups = [f"{anywhere} and not serial {PARALLEL}", f"{anywhere} and serial", "int8", "docker"]
    assert lines_of(done, "ran: ") == [f"ran: -m pytest -m {group}" for group in groups]
    assert lines_of(done, "not run: ") == []


def test_a_kubectl_that_is_too_old_is_none(bare_machine: Path) -> None:
    add_kubectl(bare_machine, "v2.0.3")
    assert "not run: kubectl, no kubectl with kustomize 5" in run_suite(bare_machine).stdout


def test_a_failing_group_fails_the_suite(bare_machine: Path) -> None:
    assert run_suite(bare_machine, PYTHON_EXIT_CODE="1").returncode == 1


def test_a_suite_in_which_no_test_ran_fails(bare_machine: Path) -> None:
    assert run_suite(bare_machine, PYTHON_EXIT_CODE="5").returncode == 5


def test_a_group_may_be_empty_where_another_is_not(bare_machine: Path) -> None:
    add_program(bare_machine, "docker")
    add_script(bare_machine, "python", 'echo "ran: $*"; [ "$4" = docker ] || exit 5')
    assert run_suite(bare_machine).returncode == 0


def test_arguments_of_the_caller_reach_pytest(bare_machine: Path) -> None:
    done = run_suite(bare_machine, PYTEST_ARGS="-x tests/service", TEST_INSTALL="no")
    assert done.stdout.splitlines()[0].endswith(f"and not serial {PARALLEL} -x tests/service")


def test_parallel_groups_have_one_torch_thread_per_process(bare_machine: Path) -> None:
    add_script(bare_machine, "python", 'echo "threads: $OMP_NUM_THREADS"')
    threads = [line.split()[-1] for line in lines_of(run_suite(bare_machine), "threads: ")]
    assert threads == ["1", "2"]
