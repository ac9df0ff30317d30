"""Threads that keep the order of results and take only a few items ahead; how long the rest takes."""

from __future__ import annotations

import io
import threading
import time
from collections.abc import Iterator

import pytest
from rich.console import Console

from palimpsest import progress
from palimpsest.data import cores
from palimpsest.data.cores import in_threads


def test_results_keep_their_order_and_items_are_taken_a_few_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cores, "MORE", 2)
    taken = 0

    def items() -> Iterator[int]:
        nonlocal taken
        for item in range(1, 201):
            taken = item
            yield item

    def slow(item: int) -> int:
        time.sleep(0.001 * (item % 3))
        return item

    results = in_threads(slow, items(), cores=1)
    assert next(results) == 1
    assert taken <= 2 * 3 + 1
    assert list(results) == list(range(2, 201))


def test_an_error_stands_where_its_result_would_and_ends_the_threads() -> None:
    def fail(item: int) -> int:
        if item == 50:
            raise ValueError("fifty")
        return item

    results, before = in_threads(fail, range(1000), cores=2), threading.active_count()
    found = []
    with pytest.raises(ValueError, match="fifty"):
        found.extend(results)
    assert found == list(range(50))
    assert threading.active_count() == before


def test_what_an_earlier_start_did_is_not_counted_as_fast_work(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    console = Console(width=100, record=True, quiet=False, file=io.StringIO())
    with progress.Reporter(1, console).step("rows") as advance:
        for clock[0], done in ((101.0, 500), (120.0, 519), (140.0, 539)):
            advance(done, 1000)
    lines = console.export_text().splitlines()
    assert [line.rpartition("about ")[2] for line in lines[:2]] == ["481 s left", "461 s left"]  # one a second
