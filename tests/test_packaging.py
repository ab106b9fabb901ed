"""The contents of an installation: the dependencies of each part, and the commands."""

import ast
import re
import subprocess
import sys
import sysconfig
from collections.abc import Iterable
from importlib.metadata import Distribution, distributions, packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NAME = "blip2-server"
OWN = {"model", "service", "training"}
BROUGHT_BY = {"starlette": "fastapi", "pydantic-core": "pydantic", "markupsafe": "jinja2", "h11": "uvicorn"}
NOT_IMPORTED = {"uvloop", "fastapi-offline"}  # uvicorn runs on the one; only files of the other are used
TYPES_ONLY = {"_typeshed"}  # known to type checkers alone


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def installed(name: str) -> Distribution:
    """Return the distribution in site-packages, not the metadata that a build left in the working tree."""
    (found,) = distributions(name=name, path=[sysconfig.get_path("purelib")])
    return found


def declared(distribution: str, extra: str | None = None) -> set[str]:
    """Return the names in the metadata that pip reads: of the distribution itself, or of one extra."""
    names = set()
    for requirement in installed(distribution).requires or ():
        name = re.match(r"[\w.-]+", requirement)
        of_extra = re.search(r"""extra == ['"]([\w-]+)['"]""", requirement)
        assert name is not None, requirement
        if (of_extra and of_extra[1]) == extra:
            names.add(canonical(name[0]))
    return names


def imported(packages: Iterable[str]) -> set[str]:
    """Return the names of the third-party distributions that these packages import anywhere."""
    modules: set[str] = set()
    for package in packages:
        for path in (ROOT / package).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Import):
                    modules |= {alias.name.partition(".")[0] for alias in node.names}
                elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
                    modules.add(node.module.partition(".")[0])
    distributions = packages_distributions()
    third_party = modules - sys.stdlib_module_names - OWN - TYPES_ONLY
    return {canonical(name) for module in third_party for name in distributions.get(module, [module])[:1]}


CORE = declared(NAME)


@pytest.mark.parametrize(("distribution", "parent"), BROUGHT_BY.items())
def test_what_is_imported_undeclared_is_a_dependency_of_a_declared_one(
    distribution: str, parent: str
) -> None:
    assert distribution in declared(parent)


def test_the_core_declares_what_it_imports() -> None:
    optional = set().union(*(declared(NAME, extra) for extra in ("heic", "peft", "quantize", "spread")))
    assert imported(["model", "service"]) - CORE - optional - BROUGHT_BY.keys() == set()


def test_the_core_brings_nothing_it_does_not_import() -> None:
    assert CORE - imported(["model", "service"]) == NOT_IMPORTED


def test_training_declares_what_it_imports() -> None:
    available = CORE | declared(NAME, "train")
    assert imported(["training"]) - available - BROUGHT_BY.keys() == set()


def test_no_extra_repeats_the_core() -> None:
    for extra in ("bench", "heic", "peft", "quantize", "spread", "train", "dev"):
        assert declared(NAME, extra) & CORE == set()


COMMANDS = {
    "blip2": "model.__main__:main",
    "blip2-serve": "service.__main__:main",
    "blip2-train": "training.__main__:main",
}


def run(command: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run an installed command to its end, with nothing else in its environment."""
    program = Path(sysconfig.get_path("scripts")) / command
    return subprocess.run(
        [program, *arguments], env=environment, capture_output=True, text=True, check=False, timeout=120
    )


def test_the_commands_are_those_of_the_modules() -> None:
    entry_points = installed(NAME).entry_points.select(group="console_scripts")
    assert {entry.name: entry.value for entry in entry_points} == COMMANDS


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_prints_its_usage(command: str) -> None:
    done = run(command, "--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("usage: ")


def test_the_server_command_starts_the_server() -> None:
    done = run("blip2-serve", BLIP2_MODLE="tiny")
    assert done.returncode == 1
    assert done.stderr == "blip2: BLIP2_MODLE is not a setting; the nearest is BLIP2_MODEL\n"


def test_the_server_command_refuses_arguments() -> None:
    done = run("blip2-serve", "--port", "8077")
    assert done.returncode == 2
    assert "unrecognized arguments: --port 8077" in done.stderr
