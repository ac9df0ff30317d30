"""Blends: the arithmetic by hand, both ends to the bit, and a study that makes several points of one training run."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from palimpsest.commands import ask
from palimpsest.config import parse_config
from palimpsest.export import folders as export
from palimpsest.files import UserError
from palimpsest.models.anatomy import layer_index, named_parameters, scored_parameters
from palimpsest.models.blend import Blend, BlendedWeights, blend_into, matching_scale, mixed, update_norm
from palimpsest.models.loading import fingerprint, is_speech_lm, load_language_model, load_speech_lm
from palimpsest.planning.plan_text import plan_recipe
from palimpsest.report import figures, page
from palimpsest.study.results import same_as_text
from palimpsest.study.run import Study, run_study
from palimpsest.ui.asking import open_panel
from test_study_given import inputs as inputs
from test_study_given import of, recipe, results
from tiny import tiny_llama


def blend(scale: float, layers: tuple[int, ...] | None = None) -> Blend:
    return Blend("base", "", "full", None, "", scale, layers)


# ---------------------------------------------------------------------------------------------------------------------
# By hand
# ---------------------------------------------------------------------------------------------------------------------
def test_a_part_of_the_change_by_hand() -> None:
    base, tuned = torch.tensor([1.0, 2.0]), torch.tensor([3.0, -2.0])
    assert mixed(base, tuned, 0.25).tolist() == [1.5, 1.0]
    assert mixed(base, tuned, -1.0).tolist() == [-1.0, 6.0]
    # 2 − (−255) = 257 has nine bits, one more than bfloat16.
    base, tuned = torch.tensor([2.0]).bfloat16(), torch.tensor([-255.0]).bfloat16()
    assert mixed(base, tuned, 0.5).tolist() == [-126.5]


def test_both_ends_are_exact_where_the_formula_is_not() -> None:
    base, tuned = torch.tensor([1e8]), torch.tensor([0.1])
    assert base + 1.0 * (tuned - base) != tuned
    assert torch.equal(mixed(base, tuned, 1.0), tuned)
    assert torch.equal(mixed(base, tuned, 0.0), base)


@pytest.mark.parametrize("scale", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("layers", [None, (1,)])
def test_what_is_scaled_and_what_is_the_methods(scale: float, layers: tuple[int, ...] | None) -> None:
    base, tuned, found = tiny_llama(0), tiny_llama(1), tiny_llama(1)
    blend_into(found, base, blend(scale, layers))
    before, after = named_parameters(base), named_parameters(tuned)
    for name, tensor in named_parameters(found).items():
        part = scale if layers is None or layer_index(name) == 1 else 1.0
        expected = before[name] if part == 0 else after[name]
        if part == 0.3:
            assert torch.allclose(tensor, 0.7 * before[name] + 0.3 * after[name], atol=1e-6), name
        else:
            assert torch.equal(tensor, expected), name
    assert found.lm_head.weight is found.model.embed_tokens.weight
    lazy = BlendedWeights(scored_parameters(base), scored_parameters(tuned), blend(scale, layers))
    assert lazy.keys() == scored_parameters(found).keys()
    assert all(torch.equal(lazy[name], tensor) for name, tensor in scored_parameters(found).items())


class Counting(Mapping[str, Tensor]):
    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.tensors, self.read = tensors, []

    def __getitem__(self, name: str) -> Tensor:
        self.read.append(name)
        return self.tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)


def test_a_weight_is_read_when_it_is_asked_for_and_from_the_base_only_where_it_counts() -> None:
    base, tuned = (Counting(scored_parameters(tiny_llama(seed))) for seed in (0, 1))
    weights = BlendedWeights(base, tuned, blend(0.5, (1,)))
    here, there = (f"model.layers.{layer}.mlp.up_proj.weight" for layer in (1, 0))
    assert base.read == tuned.read == []
    weights[here], weights[there]
    assert (base.read, tuned.read) == ([here], [here, there])


def test_norms_by_hand() -> None:
    base = {"a": torch.zeros(2), "b": torch.ones(1)}
    tuned = {"a": torch.tensor([3.0, 0.0]), "b": torch.tensor([5.0])}
    assert update_norm(base, tuned) == 5.0
    assert matching_scale((2.5, 5.0), "lora", "full") == 0.5
    with pytest.raises(UserError, match="full changed no weight"):
        matching_scale((2.5, 0.0), "lora", "full")


# ---------------------------------------------------------------------------------------------------------------------
# A study
# ---------------------------------------------------------------------------------------------------------------------
# Points of a curve, whose weights are not analysed, where these are not looked at below.
METHODS: dict[str, Any] = {
    "full": {"kind": "full", "learning_rate": 1e-2},
    "oft": {"kind": "peft", "learning_rate": 1e-2, "curve": "oft", "peft": {"peft_type": "OFT", "oft_block_size": 4}},
    "restored": {"kind": "blend", "of": "full", "scale": 0, "layers": [1]},
    "part": {"kind": "blend", "of": "full", "over": {"scale": [0, 0.5]}},
    "matched": {"kind": "blend", "of": "full", "norm_of": "oft", "curve": "matched"},
    "gated": {"kind": "lora", "learning_rate": 1e-2, "rank": 2, "gate": "speech"},
}


def study(inputs: Path) -> dict[str, Any]:
    values = recipe(inputs, METHODS, analysis={"shuffles": 1, "bootstrap": 100, "rank_draws": 0})
    values["evaluation"]["probe"] = False
    return values


@pytest.fixture(scope="module")
def run(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        for module in (figures, page):
            patch.setattr(module, "FIGURES", {})
        run_study(parse_config(study(inputs), "test"), folder)
    return folder


def checkpoint(run: Path, name: str) -> Path:
    return run / "methods" / name / "checkpoint"


def without_name(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{**row, "method": "", "model": ""} for row in rows]


def test_no_weights_are_kept_of_a_blend(run: Path) -> None:
    for name in ("restored", "part-0", "part-0_5", "matched"):
        files = {path.name for path in checkpoint(run, name).iterdir()}
        assert files == {"blend.json", "step.json", "files.json"}
    about = json.loads((checkpoint(run, "part-0_5") / "blend.json").read_text())
    of_full = json.loads((checkpoint(run, "full") / "step.json").read_text())["fingerprint"]
    assert (about["method"], about["fingerprint"], about["scale"], about["layers"]) == ("full", of_full, 0.5, None)


def test_with_scale_0_text_is_the_bases(run: Path) -> None:
    found = results(run)
    for table in ("perplexity", "qa", "qa_floors"):
        base, ours, gated = (without_name(of(found[table], it, modality="text")) for it in ("base", "part-0", "gated"))
        assert ours == gated == [row for row in base if row["modality"] == "text"], table
        assert ours
    assert of(found["qa"], "part-0", modality="speech")
    left_out = {
        (row["method_a"], row["method_b"]): row["left_out"] for row in found["comparisons"] if row["modality"] == "text"
    }
    assert left_out["base", "part-0"] == left_out["base", "gated"] == "equal by construction"
    whole = {"full": {"kind": "full"}, "whole": {"kind": "blend", "of": "full", "scale": 1}}
    config = json.loads(json.dumps({**recipe(run, {}), "methods": whole}))
    assert same_as_text(parse_config(config, "test")) == {"whole": "full"}


def test_a_restored_layer_has_no_change_and_no_other_layer_another(run: Path) -> None:
    norms: dict[str, dict[str, float]] = {}
    for row in results(run)["delta"]:
        norms.setdefault(row["method"], {})[row["name"]] = row["relative_norm"]
    assert norms.keys() == {"full", "restored"}
    for name, whole in norms["full"].items():
        assert whole > 0
        assert norms["restored"][name] == (0 if layer_index(name) == 1 else whole)


def test_a_matched_update_has_the_others_norm(run: Path, inputs: Path) -> None:
    base = scored_parameters(load_language_model(str(inputs / "llm"))[0])

    def norm(name: str) -> float:
        tuned = scored_parameters(load_language_model(str(checkpoint(run, name)))[0])
        return float(torch.stack([(tuned[key] - base[key]).norm() for key in base]).norm())

    about = json.loads((checkpoint(run, "matched") / "blend.json").read_text())
    assert about["scale"] == pytest.approx(norm("oft") / norm("full"), rel=1e-5)
    assert norm("matched") == pytest.approx(norm("oft"), rel=1e-4)
    assert about["norm_of"] == "oft"


def test_its_folder_is_taken_for_a_model(run: Path, inputs: Path, tmp_path: Path) -> None:
    base, _ = load_language_model(str(inputs / "llm"))
    full, _ = load_speech_lm(checkpoint(run, "full"))
    half, processor = load_speech_lm(checkpoint(run, "part-0_5"))
    before, after = named_parameters(base), named_parameters(full.language_model)
    for name, tensor in named_parameters(half.language_model).items():
        assert torch.equal(tensor, before[name] + (after[name] - before[name]) * 0.5), name
    assert torch.equal(half.adaptor.linear1.weight, full.adaptor.linear1.weight)
    assert processor.stack_factor == 5
    where = str(checkpoint(run, "part-0_5"))
    assert is_speech_lm(where)
    assert len({fingerprint(str(checkpoint(run, name))) for name in ("full", "part-0_5", "restored")}) == 3
    assert isinstance(ask.answer(ask.Options(where, text="why?", max_new_tokens=3, device="cpu")), str)
    panel = open_panel(run)
    assert not [key for key in panel.refusals if key[0] != "base"]

    export.export(run, method="part-0_5", speech_lm=tmp_path / "whole", text_llm=tmp_path / "text")
    again, _ = load_speech_lm(tmp_path / "whole")
    assert all(torch.equal(again.state_dict()[key], value) for key, value in half.state_dict().items())
    assert "of: full" in (tmp_path / "whole/README.md").read_text()
    with pytest.raises(UserError, match="no light form"):
        export.export(run, method="part-0_5", light=tmp_path / "light")


def test_other_weights_under_a_blend_are_told(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run / "methods", tmp_path / "methods")
    step = checkpoint(tmp_path, "full") / "step.json"
    step.write_text(json.dumps({**json.loads(step.read_text()), "fingerprint": "another"}))
    with pytest.raises(UserError, match="blend of other weights than"):
        load_speech_lm(checkpoint(tmp_path, "part-0_5"))
    (checkpoint(tmp_path, "part-0_5") / "blend.json").write_text('{"scale": 1}')
    with pytest.raises(UserError, match=r"blend\.json is damaged"):
        load_speech_lm(checkpoint(tmp_path, "part-0_5"))


def test_another_scale_trains_nothing_and_what_is_done_is_skipped(run: Path, inputs: Path, no_figures: None) -> None:
    values = study(inputs)
    values["methods"] = {**METHODS, "matched": {"kind": "blend", "of": "full", "scale": 0.25, "curve": "matched"}}
    again = Study(parse_config(values, "test"), run)
    again.run()
    made = {step.name for step in again.ws.done if not step.skipped}
    assert {"methods/matched/checkpoint", "methods/matched/perplexity"} <= made
    assert not [name for name in made if not name.startswith("methods/matched/")]


def test_a_blend_of_a_given_text_model(run: Path, inputs: Path, tmp_path: Path, no_figures: None) -> None:
    text = {"kind": "given", "checkpoint": str(tmp_path / "text")}
    export.export(run, method="full", text_llm=tmp_path / "text")
    methods = {
        "theirs": text,
        "half": {"kind": "blend", "of": "theirs", "scale": 0.5},
        "none": {"kind": "blend", "of": "theirs", "scale": 0, "curve": "none"},
    }
    values = recipe(inputs, methods, encoder=False, analysis={"shuffles": 1, "bootstrap": 100, "rank_draws": 0})
    values["evaluation"]["probe"] = False
    config = parse_config(values, "test")
    assert not config.takes_speech("half")
    study = Study(config, tmp_path / "run")
    study.run()
    base, theirs = (named_parameters(load_language_model(str(it))[0]) for it in (inputs / "llm", tmp_path / "text"))
    for name, tensor in named_parameters(study.ws.language_model("half")).items():
        assert torch.equal(tensor, base[name] + (theirs[name] - base[name]) * 0.5), name
    found = results(tmp_path / "run")
    assert {row["modality"] for row in of(found["qa"], "half")} == {"text"}
    (of_base,), (of_none,) = (without_name(of(found["perplexity"], it)) for it in ("base", "none"))
    assert of_none == of_base
    whole, half = ({row["name"]: row["relative_norm"] for row in of(found["delta"], it)} for it in ("theirs", "half"))
    assert half == pytest.approx({name: norm / 2 for name, norm in whole.items()}, rel=1e-4)
    assert whole


SEVERAL = {
    "full": {"kind": "full", "learning_rate": 1e-2, "curve": "full"},
    "gated": {"kind": "lora", "learning_rate": 1e-2, "rank": 2, "gate": "speech"},
    "part": {"kind": "blend", "of": "full", "over": {"scale": [0, 0.5]}},
}


@pytest.mark.slow
def test_each_training_run_has_its_own_blend_and_gate(inputs: Path, tmp_path: Path, no_figures: None) -> None:
    drift = {"own_text": {"n_texts": 4, "new_tokens": 8}, "batch_size": 4, "in_training": 0}
    values = recipe(inputs, SEVERAL, seeds=2, seeds_measure=["drift"], drift=drift)
    values["evaluation"]["probe"] = False
    run_study(parse_config(values, "test"), tmp_path)
    base = named_parameters(load_language_model(str(inputs / "llm"))[0])
    halves, speech = [], []
    for end in ("", "-seed1"):
        about = json.loads((checkpoint(tmp_path, f"part-0_5{end}") / "blend.json").read_text())
        assert (about["method"], about["scale"]) == (f"full{end}", 0.5)
        whole = named_parameters(load_speech_lm(checkpoint(tmp_path, f"full{end}"))[0].language_model)
        half = named_parameters(load_speech_lm(checkpoint(tmp_path, f"part-0_5{end}"))[0].language_model)
        for name, tensor in half.items():
            assert torch.equal(tensor, base[name] + (whole[name] - base[name]) * 0.5), name
        halves.append(half)
        speech.append(load_speech_lm(checkpoint(tmp_path, f"gated{end}"))[0].state_dict())
    updates = [name for name in speech[0] if "lora_B" in name]
    assert updates
    assert not any(torch.equal(speech[0][name], speech[1][name]) for name in updates)
    assert not any(torch.equal(halves[0][name], halves[1][name]) for name in halves[0])

    found = results(tmp_path)
    drifts = [row for row in found["drift"] if row["tokens"] == "all"]
    assert {row["kl"] for row in drifts if row["model"] in ("part-0", "part-0-seed1", "gated", "gated-seed1")} == {0.0}
    means = {
        row["model"]: row
        for row in found["frontier"]
        if (row["text_measure"], row["hearing_measure"]) == ("drift", "speech_loss")
    }
    assert means.keys() == {"base", "full", "part-0", "part-0_5", "gated"}
    for name, row in means.items():
        if name != "base":
            runs = [
                sum(d["kl"] * d["n_tokens"] for d in mine) / sum(d["n_tokens"] for d in mine)
                for mine in ([d for d in drifts if d["model"] == run] for run in (name, f"{name}-seed1"))
            ]
            assert row["n_seeds"] == 2
            assert row["text"] == pytest.approx(sum(runs) / 2)
    assert 0 < means["part-0_5"]["text"] < means["full"]["text"]
    assert {(row["seeds_a"], row["seeds_b"]) for row in found["equal_hearing"]} == {(2, 2)}
    pairs = {frozenset((row["method_a"], row["method_b"])) for row in found["equal_hearing"]}
    assert pairs == {frozenset(pair) for pair in (("full", "part"), ("gated", "part"))}


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ({"kind": "blend", "of": "full", "scale": 0, "layers": [1, 2]}, "layers names 2, which is none"),
        ({"kind": "blend", "of": "full", "scale": 0, "layers": []}, "layers names no layer"),
        ({"kind": "blend", "of": "full", "norm_of": "full"}, "norm_of and of are both full"),
        ({"kind": "peft", "peft": {"peft_type": "boft"}}, "nearest that it has is 'BOFT'"),
        ({"kind": "peft", "peft": {"peft_type": "OFT", "block": 4}}, "no key 'block'; the nearest is"),
        ({"kind": "peft", "peft": {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 4}}, "cannot become part of"),
        ({"kind": "peft", "peft": {"peft_type": "PREFIX_TUNING", "num_virtual_tokens": 4}}, "cannot become part of"),
        ({"kind": "peft", "peft": {"peft_type": "MISS", "r": 64}}, "MISS cannot be put on .*change its options"),
        (
            {"kind": "peft", "peft": {"peft_type": "LORA", "init_lora_weights": "pissa"}},
            "changes the weights of the base",
        ),
        ({"kind": "peft", "peft": {"peft_type": "ADALORA"}}, "between the steps"),
    ],
)
def test_what_cannot_be_is_told_before_anything_runs(
    inputs: Path,
    tmp_path: Path,
    method: dict[str, Any],
    message: str,
) -> None:
    values = recipe(inputs, {"full": METHODS["full"], "it": {"learning_rate": 1e-3, **method}})
    if method["kind"] == "blend":
        del values["methods"]["it"]["learning_rate"]
    with pytest.raises(UserError, match=message):
        Study(parse_config(values, "test"), tmp_path / "run").check()


def test_the_plan_counts_a_tuner_and_no_blend(inputs: Path, tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(json.dumps(study(inputs)))
    from palimpsest.planning.plan import Assumptions

    lines = list(plan_recipe(file, Assumptions()))
    assert lines[0] == "tiny: 3 methods, 4 blended"
