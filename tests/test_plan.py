"""`palimpsest plan`: what a recipe needs, before anything runs; refused with the number where it cannot fit."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import MimiConfig

from palimpsest.config import load_config, parse_config
from palimpsest.files import UserError
from palimpsest.planning import plan as module
from palimpsest.planning.memory import memory
from palimpsest.planning.needs import steps_at_most
from palimpsest.planning.plan import Assumptions, Lengths, Plan, is_hub_name, make_plan
from palimpsest.planning.plan_text import plan_recipe, refusal
from palimpsest.training.methods import add_lora, rules_for
from palimpsest.training.rules import assign
from tiny import tiny_llama, tiny_speech_lm, tiny_tokenizer

ROOT = Path(__file__).parent.parent
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))
PAPER = ROOT / "recipes" / "paper-8b.yaml"


def recipe(folder: Path, **changes: Any) -> Path:
    """A recipe on a tiny model and a manifest of ten questions."""
    model = tiny_llama(eos_token_id=3)
    model.save_pretrained(folder / "llm")
    tiny_tokenizer().save_pretrained(folder / "llm")
    rows = [{"id": f"q{i}", "question": "a" * 40, "answer": "b" * (10 + i)} for i in range(10)]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    values = {
        "name": "tiny",
        "models": {
            "language_model": str(folder / "llm"),
            "encoder": "embedded:whisper-tiny.en",
            "device": "cpu",
            "compute": "float32",
        },
        "data": {
            "train": {"source": str(folder / "train.jsonl"), "split": "train"},
            "heldout": {"source": "facts", "split": "heldout"},
        },
        "methods": {kind: {"kind": kind} for kind in ("full", "layer_lr", "lora")},
        "training": {"batch_size": 4, "epochs": 2},
        "evaluation": {"tasks": [{"name": "facts", "source": "facts", "split": "heldout"}]},
        **changes,
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def test_lengths_batch_and_steps_by_hand(tmp_path: Path) -> None:
    plan = make_plan(load_config(recipe(tmp_path)), Assumptions(gpu="L4"))
    # The byte tokenizer's prompt: <s><user>, a line break, the instruction of 39 characters, <end>, a line break,
    # <assistant>; speech of 40 characters takes 2.8 s, 28 positions of 0.1 s; the longest answer 19 bytes and <end>.
    frame = 2 + 1 + len("Answer the question asked in the speech.") + 1 + 1 + 1
    full = plan.methods[0]
    assert (full.batch.rows, full.batch.positions) == (4, 28)
    assert full.batch.length == frame + 28 + 20
    assert full.batch.supervised == 16  # 10 … 19 bytes and one: 15.5 on average
    assert full.batch.columns == 20
    assert full.steps == 2 * 3  # ten examples, batches of four, two epochs
    text = make_plan(load_config(recipe(tmp_path, methods={"t": {"kind": "full", "modality": "text"}})), Assumptions())
    assert text.methods[0].batch.positions == 0
    assert text.methods[0].batch.length == 2 + 40 + 3 + 20  # the question stands in place of speech and instruction
    # 28 positions of five frames of 384 numbers of two bytes, ten times
    assert plan.features == pytest.approx(10 * 28 * 5 * 384 * 2)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_can_be_planned_and_every_method_covers_a_model(path: Path) -> None:
    config = load_config(path)
    plan = make_plan(config, Assumptions(gpu="H200", n_gpus=8))
    trained = {name: method for name, method in config.methods.items() if method.trains}
    assert [method.name for method in plan.methods] == list(trained)
    assert all(method.memory.peak > method.memory.weights for method in plan.methods)
    for method in trained.values():
        model, _ = tiny_speech_lm()
        wanted = method
        if wanted.kind == "lora":
            add_lora(model, wanted)
        assign((name for name, _ in model.named_parameters()), rules_for(wanted, {0: 1.0, 1: 0.6}))
    for split in (config.data.train, *config.evaluation.tasks):
        assert all(source == "facts" or is_hub_name(source) for source in split.source.split(" + "))


def test_rows_of_speech_tokens_by_hand(tmp_path: Path) -> None:
    """1,000 rows as wide as SmolLM2-135M's embedding, 576, in the adaptor's place; 25 tokens a second against 10."""
    path = ROOT / "recipes" / "tokens-cpu.yaml"
    plan = make_plan(load_config(path), Assumptions(gpu="H200"))
    by_name = {method.name: method for method in plan.methods}
    adaptor = (384 * 5 + 1) * 2048 + (2048 + 1) * 576
    assert by_name["rows"].setup.trainable == 576_000
    assert by_name["adaptor"].setup.trainable == by_name["quantised"].setup.trainable == adaptor
    for name in ("full", "layer_lr", "lora"):
        of_frames, of_tokens = by_name[name].setup, by_name[f"{name}_tokens"].setup
        assert of_frames.trainable - of_tokens.trainable == adaptor - 576_000
        longer = by_name[f"{name}_tokens"].batch.positions / by_name[name].batch.positions
        assert longer == pytest.approx(2.5, rel=0.05)
        assert by_name[f"{name}_tokens"].flops > by_name[name].flops  # the prompts are longer
    assert by_name["rows"].checkpoint == 4 * 576_000  # light: nothing else
    lines = list(plan_recipe(path, Assumptions(gpu="H200")))
    assert f"  adaptor         {adaptor:,} parameters" in lines
    assert "  speech tokens   1,000 rows, 576,000 parameters, in the adaptor's place" in lines
    # A study whose methods all read tokens has no adaptor.
    values = yaml.safe_load(path.read_text())
    values["methods"] = {"rows": values["methods"]["rows"]}
    values["speech"]["tokens"]["start"] = "embedding"
    (tmp_path / "rows.yaml").write_text(yaml.safe_dump(values))
    lines = list(plan_recipe(tmp_path / "rows.yaml", Assumptions(gpu="H200")))
    assert not any(line.startswith("  adaptor ") for line in lines)


def test_a_codecs_tokens_are_counted_by_its_own_rate(tmp_path: Path) -> None:
    """Mimi's config: 12.5 tokens a second; one whose config is not to be had is taken at 50, and that is said."""
    MimiConfig().save_pretrained(tmp_path / "codec")
    values = yaml.safe_load((ROOT / "recipes" / "tokens-cpu.yaml").read_text())
    values["methods"] = {name: values["methods"][name] for name in ("full", "full_tokens")}

    def planned(codec: str) -> tuple[Plan, list[str]]:
        values["speech"]["tokens"] = {"kind": "codec", "codec": codec, "k": 2048}
        (tmp_path / "codec.yaml").write_text(yaml.safe_dump(values))
        options = Assumptions(gpu="H200")
        plan = make_plan(load_config(tmp_path / "codec.yaml"), options)
        return plan, list(plan_recipe(tmp_path / "codec.yaml", options))

    known, lines = planned(str(tmp_path / "codec"))
    assert known.codec == 12.5
    assert f"  codec           {tmp_path / 'codec'}: 12.5 tokens a second (its config)" in lines
    assumed, lines = planned("nobody/has-this-codec")
    assert assumed.codec == 50
    assert "nobody/has-this-codec: 50 tokens a second (assumed: its config cannot be had)" in "\n".join(lines)
    longest = max(row[2] for row in known.lengths.rows)  # seconds
    for plan, rate in ((known, 12.5), (assumed, 50)):
        frames, tokens = (method.batch.positions for method in plan.methods)
        assert (frames, tokens) == (math.ceil(longest * 50 / 5), math.ceil(longest * rate))
    one = Lengths(1, ((10, 5, 2.0, 3),), "", 0.0)
    assert one.sequences(known.config, "speech", 1, 12.5) == [(10 + 25 + 3, 25, 3)]


