"""Inserted layers: at first without effect, to the bit; alone trained; saved, resumed, exported; in a tiny study."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from palimpsest.config import parse_config
from palimpsest.data.collate import Collator
from palimpsest.data.examples import Example
from palimpsest.export import folders as export
from palimpsest.files import UserError, read_json
from palimpsest.models.anatomy import decoder_layers, layer_index, scored_parameters
from palimpsest.models.given import require_pair
from palimpsest.models.inserted import insert_layers, numbers_of, places_of
from palimpsest.models.light import is_light
from palimpsest.models.loading import blank_language_model, load_language_model, load_speech_lm
from palimpsest.models.loss import supervised_losses
from palimpsest.models.speech_lm import SpeechLM
from palimpsest.planning.memory import Batch, Setup, activation_bytes, memory
from palimpsest.planning.needs import checkpoint_bytes
from palimpsest.planning.plan import setups_of
from palimpsest.planning.sizes import decoder_of, encoder_sizes
from palimpsest.report import figures, page
from palimpsest.study.run import Study, run_study
from palimpsest.training.keep import hold
from palimpsest.training.methods import Method, rules_for
from palimpsest.training.remedies import Distill, Replay
from palimpsest.training.replay import TextRow
from palimpsest.training.rules import parameter_groups
from palimpsest.training.train import Settings, train
from spoken import spoken
from test_importance_any_model import ARCHITECTURES, SMALL, VOCAB
from test_study_given import inputs as inputs
from test_study_given import of, recipe, results
from tiny import tiny_llama, tiny_speech_lm

RATE = 1e-2
SETTINGS = Settings(epochs=2, batch_size=3, warmup_ratio=0.0, checkpoint_every=2, weight_decay=0.01, seed=1)
METHOD = Method("inserted", RATE, new_layers=1)
GREEDY: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
Setup_ = tuple[list[Example], Collator]


# ---------------------------------------------------------------------------------------------------------------------
# Where they stand, and that they do nothing at first
# ---------------------------------------------------------------------------------------------------------------------
def test_places_by_hand() -> None:
    assert places_of(30, 4) == (7, 14, 22, 29)  # groups of 8, 7, 8 and 7
    assert places_of(32, 8) == (3, 7, 11, 15, 19, 23, 27, 31)  # LLaMA Pro's
    assert places_of(3, 3) == (0, 1, 2)
    assert places_of(5, 1) == (4,)
    assert numbers_of(30, 4) == (8, 16, 25, 33)
    assert numbers_of(2, 2) == (1, 3)


KINDS: dict[str, dict[str, Any]] = {
    **{kind: ARCHITECTURES[kind] for kind in ("llama", "qwen2", "gpt2", "opt", "phi3", "mixtral")},
    # Attention with and without a window, with and without rotary positions, by the layer's number.
    "gemma3_text": {**SMALL, "layer_types": ["sliding_attention", "full_attention"], "sliding_window": 4},
    "smollm3": {**SMALL, "num_hidden_layers": 4, "no_rope_layer_interval": 2},
}


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_untrained_they_change_nothing_and_trained_they_are_loaded_again(kind: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **KINDS[kind])).eval()
    for parameter in model.parameters():
        parameter.add_(0.1 * torch.randn_like(parameter))  # biases too
    ids = torch.randint(3, VOCAB, (2, 9))
    before, said = model(ids).logits, model.generate(ids, **GREEDY)
    n_layers = len(decoder_layers(model))
    numbers = insert_layers(model, 2)
    assert len(decoder_layers(model)) == model.config.num_hidden_layers == n_layers + 2
    assert torch.equal(model(ids).logits, before)
    assert torch.equal(model.generate(ids, **GREEDY), said)  # each layer has its own place in the cache
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert {layer_index(name) for name in trained} == set(numbers)
    for name in trained:
        model.get_parameter(name).add_(0.1 * torch.randn_like(model.get_parameter(name)))
    after = model(ids).logits
    assert not torch.allclose(after, before, atol=1e-3)
    assert torch.equal(model.generate(ids, **GREEDY), model.generate(ids, **GREEDY, use_cache=False))
    model.save_pretrained(tmp_path)
    again: Any = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(again(ids).logits, after)
    assert torch.equal(again.generate(ids, **GREEDY), model.generate(ids, **GREEDY))


def test_models_that_cannot_be_grown_are_told() -> None:
    with pytest.raises(UserError, match="3 layers cannot be inserted into the 2 of LlamaForCausalLM"):
        insert_layers(tiny_llama(), 3)
    # The first layer is dense and the others are mixtures: with a layer before it the second would be dense too.
    experts = {"num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 8, "mlp_only_layers": [1]}
    mixture: Any = AutoModelForCausalLM.from_config(AutoConfig.for_model("qwen3_moe", **SMALL, **experts))
    with pytest.raises(UserError, match="makes layers of different kinds by their number"):
        insert_layers(mixture, 2)


# ---------------------------------------------------------------------------------------------------------------------
# Training
# ---------------------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def setup(tmp_path_factory: pytest.TempPathFactory) -> Setup_:
    return spoken(tmp_path_factory.mktemp("audio"))


def run(
    setup: Setup_, folder: Path, method: Method = METHOD, settings: Settings = SETTINGS, **more: Any
) -> tuple[SpeechLM, list[Any]]:
    model, _ = tiny_speech_lm()
    folder.mkdir(exist_ok=True)
    return model, train(model, *setup, method, settings, folder, name="m", **more)


def test_they_and_the_adaptor_alone_are_trained(setup: Setup_, tmp_path: Path) -> None:
    base = tiny_speech_lm()[0].state_dict()
    model, _ = run(setup, tmp_path)
    found = model.state_dict()
    (number,) = numbers_of(2, 1)  # behind the last layer
    assert model.config.text_config.num_hidden_layers == model.language_model.config.num_hidden_layers == 3
    for name, value in found.items():
        if layer_index(name.removeprefix("language_model.")) == number:
            assert not torch.equal(value, base[name.replace(f".{number}.", ".1.")]), name
        elif name.startswith("adaptor.linear"):
            assert not torch.equal(value, base[name]), name
        else:
            assert torch.equal(value, base[name]), name
    groups = parameter_groups(model, rules_for(METHOD), RATE)
    named = {name for group in groups for name in group["names"]}
    assert named == {name for name in found if ".layers.2." in name or name.startswith("adaptor.linear")}


EVERYTHING = replace(METHOD, replay=Replay(0.5), distill=Distill(text=1.0, labels=0.5))
TEXT = [TextRow(f"text {i}", (1, 5 + i), (9 + i, 10, 11 + i)) for i in range(5)]


def test_interrupted_and_resumed_gives_the_same_weights(setup: Setup_, tmp_path: Path) -> None:
    whole, whole_records = run(setup, tmp_path / "whole", EVERYTHING, replay=TEXT)

    def stop(done: int, total: int) -> None:
        if done == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(setup, tmp_path / "cut", EVERYTHING, replay=TEXT, progress=stop)
    resumed, records = run(setup, tmp_path / "cut", EVERYTHING, replay=TEXT)
    expected = whole.state_dict()
    assert resumed.state_dict().keys() == expected.keys()
    assert all(torch.equal(expected[name], value) for name, value in resumed.state_dict().items())
    assert records == whole_records


def test_the_teacher_is_the_base_and_shares_its_weights(setup: Setup_) -> None:
    """Also when the model that it was taken from has grown, and its new layers have moved."""
    model, processor = tiny_speech_lm()
    text = Collator(processor, "text")
    held = hold(model, EVERYTHING, None, text, compute="float32", sharded=False)
    assert held is not None
    numbers = insert_layers(model.language_model, 1)
    with torch.no_grad():
        for name, parameter in model.language_model.named_parameters():
            if layer_index(name) in numbers:
                parameter.add_(1.0)
        batch = text(setup[0])
        of_base = supervised_losses(tiny_llama(eos_token_id=3), batch)[0]
        assert torch.equal(supervised_losses(held.teacher, batch)[0], of_base)  # type: ignore[arg-type]
        assert not torch.allclose(supervised_losses(model, batch)[0], of_base, atol=1e-2)
    theirs = {parameter.data_ptr() for parameter in held.teacher.parameters()}  # type: ignore[union-attr]
    assert theirs < {parameter.data_ptr() for parameter in model.language_model.parameters()}


def test_what_would_change_the_base_before_it_has_learned_is_told(
    setup: Setup_, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("palimpsest.models.inserted.OUTPUTS", ("o",))  # a MLP that counts from the start
    with pytest.raises(UserError, match="change what it says before they have learned"):
        run(setup, tmp_path)


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ({"kind": "inserted"}, "kind inserted needs a number of layers"),
        ({"kind": "full", "new_layers": 1}, "no other kind has one"),
        ({"kind": "inserted", "new_layers": 1, "pull": {"strength": 1}}, "inserted trains others beside them"),
        ({"kind": "inserted", "new_layers": 1, "slow": {"top": 0.1}}, "inserted trains others beside them"),
        ({"kind": "inserted", "new_layers": 1, "rank": 4}, "rank belongs to kind lora; inserted does not use it"),
        ({"kind": "inserted", "new_layers": 1, "gate": "speech"}, "belongs to kind lora"),
        ({"kind": "blend", "of": "new", "scale": 0.5}, "which adds layers to the base's"),
        ({"kind": "blend", "of": "full", "norm_of": "new"}, "which adds layers to the base's"),
    ],
)
def test_compositions_without_sense_are_told(inputs: Path, method: dict[str, Any], message: str) -> None:
    methods = {"full": {"kind": "full"}, "new": {"kind": "inserted", "new_layers": 1}, "it": method}
    with pytest.raises(UserError, match=message):
        parse_config(recipe(inputs, methods), "test")


# ---------------------------------------------------------------------------------------------------------------------
# A study
# ---------------------------------------------------------------------------------------------------------------------
METHODS: dict[str, Any] = {
    "new": {"kind": "inserted", "learning_rate": RATE, "over": {"new_layers": [1, 2]}},
}


@pytest.fixture(scope="module")
def study(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    section = {"own_text": {"n_texts": 4, "new_tokens": 8}, "batch_size": 4, "in_training": 0}
    values = recipe(inputs, METHODS, drift=section, analysis={"shuffles": 1, "bootstrap": 100, "rank_draws": 0})
    values["models"]["checkpoints"] = "light"
    values["evaluation"]["probe"] = False
    values["frontier"] = {"measure": ["drift", "importance"]}  # which such a method does not have
    with pytest.MonkeyPatch.context() as patch:
        for module in (figures, page):
            patch.setattr(module, "FIGURES", {})
        run_study(parse_config(values, "test"), folder)
    return folder


def checkpoint(run: Path, name: str) -> Path:
    return run / "methods" / name / "checkpoint"


def test_a_study_measures_all_but_the_weights(study: Path) -> None:
    found = results(study)
    for name in ("new-1", "new-2"):
        for table in ("perplexity", "qa"):
            assert {row["modality"] for row in of(found[table], name)} == {"text", "speech"}
        assert all(row["kl"] > 0 for row in of(found["drift"], name) if row["tokens"] == "all")
        assert of(found["frontier"], name)
        assert not of([*found["layers"], *found["delta"]], name)
    assert "Missing from this run" not in (study / "report.html").read_text()


def test_a_light_checkpoint_is_the_trained_model(study: Path, inputs: Path, tmp_path: Path) -> None:
    where = checkpoint(study, "new-2")
    assert is_light(where)
    assert {it.name for it in where.glob("*.safetensors")} == {"adaptor.safetensors", "inserted.safetensors"}
    base, _ = load_language_model(str(inputs / "llm"))
    model, _ = load_speech_lm(where)
    weights, trained = scored_parameters(model.language_model), numbers_of(2, 2)
    assert {layer_index(name) for name in weights} == {0, 1, 2, 3}
    assert trained == (1, 3)
    for name, weight in scored_parameters(base).items():
        old = name.replace(".layers.1.", ".layers.2.")
        assert torch.equal(weights[old], weight)
        assert not torch.equal(weights[old.replace(".2.", ".3.").replace(".0.", ".1.")], weight)
    blank = blank_language_model(str(where))
    assert blank.config.num_hidden_layers == len(decoder_layers(blank)) == 4
    with pytest.raises(UserError, match="cannot be compared with"):
        require_pair(str(inputs / "llm"), str(where))

    folders = {kind: tmp_path / kind for kind in ("text_llm", "speech_lm", "light")}
    export.export(study, method="new-2", **folders)
    again, _ = load_speech_lm(folders["speech_lm"])
    text, _ = load_language_model(str(folders["text_llm"]))
    for name, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name
        if name.startswith("language_model."):
            assert torch.equal(text.state_dict()[name.removeprefix("language_model.")], value), name
    half, _ = load_speech_lm(folders["light"])
    torch.testing.assert_close(half.state_dict(), model.state_dict(), rtol=1e-2, atol=1e-3)
    card = (folders["light"] / "README.md").read_text()
    assert "block expansion" in card
    assert "adaptor and 2 inserted layers" in card
    assert read_json(where / "light.json")["new_layers"] == 2


def test_too_many_are_told_before_anything_runs(inputs: Path, tmp_path: Path) -> None:
    values = recipe(inputs, {"new": {"kind": "inserted", "new_layers": 3}})
    with pytest.raises(UserError, match="cannot be inserted into the 2"):
        Study(parse_config(values, "test"), tmp_path).check()


def test_the_plan_counts_them(inputs: Path) -> None:
    methods = {
        "new": {"kind": "inserted", "new_layers": 1},
        "taught": {"kind": "inserted", "new_layers": 1, "distill": {}},
    }
    config = parse_config(recipe(inputs, methods), "test")
    base, encoder = decoder_of(tiny_llama()), encoder_sizes(config.models.encoder)[0]
    setups = setups_of(config, base, encoder, device="cpu")
    new, batch = setups["new"], Batch(2, 30, 5, 10, 12)
    of_layer = sum(p.numel() for name, p in tiny_llama().named_parameters() if ".layers.0." in name)
    assert new.trainable == new.adaptor_parameters + of_layer
    assert (new.decoder.layers, new.decoder.parameters) == (3, base.parameters + of_layer)
    assert checkpoint_bytes(new, light=True) == 4 * new.trainable
    assert memory(setups["taught"], batch).held_back == 0
    assert memory(replace(setups["taught"], n_gpus=2), batch).held_back == 4 * base.parameters // 2

    def kept(setup: Setup) -> int:
        return activation_bytes(setup, batch)

    # A new layer keeps what one of full fine-tuning does, the two others what frozen ones do.
    frozen, full = replace(new, method="adaptor", new_layers=0), replace(new, method="full", new_layers=0)
    ends = kept(full) - kept(frozen) - 3 * (kept(new) - kept(frozen))  # the last norm and the head, which are frozen
    assert ends == 2 * 30 * 4 * base.hidden + 4 * 2 * 12 * base.hidden
