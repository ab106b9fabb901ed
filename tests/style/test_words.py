"""Code and documents use the field's terms: no word of the old vocabulary, no docstring without its verb."""

import ast
import io
import re
import subprocess
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# Names that once stood for the field's terms: a request queue was a line, a beam a text.
IDENTIFIERS = frozenset((Path(__file__).parent / "old_words.txt").read_text().split())
FIRST_WORDS = re.compile(r"(Gives?|Has|Lets?|Takes?|Says?|Tells?|What|Who|Which|Whether who)\b")
PROSE = re.compile(
    r"\b(desk|workshop|the door|in line|suspects?|culprit|accused?|towers?|lanes?|the board|let in|lets in|"
    r"feel each other|what gives)\b",
    re.IGNORECASE,
)


def tracked(*patterns: str) -> list[Path]:
    listed = subprocess.run(
        ["git", "ls-files", *patterns], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return [
        ROOT / name for name in listed.stdout.split() if "pretrained" not in name and (ROOT / name).exists()
    ]


CODE = [path for path in tracked("*.py") if path != Path(__file__)]
PROSE_FILES = tracked("*.md", "*.yaml", "*.yml", "*Dockerfile", "Makefile")


def identifiers(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """Yield the names that code defines, and the line of each."""
    for node in ast.walk(tree):
        line = getattr(node, "lineno", 0)
        match node:
            case ast.ClassDef(name=name) | ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name):
                yield name, line
            case ast.arg(arg=name) | ast.keyword(arg=str(name)) | ast.Name(id=name, ctx=ast.Store()):
                yield name, line
            case ast.Attribute(value=ast.Name(id="self"), attr=name):
                yield name, line


def docstrings(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """Yield each docstring and its line."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text:
                yield text, node.body[0].lineno


def faults(path: Path, root: Path = ROOT) -> Iterator[str]:
    """Yield what is to be renamed or rewritten in a Python file."""
    source = path.read_text()
    tree = ast.parse(source)
    name = path.relative_to(root).as_posix()
    for identifier, line in [(path.stem, 0), *identifiers(tree)]:
        if {identifier, identifier.lstrip("_")} & IDENTIFIERS:
            yield f"{name}:{line}: the name {identifier}"
    for text, line in docstrings(tree):
        if FIRST_WORDS.match(text):
            yield f"{name}:{line}: the docstring begins {text.split()[0]!r}"
        for found in PROSE.findall(text):
            yield f"{name}:{line}: the docstring says {found!r}"
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT and (match := PROSE.search(token.string)):
            yield f"{name}:{token.start[0]}: the comment says {match[0]!r}"


@pytest.mark.parametrize("package", ["model", "service", "training", "tests", "benchmarks"])
def test_names_docstrings_and_comments_use_the_fields_terms(package: str) -> None:
    files = [path for path in CODE if path.relative_to(ROOT).parts[0] == package]
    assert files
    assert [fault for path in files for fault in faults(path)] == []


def test_documents_use_the_fields_terms() -> None:
    found = [
        f"{path.relative_to(ROOT)}:{number}: {match[0]!r}"
        for path in PROSE_FILES
        for number, line in enumerate(path.read_text().splitlines(), 1)
        for match in PROSE.finditer(line)
    ]
    assert found == []


def test_old_names_docstrings_and_comments_are_found(tmp_path: Path) -> None:
    path = tmp_path / "code.py"
    code = ['"""Gives a number."""', "def lane(tower: int) -> int:  # of suspects", "    return tower", ""]
    path.write_text("\n".join(code))
    assert [fault.partition(": ")[2] for fault in faults(path, root=tmp_path)] == [
        "the name lane",
        "the name tower",
        "the docstring begins 'Gives'",
        "the comment says 'suspects'",
    ]
