"""A few interruptions and a few damaged inputs of every kind; the scripts beside this one do many."""

from __future__ import annotations

from pathlib import Path

import pytest

from reliability import fuzz, interrupt
from reliability.jobs import jobs, write_inputs

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    write_inputs(folder)
    return folder


@pytest.mark.parametrize("name", ["study", "evaluate", "validate-importance", "data prepare"])
def test_what_is_interrupted_ends_as_if_nothing_happened(inputs: Path, tmp_path: Path, name: str) -> None:
    job = jobs(inputs)[name]
    expected, seconds, _ = interrupt.uninterrupted(job, tmp_path)
    for cut in (False, True):
        figures = interrupt.interrupted(job, tmp_path, expected, seconds, 4, cut=cut, seed=int(cut))
        assert figures.faults == []
        assert figures.counts["series"] > 0


@pytest.mark.parametrize(
    "name", ["manifest", "csv", "parquet", "wav", "flac", "recipe", "scores", "checkpoint", "template", "samples"]
)
def test_an_input_that_is_nearly_right_is_read_or_refused(
    valid: dict[str, fuzz.Kind], tmp_path: Path, name: str
) -> None:
    outcomes = [fuzz.fault_of(valid[name], number, tmp_path / str(number)) for number in range(8)]
    assert [fault for _, fault in outcomes if fault] == []


@pytest.fixture(scope="module")
def valid(tmp_path_factory: pytest.TempPathFactory) -> dict[str, fuzz.Kind]:
    return fuzz.kinds(tmp_path_factory.mktemp("kinds"))
