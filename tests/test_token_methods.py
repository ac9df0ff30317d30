"""Every kind of method, remedy and phase on speech tokens: what learns, what stays, and that checkpoints keep it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from palimpsest.data.collate import Collator, to_device
from palimpsest.data.examples import Example
from palimpsest.data.in_loop import Recordings
from palimpsest.export import folders as export
from palimpsest.files import UserError
from palimpsest.importance.select import select
from palimpsest.models.anatomy import layer_index, named_parameters, scored_parameters
from palimpsest.models.blend import Blend, blend_into
from palimpsest.models.fused_loss import fused_loss
from palimpsest.models.inserted import numbers_of
from palimpsest.models.light import write_light
from palimpsest.models.loading import load_encoder, load_language_model, load_speech_lm
from palimpsest.models.loss import supervised_logits, supervised_losses
from palimpsest.models.packing import Losses
from palimpsest.models.speech_lm import SpeechLM
from palimpsest.models.tokens import SpeechTokenizer
from palimpsest.options import checked
from palimpsest.training.keep import Keep
from palimpsest.training.methods import Method
from palimpsest.training.remedies import Distill, Pull, Replay, Slow
from palimpsest.training.replay import TextRow
from palimpsest.training.settings import AdaptorFirst, Align, Settings
from palimpsest.training.train import train
from spoken import spoken_tokens, token_speech_lm
from test_models_fused_loss import torch_kernel
from tiny import save_tiny_models, tiny_llama

K, RATE = 6, 1e-2
SETTINGS = Settings(epochs=2, batch_size=4, warmup_ratio=0.0, seed=1)
SCALES = {0: 1.0, 1: 0.6}
TEXT = [TextRow(f"text {i}", (1, 5 + i), (9 + i, 10, 11 + i)) for i in range(5)]
FULL, LORA = Method("full", RATE, speech="tokens"), Method("lora", RATE, rank=2, speech="tokens")
METHODS = {
    "adaptor": replace(FULL, kind="adaptor"),
    "full": FULL,
    "layer_lr": replace(FULL, kind="layer_lr"),
    "lora": LORA,
    "gated": replace(LORA, gate="speech"),
    "peft": Method("peft", RATE, speech="tokens", peft={"peft_type": "OFT", "oft_block_size": 4}),
    "inserted": Method("inserted", RATE, speech="tokens", new_layers=1),
    "replay": replace(FULL, replay=Replay(0.5)),
    "distill": replace(FULL, distill=Distill(labels=0.5)),
    "distill_lora": replace(LORA, replay=Replay(0.5), distill=Distill(text=1.0)),
    "pull": replace(FULL, pull=Pull(1e4)),  # all the way back before each step: what is left is the last one
    "pull_fisher": replace(FULL, pull=Pull(1e4, "fisher")),
    "slow": replace(FULL, slow=Slow(0.2)),
    "own_rate": replace(FULL, adaptor_learning_rate=RATE / 10),
    "centroids": replace(FULL, speech="centroids"),
}
PHASES = {
    "align": replace(SETTINGS, align=Align(epochs=2, warmup_steps=1, batch_size=4, weight_decay=0.0)),
    "adaptor_first": replace(SETTINGS, adaptor_first=AdaptorFirst(1, RATE, "repeat")),
    "checkpointing": replace(SETTINGS, gradient_checkpointing=True),
    "budget": replace(SETTINGS, max_tokens=300),
}
Setup = tuple[list[Example], Collator, SpeechTokenizer]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    save_tiny_models(folder)
    return folder


@pytest.fixture(scope="module")
def setup(tmp_path_factory: pytest.TempPathFactory) -> Setup:
    return spoken_tokens(tmp_path_factory.mktemp("audio"), K)


def scores(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.rand(w.shape, generator=generator) for name, w in scored_parameters(tiny_llama()).items()}


def run(
    setup: Setup, folder: Path, method: Method, settings: Settings = SETTINGS, **more: Any
) -> tuple[SpeechLM, list[Any]]:
    examples, collator, tokenizer = setup
    folder.mkdir(exist_ok=True)
    model = token_speech_lm(tokenizer, reads=method.speech)
    if method.speech == "centroids":
        collator = replace(collator, processor=replace_factor(collator.processor, 5))
    given: dict[str, Any] = {"keep": Keep(importance=scores(0), fisher=scores(1)), "scales": SCALES, **more}
    replayed = TEXT if method.replay is not None else ()
    return model, train(model, examples, collator, method, settings, folder, name="m", replay=replayed, **given)


def replace_factor(processor: Any, factor: int) -> Any:
    return type(processor)(processor.tokenizer, processor.feature_extractor, factor, style=processor.style)


def text_logits(model: Any, collator: Collator, examples: list[Example]) -> torch.Tensor:
    with torch.no_grad():
        return supervised_logits(model, Collator(collator.processor, "text")(examples))[0]


@pytest.fixture(scope="module")
def trained(setup: Setup, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """(model, records) by name of a method, made when they are asked for."""
    folder, found = tmp_path_factory.mktemp("trained"), {}

    def of(name: str) -> tuple[SpeechLM, list[Any]]:
        if name not in found:
            method, settings = METHODS.get(name, FULL), PHASES.get(name, SETTINGS)
            found[name] = run(setup, folder / name, method, settings)
        return found[name]

    return of


@pytest.mark.parametrize("name", [*METHODS, *PHASES])
def test_rows_that_are_said_learn_and_no_others(setup: Setup, trained: Any, name: str) -> None:
    model, records = trained(name)
    fresh = token_speech_lm(setup[2], reads=METHODS.get(name, FULL).speech)
    losses = [row["loss"] for row in records]
    assert len(losses) >= 4
    assert all(0 < loss < 20 for loss in losses)
    for key in ("mean", "scale", "centroids"):
        assert torch.equal(model.adaptor.get_buffer(f"quantiser.{key}"), setup[2].tensors[key])
    if name == "centroids":
        assert not torch.equal(model.adaptor.get_parameter("linear1.weight"), fresh.adaptor.linear1.weight)
        return
    rows, before = (it.adaptor.get_parameter("rows.weight").detach() for it in (model, fresh))
    moved = (rows - before).abs().sum(1)
    assert (moved[:-1] > 0).all()
    assert float(moved[-1]) == 0.0  # too far from any frame to be said


STILL_THE_BASE = ("adaptor", "gated")


@pytest.mark.parametrize("name", METHODS)
def test_text_is_the_base_to_the_bit_where_the_language_model_is_left_alone(
    setup: Setup, trained: Any, name: str
) -> None:
    examples, collator, tokenizer = setup
    base = text_logits(tiny_llama(eos_token_id=3), collator, examples)
    assert torch.equal(text_logits(token_speech_lm(tokenizer), collator, examples), base)  # of all before training
    found = text_logits(trained(name)[0], collator, examples)
    assert torch.equal(found, base) == (name in STILL_THE_BASE)


def test_remedies_hold_what_they_hold_with_an_adaptor(trained: Any) -> None:
    base = named_parameters(tiny_llama(eos_token_id=3))

    def distance(name: str) -> float:
        weights = named_parameters(trained(name)[0].language_model)
        return sum(float((weights[key] - value).square().sum()) for key, value in base.items()) ** 0.5

    assert 0 < distance("pull") < 0.2 * distance("full")
    assert 0 < distance("pull_fisher") < 0.3 * distance("full")
    marked = select(scores(0), 0.2, "top", "global")
    slowed, free = (scored_parameters(trained(name)[0].language_model) for name in ("slow", "full"))
    original = scored_parameters(tiny_llama(eos_token_id=3))
    for key in marked.names:
        at = marked.tensor(key)
        assert torch.equal(slowed[key][at], original[key][at]), key
        assert not torch.equal(free[key][at], original[key][at]) or not at.any(), key
    grown = trained("inserted")[0]
    (new,) = numbers_of(2, 1)
    for key, value in named_parameters(grown.language_model).items():
        assert (layer_index(key) == new) or torch.equal(value, base[key]), key
    assert all(row["replayed"] is not None for row in trained("replay")[1] if row["kind"] == "train")


def test_the_first_distilled_loss_is_the_kl_from_the_text_to_the_tokens(setup: Setup, tmp_path: Path) -> None:
    examples, collator, tokenizer = setup
    all_at_once = Settings(epochs=1, batch_size=len(examples), warmup_ratio=0.0)
    method = replace(FULL, distill=Distill(labels=0))
    _, records = run(setup, tmp_path, method, all_at_once)
    model = token_speech_lm(tokenizer)
    p = text_logits(tiny_llama(eos_token_id=3), collator, examples).double().softmax(-1)
    with torch.no_grad():
        q = supervised_logits(model, collator(examples))[0].double().softmax(-1)
    assert records[0]["loss"] == pytest.approx(float((p * (p.log() - q.log())).sum(-1).mean()), rel=1e-4)


def test_the_rate_of_the_rows_is_the_adaptors(setup: Setup, trained: Any) -> None:
    """The first step of AdamW is as long as the rate: with a tenth of it rows go a tenth as far."""
    fresh = token_speech_lm(setup[2]).adaptor.get_parameter("rows.weight")
    far, near = (
        float((trained(name)[0].adaptor.get_parameter("rows.weight") - fresh)[:-1].abs().mean())
        for name in ("full", "own_rate")
    )
    assert near == pytest.approx(far / 10, rel=0.3)


def test_frames_encoded_in_the_loop_are_the_same_tokens(setup: Setup, trained: Any, tmp_path: Path) -> None:
    examples, collator, tokenizer = setup
    looped = replace(collator, features=Recordings(replace_factor(collator.processor, 5), examples))
    model, records = run((examples, looped, tokenizer), tmp_path, FULL)
    expected, cached = trained("full")
    assert [row["loss"] for row in records] == pytest.approx([row["loss"] for row in cached], abs=1e-3)
    rows = [it.adaptor.get_parameter("rows.weight") for it in (model, expected)]
    torch.testing.assert_close(*rows, rtol=0, atol=2e-3)


def test_interrupted_and_resumed_gives_the_same_rows(setup: Setup, tmp_path: Path) -> None:
    settings = replace(SETTINGS, checkpoint_every=2)
    whole, records = run(setup, tmp_path / "whole", METHODS["replay"], settings)

    def stop(done: int, total: int) -> None:
        if done == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(setup, tmp_path / "cut", METHODS["replay"], settings, progress=stop)
    steps: list[int] = []
    resumed, again = run(
        setup, tmp_path / "cut", METHODS["replay"], settings, progress=lambda done, _: steps.append(done)
    )
    assert steps[0] == 5
    assert again == records
    expected = whole.state_dict()
    assert all(torch.equal(expected[name], value) for name, value in resumed.state_dict().items())


@pytest.mark.parametrize("name", ["adaptor", "lora", "gated", "inserted", "centroids"])
def test_a_light_folder_gives_the_trained_model(
    setup: Setup, trained: Any, models: Path, tmp_path: Path, name: str
) -> None:
    examples, collator, _ = setup
    if name == "centroids":  # of a frozen language model: full has no light form
        model = run(setup, tmp_path / "run", replace(METHODS["adaptor"], speech="centroids"))[0]
        processor = replace_factor(collator.processor, 5)
    else:
        model, processor = trained(name)[0], collator.processor
    places = {key: str(models / value) for key, value in (("llm", "llm"), ("encoder", "whisper"))}
    adapter = tmp_path.parent / "none" / "adapter"
    if name in ("lora", "gated"):
        run(setup, tmp_path / "again", METHODS[name])  # the same, for its adapter
        adapter = tmp_path / "again" / "adapter"
    (tmp_path / "light").mkdir()
    write_light(
        tmp_path / "light",
        model,
        processor,
        language_model=(places["llm"], load_language_model(places["llm"])[0]),
        encoder=(places["encoder"], load_encoder(places["encoder"])[0]),
        adapter=adapter if adapter.exists() else None,
        trained={},
        exact=True,
    )
    found, its = load_speech_lm(tmp_path / "light")
    batch = to_device(replace(collator, processor=processor)(examples), "cpu")
    assert (its.stack_factor, its.rounded_to) == (processor.stack_factor, processor.rounded_to)
    with torch.no_grad():
        expected, got = (supervised_losses(it.eval(), batch)[0] for it in (model, found))
    torch.testing.assert_close(got, expected, rtol=0, atol=2e-5)
    for key, value in model.adaptor.state_dict().items():
        assert torch.equal(found.adaptor.state_dict()[key], value), key


def test_half_of_an_update_has_whole_rows(setup: Setup, trained: Any, tmp_path: Path) -> None:
    """A blend takes a part of what changed in the language model; what stands for speech is the method's."""
    model = trained("full")[0]
    model.save_pretrained(tmp_path / "whole")
    setup[1].processor.save_pretrained(tmp_path / "whole")
    half, _ = load_speech_lm(tmp_path / "whole")
    base = tiny_llama(eos_token_id=3)
    blend_into(half.language_model, base, Blend("", "", "full", None, "", 0.5))
    ours, theirs = named_parameters(half.language_model), named_parameters(model.language_model)
    for name, value in named_parameters(base).items():
        torch.testing.assert_close(ours[name], (value + theirs[name]) / 2, rtol=0, atol=1e-6)
    assert torch.equal(half.adaptor.get_parameter("rows.weight"), model.adaptor.get_parameter("rows.weight"))


