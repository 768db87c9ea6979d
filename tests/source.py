"""The project's source as tests of its form read it: files, names, and the texts of its errors."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parent.parent
HOLE = "\0"
"""Stands in a text where the source puts a value in."""


def python_files(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


@cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


def template(node: ast.expr) -> str | None:
    """A string, or an f-string with a hole for each value; None for anything else."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(str(part.value) if isinstance(part, ast.Constant) else HOLE for part in node.values)
    return None


def identifiers(tree: ast.Module) -> Iterator[str]:
    """Every name that a module gives or uses."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            yield node.id
        elif isinstance(node, ast.Attribute):
            yield node.attr
        elif isinstance(node, ast.arg | ast.keyword):
            yield node.arg or ""
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name


def strings(tree: ast.Module) -> Iterator[str]:
    """Every text in a module, f-strings with their holes."""
    for node in ast.walk(tree):
        if isinstance(node, ast.expr) and (text := template(node)) is not None:
            yield text


def user_errors(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """(line, text) of every ValueError: of those raised, and of the conditions that `require` asks for."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
            call, place = node.exc, 0
        elif isinstance(node, ast.Call) and ast.unparse(node.func) == "require":
            call, place = node, 1
        else:
            continue
        if ast.unparse(call.func) in ("ValueError", "require") and len(call.args) > place:
            text = template(call.args[place])
            if text is not None:
                yield node.lineno, text