def test_importance_in_parts_is_planned(tmp_path: Path) -> None:
    """One reduction of the matrices, the embedding and, at most, 4,000 rows, 576 wide; longer prompts than as text."""
    config = load_config(ROOT / "recipes" / "tokens-cpu.yaml")
    steps = {step.name: step for step in make_plan(config, Assumptions(gpu="H200")).steps}
    parts, plain = steps["methods/NAME/importance_parts"], steps["methods/NAME/importance"]
    assert parts.parts["accumulators"] - plain.parts["accumulators"] == 4 * (49_152 + 4000) * 576
    assert parts.parts["activations"] > plain.parts["activations"]
    without = load_config(ROOT / "recipes" / "demo.yaml")
    assert "methods/NAME/importance_parts" not in {step.name for step in make_plan(without, Assumptions()).steps}


def test_the_papers_recipes_keep_its_settings() -> None:
    for name, rank in (("paper-1b", 8), ("paper-8b", 16)):
        config = load_config(ROOT / "recipes" / f"{name}.yaml")
        assert config.data.heldout_examples == 500
        assert config.importance.n_examples is None  # 1/30 of the training data
        assert config.training.batch_size * config.training.accumulation == 32
        assert (config.training.epochs, config.training.warmup_ratio) == (3, 0.03)
        assert {method.learning_rate for method in config.methods.values()} == {2e-5}
        assert (config.methods["lora"].rank, config.methods["lora"].alpha) == (rank, 2 * rank)
        assert config.methods["layer_lr"].lambda_ == 0.4
        assert config.speech.length == "pad_to_30s"
    ranks = load_config(ROOT / "recipes" / "lora-rank.yaml").methods
    assert [method.rank for method in ranks.values()] == [8, 16, 24]
    sweep = load_config(ROOT / "recipes" / "layer-lr-lambda.yaml").methods
    assert {method.importance for method in sweep.values()} == {"measured", "shuffled", "inverted"}


