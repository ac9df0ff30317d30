"""The documentation as a site: what scripts/docs_site.py makes of code and links. `make check` builds it strictly."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import dataclass, field, fields
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Annotated, Literal

import pytest
from annotated_types import Ge, Lt

from browser import chromium
from palimpsest.cli import COMMANDS, DATA_COMMANDS
from palimpsest.config import StudyConfig
from palimpsest.training.methods import Method
from script_files import load_script

ROOT = Path(__file__).parent.parent
pytest.importorskip("mkdocs")


@cache
def site() -> ModuleType:
    return load_script("docs_site")


@dataclass(frozen=True)
class Inner:
    depth: int = 3


@dataclass(frozen=True)
class Options:
    """What it is. More of it."""

    kind: Literal["a", "b"]  # which of the two | and no third
    # In front of it,
    # on two lines.
    lambda_: Annotated[float, Ge(0), Lt(1)] = 0.4  # and beside it
    names: tuple[str, ...] | None = None
    inner: Inner = field(default_factory=Inner)
    many: dict[str, Inner] = field(default_factory=dict)


def test_the_table_of_a_class() -> None:
    lines = "\n".join(site()._section("outer", Options)).splitlines()
    assert lines[0] == "## outer"
    assert "What it is. More of it." in lines
    assert "| `kind` | `a`, `b` | required | which of the two \\| and no third |" in lines
    assert "| `lambda` | number, ≥ 0, < 1 | `0.4` | In front of it, on two lines. and beside it |" in lines
    assert "| `names` | list of text |  |  |" in lines
    assert "| `inner` | [section](#outerinner) | that section's |  |" in lines
    assert "## outer.many.NAME" in lines
    assert lines.count("| `depth` | whole number | `3` |  |") == 2


def test_every_key_of_a_recipe_is_there() -> None:
    page = site().recipe_page()
    for name in StudyConfig.model_fields:
        assert f"| `{name}` |" in page
    methods = page.split("## methods.NAME\n")[1].split("\n## ")[0]
    listed = re.findall(r"^\| `(\w+)` \|", methods, flags=re.MULTILINE)
    assert listed == [it.name.removesuffix("_") for it in fields(Method) if it.name != "curve"]
    for anchor in re.findall(r"\]\(#([\w-]+)\)", page):
        assert anchor in {re.sub(r"[^\w\- ]", "", it.lower()) for it in re.findall(r"^## (.+)$", page, re.MULTILINE)}


def test_every_option_of_every_command_is_there() -> None:
    parts = dict(part.split("\n", 1) for part in site().commands_page().split("\n## ")[1:])
    assert set(parts) == {f"palimpsest {n}" for n in COMMANDS} | {f"palimpsest data {n}" for n in DATA_COMMANDS}
    assert "| `--text` |  | General text whose loss is measured too" in parts["palimpsest diagnose"]
    assert "| `--speech` `--no-speech` | `true` |" in parts["palimpsest diagnose"]
    assert "| `BASE` | required |" in parts["palimpsest diagnose"]
    assert all("```\npalimpsest " in part for part in parts.values())


def test_links_become_those_of_the_site() -> None:
    def mended(text: str, page: str) -> str:
        return str(site().on_page_markdown(text, Page(File(page)), None, None))

    @dataclass
    class File:
        src_uri: str

    @dataclass
    class Page:
        file: File

    assert mended("[a](docs/data.md#sources)", "index.md") == "[a](data.md#sources)"
    assert mended("[a](../README.md) [b](data.md#x)", "report.md") == "[a](index.md) [b](data.md#x)"
    assert mended("[`d`](src/palimpsest/training/)", "index.md") == "`d`"
    assert mended("[c](CONTRIBUTING.md)", "index.md") == "[c](contributing.md)"
    assert mended("[e](../recipes/demo.yaml)", "reproducing.md") == "[e](files/src/palimpsest/recipes/demo.yaml.md)"
    kept = "[f](https://example.org/README.md) [g](#here)\n\n```\n[h](../README.md)\n```\n"
    assert mended(kept, "report.md") == kept


@cache
def built(folder: Path) -> Path:
    command = [sys.executable, "-m", "mkdocs", "-q", "build", "--strict", "-d", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"})
    return folder


def test_the_site_loads_nothing_from_elsewhere_and_its_search_works_from_disk(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    folder = built(tmp_path_factory.mktemp("site"))
    for file in folder.rglob("*.html"):
        loaded = re.findall(
            r'<(?:script|img|iframe|link rel="stylesheet")[^>]+(?:src|href)="https?:[^"]+', file.read_text()
        )
        assert loaded == [], file
    with chromium() as browser:
        page = browser.new_context(offline=True).new_page()
        page.goto((folder / "reference" / "recipe.html").as_uri())
        page.keyboard.press("f")
        page.keyboard.type("adaptor_learning_rate")
        page.wait_for_selector(".md-search-result__link", timeout=20_000)
        assert "matching" in page.inner_text(".md-search-result__meta")
