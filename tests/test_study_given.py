"""Models that are given instead of trained: the same tables, whatever form their files have; wrong pairs are told."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from palimpsest.commands import diagnose
from palimpsest.config import parse_config
from palimpsest.files import UserError
from palimpsest.models.adapters import JOIN
from palimpsest.models.loading import load_language_model
from palimpsest.planning.plan_text import plan_recipe
from palimpsest.report import figures, page
from palimpsest.study.run import Study, run_study
from test_importance_any_model import ARCHITECTURES
from tiny import VOCAB, tiny_llama, tiny_tokenizer
from tiny_study import numbered, write_inputs

WEIGHTS = ("layers", "shift", "clustering", "clustering_summary", "delta", "mask_overlap")
BY_MODEL = ("deactivation", "perplexity", "qa", "qa_floors", "probe")


@pytest.fixture(scope="module", autouse=True)
def nothing_is_drawn() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        for module in (figures, page):
            patch.setattr(module, "FIGURES", {})
        yield


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiny models, and manifests with noise for speech."""
    return write_inputs(tmp_path_factory.mktemp("inputs"), numbered(12, 6, "{split} {i}?", "{i}."))


def recipe(inputs: Path, methods: dict[str, Any], *, encoder: bool = True, **changes: Any) -> dict[str, Any]:
    heldout = {"source": str(inputs / "heldout.jsonl"), "split": "heldout"}
    models = {"language_model": str(inputs / "llm"), "compute": "float32"}
    return {
        "name": "tiny",
        "models": {**models, **({"encoder": str(inputs / "whisper")} if encoder else {})},
        "speech": {"adaptor_hidden_size": 24},
        "data": {"train": {"source": str(inputs / "train.jsonl"), "split": "train"}, "heldout": heldout},
        "methods": methods,
        "training": {"epochs": 1, "batch_size": 4, "warmup_ratio": 0},
        "importance": {"n_examples": 6, "batch_size": 2},
        "deactivation": {"random_seeds": 1},
        "analysis": {"shuffles": 1, "bootstrap": 100},
        "evaluation": {"tasks": [{"name": "numbers", **heldout}], "max_new_tokens": 4},
        **changes,
    }


def given(**checkpoints: Path | str) -> dict[str, Any]:
    return {name: {"kind": "given", "checkpoint": str(where)} for name, where in checkpoints.items()}


def results(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "results.json").read_text())
    return found


def of(table: list[dict[str, Any]], *models: str, modality: str | None = None) -> list[dict[str, Any]]:
    """The rows of some models, but for how long an answer took."""
    rows = [row for row in table if (row.get("model") or row["method"]) in models]
    return [row for row in rows if modality is None or row.get("modality", modality) == modality]