def test_a_batch_that_cannot_fit_is_refused_with_the_largest_that_fits(tmp_path: Path) -> None:
    path = recipe(tmp_path, training={"batch_size": 512})
    plan = make_plan(load_config(path), Assumptions(memory=1.2))
    said = refusal(plan, path)
    assert said is not None
    found = re.search(
        r"the largest batch that fits is (\d+) rows: set training.batch_size to \1 and .*accumulation", said
    )
    assert found is not None, said
    rows = int(found[1])
    worst = max(plan.methods, key=lambda method: method.memory.peak)
    fits, more = (
        make_plan(load_config(recipe(tmp_path, training={"batch_size": n})), Assumptions(memory=1.2))
        for n in (rows, rows + 1)
    )
    assert refusal(fits, path) is None
    assert refusal(more, path) is not None
    assert f"{worst.memory.peak / 1e9:.1f} GB" in said
    with pytest.raises(UserError, match="does not fit"):
        list(plan_recipe(recipe(tmp_path, training={"batch_size": 512}), Assumptions(memory=1.2)))


def test_what_fits_only_on_several_gpus_is_told(tmp_path: Path) -> None:
    plan = make_plan(load_config(PAPER), Assumptions(gpu="H100"))
    said = refusal(plan, PAPER)
    assert said is not None
    assert "full, layer_lr would need" in said  # LoRA fits
    needed = re.search(r"at least (\d+) such devices are needed \(--n-gpus \1\)", said)
    assert needed is not None, said
    plan = make_plan(load_config(PAPER), Assumptions(gpu="H100", n_gpus=8))
    assert refusal(plan, PAPER) is None
    one = make_plan(load_config(PAPER), Assumptions(gpu="H100")).methods[0]
    whole = 4 * one.setup.encoder.parameters  # it encodes in the loop, on every device
    assert one.memory.weights - whole > 7 * (plan.methods[0].memory.weights - whole) > 0
    kept = replace(plan.methods[0].setup, in_loop=False)
    assert one.memory.weights > 7 * memory(kept, plan.methods[0].batch).weights


