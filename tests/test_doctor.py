"""`palimpsest doctor`: a line for everything, also for what cannot be found out; its numbers by hand."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import palimpsest
from palimpsest.cli import app
from palimpsest.commands import doctor
from palimpsest.models import embedded
from palimpsest.planning import machine
from palimpsest.planning.machine import Finding, findings, folder_bytes


@pytest.fixture(scope="module")
def found() -> dict[str, Finding]:
    return {finding.name: finding for finding in findings()}


def test_every_line_is_found_out_here(found: dict[str, Finding]) -> None:
    missing = {name for name, finding in found.items() if not finding.found}
    assert missing <= {"espeak-ng"}  # a program, which may not be installed
    assert found["palimpsest"].values["version"] == palimpsest.__version__
    assert torch.__version__.startswith(
        found["packages"].values["versions"]["torch"]
    )  # of a wheel for CUDA without +cu
    assert found["packages"].values["missing"] == []
    assert {"embedded", "hub", "augment"} <= set(found["extras"].values["there"])
    assert found["threads"].values["torch"] == torch.get_num_threads()
    assert found["arithmetic"].values == {"dtype": "float32", "reason": "this is a test", "exact": "float32"}
    assert {name for name, finding in found.items() if finding.part == "embedded weights"} == {
        *embedded.MODELS,
        *embedded.SHIPPED,
    }


def test_what_would_run_is_what_plan_says(found: dict[str, Finding], monkeypatch: pytest.MonkeyPatch) -> None:
    demo, paper = found["demo"].values, found["paper-1b"].values
    assert 2e9 < demo["memory_bytes"] < 5e9 < 30e9 < paper["memory_bytes"]
    assert demo["runs"] == (demo["memory_bytes"] <= demo["capacity_bytes"] and demo["disk_bytes"] <= demo["free_bytes"])
    assert "does not fit" in paper["reason"] or paper["memory_bytes"] <= paper["capacity_bytes"]
    monkeypatch.setattr(machine, "memory_limit", lambda: 10**9)  # a small container
    (text, values), wheel = machine._demo(), embedded.read_wheels(embedded.WHEELS)[0]
    assert text.startswith("no: it would need up to ")
    assert (values["runs"], values["capacity_bytes"]) == (False, 10**9)
    monkeypatch.setattr(embedded, "read_wheels", lambda file: [embedded.Wheel("no-such-wheel", "1", "")])
    assert machine._demo()[0] == "no: The demo needs no-such-wheel, which is not installed; run: palimpsest setup"
    assert wheel.installed == wheel.version


def test_what_cannot_be_found_out_says_so_and_stops_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> Any:
        raise OSError("no such\n device")

    def questions() -> Any:
        yield "machine", "device", broken
        yield "machine", "threads", lambda: ("one", {"torch": 1})

    monkeypatch.setattr(machine, "_questions", questions)
    result = CliRunner().invoke(app, ["doctor"])
    assert result.exit_code == 0
    assert [line.split() for line in result.output.splitlines()] == [
        ["machine"],
        ["device", *["cannot", "be", "found", "out", "(OSError:", "no", "such", "device)"]],
        ["threads", "one"],
    ]
    result = CliRunner().invoke(app, ["doctor", "--json"])
    assert [(row["name"], row["found"]) for row in json.loads(result.output)] == [("device", False), ("threads", True)]


def test_lines_come_as_they_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def questions() -> Any:
        for name in ("one", "two"):
            yield "part", name, lambda name=name: asked.append(name) or (name, {})

    monkeypatch.setattr(machine, "_questions", questions)
    lines = doctor.run(doctor.Options())
    assert [next(lines).strip(), next(lines).split()] == ["part", ["one", "one"]]
    assert asked == ["one"]


def test_a_folder_s_bytes_by_hand(tmp_path: Path) -> None:
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs" / "a").write_bytes(bytes(1000))
    (tmp_path / "b").write_bytes(bytes(24))
    (tmp_path / "link").symlink_to(tmp_path / "blobs" / "a")  # as in the hub's cache: counted once
    assert folder_bytes(tmp_path) == (1024, True)
    assert folder_bytes(tmp_path / "none") == (0, True)
    assert folder_bytes(tmp_path, patience=-1) == (24, False)  # the time is over after the first folder


@pytest.mark.parametrize("inside", ["", "palimpsest"])
def test_a_cache_that_is_a_file_is_one_line_and_stops_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, inside: str
) -> None:
    file = tmp_path / "cache"
    file.write_text("somebody's notes")
    monkeypatch.setenv("PALIMPSEST_CACHE", str(file / inside))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(file / inside))
    lines = {line.split()[0]: line for line in CliRunner().invoke(app, ["doctor"]).output.splitlines()}
    for name, variable in (("cache", "PALIMPSEST_CACHE"), ("hub", "HF_HOME")):
        said = f"{file} is a file, and a folder belongs there; move it away, or set {variable} to a folder"
        assert lines[name].split(maxsplit=1)[1] == said
    assert "recipes" in lines


def test_memory_of_a_container(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limit = tmp_path / "memory.max"
    monkeypatch.setattr(machine, "CGROUP_LIMIT", limit)
    assert machine.memory_limit() is None
    for written, expected in (("max\n", None), ("1000000\n", 1_000_000), (f"{2**62}\n", None)):
        limit.write_text(written)
        assert machine.memory_limit() == expected
    limit.write_text("2500000000\n")
    monkeypatch.setattr(machine, "MEMINFO", tmp_path / "meminfo")
    (tmp_path / "meminfo").write_text("MemTotal:  9 kB\nMemAvailable:    1000000 kB\n")
    text, values = machine._memory()
    assert values["available_bytes"] == 1_024_000_000
    assert text.endswith("of which this process may have 2.5 (cgroup), 1.0 available now")


def test_gpus_are_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = SimpleNamespace(
        device_count=lambda: 1,
        mem_get_info=lambda i: (60 * 10**9, 80 * 10**9),
        get_device_capability=lambda i: (9, 0),
        get_device_name=lambda i: "H100",
    )
    monkeypatch.setattr(torch, "cuda", cuda)
    text, values = machine._device()
    assert text == "cuda:0 H100, 80.0 GB, 60.0 free, compute capability 9.0"
    assert values["gpus"] == [
        {"name": "H100", "capability": "9.0", "total_bytes": 80 * 10**9, "free_bytes": 60 * 10**9}
    ]


def test_too_old_and_missing_packages_are_named_with_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = ["numpy>=99", "no-such-package>=1", "torch>=2", 'gradio>=999; extra == "ui"', 'mypy; extra == "dev"']
    monkeypatch.setattr(machine.metadata, "requires", lambda name: lines)
    text, values = machine._packages()
    assert values["missing"] == ["numpy>=99", "no-such-package>=1"]
    assert text.endswith("missing or too old, run: pip install 'numpy>=99' 'no-such-package>=1'")
    assert machine._extras()[1] == {"there": [], "missing": {"ui": ["gradio"]}}
