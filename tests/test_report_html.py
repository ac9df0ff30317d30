"""The HTML report: complete, self-contained, and everything a model wrote stays text."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import pytest

from palimpsest.files import UserError, write_text
from palimpsest.report.figures import FIGURES
from palimpsest.report.inputs import flat, read_inputs
from palimpsest.report.page import MAX_VALUE, tables_of, write_report
from palimpsest.report.samples import MAX_CHARACTERS, MAX_QUESTIONS
from report_fixture import HOSTILE, make_run


class _Page(HTMLParser):
    """Tags with their attributes, and the text outside scripts, styles and templates."""

    VOID = frozenset({"meta", "link", "br", "img", "input", "hr", "wbr"})

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag  # well nested

    def handle_data(self, data: str) -> None:
        if not {"script", "style", "template"} & set(self.open):
            self.text += data

    def all(self, name: str) -> list[dict[str, str | None]]:
        return [attributes for tag, attributes in self.tags if tag == name]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("run"), hostile=True)


@pytest.fixture(scope="module")
def page(run: Path) -> str:
    return write_report(run).read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def parsed(page: str) -> _Page:
    return _Page(page)


def test_the_page_is_well_formed_and_small(page: str, parsed: _Page) -> None:
    assert parsed.open == []
    assert len(page.encode()) < 15e6
    identifiers = [attributes["id"] for _, attributes in parsed.tags if "id" in attributes]
    assert len(set(identifiers)) == len(identifiers)


def test_hostile_text_stays_text(page: str, parsed: _Page) -> None:
    assert HOSTILE not in page
    assert parsed.text.count(HOSTILE) >= 3  # an answer, the platform, the configuration
    assert len(parsed.all("script")) == 1
    assert not parsed.all("img")
    assert not any(name.startswith("on") for _, attributes in parsed.tags for name in attributes)


def test_nothing_is_loaded_from_anywhere(page: str, parsed: _Page) -> None:
    for tag, attributes in parsed.tags:
        for name in ("src", "href", "xlink:href", "srcset", "action", "data"):
            value = attributes.get(name)
            assert value is None or value.startswith(("#", "data:")), (tag, name, value)
    assert "@import" not in page
    assert "url(http" not in page


def test_only_the_pages_own_script_may_run(page: str, parsed: _Page) -> None:
    (policy,) = (tag["content"] for tag in parsed.all("meta") if tag.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None
    assert policy.startswith("default-src 'none'")
    script = re.findall(r"<script>(.*?)</script>", page, flags=re.DOTALL)[0]
    assert base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() in policy


def test_tables_and_figures_can_be_read_aloud(parsed: _Page) -> None:
    assert all(attributes.get("scope") in ("col", "row") for attributes in parsed.all("th"))
    drawings = [tag for tag in parsed.all("svg") if tag.get("role") == "img"]
    assert len(drawings) == len(FIGURES) + 2  # and those of the first screen
    assert all(len(tag["aria-label"] or "") > 20 for tag in drawings)
    assert len(parsed.all("caption")) >= 10
    assert parsed.all("html")[0]["lang"] == "en"


def test_headings_and_parts_can_be_found(parsed: _Page) -> None:
    """One h1, no level left out; parts with a name each; what scrolls sideways is reached by Tab, and has a name."""
    levels = [int(tag[1]) for tag, _ in parsed.tags if re.fullmatch(r"h[1-6]", tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(b <= a + 1 for a, b in pairwise(levels))
    identifiers = {attributes["id"] for _, attributes in parsed.tags if "id" in attributes}
    names = [tag["aria-labelledby"] for tag in parsed.all("section")]
    assert len(set(names)) == len(names)
    assert set(names) <= identifiers
    assert {tag["href"] for tag in parsed.all("a")} <= {f"#{identifier}" for identifier in identifiers}
    boxes = [tag for _, tag in parsed.tags if tag.get("class") == "scroll"]
    assert len(boxes) > 20
    assert all(box["tabindex"] == "0" and box["role"] == "group" and box["aria-label"] for box in boxes)
    assert all(tag["tabindex"] == "0" for tag in parsed.all("pre"))
    assert {tag.get("tabindex") for _, tag in parsed.tags} == {None, "0"}  # the order is the document's


def test_the_summary_comes_first_and_the_run_is_called_small(parsed: _Page) -> None:
    text = parsed.text
    assert text.index("135 million parameters") < text.index("What was lost?") < text.index("tested on this run")
    assert "The models do not yet understand speech" in text
    assert "Missing from this run" not in text


def test_published_numbers_are_labelled(parsed: _Page) -> None:
    n_rows = [tag.get("class") for tag in parsed.all("tr")].count("published")
    assert n_rows == 4 + 22 + 6
    assert parsed.text.count("published (Wang et al.)") == n_rows


def test_samples_show_the_first_questions_of_every_method(page: str, parsed: _Page) -> None:
    assert [tag.get("class") for tag in parsed.all("details")].count("sample") == 2 * MAX_QUESTIONS
    assert f"Invented question {MAX_QUESTIONS - 1}:" in parsed.text
    assert f"Invented question {MAX_QUESTIONS}:" not in parsed.text
    assert "(empty answer)" in parsed.text
    assert "! failed" in parsed.text
    assert f"({len('an answer that loops ' * 200) - MAX_CHARACTERS} more characters)" in parsed.text


def test_every_table_is_shown_and_can_be_copied_in_three_forms(run: Path, parsed: _Page) -> None:
    formats = [tag["data-format"] for tag in parsed.all("template")]
    n_tables = sum((tag.get("id") or "").startswith("table-") for tag in parsed.all("table"))
    shown = {tag["id"] for tag in parsed.all("table") if "id" in tag}
    assert shown == {f"table-{name}" for name in tables_of(read_inputs(run))}
    assert formats == ["markdown", "latex", "csv"] * n_tables


def test_the_same_run_gives_the_same_bytes(tmp_path: Path) -> None:
    make_run(tmp_path, without={"maps", "samples", "layers"})
    first = write_report(tmp_path).read_bytes()
    assert write_report(tmp_path).read_bytes() == first


def test_an_empty_run_still_gives_a_report(tmp_path: Path) -> None:
    page = _Page(write_report(tmp_path).read_text(encoding="utf-8"))
    assert page.open == []
    assert page.text.count("Missing from this run") == 1
    for part in ("results.json is not there", "The figure “figure1” has no data", "no sample answers"):
        assert part in page.text
    assert "published (" not in page.text  # the paper's numbers never stand in for a run's


@pytest.mark.parametrize("part", ["study.yaml", "maps", "samples", "qa", "deactivation", "layers", "claims"])
def test_a_missing_part_is_named_and_the_rest_shown(tmp_path: Path, part: str) -> None:
    others = {"maps", "layers", "training"}  # their figures take most of the time
    page = _Page(write_report(make_run(tmp_path, without={part, *others})).read_text(encoding="utf-8"))
    assert page.open == []
    named = {"maps": "maps/importance.npz", "samples": "no sample answers of base", "study.yaml": "study.yaml"}
    assert named.get(part, f"“{part}”") in page.text


def test_lone_surrogates_and_control_characters_do_not_stop_the_report(tmp_path: Path) -> None:
    make_run(tmp_path, without={"maps", "layers", "training"})
    file = tmp_path / "base" / "samples" / "facts-text" / "samples.jsonl"
    row = r'{"id": "q0", "question": "a", "response": "\ud800\u0000\u202e", "answers": [], "n_new_tokens": 1}'
    write_text(file, row + "\n")
    assert "Accepted:" in write_report(tmp_path).read_text(encoding="utf-8")


def test_a_prompt_of_each_kind_is_shown_with_its_special_tokens(tmp_path: Path) -> None:
    make_run(tmp_path, without={"maps", "layers", "training"})
    without = write_report(tmp_path).read_text(encoding="utf-8")
    provenance = json.loads((tmp_path / "provenance.json").read_text())
    prompts = {"text": "<|user|>Who?\n<|assistant|>", "speech": "<|user|>[speech]<script>alert(1)</script>"}
    (tmp_path / "provenance.json").write_text(json.dumps({**provenance, "prompts": prompts}))
    shown = write_report(tmp_path).read_text(encoding="utf-8")
    assert "What a model is given" not in without, "a run of an earlier version has none"
    assert '<dt>text</dt><dd><pre tabindex="0">&lt;|user|&gt;Who?\n&lt;|assistant|&gt;</pre></dd>' in shown
    assert "[speech]&lt;script&gt;" in shown
    assert "prompts.text" not in shown


def test_no_folder_is_the_users_mistake(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not a folder"):
        write_report(tmp_path / "nothing")


def test_provenance_is_flattened_in_order() -> None:
    value = {"a": {"b": 1, "c": ["x", "y"]}, "d": [{"e": None}], "f": {}, "g": "z" * 500}
    assert list(flat(value, MAX_VALUE)) == [
        ("a.b", "1"),
        ("a.c", "x, y"),
        ("d.0.e", "None"),
        ("f", "{}"),
        ("g", "z" * 400 + " …"),
    ]


def test_importing_the_report_imports_no_torch_and_nothing_else_of_the_package() -> None:
    code = (
        "import sys, palimpsest.report.page\n"
        "print(sorted(m for m in sys.modules if m.split('.')[0] in ('torch', 'transformers', 'pydantic')))\n"
        "print(sorted(m for m in sys.modules if m.startswith('palimpsest.') and m.count('.') == 1))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [
        "[]",
        "['palimpsest.files', 'palimpsest.models', 'palimpsest.records', 'palimpsest.report', 'palimpsest.rundir']",
    ]
