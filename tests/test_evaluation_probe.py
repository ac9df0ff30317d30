"""The retention probe: its pairs, its losses by hand, and what it says of a model."""

from __future__ import annotations

import json
import math
import re
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from palimpsest.cli import app
from palimpsest.commands import probe as command
from palimpsest.evaluation.probe import PAIRS, Pair, PairLoss, load_pairs, pair_losses, probe, summarise_probe
from palimpsest.files import UserError, read_json, read_jsonl
from tiny import tiny_llama, tiny_speech_lm, tiny_tokenizer

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))
import make_probe


# -- the pairs ---------------------------------------------------------------------------------------------------------
def test_the_committed_pairs_are_what_the_script_makes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(make_probe, "OUT", tmp_path / "pairs.jsonl")
    make_probe.main()
    assert (tmp_path / "pairs.jsonl").read_bytes() == PAIRS.read_bytes()


def test_in_every_kind_each_continuation_is_right_as_often_as_it_is_wrong() -> None:
    pairs = load_pairs()
    assert len(pairs) >= 300
    kinds = Counter(pair.kind for pair in pairs)
    assert len(kinds) >= 6
    assert min(kinds.values()) >= 40
    for kind in kinds:
        of = [pair for pair in pairs if pair.kind == kind]
        assert Counter(pair.right for pair in of) == Counter(pair.wrong for pair in of)
    assert all(pair.right != pair.wrong and pair.right[0] == pair.wrong[0] == " " for pair in pairs)
    assert all(pair.prompt == pair.prompt.strip() for pair in pairs)
    assert len({(pair.prompt, pair.right) for pair in pairs}) == len(pairs)


def test_the_harder_pairs_are_as_hard_as_they_say() -> None:
    """Six or more words of the other number stand between noun and verb; facts are two of a sort, in turn."""
    of_kind = {kind: [pair for pair in load_pairs() if pair.kind == kind] for kind in ("far_agreement", "close_facts")}
    assert {kind: len(pairs) for kind, pairs in of_kind.items()} == {"far_agreement": 72, "close_facts": 70}
    for pair in of_kind["far_agreement"]:
        words = pair.prompt.split()
        assert len(words) - words.index(words[1]) >= 8
        many = words[1].endswith("s")
        assert (pair.right.strip() in ("are", "were", "have")) == many
        between = [word for word in words[2:] if word in {"managers", "offices", "tourists", "markets", "walls",
                                                          "soldiers", "kings"}]  # fmt: skip
        assert bool(between) != many  # the nouns between have the other number
    for first, second in zip(of_kind["close_facts"][::2], of_kind["close_facts"][1::2], strict=True):
        assert (first.right, first.wrong) == (second.wrong, second.right)
        assert first.prompt != second.prompt
        same = zip(first.prompt.split(), second.prompt.split(), strict=False)
        assert next(same)[0] == second.prompt.split()[0]  # one statement about two subjects


def test_training_on_the_built_in_questions_does_not_teach_the_close_facts() -> None:
    """Their subjects are in none of its training questions: what was lost must not be hidden by what was taught."""
    from palimpsest.data.sources import load_examples

    questions = " | ".join(example.question for example in load_examples("facts", "train"))
    subjects = [
        part.rsplit(" ", 1)[0].replace("_", " ")
        for table in make_probe.CLOSE_FACTS.values()
        for entry in table.split("; ")
        for part in entry.split(", ")
    ]
    assert len(subjects) == 70
    assert [subject for subject in subjects if re.search(rf"\b{subject}\b", questions)] == []


def test_no_question_of_facts_is_among_them() -> None:
    from palimpsest.data.sources import load_examples

    questions = {e.question for split in ("train", "heldout") for e in load_examples("facts", split)}
    assert not any(
        pair.prompt in question or question in pair.prompt for pair in load_pairs() for question in questions
    )


# -- losses ------------------------------------------------------------------------------------------------------------
def mean_loss(model: Any, tokenizer: Any, prompt: str, continuation: str) -> float:
    """−log p, one forward pass per token."""
    ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    targets = tokenizer(continuation, add_special_tokens=False)["input_ids"]
    total = 0.0
    for target in targets:
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0, -1].double()
        total += float(torch.logsumexp(logits, 0) - logits[target])
        ids = [*ids, target]
    return total / len(targets)


PAIR_LIST = [
    Pair("a", "one", "The cat", "s", "x"),
    Pair("b", "two", "A much longer prompt is", " here", " gone away"),
    Pair("c", "two", "Short", " yes", " no"),
]


@pytest.mark.parametrize("batch_size", [1, 2, 64])
def test_losses_by_hand_whatever_the_batch_size(batch_size: int) -> None:
    model, tokenizer = tiny_llama(), tiny_tokenizer()
    for pair, loss in zip(PAIR_LIST, pair_losses(model, tokenizer, PAIR_LIST, batch_size), strict=True):
        assert (loss.id, loss.kind) == (pair.id, pair.kind)
        assert loss.right == pytest.approx(mean_loss(model, tokenizer, pair.prompt, pair.right), rel=1e-5)
        assert loss.wrong == pytest.approx(mean_loss(model, tokenizer, pair.prompt, pair.wrong), rel=1e-5)


def test_one_row_serves_both_continuations_of_one_token() -> None:
    model, rows = tiny_llama(), []
    model.register_forward_pre_hook(lambda _, __, kwargs: rows.append(len(kwargs["input_ids"])), with_kwargs=True)
    pair_losses(model, tiny_tokenizer(), PAIR_LIST[:1], 8)
    pair_losses(model, tiny_tokenizer(), PAIR_LIST[1:], 8)
    assert rows == [1, 4]