def test_importance_is_planned_and_refused_with_the_keys_that_make_room(tmp_path: Path) -> None:
    """8B in float32 on 80 GB: weights 32 and sums of two reductions 56, before any activation."""

    def plan_with(**importance: Any) -> tuple[Any, Path]:
        values = yaml.safe_load(PAPER.read_text())
        values["importance"] = {"batch_size": 8, **importance}
        path = tmp_path / f"{len(list(tmp_path.iterdir()))}.yaml"
        path.write_text(yaml.safe_dump(values))
        return make_plan(load_config(path), Assumptions(gpu="H100", n_gpus=8)), path

    plan, path = plan_with()
    base, tuned = plan.steps[:2]
    matrices, decoder = plan.methods[0].setup.decoder.matrices, plan.methods[0].setup.decoder.parameters
    assert base.parts["weights"] == 4 * decoder
    assert base.parts["accumulators"] == 2 * 4 * matrices
    assert tuned.parts["weights"] - base.parts["weights"] == 4 * (
        plan.methods[0].setup.encoder.parameters + plan.methods[0].setup.adaptor_parameters
    )
    said = refusal(plan, path)
    assert said is not None
    assert "base/importance and methods/NAME/importance would need up to" in said
    with pytest.raises(UserError, match=r"base/importance .* set importance\.accumulate: kept, .*keep: \[signed_sum\]"):
        list(plan_recipe(path, Assumptions(gpu="H100", n_gpus=8)))
    assert base.remedy is not None
    keys = yaml.safe_load("{" + base.remedy.replace("importance.", "") + "}")
    fits, path = plan_with(**keys)
    assert refusal(fits, path) is None
    assert fits.steps[0].parts["accumulators"] == 4 * matrices
    host, _ = plan_with(offload="cpu", gradient_checkpointing=True)
    assert (host.steps[0].parts["accumulators"], host.steps[0].host) == (0, 8 * matrices)
    shipped = make_plan(load_config(PAPER), Assumptions(gpu="H100", n_gpus=8))
    assert all(step.peak <= shipped.capacity for step in shipped.steps)
    assert "where base/importance" in str(refusal(*plan_with(batch_size=1)))


def test_what_points_of_curves_do_not_measure_is_not_planned_for_them(tmp_path: Path) -> None:
    curve = {"full": {"kind": "full", "over": {"learning_rate": [1e-5, 1e-4]}}}

    def weights(frontier: list[str]) -> dict[str, int]:
        plan = make_plan(load_config(recipe(tmp_path, methods=curve, frontier={"measure": frontier})), Assumptions())
        return {step.name: step.parts["weights"] for step in plan.steps}

    base_alone, all_measured = weights([]), weights(["importance", "deactivation"])
    assert all_measured.keys() - base_alone.keys() == {"methods/NAME/importance"}
    assert base_alone["deactivation"] == base_alone["base/importance"] < all_measured["deactivation"]


def test_drift_has_two_models_and_both_their_logits(tmp_path: Path) -> None:
    values = yaml.safe_load(recipe(tmp_path).read_text())
    path = tmp_path / "drift.yaml"

    def steps(**section: Any) -> dict[str, Any]:
        path.write_text(yaml.safe_dump({**values, "drift": section}))
        plan = make_plan(load_config(path), Assumptions(gpu="H100"))
        return {step.name: (step, plan.methods[0].setup) for step in plan.steps}

    drift, setup = steps(own_text={"new_tokens": 100}, batch_size=4)["drift"]
    tuned = setup.decoder.parameters + setup.encoder.parameters + setup.adaptor_parameters
    logits = 4 * 100 * setup.decoder.vocabulary * 8  # 4 bytes and as many in the loss's float32
    wide = 8 * 64 * setup.decoder.vocabulary * 8
    assert drift.parts["weights"] == 4 * (tuned + setup.decoder.parameters) + logits + wide
    assert drift.parts["loss or gradient"] == logits
    assert "general_text" not in steps()
    assert steps(general_text={"text": "wiki.txt"}).keys() - steps().keys() == {"general_text"}
    assert "drift" not in {step.name for step in make_plan(load_config(recipe(tmp_path)), Assumptions()).steps}


