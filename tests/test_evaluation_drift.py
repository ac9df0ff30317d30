"""Drift against numbers worked out by hand, and properties that hold for any two models."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import Gemma2Config, Gemma2ForCausalLM

from palimpsest.evaluation.drift import (
    MEASURES,
    BasePasses,
    TextDrift,
    VocabularyError,
    _compare,
    measure_drift,
    read_drift,
    require_same_tokens,
    summarise_drift,
    token_classes,
    write_drift,
)
from palimpsest.evaluation.drift_settings import Sampling
from palimpsest.evaluation.own_text import (
    OwnText,
    beginning,
    describe,
    read_own_text,
    sample_own_text,
    user_turn,
    write_own_text,
)
from palimpsest.files import UserError
from palimpsest.models import cache
from palimpsest.models.prompts import PromptStyle
from tiny import tiny_llama, tiny_tokenizer


class Table(nn.Module):
    """A language model of which each token's distribution is the one in the row of the token before it."""

    def __init__(self, probabilities: list[list[float]]) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.tensor(probabilities).log())

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> Any:
        return SimpleNamespace(logits=self.logits[input_ids])

    def get_input_embeddings(self) -> Any:
        return SimpleNamespace(weight=self.logits)


def text(*ids: int, prompt: tuple[int, ...] = (0,), name: str = "plain-0", kind: Any = "plain") -> OwnText:
    return OwnText(name, kind, prompt, ids, "", "")


BASE = Table([[0.75, 0.25], [0.5, 0.5]])
TUNED = Table([[0.5, 0.5], [0.2, 0.8]])


def test_two_tokens_by_hand() -> None:
    (drift,) = measure_drift(BASE.eval(), TUNED.eval(), [text(0, 1, 1)])
    # After 0: p = 3/4, 1/4 and q = 1/2, 1/2; after 1: p = 1/2, 1/2 and q = 1/5, 4/5.
    after_0 = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    after_1 = 0.5 * math.log(2.5) + 0.5 * math.log(0.625)
    assert drift.kl == pytest.approx([after_0, after_0, after_1], rel=1e-6)
    back_0 = 0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(2)
    back_1 = 0.2 * math.log(0.4) + 0.8 * math.log(1.6)
    assert drift.reverse_kl == pytest.approx([back_0, back_0, back_1], rel=1e-6)
    assert drift.loss_base == pytest.approx([-math.log(0.75), -math.log(0.25), -math.log(0.5)], rel=1e-6)
    assert drift.loss == pytest.approx([-math.log(0.5), -math.log(0.5), -math.log(0.8)], rel=1e-6)
    assert drift.agreement == (1, 1, 0)  # of equal ones the first is the most likely: 0 and 0, 0 and 0, 0 and 1
    assert drift.new_tokens_share == (0, 0, 0)


def test_rows_that_only_one_has_are_left_out_of_both() -> None:
    grown = Table([[0.4, 0.4, 0.2], [0.1, 0.4, 0.5], [1 / 3, 1 / 3, 1 / 3]])  # TUNED, of what it gives to the first two
    (drift,) = measure_drift(BASE.eval(), grown.eval(), [text(0, 1, 1)])
    (plain,) = measure_drift(BASE.eval(), TUNED.eval(), [text(0, 1, 1)])
    for measure in ("kl", "reverse_kl", "loss", "loss_base"):
        assert getattr(drift, measure) == pytest.approx(getattr(plain, measure), rel=1e-5)
    assert drift.new_tokens_share == pytest.approx([0.2, 0.2, 0.5], rel=1e-6)
    with pytest.raises(VocabularyError, match="has the token 2, and the tuned model has 2;"):
        measure_drift(grown.eval(), TUNED.eval(), [text(0, 2)])


TEXTS = [
    text(5, 6, 7, 8, name="plain-0", prompt=(2,)),
    text(9, 3, name="plain-1", prompt=(2,)),
    text(11, 12, 13, name="chat-0", kind="chat", prompt=(1, 4, 50, 51, 3, 5)),
]


@pytest.mark.parametrize("compute", ["float32", "bfloat16"])
def test_a_model_against_itself(compute: Any) -> None:
    for drift in measure_drift(tiny_llama(), tiny_llama(), TEXTS, compute=compute):
        assert set(drift.kl) == set(drift.reverse_kl) == set(drift.new_tokens_share) == {0.0}
        assert set(drift.agreement) == {1.0}
        assert drift.loss == drift.loss_base


