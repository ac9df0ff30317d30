"""What code a step depends on comes from the imports: nothing that it uses is left out, nothing else runs it again."""

from __future__ import annotations

import ast
import json
import platform
import resource
from functools import partial
from pathlib import Path

import pytest

from forked import forked
from palimpsest.config import parse_config
from palimpsest.study import code, steps
from palimpsest.study.run import steps_of
from test_config import MINIMAL


@pytest.mark.parametrize(
    ("step", "needed", "not_needed"),
    [
        ("data", {"data.parquet", "data.augment", "data.splits", "data.voices"}, {"training.train", "models.loading"}),
        ("features", {"data.features", "data.shards", "models.speech_lm"}, {"training.train", "evaluation.answers"}),
        ("train", {"training.trainer", "data.collate", "data.features", "parallel"}, {"evaluation.answers"}),
        ("importance", {"importance.estimate", "importance.layouts", "models.loss"}, {"importance.select"}),
        ("answers", {"evaluation.answers", "evaluation.cascade", "evaluation.scoring"},
         {"evaluation.judge", "evaluation.probe", "training.train", "data.sources"}),
        ("probe", {"evaluation.probe"}, {"evaluation.answers", "evaluation.judge"}),
        ("analysis", {"analysis.clustering", "importance.scores"}, {"analysis.claims", "training.train"}),
    ],
)  # fmt: skip
def test_modules_that_a_step_reaches(step: str, needed: set[str], not_needed: set[str]) -> None:
    modules = set(code.reached(step)[1])
    assert needed <= modules
    assert not modules & not_needed


def test_every_import_is_followed_to_its_end() -> None:
    """Against Python's own view: what the sources of the reached modules import is reached too."""
    for step in ("train", "answers"):
        modules = set(code.reached(step)[1])
        for module in modules:
            tree = ast.parse(code.path_of(module).read_text(encoding="utf-8"))
            branches = [node for node in ast.walk(tree) if isinstance(node, ast.If)]
            typing = [branch for branch in branches if ast.unparse(branch.test) == "TYPE_CHECKING"]
            typing_only = {id(node) for branch in typing for node in ast.walk(branch)}
            for node in ast.walk(tree):
                own = isinstance(node, ast.ImportFrom) and str(node.module).startswith("palimpsest.")
                if own and id(node) not in typing_only:
                    name = str(node.module).removeprefix("palimpsest.")
                    inside = {f"{name}.{alias.name}" for alias in node.names} & modules
                    assert inside or name in modules or name.partition(".")[0] in code.LEFT_OUT, (step, module, name)


def test_a_step_depends_on_its_function_and_what_that_calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    functions = {name for _, name, _ in code.reached("answers")[0]}
    assert {"answers", "_answerer", "collator", "speech_lm", "_behind_adaptor"} <= functions
    assert not {"train", "importance", "new_speech_lm"} & functions
    before = {step: code.step_code(getattr(steps, step)) for step in ("answers", "train")}
    text = code.text("study.steps").replace('f"{folder_of(model)}/samples/', 'f"{folder_of(model)}/other/')
    assert text != code.text("study.steps")
    for cached in (code.step_code, code.definitions, code.about, code._names):
        cached.cache_clear()
    original = code.text
    monkeypatch.setattr(code, "text", lambda module: text if module == "study.steps" else original(module))
    try:
        assert code.step_code(steps.answers) != before["answers"]
        assert code.step_code(steps.train) == before["train"]
    finally:
        for cached in (code.step_code, code.definitions, code.about, code._names):
            cached.cache_clear()


def test_the_steps_are_a_list() -> None:
    config = parse_config({**MINIMAL, "models": {**MINIMAL["models"], "asr": "c"}}, "r")
    named = [step.func.__name__ if isinstance(step, partial) else step.__name__ for step in steps_of(config)]  # type: ignore[attr-defined]
    of_base = ["deactivation", "perplexity", "probe", "answers", "answers"]
    of_full = ["train", "importance", "deactivation", "perplexity", "probe", "answers", "answers"]
    assert named == ["data", "features", "importance", "importance", *of_base, *of_full, "analysis", "maps"]


def test_documented_paths_of_earlier_versions_still_import() -> None:
    with pytest.warns(DeprecationWarning, match="palimpsest.parallel now"):
        from palimpsest.processes import is_main, joined  # type: ignore[import-not-found]
    from palimpsest import parallel

    assert (is_main, joined) == (parallel.is_main, parallel.joined)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries keep memory by rules of their own")
def test_memory_is_kept_within_a_study_and_garbage_looked_through_afterwards() -> None:
    done = forked("import palimpsest.study.workspace", MEMORY)
    assert done.returncode == 0, done.stderr
    alone, kept, frozen_within, frozen_after = json.loads(done.stdout)
    pages = 10 * 80_000_000 // resource.getpagesize()
    assert kept < pages / 10 < alone, "80 MB ten times: the system has to clear them each time, or once"
    assert frozen_within > 10_000 > frozen_after == 0


MEMORY = """
import gc, json, resource
from palimpsest.study.workspace import keeping_memory

def new_pages():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        b"x" * 80_000_000
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

alone = new_pages()
with keeping_memory():
    b"x" * 80_000_000
    kept, frozen = new_pages(), gc.get_freeze_count()
print(json.dumps([alone, kept, frozen, gc.get_freeze_count()]))
"""