def test_a_batch_of_answers_that_does_not_fit_is_given_a_size(tmp_path: Path) -> None:
    values = yaml.safe_load(recipe(tmp_path).read_text())
    values["evaluation"] |= {"batch_size": 100_000}
    path = tmp_path / "answers.yaml"
    path.write_text(yaml.safe_dump(values))
    plan = make_plan(load_config(path), Assumptions(memory=4))
    said = refusal(plan, path)
    found = re.search(r"answers would need up to .*: set evaluation\.batch_size: (\d+)", str(said))
    assert found is not None, said
    for rows, expected in ((int(found[1]), True), (int(found[1]) + 1, False)):
        values["evaluation"]["batch_size"] = rows
        path.write_text(yaml.safe_dump(values))
        assert (refusal(make_plan(load_config(path), Assumptions(memory=4)), path) is None) == expected


def test_the_command_prints_the_plan_and_refuses_in_one_sentence() -> None:
    command = [sys.executable, "-m", "palimpsest.cli", "plan", str(PAPER)]
    small = subprocess.run([*command, "--gpu", "L4"], capture_output=True, text=True)
    assert small.returncode == 2
    assert small.stderr.startswith("palimpsest: ")
    assert small.stderr.count("\n") == 1
    assert "does not fit: full, layer_lr, lora would need up to" in small.stderr
    for words in ("8,030,261,248 parameters", "activations", "Time on 1 × L4", "Disk, GB", "Formulas"):
        assert words in small.stdout


def test_a_model_without_a_config_here_is_told_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    values = yaml.safe_load(recipe(tmp_path).read_text())
    values["models"]["language_model"] = "nobody/no-such-model-here"
    config = parse_config(values, "r")
    with pytest.raises(UserError, match=r"cannot be had .*--config FILE, or --shape with one of llama-3\.2-1b"):
        make_plan(config, Assumptions())
    plan = make_plan(config, Assumptions(shape="llama-3.2-1b"))
    assert plan.methods[0].setup.decoder.parameters == 1_235_814_400
    assert "without the tokenizer" in plan.lengths.origin
    with pytest.raises(UserError, match="Both --shape and --config"):
        make_plan(config, Assumptions(shape="llama-3.2-1b", config=tmp_path / "llm"))


def test_data_that_is_not_here_needs_a_number(tmp_path: Path) -> None:
    data = {"train": {"source": "some/questions", "split": "train"}, "heldout_examples": 2}
    config = load_config(recipe(tmp_path, data=data))
    with pytest.raises(UserError, match="some/questions is not on this machine; give --examples"):
        make_plan(config, Assumptions())
    short, long = (make_plan(config, Assumptions(examples=100, question_seconds=s)) for s in (2.0, 8.0))
    assert short.lengths.n == 100
    assert long.features == pytest.approx(4 * short.features, rel=0.01)
    assert long.methods[0].memory.peak > short.methods[0].memory.peak


def test_hub_names_are_told_from_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "set").mkdir()
    assert is_hub_name("gpt-omni/VoiceAssistant-400K")
    assert not any(
        map(is_hub_name, ("facts", "own/set", "data/train.jsonl", "./a/b", "voice_assistant:data/x", "/a/b"))
    )


def test_several_training_runs_are_counted(tmp_path: Path) -> None:
    """On disk 3 × 3 checkpoints instead of 3; importance of the base and of all runs, or of the first alone."""

    def disk(**changes: Any) -> tuple[list[float], list[str]]:
        path = recipe(tmp_path, **changes)
        said = list(plan_recipe(path, Assumptions(gpu="L4")))
        of = make_plan(load_config(path), Assumptions(gpu="L4"))
        checkpoints = sum(method.checkpoint for method in of.methods)
        return [checkpoints / 1e9, of.scores / 1e9], said

    def entry(lines: list[str], start: str) -> float:
        return float(next(line for line in lines if line.strip().startswith(start)).split()[-1])

    (checkpoints, scores), said = disk(seeds=3)
    assert said[0] == "tiny: 3 methods, 3 training runs of each"
    assert entry(said, "checkpoints of 9 training runs") == round(3 * checkpoints, 2) > 0
    assert entry(said, "importance, two reductions of 10 models") == round(10 * scores, 2)
    assert any(line.strip().startswith("all methods, 3 runs of each") for line in said)
    _, less = disk(seeds=3, seeds_measure=["probe"])
    assert any("two reductions of 4 models" in line for line in less)
    _, one = disk()
    assert one[0] == "tiny: 3 methods"
    assert not any("training runs" in line or "runs of each" in line for line in one)