def test_one_planted_change_by_hand() -> None:
    """log 3 more for one token, everywhere: q(v) = 3p(v)/Z and q(w) = p(w)/Z with Z = 1 + 2p(v), so that
    KL(p ‖ q) = log Z − p(v)·log 3 and KL(q ‖ p) = q(v)·log 3 − log Z."""
    base, tuned = tiny_llama(tied=False), tiny_llama(tied=False)
    planted = 9
    tuned.lm_head.bias = nn.Parameter(torch.zeros(300))
    with torch.no_grad():
        tuned.lm_head.bias[planted] = math.log(3)
    drifts = measure_drift(base, tuned, TEXTS)
    for drift, one in zip(drifts, TEXTS, strict=True):
        logits = base(torch.tensor([[*one.prompt_ids, *one.ids]])).logits[0, len(one.prompt_ids) - 1 : -1]
        share = logits.double().softmax(-1)[:, planted].tolist()
        z = [1 + 2 * p for p in share]
        assert drift.kl == pytest.approx(
            [math.log(z) - p * math.log(3) for p, z in zip(share, z, strict=True)], rel=1e-4
        )
        back = [3 * p / z * math.log(3) - math.log(z) for p, z in zip(share, z, strict=True)]
        assert drift.reverse_kl == pytest.approx(back, rel=1e-4)
        assert min(drift.kl) > 0


def test_changed_roles_change_the_measures() -> None:
    one, other = tiny_llama(0), tiny_llama(1)
    for ab, ba in zip(measure_drift(one, other, TEXTS), measure_drift(other, one, TEXTS), strict=True):
        assert ab.kl == pytest.approx(ba.reverse_kl, rel=1e-12)
        assert ab.reverse_kl == pytest.approx(ba.kl, rel=1e-12)
        assert (ab.loss, ab.agreement) == (ba.loss_base, ba.agreement)
        assert min(ab.kl) > 0


def test_neither_padding_nor_prompts_count_nor_the_batch() -> None:
    one, other = tiny_llama(0), tiny_llama(1)
    together = measure_drift(one, other, TEXTS, batch_size=3)
    assert [len(drift.kl) for drift in together] == [4, 2, 3]
    for alone, drift in zip(measure_drift(one, other, TEXTS, batch_size=1), together, strict=True):
        assert alone.id == drift.id
        for measure in MEASURES:
            assert getattr(alone, measure) == pytest.approx(getattr(drift, measure), abs=1e-5)
    # The last text by hand, from the whole row's logits.
    ids = torch.tensor([[*TEXTS[2].prompt_ids, *TEXTS[2].ids]])
    p, q = (model(input_ids=ids).logits[0, 5:8].double().log_softmax(-1) for model in (one, other))
    assert together[2].kl == pytest.approx((p.exp() * (p - q)).sum(-1).tolist(), rel=1e-4)


def test_tokens_in_parts_give_what_all_at_once_give() -> None:
    """To the bit, with more rows in one of the vocabularies, and every number by its definition."""
    base, tuned = (torch.randn(10, n, generator=torch.Generator().manual_seed(n)) * 3 for n in (60_000, 60_007))
    targets, common = torch.arange(0, 60_000, 6_000), 60_000
    found = _compare(base, tuned, targets)
    every = tuned.double().softmax(-1)
    log_p, log_q = (x[:, :common].double().log_softmax(-1) for x in (base, tuned))
    assert torch.equal(found["kl"], (log_p.exp() * (log_p - log_q)).sum(-1))
    assert torch.equal(found["reverse_kl"], -(log_q.exp() * (log_p - log_q)).sum(-1))
    assert torch.equal(found["agreement"], (log_p.argmax(-1) == log_q.argmax(-1)).double())
    assert torch.equal(found["loss_base"], -log_p[range(10), targets])
    assert torch.equal(found["loss"], -log_q[range(10), targets])
    assert torch.equal(found["new_tokens_share"], every[:, common:].sum(-1))


def test_what_is_not_finite_is_an_error() -> None:
    broken = tiny_llama(1)
    with torch.no_grad():
        broken.model.norm.weight[0] = float("nan")
    with pytest.raises(UserError, match=r"weight model\.norm\.weight of the model"):
        measure_drift(tiny_llama(), broken, TEXTS)


def soft_capped() -> Any:
    """Its head scales and caps the logits, so that hidden states alone are not enough."""
    config = Gemma2Config(
        vocab_size=300,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        final_logit_softcapping=2.0,
    )
    torch.manual_seed(0)
    return Gemma2ForCausalLM(config).eval()