@pytest.fixture(scope="module")
def trained(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study that trains full and lora (rank 2)."""
    folder = tmp_path_factory.mktemp("trained")
    methods = {kind: {"kind": kind, "learning_rate": 1e-2, "rank": 2} for kind in ("full", "lora")}
    run_study(parse_config(recipe(inputs, methods), "test"), folder)
    return folder


def checkpoint(run: Path, name: str) -> Path:
    return run / "methods" / name / "checkpoint"


def test_what_a_study_trained_has_the_same_tables_when_it_is_given(inputs: Path, trained: Path, tmp_path: Path) -> None:
    methods = given(full=checkpoint(trained, "full"), lora=checkpoint(trained, "lora") / "adapter")
    run_study(parse_config(recipe(inputs, methods), "test"), tmp_path)
    ours, theirs = results(tmp_path), results(trained)
    for table in WEIGHTS:
        assert ours[table] == theirs[table], table
        assert ours[table]
    assert "delta_rank2" in {row["of"] for row in ours["clustering"]}  # the adapter's rank
    for table in BY_MODEL:
        assert of(ours[table], "base", "full") == of(theirs[table], "base", "full"), table
        assert of(ours[table], "lora") == of(theirs[table], "lora", modality="text"), table
    assert ours["probe_comparisons"] == theirs["probe_comparisons"]
    assert {row["modality"] for row in of(ours["qa"], "full")} == {"text", "speech"}
    assert not (tmp_path / "methods/full/checkpoint/config.json").exists()
    about = json.loads((tmp_path / "methods/lora/checkpoint/given.json").read_text())
    assert (about["form"], about["speech"]) == ("adapter", False)


def test_a_second_start_skips_all_and_other_weights_run_again(inputs: Path, trained: Path, tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    shutil.copytree(checkpoint(trained, "full"), mine)
    config = parse_config(recipe(inputs, given(tuned=mine), encoder=False), "test")
    run_study(config, tmp_path / "run")
    assert not (tmp_path / "run/features").exists()
    assert {row["modality"] for row in results(tmp_path / "run")["qa"]} == {"text"}
    study = Study(config, tmp_path / "run")
    study.run()
    assert all(step.skipped for step in study.ws.done)
    weights = load_file(mine / "model.safetensors")
    name = next(key for key in weights if key.endswith("q_proj.weight"))
    save_file({**weights, name: weights[name] + 0.1}, mine / "model.safetensors", metadata={"format": "pt"})
    study = Study(config, tmp_path / "run")
    study.run()
    again = {step.name for step in study.ws.done if not step.skipped}
    assert {"methods/tuned/checkpoint", "methods/tuned/importance", "analysis"} <= again
    assert not {name for name in again if name.startswith("base/")}


def test_given_and_trained_models_stand_side_by_side(inputs: Path, trained: Path, tmp_path: Path) -> None:
    lora = {"kind": "lora", "learning_rate": 1e-2, "rank": 2}
    mixed = {**given(full=checkpoint(trained, "full")), "lora": lora}
    run_study(parse_config(recipe(inputs, mixed), "test"), tmp_path / "run")
    for table in (*WEIGHTS, *BY_MODEL, "comparisons"):
        assert results(tmp_path / "run")[table] == results(trained)[table], table
    assert {row["method"] for row in results(tmp_path / "run")["training"]} == {"lora"}


def test_the_summary_says_first_what_is_different(inputs: Path, trained: Path, tmp_path: Path) -> None:
    names = [str(checkpoint(trained, "full")), str(checkpoint(trained, "lora") / "adapter")]
    about: dict[str, Any] = {"data": str(inputs / "heldout.jsonl"), "quick": True, "compute": "float32"}
    lines = list(diagnose.run(diagnose.Options(str(inputs / "llm"), names[:1], tmp_path / "one", **about)))
    assert [line.split(" ")[0].rstrip(":") for line in lines] == [
        *("Full-FT", "Drift,", "Probe", "From", "Weights", "The", "Importance", "Report")
    ]
    several = list(diagnose.run(diagnose.Options(str(inputs / "llm"), names, tmp_path / "two", **about)))
    assert [line.split(" ")[0].rstrip(":") for line in several] == ["Full-FT", "LoRA", "Report"]
    assert list(diagnose.run(diagnose.Options(str(inputs / "llm"), names, tmp_path / "two", **about))) == several
    report = (tmp_path / "two/report.html").read_text()
    assert report.index("What is different?") < report.index("What was lost?")
    assert "Missing from this run" not in report


def test_the_base_itself_is_noted_and_differs_in_nothing(
    inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_study(parse_config(recipe(inputs, given(same=inputs / "llm"), encoder=False), "test"), tmp_path)
    assert "is the base itself" in capsys.readouterr().err
    found = results(tmp_path)
    assert {row["relative_norm"] for row in found["delta"]} == {0.0}
    assert {row["value"] for row in found["shift"] if row["measure"] == "jensen_shannon"} == {0.0}


# ---------------------------------------------------------------------------------------------------------------------
# Any architecture
# ---------------------------------------------------------------------------------------------------------------------
def save_pair(folder: Path, kind: str) -> None:
    """`folder`/base and `folder`/tuned: the same model with every matrix of its first layer changed."""
    sizes = {**ARCHITECTURES[kind], "vocab_size": VOCAB, "eos_token_id": 3}
    length = {"n_positions": 512} if kind == "gpt2" else {"max_position_embeddings": 512}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **{**sizes, **length}))
    for name in ("base", "tuned"):
        model.save_pretrained(folder / name)
        tiny_tokenizer().save_pretrained(folder / name)
        for parameter in model.base_model.parameters():
            if parameter.ndim > 1:
                parameter.data *= 1.25


@pytest.mark.parametrize("kind", [*ARCHITECTURES])
def test_a_pair_of_any_architecture(inputs: Path, tmp_path: Path, kind: str) -> None:
    save_pair(tmp_path, kind)
    values = recipe(inputs, given(tuned=tmp_path / "tuned"), encoder=False)
    values["models"]["language_model"] = str(tmp_path / "base")
    values["analysis"]["rank_draws"], values["evaluation"]["probe"] = 0, False
    run_study(parse_config(values, "test"), tmp_path / "run")
    found = results(tmp_path / "run")
    norms = [row["relative_norm"] for row in found["delta"]]
    assert norms == pytest.approx([0.25] * len(norms), rel=1e-5)
    assert {row["model"] for row in found["layers"]} == {"base", "tuned"}
    assert found["shift"]
    assert found["deactivation"]


# ---------------------------------------------------------------------------------------------------------------------
# Wrong pairs, before the long work
# ---------------------------------------------------------------------------------------------------------------------
def saved(folder: Path, model: Any, tokenizer: Any) -> Path:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def renamed_tokens() -> Any:
    """A tokenizer in which two ordinary tokens have changed places."""
    tokenizer = tiny_tokenizer()
    vocabulary = tokenizer.get_vocab()
    first, second = (token for token in vocabulary if vocabulary[token] in (20, 21))
    text = tokenizer.backend_tokenizer.to_str()
    values = json.loads(text)
    values["model"]["vocab"] |= {first: vocabulary[second], second: vocabulary[first]}
    tokenizer._tokenizer = type(tokenizer.backend_tokenizer).from_str(json.dumps(values))
    return tokenizer


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (
            lambda: (tiny_llama(intermediate_size=40, eos_token_id=3), tiny_tokenizer()),
            r"gate_proj.weight has the shape \(48, 32\)",
        ),
        (
            lambda: (tiny_llama(num_hidden_layers=1, eos_token_id=3), tiny_tokenizer()),
            r"it has no model.layers.1.self_attn.q_proj.weight; give the",
        ),
        (
            lambda: (tiny_llama(eos_token_id=3), renamed_tokens()),
            "another tokenizer.* 2 tokens differ, the first is 20",
        ),
    ],
)
def test_a_wrong_pair_is_told_with_its_first_difference(inputs: Path, tmp_path: Path, made: Any, message: str) -> None:
    other = saved(tmp_path / "other", *made())
    with pytest.raises(UserError, match=message):
        run_study(parse_config(recipe(inputs, given(other=other), encoder=False), "test"), tmp_path / "run")
    assert not (tmp_path / "run").exists() or not any((tmp_path / "run").iterdir())


def test_another_architecture_of_the_same_shapes_is_told(inputs: Path, tmp_path: Path) -> None:
    config = {**tiny_llama(eos_token_id=3).config.to_dict(), "sliding_window": 64}
    del config["model_type"]
    mistral = AutoModelForCausalLM.from_config(AutoConfig.for_model("mistral", **config))
    other = saved(tmp_path / "other", mistral, tiny_tokenizer())
    with pytest.raises(UserError, match=r"\(mistral and llama\): .*compute differently"):
        run_study(parse_config(recipe(inputs, given(other=other), encoder=False), "test"), tmp_path / "run")


def test_an_adapter_of_another_base_is_told_unless_its_base_is_named(
    inputs: Path, trained: Path, tmp_path: Path
) -> None:
    base = saved(tmp_path / "base", tiny_llama(1, eos_token_id=3), tiny_tokenizer())
    adapter = checkpoint(trained, "lora") / "adapter"
    values = recipe(inputs, given(lora=adapter), encoder=False)
    values["models"]["language_model"] = str(base)
    with pytest.raises(UserError, match=rf"is an adapter on .*llm.* not those of .*'{base}"):
        run_study(parse_config(values, "test"), tmp_path / "run")
    values["methods"] = given(lora=f"{base}{JOIN}{adapter}")
    Study(parse_config(values, "test"), tmp_path / "run").check()


def test_too_little_memory_for_two_models_is_told(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    n = load_language_model(str(inputs / "llm"))[0].num_parameters()
    config = parse_config(recipe(inputs, given(same=inputs / "llm"), encoder=False), "test")
    for room in (8 * n, 8 * n - 1):
        monkeypatch.setattr("palimpsest.planning.plan.device_of", lambda config, room=room: (room, "it", "cpu"))
        study = Study(config, tmp_path / "run")
        if room == 8 * n:
            study.check()
        else:
            with pytest.raises(UserError, match="base and of a model beside it take"):
                study.check()


def test_a_speech_llm_that_hears_otherwise_is_told(inputs: Path, trained: Path, tmp_path: Path) -> None:
    values = recipe(inputs, given(full=checkpoint(trained, "full")), speech={"stack_factor": 4})
    with pytest.raises(UserError, match=r"stack_factor 5 .*modality: text"):
        Study(parse_config(values, "test"), tmp_path).check()
    values["methods"]["full"]["modality"] = "text"
    Study(parse_config(values, "test"), tmp_path).check()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"methods": {"a": {"kind": "given"}}}, "needs a checkpoint"),
        ({"methods": {"a": {"kind": "full", "checkpoint": "x"}}}, "no other kind has one"),
        ({"methods": {"a": {"kind": "given", "checkpoint": "x", "rank": 4}}}, "does not use rank"),
        ({"methods": {"a": {"kind": "given", "checkpoint": "x"}}, "seeds": 2}, "methods.a is given; set seeds to 1"),
        ({"methods": {"a": {"kind": "full"}}, "models": {"language_model": "x"}}, "methods.a .*needs models.encoder"),
    ],
)
def test_options_that_do_not_go_together(inputs: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse_config({**recipe(inputs, {}), **change}, "test")


# ---------------------------------------------------------------------------------------------------------------------
# The command's own
# ---------------------------------------------------------------------------------------------------------------------
def test_names_are_folders_and_each_is_there_once() -> None:
    paths = ["a/methods/full/checkpoint", "b/methods/full/checkpoint", "x + a/lora/checkpoint/adapter", "./", "base"]
    assert diagnose.names_of(paths) == ["full", "full-2", "lora", "tuned", "base-tuned"]


def test_facts_are_the_demo_s_questions_and_a_limit_is_of_all(inputs: Path, tmp_path: Path) -> None:
    model = str(inputs / "llm")
    config = diagnose.study_of(diagnose.Options(model, [model], tmp_path, limit=5))
    assert (config.data.train.source, config.data.train.limit, config.importance.n_examples) == ("facts", 5, 5)
    assert (config.deactivation.n_examples, config.evaluation.tasks[0].limit) == (5, 5)
    assert config.models.encoder is None


def test_a_plan_of_given_models(inputs: Path, trained: Path, tmp_path: Path) -> None:
    import yaml

    from palimpsest.planning.plan import Assumptions

    file = tmp_path / "r.yaml"
    for encoder in (True, False):
        file.write_text(yaml.safe_dump(recipe(inputs, given(full=checkpoint(trained, "full")), encoder=encoder)))
        lines = list(plan_recipe(file, Assumptions(memory=8.0)))
        assert lines[0] == "tiny: 1 given"
        assert "Nothing is trained." in lines
