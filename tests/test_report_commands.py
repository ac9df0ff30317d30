"""The commands in a page: the command line takes them, and each names what it makes again."""

from __future__ import annotations

import re
import shlex
from html import unescape
from pathlib import Path

import pytest
import typer.main
from typer.testing import CliRunner

from palimpsest.cli import app
from palimpsest.report import remake as commands
from palimpsest.report.figures import FIGURES
from palimpsest.report.page import write_report
from report_fixture import make_run


def typed(page: str) -> list[str]:
    """Every command of the page, as its button copies it."""
    return [unescape(code) for code in re.findall(r'<span class="command"><code>(.*?)</code>', page)]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("a folder's") / "run", n_questions=1)


@pytest.fixture(scope="module")
def page(run: Path) -> str:
    return write_report(run).read_text(encoding="utf-8")


def test_every_figure_and_every_part_has_its_command(page: str, run: Path) -> None:
    found = typed(page)
    for name in FIGURES:
        assert commands.figure(name, run) in found
    for section in re.findall(r'<section id="(\w+)"', page):
        text = page.split(f'<section id="{section}"')[1].split("</section>")[0]
        if section not in ("summary", "provenance"):
            assert commands.report(run) in typed(text), section
            assert any("palimpsest study" in command for command in typed(text)), section


def test_the_command_line_takes_every_command_as_written(page: str, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(run.parent)
    for command in set(typed(page)):
        for part in command.split(" && "):
            words = shlex.split(part)
            if words[0] == "rm":
                assert all(any(run.glob(str(Path(word).relative_to(run.name)))) for word in words[2:])
                continue
            assert words[0] == "palimpsest"
            typer.main.get_command(app).make_context("palimpsest", words[1:])  # parsed, not run


def test_a_copied_command_makes_the_figure(page: str, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(run.parent)
    command = commands.figure("training", run)
    assert command in typed(page)
    file = run / "figures" / "training.svg"
    assert not file.exists()
    assert CliRunner().invoke(app, shlex.split(command)[1:]).exit_code == 0
    assert file.exists()


def test_a_run_below_the_working_folder_is_relative_to_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert commands.report(tmp_path / "runs" / "my run") == "palimpsest report 'runs/my run'"
    assert commands.report(Path("demo"), audio=False) == "palimpsest report demo --no-audio"
    assert commands.report(Path("demo"), samples=False) == "palimpsest report demo --no-samples"
    outside = "palimpsest study elsewhere/study.yaml --out elsewhere"  # typed beside it; no folder of the machine
    assert commands.study(Path("/home/ada/elsewhere")) == outside


def test_a_step_is_measured_again_only_where_the_run_has_it(tmp_path: Path) -> None:
    (tmp_path / "methods" / "full" / "deactivation").mkdir(parents=True)
    command = commands.again(tmp_path, commands.STEPS["deactivation"])
    assert command == f"rm -r {tmp_path.name}/methods/*/deactivation && {commands.study(tmp_path)}"
    assert commands.again(tmp_path, ["maps"]) == commands.study(tmp_path)


def test_the_steps_are_folders_of_a_run_directory() -> None:
    layout = (Path(__file__).parent.parent / "docs" / "run-directory.md").read_text(encoding="utf-8").split("```")[1]
    lines = {line.split("/")[0]: line for line in layout.splitlines() if "/" in line}
    for steps in commands.STEPS.values():
        for step in steps:
            folder, *inside = step.replace("methods/*", "methods").split("/")
            assert folder in lines, step
            assert all(re.search(rf"\b{part}/", lines[folder]) for part in inside), step
