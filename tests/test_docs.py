"""Every page, anchor and module that the documentation, the code or a recipe names is there."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "src" / "palimpsest"
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
SEARCHED = ("src", "docs", "tests", "scripts", "benchmarks", "recipes", "configs", "examples", "requirements")
WRITTEN = {".py", ".ipynb", ".md", ".yaml", ".yml", ".toml", ".txt", ".html", ".js", ".css", ""}
CODE = re.compile(r"^```.*?^```|`[^`\n]*`|<!--.*?-->", re.DOTALL | re.MULTILINE)


def files() -> Iterator[Path]:
    """Everything that is read by people: pages, code, recipes, scripts."""
    yield from PAGES[:3]
    yield from (ROOT / "Makefile", ROOT / "pyproject.toml")
    for folder in SEARCHED:
        for path in sorted((ROOT / folder).rglob("*")):
            made = any(part == "__pycache__" or part.endswith(".egg-info") for part in path.parts)
            if path.is_file() and path.suffix in WRITTEN and not made:
                yield path


@cache
def anchors(page: Path) -> set[str]:
    """Of the headings, as GitHub makes them: lower case, no punctuation, blanks to hyphens, repeated ones counted."""
    found: dict[str, int] = {}
    names: set[str] = set()
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    for heading in re.findall(r"^#{1,6} +(.+?) *$", text, flags=re.MULTILINE):
        heading = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).casefold()
        kept = "".join(c for c in heading if c in "-_ " or unicodedata.category(c)[0] in "LN")
        name = kept.replace(" ", "-")
        names.add(name if name not in found else f"{name}-{found[name]}")
        found[name] = found.get(name, 0) + 1
    return names


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_somewhere(page: Path) -> None:
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", CODE.sub("", page.read_text(encoding="utf-8"))):
        if re.match(r"\w+:", target):
            continue
        file, _, anchor = target.partition("#")
        there = (page.parent / file).resolve() if file else page
        if not there.exists() or (anchor and anchor not in anchors(there)):
            broken.append(target)
    assert not broken, f"{page.name} links to {broken}"


def test_every_page_that_is_named_exists() -> None:
    """Pages of docs/, with or without an anchor, in code, messages, recipes and scripts; the changelog too."""
    broken = []
    for file in files():
        text = file.read_text(encoding="utf-8")
        for name, anchor in re.findall(r"\bdocs/([\w-]+\.md)(?:#([\w-]+))?", text):
            page = ROOT / "docs" / name
            if not page.exists() or (anchor and anchor not in anchors(page)):
                broken.append(f"{file.relative_to(ROOT)}: docs/{name}{'#' * bool(anchor)}{anchor}")
    assert not broken, broken


def test_every_page_can_be_reached_from_the_readme() -> None:
    readme = PAGES[0].read_text(encoding="utf-8")
    assert [page.name for page in PAGES[3:] if f"(docs/{page.name})" not in readme] == []


def test_every_file_that_a_page_names_exists() -> None:
    """`room/module.py` of the package, `tests/…`, `scripts/…`, `benchmarks/…`, `recipes/…`, `configs/…`."""
    named = re.compile(r"`((?:[\w-]+/)+[\w.-]+\.(?:py|yaml|txt|jsonl))`")
    broken = [
        f"{page.name}: {name}"
        for page in PAGES
        for name in named.findall(page.read_text(encoding="utf-8"))
        if not any((folder / name).exists() for folder in (ROOT, PACKAGE)) and not is_of_a_run(name)
    ]
    assert not broken, broken


def is_of_a_run(name: str) -> bool:
    """Files of a run directory or of `data prepare` instead of the repository's."""
    return name.split("/")[0] in {"data", "NAME", "base", "methods", "runs", "DIR"} and not name.endswith(".py")


def test_the_map_of_the_house_is_complete() -> None:
    """docs/architecture.md names every room and module, and none that is not there."""
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    block = text.split("## Every room and module")[1].split("```")[1]
    named: set[str] = set()
    room = ""
    for line in block.splitlines():
        if match := re.match(r"(\w+)/ ", line):
            room = match[1]
        elif match := re.match(r"(\w+)\.py ", line):
            named.add(match[1])
        elif match := re.match(r"  (\w+) ", line):
            named.add(f"{room}/{match[1]}")
    commands = block.split("\ncommands/")[1].split("\n\n")[0].split(":")[1]
    named |= {f"commands/{name}" for name in re.findall(r"\w+", commands)}
    there = {str(path.relative_to(PACKAGE).with_suffix("")) for path in PACKAGE.rglob("*.py")}
    there = {name for name in there if not name.endswith("__init__")}
    assert there - named == set(), "modules without a line in docs/architecture.md"
    assert named - there == set(), "lines in docs/architecture.md without a module"
