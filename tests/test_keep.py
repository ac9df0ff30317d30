"""What holds weights back: the loss, the pull and the slowed weights by hand, and that training keeps to them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import softmax

from palimpsest.config import parse_config
from palimpsest.data.collate import Collator
from palimpsest.data.examples import Example
from palimpsest.files import UserError, read_json
from palimpsest.importance.select import select
from palimpsest.models.anatomy import named_parameters, scored_parameters
from palimpsest.models.loss import supervised_logits, supervised_losses
from palimpsest.models.speech_lm import SpeechLM
from palimpsest.planning.memory import memory
from palimpsest.planning.plan import Batch, setups_of
from palimpsest.planning.sizes import decoder_of, encoder_sizes
from palimpsest.study.run import Study
from palimpsest.training import keep as keeping
from palimpsest.training.batching import EpochBatches
from palimpsest.training.keep import Keep, WithText, adapter_off, attach, base_logits, distillation_loss, hold
from palimpsest.training.methods import Method, add_lora, rules_for
from palimpsest.training.remedies import REPLAYED, Distill, Pull, Replay, Slow
from palimpsest.training.replay import MixedBatches, TextRow, collate_text
from palimpsest.training.rules import parameter_groups
from palimpsest.training.train import Settings, train
from spoken import spoken
from test_study_adaptor import inputs, recipe
from tiny import tiny_llama, tiny_speech_lm

__all__ = ["inputs"]
SETTINGS = Settings(epochs=2, batch_size=3, warmup_ratio=0.0, checkpoint_every=2, weight_decay=0.01, seed=1)
RATE = 1e-2
Setup = tuple[list[Example], Collator]


@pytest.fixture(scope="module")
def setup(tmp_path_factory: pytest.TempPathFactory) -> Setup:
    return spoken(tmp_path_factory.mktemp("audio"))


def run(
    setup: Setup, folder: Path, method: Method, settings: Settings = SETTINGS, **more: Any
) -> tuple[SpeechLM, list[Any]]:
    model = more.pop("model", None) or tiny_speech_lm()[0]
    folder.mkdir(exist_ok=True)
    keep = more.pop("keep", Keep(importance=scores(), fisher=scores(1)))
    return model, train(model, *setup, method, settings, folder, name="m", keep=keep, **more)


def scores(seed: int = 0) -> dict[str, torch.Tensor]:
    """Of every scored weight of the tiny model, at random."""
    generator = torch.Generator().manual_seed(seed)
    weights = scored_parameters(tiny_speech_lm()[0])
    return {name: torch.rand(weight.shape, generator=generator) for name, weight in weights.items()}


def state(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def held_for(model: SpeechLM, method: Method, text: Collator, keep: Keep | None = None) -> keeping.Held:
    held = hold(model, method, keep, text, compute="float32", sharded=False)
    assert held is not None
    return held


# -- the loss of a distillation ---------------------------------------------------------------------------------------
@pytest.mark.parametrize("at_once", [1, 10, 1 << 22])
@pytest.mark.parametrize(("labels", "weight", "temperature"), [(0.0, 1.0, 1.0), (0.0, 2.0, 1.5), (0.7, 0.3, 4.0)])
def test_loss_and_gradient_by_hand(
    monkeypatch: pytest.MonkeyPatch, at_once: int, labels: float, weight: float, temperature: float
) -> None:
    monkeypatch.setattr(keeping, "AT_ONCE", at_once)  # 1, 2 or all tokens at a time
    generator = torch.Generator().manual_seed(0)
    z, b = (2 * torch.randn(3, 5, generator=generator, dtype=torch.float64) for _ in range(2))
    targets = torch.tensor([4, 0, 2])
    expected, slopes = 0.0, []
    for row, base, target in zip(z.tolist(), b.tolist(), targets.tolist(), strict=True):
        q, q_t, p_t = by_hand(row), by_hand([v / temperature for v in row]), by_hand([v / temperature for v in base])
        kl = sum(p * math.log(p / q) for p, q in zip(p_t, q_t, strict=True))
        expected += -labels * math.log(q[target]) + weight * temperature**2 * kl
        # d/dz of T²·KL at z/T is T·(q_T − p_T); of the cross-entropy q − 1 at the target.
        slopes.append(
            [
                labels * (q[v] - (v == target)) + weight * temperature * (q_t[v] - p_t[v])
                for v in range(5)
            ]
        )  # fmt: skip
    logits = z.clone().requires_grad_(True)
    given = {"labels": labels, "weight": weight, "temperature": temperature}
    loss = distillation_loss(logits, b.clone(), targets, **given)
    assert loss.item() == pytest.approx(expected, rel=1e-12)
    torch.autograd.backward(loss / 3)
    assert logits.grad is not None
    torch.testing.assert_close(3 * logits.grad, torch.tensor(slopes, dtype=torch.float64), rtol=1e-12, atol=1e-12)


def by_hand(row: list[float]) -> list[float]:
    exponentials = [math.exp(v) for v in row]
    return [e / sum(exponentials) for e in exponentials]


def test_at_a_high_temperature_logits_are_matched() -> None:
    """Hinton et al. 2015, eq. 4: T²·KL then has the gradient (z − b)/V of centred logits, whatever T is."""
    z, b = torch.randn(2, 6, dtype=torch.float64), torch.randn(2, 6, dtype=torch.float64)
    logits = z.clone().requires_grad_(True)
    loss = distillation_loss(logits, b.clone(), torch.zeros(2, dtype=torch.long), labels=0, weight=1, temperature=1e5)
    torch.autograd.backward(loss)
    centred = (z - z.mean(1, keepdim=True)) - (b - b.mean(1, keepdim=True))
    assert logits.grad is not None
    torch.testing.assert_close(logits.grad, centred / 6, rtol=1e-3, atol=1e-6)


def test_16_bit_logits_have_a_loss_in_float32() -> None:
    logits = torch.randn(4, 7).bfloat16().requires_grad_(True)
    base, targets = torch.randn(4, 7).bfloat16(), torch.zeros(4, dtype=torch.long)
    exact = distillation_loss(logits.detach().float(), base.clone().float(), targets, labels=1, weight=1, temperature=2)
    loss = distillation_loss(logits, base, targets, labels=1, weight=1, temperature=2)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.detach(), exact)
    torch.autograd.backward(loss)
    assert logits.grad is not None
    assert logits.grad.dtype == torch.bfloat16


def test_the_first_loss_is_the_kl_from_the_written_to_the_spoken_question(setup: Setup, tmp_path: Path) -> None:
    examples, collator = setup
    all_at_once = Settings(epochs=1, batch_size=8, warmup_ratio=0.0)
    method = Method("full", RATE, distill=Distill(speech=0.5, labels=0, temperature=2))
    _, records = run(setup, tmp_path, method, all_at_once)
    model, processor = tiny_speech_lm()
    with torch.no_grad():
        heard, *_ = supervised_logits(model, collator(examples))
        read, *_ = supervised_logits(model, Collator(processor, "text")(examples))
    p, q = softmax(read.double() / 2, -1), softmax(heard.double() / 2, -1)
    kl = (p * (p / q).log()).sum(-1).mean()
    assert records[0]["loss"] == pytest.approx(0.5 * 4 * float(kl), rel=1e-4)


def test_each_kind_of_batch_has_its_weight(setup: Setup) -> None:
    examples, collator = setup
    model, processor = tiny_speech_lm()
    text = Collator(processor, "text")
    method = Method("full", RATE, replay=Replay(), distill=Distill(speech=2.0, text=3.0, labels=0.5))
    held = held_for(model, method, text)
    with torch.no_grad():  # from here on the model is not the base
        for parameter in model.language_model.parameters():
            parameter.mul_(1.05)
        asked = WithText(collator, text)(examples)
        replayed = {**text(examples), REPLAYED: True}
        for batch, weight in ((asked, 2.0), (replayed, 3.0), (text(examples), 0.0)):
            loss, n = keeping.distilled_loss(held, model, model, batch, "float32")
            logits, targets, _ = supervised_logits(model, batch)
            base = supervised_logits(tiny_llama(eos_token_id=3), text(examples))[0]
            p, q = softmax(base.double(), -1), softmax(logits.double(), -1)
            expected = 0.5 * supervised_losses(model, batch)[0].sum() + weight * (p * (p / q).log()).sum()
            assert n == len(targets)
            assert float(loss) == pytest.approx(float(expected), rel=1e-4)


def test_answers_of_other_tokens_cannot_be_laid_side_by_side(setup: Setup) -> None:
    examples, collator = setup
    text = Collator(collator.processor, "text")

    def shorter(given: list[Example]) -> dict[str, Any]:
        return text([replace(given[0], answer="Another."), *given[1:]])

    with pytest.raises(UserError, match="The answer of 'e0' has other tokens after its question as text"):
        WithText(collator, shorter)(examples)  # type: ignore[arg-type]


# -- the base under an adapter ----------------------------------------------------------------------------------------
def test_the_teacher_of_an_adapter_is_the_base_whatever_the_adapter_is(setup: Setup) -> None:
    examples, _ = setup
    model, processor = tiny_speech_lm()
    batch = Collator(processor, "text")(examples)
    add_lora(model, Method("lora", rank=2, dropout=0.5))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    model.train()
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    expected = supervised_logits(tiny_llama(eos_token_id=3), batch)[0].detach()
    assert torch.equal(base_logits(None, model, batch, "float32"), expected)
    with adapter_off(model):
        assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == flags
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == flags
    assert model.training
    assert not model.encoder.training
    assert not torch.allclose(supervised_logits(model.eval(), batch)[0], expected, atol=0.1)


@pytest.mark.parametrize("changes", [{"bias": "all"}, {"init_lora_weights": "pissa"}])
def test_an_adapter_that_changes_the_base_is_refused(setup: Setup, changes: dict[str, Any]) -> None:
    from peft import LoraConfig, get_peft_model

    model, processor = tiny_speech_lm()
    method = Method("lora", distill=Distill())
    text = Collator(processor, "text")

    def put_on(**changes: Any) -> None:
        with keeping.base_stays(model, method, text, setup[0][:2], "float32"):
            config = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM", **changes)
            model.language_model = get_peft_model(model.language_model, config)

    with pytest.raises(UserError, match=r"The adapter \(LORA\) changes weights of the base itself"):
        put_on(**changes)
    model, _ = tiny_speech_lm()
    put_on()


def test_lora_has_no_second_copy_of_the_base(setup: Setup) -> None:
    model, processor = tiny_speech_lm()
    text, method = Collator(processor, "text"), Method("lora", rank=2, distill=Distill())
    add_lora(model, method)
    held = held_for(model, method, text)
    assert held.teacher is None
    assert not held.base
    copied = held_for(tiny_speech_lm()[0], Method("full", distill=Distill()), text).teacher
    assert copied is not None
    assert not any(parameter.requires_grad for parameter in copied.parameters())


def test_a_copy_in_host_memory_is_the_same_model_and_shares_nothing() -> None:
    model = tiny_llama()
    made = keeping.copied(model, "cpu")
    assert made.lm_head.weight is made.model.embed_tokens.weight
    ids = torch.arange(10, 30)[None]
    assert torch.equal(made(ids).logits, model(ids).logits)
    theirs = {tensor.data_ptr() for tensor in [*model.parameters(), *model.buffers()]}
    assert not theirs & {tensor.data_ptr() for tensor in [*made.parameters(), *made.buffers()]}


# -- the pull ---------------------------------------------------------------------------------------------------------
def one_step(method: Method, keep: Keep | None = None) -> tuple[dict[str, torch.Tensor], ...]:
    """(base, before the step, gradients, after it) of the language model, by canonical name; plain gradient descent."""
    model, processor = tiny_speech_lm()
    held = held_for(model, method, Collator(processor, "text"), keep)
    base = detached(model)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():  # as a checkpoint that is read after an interruption would
        for parameter in model.language_model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator))
    groups = parameter_groups(model, rules_for(method, {0: 0.5, 1: 0.25}), RATE)
    optimizer = torch.optim.SGD(groups, lr=RATE)
    attach(held, optimizer, model)
    assert not held.base
    before = detached(model)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.randn(parameter.shape, generator=generator)
    gradients = {name: value.grad.clone() for name, value in named_parameters(model.language_model).items()}  # type: ignore[union-attr]
    adaptor = state(model.adaptor)
    slopes = {name: value.grad for name, value in model.adaptor.named_parameters()}
    optimizer.step()
    for name, slope in slopes.items():  # the base has none, so nothing pulls it
        assert slope is not None
        torch.testing.assert_close(model.adaptor.get_parameter(name).detach(), adaptor[name] - RATE * slope)
    return base, before, gradients, detached(model)


def detached(model: SpeechLM) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in named_parameters(model.language_model).items()}


def rate_of(name: str) -> float:
    """layer_lr with these scales: each group has a rate of its own."""
    return RATE * (0.5 if ".layers.0." in name else 0.25 if ".layers.1." in name else 1.0)


@pytest.mark.parametrize("by", ["plain", "fisher", "importance"])
def test_a_step_with_a_pull_by_hand(by: Any) -> None:
    strength = 20.0
    fisher, importance = scores(3), scores(4)
    method = Method("layer_lr", RATE, pull=Pull(strength, by))
    base, before, gradients, after = one_step(method, Keep(importance=importance, fisher=fisher))
    weighed = {"plain": {}, "fisher": fisher, "importance": importance}[by]
    n = sum(value.numel() for value in weighed.values())
    mean = sum(float(value.double().sum()) for value in weighed.values()) / max(n, 1)
    for name in base:
        c = weighed[name] / mean if name in weighed else torch.ones(())
        share = (rate_of(name) * strength * c).clamp(max=1)
        pulled = before[name] - share * (before[name] - base[name])
        torch.testing.assert_close(after[name], pulled - rate_of(name) * gradients[name], rtol=0, atol=1e-5)
    if by != "plain":
        mean_c = sum(float((value / mean).double().sum()) for value in weighed.values()) / n
        assert mean_c == pytest.approx(1)


def test_a_pull_goes_to_the_base_and_not_past_it() -> None:
    base, _, gradients, after = one_step(Method("layer_lr", RATE, pull=Pull(1e6)))
    for name in base:
        torch.testing.assert_close(after[name], base[name] - rate_of(name) * gradients[name], rtol=0, atol=1e-6)


def test_trained_with_a_strong_pull_the_weights_stay_near(setup: Setup, tmp_path: Path) -> None:
    base = detached(tiny_speech_lm()[0])

    def distance(model: SpeechLM) -> float:
        return math.fsum(float((value - base[name]).square().sum()) for name, value in detached(model).items())

    free, _ = run(setup, tmp_path / "free", Method("full", RATE))
    pulled, _ = run(setup, tmp_path / "pulled", Method("full", RATE, pull=Pull(50.0)))
    assert distance(pulled) < 0.5 * distance(free)


# -- slowed weights ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("scope", ["global", "per_matrix"])
def test_frozen_weights_are_the_bases_to_the_bit_and_the_others_move(setup: Setup, tmp_path: Path, scope: Any) -> None:
    """With weight decay and a pull, both of which move a weight without a gradient."""
    base = detached(tiny_speech_lm()[0])
    method = Method("full", RATE, slow=Slow(0.3, scope), pull=Pull(1.0))
    model, _ = run(setup, tmp_path, method)
    mask, after = select(scores(), 0.3, "top", scope), detached(model)
    for name, value in after.items():
        marked = mask.tensor(name) if name in mask.names else torch.zeros(value.shape, dtype=torch.bool)
        assert torch.equal(value[marked], base[name][marked])
        assert (value != base[name])[~marked].float().mean() > 0.99, name


def test_slowed_weights_move_so_much_less(setup: Setup, tmp_path: Path) -> None:
    one = Settings(epochs=1, batch_size=8, warmup_ratio=0.0)
    base = detached(tiny_speech_lm()[0])
    whole, _ = run(setup, tmp_path / "whole", Method("full", RATE), one)
    slowed, _ = run(setup, tmp_path / "slowed", Method("full", RATE, slow=Slow(0.2, scale=0.25)), one)
    mask, free, found = select(scores(), 0.2, "top"), detached(whole), detached(slowed)
    for name, value in found.items():
        scale = torch.ones(value.shape)
        if name in mask.names:
            scale[mask.tensor(name)] = 0.25
        torch.testing.assert_close(value - base[name], scale * (free[name] - base[name]), rtol=0, atol=1e-6)


# -- with all that training does --------------------------------------------------------------------------------------
EVERYTHING = Method("full", RATE, distill=Distill(temperature=2.0), pull=Pull(5.0, "fisher"), slow=Slow(0.1, scale=0.5))
ADAPTER = Method("lora", RATE, rank=2, dropout=0.3, distill=Distill())


@pytest.mark.parametrize(
    "method",
    [EVERYTHING, ADAPTER],
    ids=["everything", "lora"],
)
def test_interrupted_and_resumed_gives_the_same_weights(setup: Setup, tmp_path: Path, method: Method) -> None:
    whole, whole_records = run(setup, tmp_path / "whole", method)

    def stop(done: int, total: int) -> None:
        if done == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(setup, tmp_path / "cut", method, progress=stop)
    if method is EVERYTHING:
        other = Keep(importance=scores(), fisher=scores(9))
        with pytest.raises(UserError, match="interrupted training of another recipe"):
            run(setup, tmp_path / "cut", method, keep=other)
    resumed, records = run(setup, tmp_path / "cut", method)
    assert all(torch.equal(state(whole)[name], value) for name, value in state(resumed).items())
    assert records == whole_records


def test_replayed_text_is_distilled_beside_the_speech(setup: Setup, tmp_path: Path) -> None:
    """Before its first step the model is the base, so the KL on text is 0 and the loss that of the labels, by half."""
    text = [TextRow(f"text {i}", (1, 5 + i), (9 + i, 10, 11 + i)) for i in range(5)]
    distill = Distill(speech=0.5, text=2.0, labels=0.5)
    method = replace(EVERYTHING, distill=distill, replay=Replay(share=0.6))
    settings = replace(SETTINGS, batch_size=4)
    base = tiny_speech_lm()[0].eval()
    whole, whole_records = run(setup, tmp_path / "whole", method, settings, replay=text)
    replayed = [record["replayed"] for record in whole_records]
    assert replayed[:2] == [1.0, 0.0]
    assert replayed.count(1.0) == 2 * 3  # of two epochs with two batches of questions each
    first = next(MixedBatches(EpochBatches(len(setup[0]), 4, 1), 3, [5] * 5).__iter__())
    rows = collate_text([text[i - len(setup[0])] for i in first])
    expected = 0.5 * float(supervised_losses(base, {k: v for k, v in rows.items() if k != REPLAYED})[0].mean())
    assert whole_records[0]["loss"] == pytest.approx(expected, rel=1e-5)

    def stop(done: int, total: int) -> None:
        if done == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(setup, tmp_path / "cut", method, settings, replay=text, progress=stop)
    resumed, records = run(setup, tmp_path / "cut", method, settings, replay=text)
    assert all(torch.equal(state(whole)[name], value) for name, value in state(resumed).items())
    assert records == whole_records


@pytest.mark.parametrize("method", [EVERYTHING, replace(ADAPTER, dropout=0.0)], ids=["full", "lora"])
def test_accumulated_batches_checkpointing_and_bfloat16(setup: Setup, tmp_path: Path, method: Method) -> None:
    method = replace(method, learning_rate=1e-3)
    big = Settings(epochs=1, batch_size=8, seed=3)
    whole, (record,) = run(setup, tmp_path / "big", method, big)
    parts, (accumulated,) = run(setup, tmp_path / "parts", method, replace(big, batch_size=3, accumulation=3))
    again, (checkpointed,) = run(setup, tmp_path / "again", method, replace(big, gradient_checkpointing=True))
    rounded, (near,) = run(setup, tmp_path / "bf16", method, replace(big, compute="bfloat16"))
    for other in (accumulated, checkpointed):
        assert other["loss"] == pytest.approx(record["loss"], rel=1e-5)
        assert other["grad_norm"] == pytest.approx(record["grad_norm"], rel=1e-3)
    for model in (parts, again):
        for name, value in state(model).items():
            torch.testing.assert_close(value, state(whole)[name], rtol=0, atol=3e-4)
    assert near["loss"] == pytest.approx(record["loss"], rel=0.05)
    assert near["loss"] != record["loss"]
    assert {value.dtype for value in rounded.parameters()} == {torch.float32}


def test_a_fused_loss_is_chosen_away(setup: Setup, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def kernel(*arguments: Any) -> torch.Tensor:
        raise AssertionError("it makes no logits")

    monkeypatch.setattr("palimpsest.training.train.choose_kernel", lambda setting, device: kernel)
    run(setup, tmp_path, Method("full", RATE, distill=Distill()), Settings(epochs=1, batch_size=8))


@pytest.mark.slow
@pytest.mark.parametrize("method", [EVERYTHING, replace(ADAPTER, dropout=0.0)], ids=["full", "lora"])
def test_a_compiled_model_trains_the_same(setup: Setup, tmp_path: Path, method: Method) -> None:
    method = replace(method, learning_rate=1e-3)
    plain, _ = run(setup, tmp_path / "plain", method)
    compiled, _ = run(setup, tmp_path / "compiled", method, replace(SETTINGS, compile=True))
    for name, value in state(compiled).items():
        torch.testing.assert_close(value, state(plain)[name], rtol=0, atol=3e-4)


# -- what is refused --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("method", "keep", "said"),
    [
        (Method("full", pull=Pull(1.0, "fisher")), Keep(), "The method needs the fisher of the base's weights"),
        (Method("full", slow=Slow(0.1)), None, "The method needs the importance of the base's weights"),
        (
            Method("full", pull=Pull(1.0, "fisher")),
            Keep(fisher={"model.layers.0.mlp.up_proj.weight": torch.zeros(48, 32)}),
            "The fisher of the base is 0 for every weight",
        ),
        (
            Method("full", pull=Pull(1.0, "importance")),
            Keep(importance={"model.layers.7.mlp.up_proj.weight": torch.ones(48, 32)}),
            "has scores of model.layers.7.mlp.up_proj.weight",
        ),
    ],
)
def test_scores_that_are_missing_or_wrong(
    setup: Setup, tmp_path: Path, method: Method, keep: Keep | None, said: str
) -> None:
    with pytest.raises(UserError, match=said):
        run(setup, tmp_path, method, keep=keep)


def test_a_distillation_that_learns_nothing_of_the_questions() -> None:
    with pytest.raises(ValueError, match="learns nothing of the questions"):
        Distill(speech=0, text=1, labels=0)


# -- in a study -------------------------------------------------------------------------------------------------------
METHODS: Mapping[str, Any] = {
    "kept": {
        "kind": "full",
        "learning_rate": RATE,
        "pull": {"strength": 5, "by": "fisher"},
        "slow": {"top": 0.2},
        "distill": {"temperature": 2},
    },
}


@pytest.mark.usefixtures("no_figures")
def test_a_study_estimates_what_a_method_asks_for(inputs: Path, tmp_path: Path) -> None:
    config = parse_config(recipe(inputs, adaptor=None, methods=METHODS), "test")
    study = Study(config, tmp_path)
    names = [getattr(step, "func", step).__name__ for step in study.steps]
    assert names[:5] == ["data", "features", "importance", "importance", "fisher"]
    for step in study.steps:
        if getattr(step, "func", step).__name__ in ("data", "features", "importance", "fisher", "train"):
            if getattr(step, "keywords", {}).get("model") not in ("base", "kept", None):
                continue
            step(study.ws)
    about = read_json(tmp_path / "base" / "fisher" / "scores.json")
    assert list(about["metadata"]["reductions"]) == ["fisher"]
    assert about["metadata"]["data"] == read_json(tmp_path / "base/importance/scores.json")["metadata"]["data"]
    kept, base = study.ws.weights("kept"), study.ws.weights("base")
    mask = select(study.ws.scores("base").tensors("signed_sum"), 0.2, "top")
    for name in mask.names:
        marked = mask.tensor(name)
        assert torch.equal(kept[name][marked], base[name][marked])
        assert not torch.equal(kept[name], base[name])
    without = {"kept": {**METHODS["kept"], "pull": {"strength": 5}}}
    plain = Study(parse_config(recipe(inputs, adaptor=None, methods=without), "test"), tmp_path / "other")
    assert "fisher" not in [getattr(step, "func", step).__name__ for step in plain.steps]


def test_the_plan_counts_what_is_kept_of_the_base(inputs: Path) -> None:
    methods = {
        "full": {"kind": "full"},
        "all": {"kind": "full", "distill": {}, "pull": {"strength": 1, "by": "fisher"}, "slow": {"top": 0.5}},
        "lora": {"kind": "lora"},
        "lora_kd": {"kind": "lora", "distill": {}},
    }
    config = parse_config(recipe(inputs, adaptor=None, methods=methods), "test")
    decoder, encoder = decoder_of(tiny_llama()), encoder_sizes(config.models.encoder)[0]
    setups = setups_of(config, decoder, encoder, device="cpu")
    found = {name: memory(setup, Batch(2, 30, 5, 10, 12)).held_back for name, setup in setups.items()}
    by_hand = 2 * 4 * decoder.parameters + 4 * decoder.matrices + (decoder.matrices // 2) * (4 + 8)
    assert found == {"full": 0, "all": by_hand, "lora": 0, "lora_kd": 0}
