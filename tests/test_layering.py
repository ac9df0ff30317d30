"""Imports point one way (docs/architecture.md), and heavy packages stay where they belong."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "src" / "palimpsest"
# Each part may import the parts in front of it, and parts of its own group.
ORDER: list[set[str]] = [
    {"rundir", "schema", "config", "paper", "progress", "processes", "changes"},
    {"data", "models", "auto"},
    {"importance", "training"},
    {"analysis", "evaluation"},
    {
        *("results", "workspace", "answering", "heldout", "ask", "evaluate", "compare", "compare_text", "pairing"),
        *("measure", "validation", "prepare", "inspection", "plan", "plan_text", "export", "model_card"),
        *("seeds", "steps", "by_voice"),
    },
    {"study", "ui"},
    {"cli"},
]
REPORT_MAY_IMPORT = {"rundir", "schema", "paper", "report"}


def part_of(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imported_parts(path: Path) -> set[str]:
    parts = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        modules = []
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            modules = [node.module] + [
                f"{node.module}.{alias.name}" for alias in node.names if node.module == "palimpsest"
            ]
        parts |= {m.split(".")[1] for m in modules if m.startswith("palimpsest.")}
    return parts


FILES = [path for path in sorted(ROOT.rglob("*.py")) if path.name != "__init__.py" or path.parent != ROOT]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_one_way(path: Path) -> None:
    part = part_of(path)
    if part == "report":
        assert imported_parts(path) <= REPORT_MAY_IMPORT
        return
    level = next((i for i, group in enumerate(ORDER) if part in group), None)
    assert level is not None, f"{part} has no place in the order of imports; give it one"
    allowed = set().union(*ORDER[: level + 1]) | ({"report"} if part in ("study", "ui", "cli") else set())
    assert imported_parts(path) <= allowed, f"{path} imports {imported_parts(path) - allowed}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_modules_stay_readable(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 400


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("palimpsest", ("torch", "transformers", "pydantic")),
        ("palimpsest.cli", ("torch", "transformers")),
        ("palimpsest.ui.page", ("gradio", "transformers")),
        ("palimpsest.report.html", ("torch", "transformers", "pydantic")),
        ("palimpsest.importance.estimate", ("pydantic", "jaxtyping", "matplotlib", "typer")),
        ("palimpsest.training.train", ("pydantic", "jaxtyping", "matplotlib", "typer")),
        ("palimpsest.data.augment", ("torch", "pyroomacoustics", "hibari", "onnxruntime", "scipy")),
        ("palimpsest.models.speech_lm", ("pydantic", "jaxtyping", "gguf", "hibari", "onnxruntime")),
    ],
)
def test_what_importing_a_module_does_not_pull_in(module: str, absent: tuple[str, ...]) -> None:
    code = f"import sys, {module}; print([m for m in {absent!r} if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "[]"
