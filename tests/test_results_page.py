"""The results pages of docs/ show what the records in results/ say, and no other number."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from palimpsest.files import read_json, write_json
from palimpsest.report.table import Column, Table, number, text
from report_fixture import make_run
from script_files import load_script

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "scripts" / "results_page.py"
PAGES = sorted((ROOT / "docs").glob("results-*.md"))


page = load_script("results_page")
TABLE = Table(
    "fruit",
    "Fruit",
    (Column("Name"), Column("Colour"), Column("Mass", numeric=True)),
    (
        (text("apple"), text("green"), number(0.2, "0.20", "0.1 to 0.3")),
        (text("pear"), text("green"), number(0.25)),
        (text("plum"), text("blue"), number(0.03)),
    ),
)


def test_columns_and_rows_are_chosen_and_the_old_table_replaced() -> None:
    mark = "<!-- table: fruit; columns: Mass | Name; Colour = green; Name = app | plum -->\n"
    old = f"Before.\n\n{mark}| x |\n| --- |\n| 1 |\n\nAfter.\n"
    new = page.filled(old, {"fruit": TABLE})
    assert new == f"Before.\n\n{mark}| Mass | Name |\n| ---: | --- |\n| 0.20 \\[0.1 to 0.3\\] | apple |\n\nAfter.\n"
    assert page.filled(new, {"fruit": TABLE}) == new
    whole = page.filled("<!-- table: fruit -->\n", {"fruit": TABLE})
    assert len(whole.splitlines()) == 1 + 2 + 3


@pytest.mark.parametrize(
    ("mark", "said"),
    [
        ("nuts", "no table 'nuts'"),
        ("fruit; columns: Taste", "no column 'Taste'"),
        ("fruit; Taste = sweet", "no column 'Taste'"),
        ("fruit; Colour = red", "No row of table fruit"),
    ],
)
def test_a_mark_that_fits_nothing_is_named(mark: str, said: str) -> None:
    with pytest.raises(SystemExit, match=said):
        page.filled(f"<!-- table: {mark} -->\n", {"fruit": TABLE})


def test_the_script_fills_a_page_and_check_finds_a_changed_number(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    file = tmp_path / "page.md"
    file.write_text("<!-- table: claims; columns: Verdict -->\n", encoding="utf-8")
    command = [sys.executable, str(SCRIPT), str(run), str(file)]
    assert subprocess.run([*command, "--check"], capture_output=True).returncode == 1
    subprocess.run(command, check=True)
    assert file.read_text(encoding="utf-8").count("\n") > 8
    subprocess.run([*command, "--check"], check=True)
    file.write_text(file.read_text(encoding="utf-8").replace("holds", "fails"), encoding="utf-8")
    assert subprocess.run([*command, "--check"], capture_output=True).returncode == 1


def test_what_is_published_of_a_run_has_its_records_and_no_answers(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    write_json(run / "provenance.json", {**read_json(run / "provenance.json"), "study": "invented"})
    command = [sys.executable, str(ROOT / "scripts" / "publish_run.py"), str(run), str(tmp_path / "out")]
    subprocess.run(command, check=True)
    whole, published = (read_json(folder / "results.json") for folder in (run, tmp_path / "out"))
    assert [table for table in whole if published[table] != whole[table]] == ["clustering"]
    assert f"`clustering` ({len(whole['clustering'])} rows" in (tmp_path / "out" / "README.md").read_text()
    report = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert "--no-samples" in report
    assert '<details class="sample"' not in report
    assert not list((tmp_path / "out").rglob("*.jsonl"))


@pytest.mark.parametrize("file", PAGES, ids=lambda file: file.stem)
def test_a_page_shows_its_run(file: Path) -> None:
    run = ROOT / "results" / file.stem.removeprefix("results-")
    written = file.read_text(encoding="utf-8")
    assert page.filled(written, page.tables_of_run(run)) == written


@pytest.mark.parametrize("file", PAGES, ids=lambda file: file.stem)
def test_every_decimal_of_the_prose_stands_in_a_table_of_the_page(file: Path) -> None:
    """Numbers of the text are those of the tables above or below it, digit by digit."""
    written = file.read_text(encoding="utf-8")
    tables = " ".join(line for line in written.splitlines() if line.startswith("|"))
    prose = "\n".join(line for line in written.splitlines() if not line.startswith(("|", "<!--", "    ")))
    known = set(re.findall(r"\d+\.\d+", tables.replace("\\", "")))
    said = set(re.findall(r"\d+\.\d+", re.sub(r"`[^`]*`|```.*?```|\]\([^)]*\)", "", prose, flags=re.S)))
    assert said <= known


def test_a_published_run_says_nothing_of_the_machine_it_ran_on(tmp_path: Path) -> None:
    """No absolute path and no text of a question in what is passed on."""
    for run in (ROOT / "results").glob("*/"):
        copy = shutil.copytree(run, tmp_path / run.name)
        for path in copy.rglob("*"):
            if path.suffix in (".json", ".yaml", ".html", ".svg"):
                written = path.read_text(encoding="utf-8")
                assert not re.search(r"[\"'\s]/(home|root|tmp|mnt|work|Users)/", written), path
                assert '<details class="sample"' not in written
                assert "<audio " not in written
