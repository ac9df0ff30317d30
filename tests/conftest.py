"""What holds for every test: one thread in each process, and of the files that are dealt out the long ones first."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, settings

from palimpsest.models.compute import Choice

# pytest -n runs a process per core, so that more threads would only be in each other's way; and one thread adds numbers
# up in the same order everywhere. Read by OpenMP and BLAS when they are loaded, which is later; what a test starts
# inherits it.
for _library in ("OMP", "MKL", "OPENBLAS"):
    os.environ.setdefault(f"{_library}_NUM_THREADS", "1")

# Of a test on a busy machine, time says nothing.
settings.register_profile("busy", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("busy")

# Files that take long, the longest first, so that none of them begins when the others are finished.
LONG = (
    *("test_study", "test_readme", "test_training_distributed", "test_seeds", "test_training_train", "test_cli"),
    *("test_study_ranks", "test_study_given", "test_study_given_pairs", "test_frontier_study", "test_blend"),
    *("test_study_tokens", "test_token_ranks", "test_token_methods"),
    *("test_keep_ranks", "test_study_drift", "test_retention_callback", "test_own_answers"),
    *("test_report_html", "test_training_options", "test_study_adaptor", "test_report_figures"),
    *("test_evaluation_generate", "test_export", "test_importance_distributed", "test_models_embedded", "test_plan"),
)


@pytest.fixture(autouse=True, scope="session")
def same_arithmetic_everywhere() -> Iterator[None]:
    """No outcome depends on the processor: `compute: auto` is float32 in this process unless a test says otherwise."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("palimpsest.models.compute.fastest", lambda device: Choice("float32", "this is a test"))
        yield


@pytest.fixture(autouse=True, scope="session")
def no_collections_between_steps() -> Iterator[None]:
    """After each step of a study memory is given back, which beside everything a test process holds takes a second."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("palimpsest.study.workspace.give_back_memory", lambda: None)
        yield


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    place = {name: i for i, name in enumerate(LONG)}
    items.sort(key=lambda item: place.get(item.path.stem, len(LONG)))  # stable: the rest stays in its order


@pytest.fixture
def no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reports without drawings, which take most of their time and are tested elsewhere."""
    from palimpsest.report import figures, page

    for module in (figures, page):
        monkeypatch.setattr(module, "FIGURES", {})
