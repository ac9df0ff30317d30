"""What code a step depends on: its own function, and every module of the package that it imports.

A change there runs the step again, and a change anywhere else does not. Nothing is listed by hand: the imports are read
from the sources, those inside functions and those of imported modules too. Of the study itself (steps.py, workspace.py)
only the functions count that the step reaches: a change to one step must not run all of them again.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from palimpsest.files import hash_file, hash_value

ROOT = Path(__file__).parent.parent
NAME = ROOT.name
# What reads, writes and shows, and decides no number; the study's own modules are followed function by function.
LEFT_OUT = ("config", "files", "options", "planning", "progress", "records", "rundir", "study")


@cache
def step_code(made_by: Callable[..., None]) -> str:
    """Identifies the code of the step that the function `made_by` of steps.py makes."""
    functions, modules = reached(made_by.__name__)
    sources = [about(module, name).source for module, name, _ in functions]
    return hash_value([sources, [[module, file_hash(module)] for module in modules]])[:16]


def reached(step: str) -> tuple[list[tuple[str, str, ast.AST]], list[str]]:
    """(functions of the study, modules of the package) that a step reaches, each in a fixed order."""
    waiting, functions = [("steps", step)], dict[tuple[str, str], ast.AST]()
    modules: set[str] = set()
    while waiting:
        module, name = waiting.pop()
        functions[module, name] = definitions(module)[name]
        waiting += [other for other in about(module, name).mentioned if other not in functions]
        modules |= about(module, name).imported
    return [(*key, functions[key]) for key in sorted(functions)], sorted(closure(modules))


def closure(modules: set[str]) -> set[str]:
    """The modules and all they import."""
    found: set[str] = set()
    waiting = list(modules)
    while waiting:
        module = waiting.pop()
        if module not in found and module.partition(".")[0] not in LEFT_OUT:
            found.add(module)
            waiting += imports_of(module)
    return found


# ---------------------------------------------------------------------------------------------------------------------
# Sources
# ---------------------------------------------------------------------------------------------------------------------
def path_of(module: str) -> Path:
    """Of a room, its __init__.py."""
    path = ROOT.joinpath(*module.split("."))
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


@cache
def text(module: str) -> str:
    return path_of(module).read_text(encoding="utf-8")


@cache
def file_hash(module: str) -> str:
    return hash_file(path_of(module))


@cache
def imports_of(module: str) -> frozenset[str]:
    return frozenset(name for node in _nodes(ast.parse(text(module))) for name in _modules(node))


@cache
def definitions(module: str) -> dict[str, ast.AST]:
    """Functions of steps.py; methods of the Workspace."""
    body = ast.parse(text(f"study.{module}")).body
    if module == "workspace":
        body = next(node for node in body if isinstance(node, ast.ClassDef)).body
    return {node.name: node for node in body if isinstance(node, ast.FunctionDef)}


@dataclass(frozen=True)
class About:
    """A function of the study: what it names of the study, what it imports, and its source."""

    mentioned: tuple[tuple[str, str], ...]
    imported: frozenset[str]
    source: str | None


@cache
def about(module: str, name: str) -> About:
    """Read once: many steps reach the same functions."""
    node, whole = definitions(module)[name], f"study.{module}"
    return About(
        tuple(_mentioned(module, node)), frozenset(_imported(whole, node)), ast.get_source_segment(text(whole), node)
    )


@cache
def _names(module: str) -> dict[str, str]:
    """Names that a module of the study imports at its top → the module they come from."""
    top = [node for node in ast.parse(text(module)).body if isinstance(node, ast.ImportFrom)]
    return {alias.asname or alias.name: name for node in top for alias, name in _aliases(node)}


def _mentioned(module: str, function: ast.AST) -> Iterator[tuple[str, str]]:
    """Other functions of the study that a function names: `helper`, `ws.method`, `self.method`."""
    for node in _nodes(function):
        if isinstance(node, ast.Name) and module == "steps" and node.id in definitions("steps"):
            yield "steps", node.id
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in ("ws", "self"):
            yield from [("workspace", node.attr)] * (node.attr in definitions("workspace"))


def _imported(module: str, function: ast.AST) -> set[str]:
    """Modules that a function imports itself, or whose names it takes from the top of its module."""
    found: set[str] = set()
    for node in _nodes(function):
        found |= set(_modules(node))
        if isinstance(node, ast.Name) and node.id in _names(module):
            found.add(_names(module)[node.id])
    return found


def _nodes(tree: ast.AST) -> Iterator[ast.AST]:
    """Every node but annotations and what is imported for them alone."""
    yield tree
    if isinstance(tree, ast.If) and ast.unparse(tree.test) == "TYPE_CHECKING":
        return
    for name, value in ast.iter_fields(tree):
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST) and name not in ("annotation", "returns"):
                yield from _nodes(child)


def _modules(node: ast.AST) -> list[str]:
    return [name for _, name in _aliases(node)] if isinstance(node, ast.ImportFrom) else []


def _aliases(node: ast.ImportFrom) -> Iterator[tuple[ast.alias, str]]:
    """The package's modules among what is imported: `from palimpsest.a import b` is a, or a.b where that is one."""
    if node.module is None or node.module.partition(".")[0] != NAME:
        return
    above = node.module.removeprefix(NAME).lstrip(".")
    for alias in node.names:
        inside = f"{above}.{alias.name}".lstrip(".")
        yield alias, inside if path_of(inside).exists() else above