@pytest.mark.parametrize("compute", ["float32", "bfloat16"])
@pytest.mark.parametrize("make", [tiny_llama, soft_capped])
def test_the_base_is_run_once_for_all_tuned_models(make: Any, compute: Any) -> None:
    base, runs = make(), 0

    def count(*_: Any) -> None:
        nonlocal runs
        runs += 1

    base.model.layers[0].register_forward_hook(count)
    passes, asked = BasePasses(), {"batch_size": 2, "compute": compute}
    for seed in (1, 2):
        alone = measure_drift(make(), tiny_llama(seed), TEXTS, **asked)
        assert measure_drift(base, tiny_llama(seed), TEXTS, passes=passes, **asked) == alone
        assert min(alone[0].kl) > 0
    assert runs == 2  # two batches
    assert set(measure_drift(base, make(), TEXTS, passes=passes, **asked)[1].kl) == {0.0}
    assert runs == 2
    measure_drift(base, tiny_llama(1), TEXTS, passes=passes, batch_size=3, compute=compute)  # other rows
    assert runs == 3
    inputs = torch.tensor([[5, 6]])
    assert torch.equal(base(inputs).logits, make()(inputs).logits)  # as it was


def test_a_base_that_gives_more_than_hidden_states_is_run_every_time() -> None:
    passes = BasePasses()
    table = [measure_drift(BASE.eval(), TUNED.eval(), [text(0, 1)], passes=passes) for _ in range(2)]
    assert table[0] == table[1]
    base = tiny_llama()
    base.config.output_hidden_states = True
    measured = [measure_drift(base, tiny_llama(1), TEXTS, passes=passes) for _ in range(2)]
    assert measured[0] == measured[1] == measure_drift(tiny_llama(), tiny_llama(1), TEXTS)
    assert not passes._hidden


# -- tokens ------------------------------------------------------------------------------------------------------------
def test_the_same_tokens() -> None:
    grown = tiny_tokenizer()
    grown.add_tokens(["<audio>"])
    require_same_tokens(tiny_tokenizer(), grown)
    other = SimpleNamespace(get_vocab=lambda: {"x": 0, "b": 1}, added_tokens_decoder={})
    mine = SimpleNamespace(get_vocab=lambda: {"a": 0, "b": 1}, added_tokens_decoder={})
    with pytest.raises(VocabularyError, match=r"\(1 differ, the first is 0: 'x' instead of 'a'\)"):
        require_same_tokens(mine, other)
    reserved = SimpleNamespace(get_vocab=lambda: {"<reserved>": 0, "b": 1}, added_tokens_decoder={0: "<reserved>"})
    renamed = SimpleNamespace(get_vocab=lambda: {"<audio>": 0, "b": 1}, added_tokens_decoder={0: "<audio>"})
    require_same_tokens(reserved, renamed)


def test_classes_of_tokens() -> None:
    tokenizer = tiny_tokenizer()
    ids = tokenizer("ab Cd é 7x", add_special_tokens=False)["input_ids"] + [3]  # a token a byte, é has two; <end>
    classes = token_classes(tokenizer, text(*ids))
    assert all(classes["all"])
    assert [i for i, inside in enumerate(classes["token 1"]) if inside] == [0]
    assert [i for i, inside in enumerate(classes["tokens 2-8"]) if inside] == [*range(1, 8)]
    marked = classes["words with a capital or digit"]
    assert [i for i, inside in enumerate(marked) if inside] == [3, 4, 9, 10]
    assert classes["other words"] == [not it for it in marked]


# -- means -------------------------------------------------------------------------------------------------------------
def flat(name: str, values: list[float]) -> TextDrift:
    column = tuple(values)
    return TextDrift(name, column, column, tuple(1.0 for _ in column), tuple(0.0 for _ in column), column, column)


def test_means_are_over_tokens_and_intervals_over_texts() -> None:
    texts = [text(1, 1, 1, name="plain-0"), text(1, name="plain-1")]
    drifts = [flat("plain-0", [1, 2, 3]), flat("plain-1", [10])]
    classes = [{"all": [True] * 3, "last": [False, False, True]}, {"all": [True], "last": [True]}]
    first, last = summarise_drift(drifts, texts, classes, model="m", base="b", seed=0)
    assert (first["n_texts"], first["n_tokens"], first["kl"]) == (2, 4, 4.0)  # (1 + 2 + 3 + 10) / 4
    assert (first["kl_ci_low"], first["kl_ci_high"]) == (2.0, 10.0)  # both draws are the first, or the second text
    assert (first["agreement"], first["agreement_ci_low"], first["loss_difference"]) == (1, 1, 4.0)
    assert (last["n_tokens"], last["kl"]) == (2, 6.5)
    with pytest.raises(UserError, match="The drift is of other texts"):
        summarise_drift(drifts[:1], texts, classes, model="m", base="b", seed=0)


