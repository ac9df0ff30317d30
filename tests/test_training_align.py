"""Alignment of the adaptor with the embedding: CTC against sums by hand, planted words that must be read."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from palimpsest.data.examples import Example
from palimpsest.files import UserError
from palimpsest.models.speech_lm import SpeechAdaptor
from palimpsest.training.align import TokenReader, align_adaptor, ctc_loss, positions_needed
from palimpsest.training.settings import Align

D_ENC, D_LM, FACTOR, VOCABULARY = 6, 8, 2, 12
SETTINGS = Align(epochs=4, learning_rate=1e-2, warmup_steps=5, batch_size=8)
LONG = replace(SETTINGS, epochs=40)


def adaptor(seed: int = 0) -> SpeechAdaptor:
    torch.manual_seed(seed)
    return SpeechAdaptor(D_ENC, 32, D_LM, FACTOR)


class Heard(dict[str, torch.Tensor]):
    def count(self, example_id: str) -> int:
        return len(self[example_id])


def planted(n: int) -> tuple[torch.Tensor, list[Example], Heard, dict[str, list[int]]]:
    """Utterances in which each token sounds for two positions as a pattern of its own, between silences."""
    generator = torch.Generator().manual_seed(1)
    embedding = torch.randn(VOCABULARY, D_LM, generator=generator)
    sound = torch.randn(VOCABULARY, D_ENC, generator=generator) * 2
    examples, frames, tokens = [], Heard(), {}
    for i in range(n):
        said = torch.randint(2, VOCABULARY, (int(torch.randint(1, 5, (), generator=generator)),), generator=generator)
        heard = []
        for token in said:
            heard += [sound[token]] * (2 * FACTOR) + [torch.zeros(D_ENC)] * FACTOR
        frames[str(i)] = torch.stack(heard) + 0.05 * torch.randn(len(heard), D_ENC, generator=generator)
        tokens[str(i)] = said.tolist()
        examples.append(Example(str(i), "?", ("a",), "a"))
    return embedding, examples, frames, tokens


def test_planted_words_are_read_in_speech_not_transcribed_before() -> None:
    embedding, examples, frames, tokens = planted(240)
    model = adaptor()
    alignment = align_adaptor(model, embedding, examples[:200], frames, tokens, LONG, seed=3)
    assert len(alignment.losses) == LONG.epochs
    assert alignment.losses[-1] < 0.2 * alignment.losses[0]
    right = 0
    for example in examples[200:]:
        outputs = model(frames[example.id][None])[0].detach()
        right += alignment.read(outputs) == tokens[example.id]
    assert right >= 38  # of 40; guessing gets none


def test_aligned_outputs_lie_nearest_the_embedding_of_what_is_said() -> None:
    embedding, examples, frames, tokens = planted(200)
    model = adaptor()
    align_adaptor(model, embedding, examples, frames, tokens, LONG, seed=3)
    for example in examples[:20]:
        outputs = model(frames[example.id][None])[0].detach()
        nearest = (
            torch.cdist(outputs, embedding[2:]).argmin(1) + 2
        )  # tokens 0 and 1 are never said, so never told apart
        assert set(tokens[example.id]) <= set(nearest.tolist())


def test_the_loss_is_the_sum_over_all_ways_to_lay_the_words_along_the_positions() -> None:
    torch.manual_seed(0)
    model, reader = adaptor(), TokenReader(torch.randn(3, D_LM), 2.0)
    frames = [torch.randn(4 * FACTOR + 1, D_ENC)]  # 4 positions; the last frame is dropped
    words = [[2, 1]]
    log_probs = reader(model(frames[0][None]))[0]
    total = 0.0
    for path in itertools.product(range(4), repeat=4):  # blank and three words at each position
        merged = [w for i, w in enumerate(path) if w != 0 and (i == 0 or path[i - 1] != w)]
        if merged == words[0]:
            total += math.exp(sum(float(log_probs[i, w]) for i, w in enumerate(path)))
    assert float(ctc_loss(model, reader, frames, words)) == pytest.approx(-math.log(total) / 2, rel=1e-4)


def test_the_reader_prefers_the_nearest_point_and_its_probabilities_sum_to_one() -> None:
    torch.manual_seed(0)
    points = torch.randn(5, D_LM) * 3
    log_probs = TokenReader(points, 20.0)(points[None] + 0.01)[0]
    assert log_probs.argmax(1).tolist() == [1, 2, 3, 4, 5]
    assert torch.allclose(log_probs.exp().sum(1), torch.ones(5), atol=1e-5)


def test_padding_in_a_batch_changes_no_utterance() -> None:
    torch.manual_seed(0)
    model, reader = adaptor(), TokenReader(torch.randn(3, D_LM), 2.0)
    short, long = torch.randn(4, D_ENC), torch.randn(12, D_ENC)
    together = ctc_loss(model, reader, [short, long], [[1], [2, 3]])
    apart = (ctc_loss(model, reader, [short], [[1]]) + ctc_loss(model, reader, [long], [[2, 3]])) / 2
    assert float(together) == pytest.approx(float(apart), rel=1e-3)  # products are in bfloat16


@pytest.mark.parametrize(("tokens", "needed"), [([5], 1), ([5, 6], 2), ([5, 5], 3), ([5, 5, 5], 5), ([4, 5, 5, 4], 5)])
def test_positions_needed(tokens: list[int], needed: int) -> None:
    assert positions_needed(tokens) == needed


def test_a_killed_alignment_ends_with_the_same_weights(tmp_path: Path) -> None:
    embedding, examples, frames, tokens = planted(40)
    whole, killed = adaptor(), adaptor()
    align_adaptor(whole, embedding, examples, frames, tokens, SETTINGS, seed=3)

    class Killed(Exception):
        pass

    def kill(done: int, total: int, loss: float) -> None:
        if done == total // 2:
            raise Killed

    with pytest.raises(Killed):
        align_adaptor(
            killed, embedding, examples, frames, tokens, SETTINGS, seed=3, state=tmp_path / "state", progress=kill
        )
    again = adaptor(seed=9)
    align_adaptor(again, embedding, examples, frames, tokens, SETTINGS, seed=3, state=tmp_path / "state")
    for name, value in whole.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name

    tokens["0"] = [*tokens["0"][::-1], 3]
    with pytest.raises(UserError, match="belongs to an alignment with other settings or texts"):
        align_adaptor(adaptor(), embedding, examples, frames, tokens, SETTINGS, seed=3, state=tmp_path / "state")


def test_too_short_utterances_are_counted_and_all_too_short_is_an_error() -> None:
    embedding, examples, frames, tokens = planted(20)
    frames["0"] = frames["0"][:1]
    assert align_adaptor(adaptor(), embedding, examples, frames, tokens, SETTINGS, seed=3).n_left_out == 1
    with pytest.raises(UserError, match="No utterance has as many speech positions"):
        align_adaptor(adaptor(), embedding, examples[:1], frames, tokens, SETTINGS, seed=3)