def test_a_model_without_logits_to_keep_and_a_speech_lm() -> None:
    model, tokenizer = tiny_llama(), tiny_tokenizer()
    expected = pair_losses(model, tokenizer, PAIR_LIST)

    class Plain(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> Any:
            return self.inner(input_ids=input_ids, attention_mask=attention_mask)

    for a, b in zip(pair_losses(Plain().eval(), tokenizer, PAIR_LIST), expected, strict=True):
        assert (a.right, a.wrong) == pytest.approx((b.right, b.wrong), rel=1e-6)
    speech_lm, processor = tiny_speech_lm()
    inside = pair_losses(speech_lm.language_model, processor.tokenizer, PAIR_LIST)
    assert pair_losses(speech_lm, processor.tokenizer, PAIR_LIST) == inside


def test_a_model_in_training_is_measured_in_eval_mode_and_left_training_with_its_gradients() -> None:
    model, tokenizer = tiny_llama(attention_dropout=0.5), tiny_tokenizer()
    expected = probe(model, tokenizer, PAIR_LIST, name="x")
    model.train()
    model(torch.tensor([[5, 6, 7]])).logits.sum().backward()
    gradients = [parameter.grad.clone() for parameter in model.parameters()]
    state = torch.get_rng_state()
    assert probe(model, tokenizer, PAIR_LIST, name="x") == expected
    assert model.training
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), gradients, strict=True))


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_a_model_that_is_not_finite_is_an_error_and_no_accuracy(value: float) -> None:
    model = tiny_llama()
    with torch.no_grad():
        model.model.layers[0].self_attn.o_proj.weight[0, 0] = value
    with pytest.raises(UserError, match=r"layers\.0\.self_attn\.o_proj\.weight of the model .* pair 'b'"):
        probe(model, tiny_tokenizer(), PAIR_LIST)


# -- summary -----------------------------------------------------------------------------------------------------------
def test_records_by_hand() -> None:
    losses = [PairLoss("a", "x", 1.0, 3.0), PairLoss("b", "x", 2.0, 2.0), PairLoss("c", "y", 4.0, 1.0)]
    everything, x, y = summarise_probe(losses, "base")
    assert (everything["kind"], everything["n"], everything["correct"]) == ("all", 3, 1)  # a tie is wrong
    assert everything["margin"] == pytest.approx((2.0 + 0.0 - 3.0) / 3)
    assert (x["kind"], x["correct"], x["accuracy"], x["margin"]) == ("x", 1, 0.5, 1.0)
    assert (x["loss_right"], x["loss_wrong"]) == (1.5, 2.5)
    assert y["ci_high"] == pytest.approx(0.7935, abs=1e-4)  # Wilson for 0 of 1: z² / (1 + z²)
    assert {record["model"] for record in (everything, x, y)} == {"base"}


def test_bad_pairs(tmp_path: Path) -> None:
    model, tokenizer = tiny_llama(), tiny_tokenizer()
    with pytest.raises(UserError, match="at least one pair"):
        probe(model, tokenizer, [])
    with pytest.raises(UserError, match="leaves no token of '' after 'The cat'"):
        probe(model, tokenizer, [Pair("a", "one", "The cat", "", "x")])
    file = tmp_path / "pairs.jsonl"
    for content, said in (
        ('{"id": "a"}\n', "no file of probe pairs"),
        ("", "holds no pair"),
        ((json.dumps(PAIR_LIST[0].__dict__) + "\n") * 2, "two with the same id"),
    ):
        file.write_text(content)
        load_pairs.cache_clear()
        with pytest.raises(UserError, match=said):
            load_pairs(file)


def test_the_command(tmp_path: Path) -> None:
    from typer.testing import CliRunner

    tiny_llama().save_pretrained(tmp_path / "llm")
    tiny_tokenizer().save_pretrained(tmp_path / "llm")
    result = CliRunner().invoke(app, ["probe", "--model", str(tmp_path / "llm"), "--out", str(tmp_path / "out")])
    assert result.exit_code == 0, result.output
    records = read_json(tmp_path / "out" / "records.json")["probe"]
    assert [record["kind"] for record in records] == ["all", *dict.fromkeys(pair.kind for pair in load_pairs())]
    rows = read_jsonl(tmp_path / "out" / "pairs.jsonl")
    assert sum(row["correct"] for row in rows) == records[0]["correct"]
    assert math.isclose(records[0]["margin"], sum(row["wrong"] - row["right"] for row in rows) / len(rows))
    assert 0.35 < records[0]["accuracy"] < 0.65  # an untrained model knows nothing

    def refused(out: Path) -> str:
        with pytest.raises(UserError) as error:
            list(command.run(command.Options("no such model", out)))  # what is there is said before the model is read
        return str(error.value)

    written = (tmp_path / "out" / "records.json").read_bytes()
    assert refused(tmp_path / "out").endswith("out holds a probe already; delete the folder or write elsewhere.")
    assert (tmp_path / "out" / "records.json").read_bytes() == written
    assert "records.json is a file, and a folder belongs there" in refused(tmp_path / "out" / "records.json" / "new")


@pytest.mark.slow
def test_the_embedded_model_is_far_above_chance() -> None:
    from palimpsest.models.loading import load_language_model

    model, tokenizer = load_language_model("embedded:smollm2-135m-instruct")
    records = {record["kind"]: record for record in probe(model, tokenizer)}
    assert records["all"]["ci_low"] > 0.8
    assert all(record["ci_low"] > 0.5 for record in records.values())
    assert all(record["margin"] > 0 for record in records.values())
    assert probe(model, tokenizer) == list(records.values())
