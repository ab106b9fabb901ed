"""Tests replace our code through constructors: nothing of ours is patched. Private names: ruff's SLF."""

import ast
from collections.abc import Iterator

from tests.style.test_words import CODE, ROOT

OURS = {"model", "service", "training"}


def patched(tree: ast.AST) -> Iterator[str]:
    """Yield the objects of our packages that `setattr` of a fixture changes."""
    imported = {
        alias.asname or alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in OURS
        for alias in node.names
    }
    for node in ast.walk(tree):
        if (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Attribute)
            and node.func.attr == "setattr"
        ):
            target = node.args[0]
            while isinstance(target, ast.Attribute):
                target = target.value
            if isinstance(target, ast.Name) and target.id in imported:
                yield target.id
            if isinstance(target, ast.Constant) and str(target.value).split(".")[0] in OURS:
                yield str(target.value)


def test_no_test_patches_our_own_code() -> None:
    tests = [path for path in CODE if path.is_relative_to(ROOT / "tests")]
    assert len(tests) > 100
    assert {path: names for path in tests if (names := list(patched(ast.parse(path.read_text()))))} == {}


def test_a_patch_of_our_own_code_is_found() -> None:
    code = [
        "from model import Blip2",
        "monkeypatch.setattr(Blip2.encode, 'x', 1)",
        "monkeypatch.setattr('service.api', 2)",
    ]
    assert list(patched(ast.parse("\n".join(code)))) == ["Blip2", "service.api"]