def test_on_disk(tmp_path: Path) -> None:
    drifts = measure_drift(tiny_llama(0), tiny_llama(1), TEXTS)
    write_drift(tmp_path / "drift.jsonl", drifts)
    assert read_drift(tmp_path / "drift.jsonl") == drifts
    (tmp_path / "drift.jsonl").write_text('{"id": "plain-0"}\n')
    with pytest.raises(UserError, match="damaged"):
        read_drift(tmp_path / "drift.jsonl")


# -- the base's own text -----------------------------------------------------------------------------------------------
def sampled(n: int = 6, seed: int = 0, model: Any = None) -> list[OwnText]:
    return sample_own_text(model or tiny_llama(eos_token_id=3), tiny_tokenizer(), Sampling(n, 12), seed=seed)


def test_the_seed_makes_the_text() -> None:
    assert sampled() == sampled()
    assert sampled() != sampled(seed=1)
    few, many = sampled(3), sampled(6)  # a text does not depend on how many there are
    assert few[:3] == many[:3]
    model, before = tiny_llama(eos_token_id=3), torch.get_rng_state()
    sampled(2, model=model)
    assert torch.equal(before, torch.get_rng_state())  # nobody else's random numbers are used


def test_it_is_what_the_cache_of_transformers_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    found = sampled(4)
    monkeypatch.setattr(cache, "generation_cache", lambda _model: {})
    assert sampled(4) == found


def test_both_kinds_and_where_they_end() -> None:
    texts, tokenizer = sampled(20), tiny_tokenizer()
    assert [it.id for it in texts] == [f"{kind}-{i}" for kind in ("plain", "chat") for i in range(20)]
    assert {it.prompt_ids for it in texts[:20]} == {tuple(beginning(tokenizer))}
    assert user_turn(tokenizer, PromptStyle()) == ("<s><user>", "<end>\n<assistant>")
    for it in texts[20:]:
        assert it.prompt.startswith("<s><user>")
        assert it.prompt.endswith("<end>\n<assistant>")
        assert it.prompt.count("<end>") == 1
    assert len({it.prompt for it in texts[20:]}) > 1
    for it in texts:
        assert 1 <= len(it.ids) <= 12
        assert 3 not in it.ids[:-1]  # <end> ends a text, and is of it
        assert len(it.ids) == 12 or it.ids[-1] == 3
    tokenizer.chat_template = None
    only = sample_own_text(tiny_llama(), tokenizer, Sampling(2, 3), seed=0)
    assert [it.kind for it in only] == ["plain", "plain"]


def test_it_is_the_base_s_distribution_at_temperature_one() -> None:
    """So the difference of the losses on it estimates KL; that it is both, within its own error, checks either."""
    base, tuned = tiny_llama(0, eos_token_id=3, initializer_range=0.2), tiny_llama(1, initializer_range=0.2)
    with torch.no_grad():  # not too far, or the estimate is all noise
        for ours, theirs in zip(tuned.parameters(), base.parameters(), strict=True):
            ours.mul_(0.2).add_(theirs)
    drifts = measure_drift(base, tuned, sampled(200, model=base), batch_size=50)
    gap = np.array([sum(drift.loss) - sum(drift.loss_base) - sum(drift.kl) for drift in drifts])
    kl = np.mean([sum(drift.kl) for drift in drifts])
    error = gap.std(ddof=1) / math.sqrt(len(gap))
    assert kl > 4 * error  # it could tell
    assert abs(gap.mean()) < 3 * error


def test_stored_text_is_bound_to_what_it_is(tmp_path: Path) -> None:
    file, texts = tmp_path / "own.jsonl", sampled(2)
    about = describe("print", Sampling(2, 12), 0, "float32")
    assert read_own_text(file, about) is None
    write_own_text(file, texts, about)
    assert read_own_text(file, about) == read_own_text(file) == texts
    with pytest.raises(UserError, match=r"own.jsonl is another text \(seed: 0 → 1\)"):
        read_own_text(file, {**about, "seed": 1})
    write_own_text(tmp_path / "other.jsonl", [replace(texts[0], ids=(9,)), *texts[1:]], about)
    file.write_bytes((tmp_path / "other.jsonl").read_bytes())
    with pytest.raises(UserError, match=r"is not what own.json describes"):
        read_own_text(file, about)
    file.write_text("{}\n")
    with pytest.raises(UserError, match=r"own.jsonl:1 is not a line of text"):
        read_own_text(file, about)