@pytest.mark.parametrize("collapse", [True, False])
def test_losses_are_the_same_packed_and_fused(setup: Setup, collapse: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("palimpsest.models.packing.PAYS", 10.0)  # also where little is shared
    examples, collator, tokenizer = setup
    model = token_speech_lm(tokenizer, collapse=collapse)
    batch = collator(examples)
    with torch.no_grad():
        plain = supervised_losses(model, batch)[0]
        packing = Losses(model)
        torch.testing.assert_close(packing(batch)[0], plain, rtol=0, atol=1e-4)
        assert packing.n_packed == (0 if collapse else 1)  # what is left out is known only when the speech is read
        assert float(fused_loss(model, batch, torch_kernel)[0]) == pytest.approx(float(plain.sum()), rel=1e-5)


@pytest.mark.parametrize("name", ["full", "lora", "centroids"])
def test_a_trained_checkpoint_is_exported_as_text_without_its_rows(
    setup: Setup, trained: Any, tmp_path: Path, name: str
) -> None:
    from transformers import AutoModelForCausalLM

    examples, collator, _ = setup
    model = trained(name)[0]
    model.save_pretrained(tmp_path / "whole")
    collator.processor.save_pretrained(tmp_path / "whole")
    export.export(tmp_path / "whole", text_llm=tmp_path / "text")
    plain: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "text").eval()
    assert plain.state_dict().keys() == tiny_llama().state_dict().keys()
    assert torch.equal(text_logits(plain, collator, examples), text_logits(model, collator, examples))


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ({"kind": "given", "checkpoint": "x", "speech": "tokens"}, "given trains nothing and does not use speech"),
        ({"kind": "blend", "of": "full", "speech": "tokens"}, "blend trains nothing and does not use speech"),
        ({"kind": "full", "modality": "text", "speech": "tokens"}, "would not be heard"),
        ({"kind": "adaptor", "speech": "tokens", "replay": {}}, "replay has nothing to hold back"),
        ({"kind": "adaptor", "speech": "tokens", "distill": {}}, "distill has nothing to hold back"),
        ({"kind": "adaptor", "speech": "centroids", "pull": {"strength": 1}}, "pull has nothing to hold back"),
        ({"kind": "adaptor", "speech": "tokens", "slow": {"top": 0.1}}, "slow has nothing to hold back"),
        ({"kind": "lora", "speech": "tokens", "pull": {"strength": 1}}, "lora trains others beside them"),
        ({"kind": "inserted", "new_layers": 1, "speech": "tokens", "slow": {"top": 0.1}}, "trains others beside them"),
        ({"kind": "full", "speech": "tokens", "gate": "speech"}, "gate speech belongs to kind lora"),
        ({"kind": "lora", "speech": "tokens", "gate": "speech", "replay": {}}, "replay would train nothing"),
        ({"kind": "full", "speech": "units"}, "speech"),
    ],
)
def test_what_does_not_go_together_is_told(method: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        checked(Method, method, "test")
