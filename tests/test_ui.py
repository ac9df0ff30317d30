"""What the UI shows, without Gradio: answers of every model of a run, and importance read from its files."""

from __future__ import annotations

import shutil
import sys
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch

from palimpsest.commands.ask import Options, answer
from palimpsest.evaluation.answers import Answer
from palimpsest.files import UserError, write_text
from palimpsest.report.inputs import read_inputs
from palimpsest.ui import asking, explorer
from palimpsest.ui import server as page
from ui_fixture import BASE_Q, UP, Q, make_ui_run


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ui")
    make_ui_run(folder)
    return folder


@pytest.fixture(scope="module")
def run(folder: Path) -> Path:
    return folder / "run"


def test_every_model_answers_text_and_speech_or_says_why_not(run: Path, folder: Path) -> None:
    states = list(
        asking.ask_everyone(asking.open_panel(run), text="What is it?", audio=folder / "question.wav", max_new_tokens=4)
    )
    last = states[-1]
    assert list(dict.fromkeys(state.status for state in states)) == [
        "Loading Base (1 of 2) …",
        "Base answers the typed question (1 of 2) …",
        "Loading Full-FT (2 of 2) …",
        "Full-FT answers the typed question (2 of 2) …",
        "Full-FT answers the recording (2 of 2) …",
        "Done.",
    ]
    assert last.status == "Done."
    checkpoint = str(run / "methods" / "full" / "checkpoint")
    asked = {
        ("base", "text"): answer(Options(str(folder / "llm"), text="What is it?", max_new_tokens=4)),
        ("full", "text"): answer(Options(checkpoint, text="What is it?", max_new_tokens=4)),
        ("full", "speech"): answer(Options(checkpoint, audio=folder / "question.wav", max_new_tokens=4)),
    }
    assert last.answers == {key: given or asking.EMPTY for key, given in asked.items()}
    assert "takes no speech" in last.refusals["base", "speech"]
    assert "no recogniser" in last.refusals["base", "cascade"]
    for how in ("text", "speech"):
        assert "methods/lora/checkpoint is not there" in last.refusals["lora", how]  # type: ignore[index]
    for state in states:  # an answer stays, and nothing is both answered and refused
        assert state.answers.items() <= last.answers.items()
        assert not state.answers.keys() & state.refusals.keys()