def test_time_and_disk_follow_the_formulas(tmp_path: Path) -> None:
    path = recipe(tmp_path)
    plan = make_plan(load_config(path), Assumptions(gpu="A100-40GB"))
    lines = list(plan_recipe(path, Assumptions(gpu="A100-40GB", utilisation=0.5)))
    assert any("FLOPs / (0.5 × 19.5 TFLOP/s, float32)" in line for line in lines)  # the recipe computes in float32
    full = plan.methods[0]
    weights = 4 * (full.setup.decoder.parameters + full.setup.adaptor_parameters + full.setup.encoder.parameters)
    assert full.checkpoint == weights
    often = make_plan(load_config(recipe(tmp_path, training={"batch_size": 4, "checkpoint_every": 2})), Assumptions())
    # Three times the model and two numbers for each that is trained, in float32.
    assert often.methods[0].while_training == 3 * (weights + 8 * often.methods[0].setup.trainable)
    little = {"keep": ["per_batch_abs"], "reduction": "per_batch_abs", "keep_other": "masks", "offload": "disk"}
    models = yaml.safe_load(recipe(tmp_path).read_text())["models"]
    of = make_plan(
        load_config(recipe(tmp_path, importance=little, models={**models, "checkpoints": "light"})), Assumptions()
    )
    matrices, lora = full.setup.decoder.matrices, of.methods[2].setup
    assert [(step.name, step.kept) for step in of.disk] == [
        ("base/importance", 4 * matrices),
        ("base/importance_other", matrices / 8),
        ("methods/full/checkpoint", weights),
        ("methods/full/importance", 4 * matrices),
        ("methods/layer_lr/checkpoint", weights),
        ("methods/layer_lr/importance", 4 * matrices),
        ("methods/lora/checkpoint", 4 * (lora.lora_parameters + lora.adaptor_parameters)),
        ("methods/lora/importance", 4 * matrices),
    ]
    assert {step.passing for step in of.disk if "importance" in step.name} == {8 * matrices}
    assert full.while_training == 0  # six steps, a checkpoint every 500
    assert memory(full.setup, full.batch) == full.memory


def changed(folder: Path, name: str, **speech: Any) -> Path:
    """A recipe that ships, with other keys of its speech section."""
    values = yaml.safe_load((ROOT / "recipes" / f"{name}.yaml").read_text())
    values["speech"] |= speech
    path = folder / f"{name}-{len(list(folder.iterdir()))}.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def test_the_paper_at_1b_takes_at_most_200_gb_of_disk_in_the_loop(tmp_path: Path) -> None:
    def disk(path: Path) -> tuple[float, list[str]]:
        lines = list(plan_recipe(path, Assumptions(gpu="H100")))
        (said,) = [line for line in lines if line.startswith("Disk, GB")]
        return float(said.split()[2]), lines

    in_loop, lines = disk(ROOT / "recipes" / "paper-1b.yaml")
    assert in_loop <= 200
    assert any("encode the speech, 9 × in the loop" in line for line in lines)  # three methods, three epochs
    cached, lines = disk(changed(tmp_path, "paper-1b", features="cache"))
    assert cached > 2000
    assert any("encode the speech, once" in line for line in lines)

    plan = make_plan(load_config(ROOT / "recipes" / "paper-1b.yaml"), Assumptions(gpu="H100"))
    assert plan.features == 0
    assert plan.other_features == (500 + 300 + 2032) * 1500 * 1280 * 2  # held out, two tasks
    assert plan.lengths.n == 470_054 + 51_349
    assert plan.audio == ((470_054 + 51_349 + 300 + 2032) * 6 * 18_000)
    kept = make_plan(load_config(changed(tmp_path, "paper-1b", features="cache")), Assumptions(gpu="H100"))
    assert kept.features == (470_054 + 51_349 - 500) * 1500 * 1280 * 2
    assert kept.other_features == plan.other_features


