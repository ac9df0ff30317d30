"""The house: imports point one way, no circles (imports inside functions are read too), heavy packages stay put."""

from __future__ import annotations

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from forked import forked

ROOT = Path(__file__).parent.parent / "src" / "palimpsest"
# Each room may import the rooms in front of it; docs/architecture.md draws them.
ORDER: list[set[str]] = [
    {"files", "records", "progress"},
    {"intervals", "options", "parallel", "rundir", "models"},
    {"data", "importance", "report"},
    {"training", "evaluation", "analysis", "ablation"},
    {"config"},
    {"planning", "comparison", "export"},
    {"study"},
    {"ui"},
    {"commands"},
    {"cli"},
]
REPORT_MAY_IMPORT = {"files", "records", "rundir", "intervals"}  # it only reads what a run has left
MOST_TOP_LEVEL_FILES = 10

MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(ROOT.rglob("*.py"))
    if path != ROOT / "__init__.py"
}


def imported(path: Path) -> set[str]:
    """Modules of the package that a file imports, anywhere but under TYPE_CHECKING."""
    found: set[str] = set()
    waiting: list[ast.AST] = [ast.parse(path.read_text(encoding="utf-8"))]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            waiting += node.orelse
            continue
        waiting += ast.iter_child_nodes(node)
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in [name.removeprefix("palimpsest.") for name in names if name.startswith("palimpsest.")]:
            found.add(name if name in MODULES else name.rpartition(".")[0])
    return found & MODULES.keys()


IMPORTS = {name: imported(path) - {name} for name, path in MODULES.items()}


def test_no_circles() -> None:
    try:
        tuple(TopologicalSorter(IMPORTS).static_order())
    except CycleError as error:
        pytest.fail(f"modules import each other: {' ← '.join(error.args[1])}")


def test_rooms_import_one_way() -> None:
    level = {room: i for i, rooms in enumerate(ORDER) for room in rooms}
    rooms = {name.partition(".")[0] for name in MODULES}
    assert rooms <= level.keys(), f"{rooms - level.keys()} have no place in the order of imports; give them one"
    for name, others in IMPORTS.items():
        room = name.partition(".")[0]
        for other in {module.partition(".")[0] for module in others} - {room}:
            assert level[other] < level[room], f"{name} imports {other}, which is not in front of {room}"
            if room == "report":
                assert other in REPORT_MAY_IMPORT, f"{name} imports {other}"


def test_the_top_floor_is_small_and_no_file_is_called_like_another() -> None:
    assert len(list(ROOT.glob("*.py"))) <= MOST_TOP_LEVEL_FILES
    names = [path.stem for path in MODULES.values() if path.stem != "__init__" and path.parent.name != "commands"]
    assert len(set(names)) == len(names), sorted({name for name in names if names.count(name) > 1})


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("palimpsest", ("torch", "transformers", "pydantic")),
        ("palimpsest.cli", ("torch", "transformers")),
        ("palimpsest.ui.server", ("gradio", "transformers")),
        ("palimpsest.report.page", ("torch", "transformers")),
        ("palimpsest.importance.estimate", ("pydantic", "jaxtyping", "matplotlib", "typer")),
        ("palimpsest.training.train", ("pydantic", "jaxtyping", "matplotlib", "typer")),
        ("palimpsest.data.augment", ("torch", "pyroomacoustics", "hibari", "onnxruntime", "scipy")),
        ("palimpsest.models.speech_lm", ("pydantic", "jaxtyping", "gguf", "hibari", "onnxruntime")),
    ],
)
def test_what_importing_a_module_does_not_pull_in(module: str, absent: tuple[str, ...]) -> None:
    code = f"import sys, {module}; print([m for m in {absent!r} if m in sys.modules])"
    # Those that need torch anyhow share the seconds that it and transformers take, which must not pull these in either.
    imports = "" if {"torch", "transformers"} & set(absent) else "import torch, transformers.trainer"
    done = forked(imports, code)
    assert done.stdout.strip() == "[]", done.stderr