def test_the_cascade_answers_what_was_heard(run: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (run / "study.yaml").read_text(encoding="utf-8")
    other = folder / "with-asr"
    write_text(other / "study.yaml", text.replace("asr: null", "asr: a/recogniser"))
    monkeypatch.setattr(asking, "_transcript", lambda panel, example: "What is it?")
    panel = asking.open_panel(other)
    last = list(asking.ask_everyone(panel, audio=folder / "question.wav"))[-1]
    typed = list(asking.ask_everyone(panel, text="What is it?"))[-1]
    assert last.answers["base", "cascade"] == f"Heard: What is it?\n\n{typed.answers['base', 'text']}"


def test_one_models_trouble_does_not_stop_the_others(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(panel: asking.Panel, model: str) -> object:
        if model == "base":
            raise torch.OutOfMemoryError("no room")
        return lambda heard, limit: {"text": lambda examples, how: [Answer("fine", 1)]}

    monkeypatch.setattr(asking, "_load", load)
    last = list(asking.ask_everyone(asking.open_panel(run), text="Who?"))[-1]
    assert last.refusals["base", "text"] == "Could not answer: no room"
    assert last.answers == {("full", "text"): "fine"}


class Loaded:
    """In the place of a model, with the answers that it gives."""

    def __init__(self, model: str) -> None:
        self.model = model

    def __call__(self, heard: str | None, limit: int) -> object:
        return {"text": lambda examples, how: [Answer(f"{self.model}, {limit} tokens", 1)]}


def test_a_model_stays_until_another_is_asked_and_goes_before_that_is_loaded(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[str] = []
    alive: list[weakref.ref[Loaded]] = []

    def load(panel: asking.Panel, model: str) -> Loaded:
        assert not any(one() for one in alive)  # room for this one
        loaded.append(model)
        found = Loaded(model)
        alive.append(weakref.ref(found))
        return found

    monkeypatch.setattr(asking, "_load", load)
    panel, kept = asking.open_panel(run), asking.Kept()
    for models, limit in ((["full"], 3), (["full"], 5), (["base", "full"], 7)):
        *states, last = asking.ask_everyone(panel, text="Who?", models=models, max_new_tokens=limit, kept=kept)
        assert last.answers == {(model, "text"): f"{model}, {limit} tokens" for model in models}
        assert any(state.status.startswith("Loading") for state in states) == (limit != 5)
    assert loaded == ["full", "base", "full"]


@pytest.mark.parametrize(
    ("text", "audio", "said"), [("  ", None, "Type a question"), (None, "absent.wav", "absent.wav")]
)
def test_bad_questions_are_told_before_a_model_is_loaded(
    run: Path, monkeypatch: pytest.MonkeyPatch, text: str | None, audio: str | None, said: str
) -> None:
    monkeypatch.setattr(asking, "_load", lambda *_: pytest.fail("a model was loaded"))
    with pytest.raises(UserError, match=said):
        list(asking.ask_everyone(asking.open_panel(run), text=text, audio=Path(audio) if audio else None))
    with pytest.raises(UserError, match="Choose a model"):
        list(asking.ask_everyone(asking.open_panel(run), text="Who?", models=[]))


def test_few_models_are_chosen_at_first(run: Path) -> None:
    panel = asking.open_panel(run)
    assert panel.first_choice == ("base", "full", "lora")
    methods = {f"m{i}": panel.config.methods["full"] for i in range(20)}
    config = panel.config.model_copy(update={"seeds": 3, "methods": methods})
    many = asking.Panel(run, config, {})
    assert len(many.models) == 61
    assert many.first_choice == ("base", "m0", "m1", "m2", "m3", "m4")


def test_no_study_and_no_gradio_are_the_users_mistakes(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match=r"holds no study\.yaml"), page.served(tmp_path):
        pass
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(UserError, match=r"palimpsest-llm\[ui\]"), page.served(run):
        pass


def test_grids_hold_the_table(run: Path) -> None:
    inputs = read_inputs(run)
    assert explorer.models_of(inputs) == ["base", "full"]
    assert explorer.reductions_of(inputs) == ["per_batch_abs"]
    found = explorer.grid(inputs, "full", "per_batch_abs", "mean")
    assert found.kinds == ("q", "up")
    np.testing.assert_array_equal(found.values, [[1.0, np.nan], [np.nan, 6.0]])
    assert explorer.grid(inputs, "full", "per_batch_abs", "total").values[1, 1] == 72.0
    base = explorer.grid(inputs, "base", "per_batch_abs", "mean")
    panels = explorer.draw_grids(base, found, "mean").axes
    # Shares of the base: 1/4, 3/4; of the tuned: 1/7, 6/7.
    change = panels[2].images[0].get_array()
    assert change is not None
    assert change[0, 0] == pytest.approx(np.log2(4 / 7))
    assert change[1, 1] == pytest.approx(np.log2(8 / 7))
    with pytest.raises(UserError, match="no layers of LoRA"):
        explorer.grid(inputs, "lora", "per_batch_abs", "mean")


def test_a_matrix_has_its_exact_sums(run: Path) -> None:
    inputs = read_inputs(run)
    assert explorer.matrices_of(inputs) == [Q, UP]
    one = explorer.matrix(inputs, "base", Q, "per_batch_abs")
    np.testing.assert_array_equal(one.map, BASE_Q)
    assert one.rows is not None
    assert one.columns is not None
    assert one.rows.tolist() == [4.0, 0.0]
    assert one.columns.tolist() == [1.0, 0.0, 3.0]
    assert one.note == "the top 5 % of its rows hold 100.0 %, of its columns 75.0 %"
    both = [one, explorer.matrix(inputs, "full", Q, "per_batch_abs")]
    drawn = [axis.images[0].get_array() for axis in explorer.draw_matrices(both).axes if axis.images]
    assert len([array for array in drawn if array is not None and array.shape == BASE_Q.shape]) == 2
    for model, name, reduction, said in (
        ("lora", Q, "per_batch_abs", "is not there and maps/importance.npz has no map"),
        ("base", "model.layers.9.mlp.up_proj.weight", "per_batch_abs", "has no scores of"),
        ("base", Q, "signed_sum", "no reduction 'signed_sum'"),
    ):
        with pytest.raises(UserError, match=said):
            explorer.matrix(inputs, model, name, reduction)


def test_what_is_missing_is_of_importance(run: Path, tmp_path: Path) -> None:
    """The other tables of results.json are shown nowhere here."""
    assert explorer.missing_from(read_inputs(run)) == ["maps/importance.npz is not there."]
    shutil.copytree(run, tmp_path / "bare", ignore=shutil.ignore_patterns("results.json"))
    assert "results.json is not there." in explorer.missing_from(read_inputs(tmp_path / "bare"))
    write_text(tmp_path / "bare" / "results.json", '{"schema": 1, "layers": [{}]}')
    assert any("“layers”" in line for line in explorer.missing_from(read_inputs(tmp_path / "bare")))


def test_without_scores_the_maps_are_shown_and_said_to_be(run: Path, tmp_path: Path) -> None:
    shutil.copy(run / "study.yaml", tmp_path / "study.yaml")
    text = (
        (tmp_path / "study.yaml")
        .read_text(encoding="utf-8")
        .replace("reduction: signed_sum", "reduction: per_batch_abs")
    )
    write_text(tmp_path / "study.yaml", text)
    (tmp_path / "maps").mkdir()
    np.savez(tmp_path / "maps" / "importance.npz", **{f"base|{Q}": BASE_Q})
    inputs = read_inputs(tmp_path)
    assert explorer.models_of(inputs) == ["base"]
    assert explorer.matrices_of(inputs) == [Q]
    one = explorer.matrix(inputs, "base", Q, "per_batch_abs")
    assert one.rows is None
    assert "from maps/importance.npz" in explorer.about([one])
    assert explorer.draw_matrices([one]).axes
    with pytest.raises(UserError, match="is not there"):
        explorer.matrix(inputs, "base", Q, "signed_sum")  # the maps are of another reduction