def test_auto_is_planned_by_the_disk_that_is_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = changed(tmp_path, "paper-1b", features="auto")
    for free, found in ((5e12, "cache"), (3e12, "loop")):  # 2.0 TB are half of 4
        monkeypatch.setattr(module, "free_bytes", lambda folder, n=free: int(n))
        plan = make_plan(load_config(path), Assumptions(gpu="H100"))
        assert plan.frames.path == found
        assert (plan.features > 0) == (found == "cache")
        assert "2000.3 GB of frames" in plan.frames.reason


def test_local_questions_count_with_their_frames_and_recordings(tmp_path: Path) -> None:
    questions = [{"id": f"k{i}", "question": "c" * 20, "answer": "d"} for i in range(4)]
    (tmp_path / "task.jsonl").write_text("".join(json.dumps(row) + "\n" for row in questions))
    task = {"source": str(tmp_path / "task.jsonl"), "split": "test"}
    data = {"train": {"source": str(tmp_path / "train.jsonl"), "split": "train"}, "heldout": task}
    path = recipe(tmp_path, data=data, evaluation={"tasks": [{"name": "t", **task}]})
    plan = make_plan(load_config(path), Assumptions(gpu="L4"))
    # 1.4 s of speech, 70 frames of 384 numbers; four held out, four of the task; ten to train on of 2.8 s
    assert plan.other_features == pytest.approx(8 * 70 * 384 * 2)
    assert plan.audio == pytest.approx((8 * 1.4 + 10 * 2.8) * 18_000)


@pytest.mark.slow
def test_the_planned_peak_is_within_15_percent_of_the_measured(tmp_path: Path) -> None:
    out = tmp_path / "rows.json"
    command = [sys.executable, str(ROOT / "benchmarks" / "plan.py"), str(tmp_path / "run"), "--json", str(out)]
    subprocess.run(command, check=True, capture_output=True)
    rows = json.loads(out.read_text())
    assert [row["method"] for row in rows] == ["full", "layer_lr", "lora"]
    for row in rows:
        assert abs(row["peak_error"]) < 0.15, row
        assert abs(row["in_use_error"]) < 0.15, row


def test_replayed_text_and_own_answers_are_counted(tmp_path: Path) -> None:
    """Ten questions in batches of four make three batches; replay of a half as many again: 2 epochs of 6 steps."""
    methods = {
        "plain": {"kind": "full"},
        "own": {"kind": "full", "answers": "own", "replay": {"share": 0.5, "n_texts": 100, "new_tokens": 20}},
        "long": {"kind": "full", "replay": {"share": 0.5, "text": "wiki.txt", "window": 400}},
    }
    path = recipe(tmp_path, methods=methods)
    plan = make_plan(load_config(path), Assumptions(gpu="L4"))
    plain, own, long = ({method.name: method for method in plan.methods}[name] for name in methods)
    assert [method.steps for method in (plain, own, long)] == [6, 12, 12]
    # The longest row of text is longer than any question, and supervised but for its first token.
    assert (long.batch.rows, long.batch.length, long.batch.positions, long.batch.supervised) == (4, 400, 0, 399)
    assert long.memory == memory(long.setup, long.batch)
    assert long.memory.peak > plain.memory.peak
    assert long.tokens == plain.tokens + 3 * 4 * 400
    assert own.flops > plain.flops
    answers, text = plan.written
    assert (answers.name, answers.tokens, answers.reads) == ("base/own_answers", 10 * 64, 1 * 64)
    # 100 texts are two batches of 64 at most: 20 tokens, a user's turn of 48, and its answer of 20.
    assert (text.name, text.tokens, text.reads) == ("base/replay_text", 100 * 88, 2 * 88)
    lines = list(plan_recipe(path, Assumptions(gpu="L4")))
    assert any(line.lstrip().startswith("base/own_answers, each text at its limit") for line in lines)
    assert steps_at_most(load_config(path), 10, load_config(path).methods["own"].replay) == 12
