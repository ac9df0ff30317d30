"""The adaptor before the language model: its outputs aligned with the embeddings of the words that are spoken.

Each position of the adaptor is read as a token: the one whose input embedding lies nearest to it, or none (`blank`, a
point of its own). CTC (Graves et al. 2006, doi:10.1145/1143844.1143891) sums over all ways to lay the question's
tokens along the positions, so no time stamps are needed. After this the speech stands in the prompt nearly as its text
would; the language model never runs, and an epoch costs a small part of one through the model. Beyond the paper, where
the adaptor learns from the answers alone.

>>> alignment = align_adaptor(model.adaptor, embedding, examples, features, tokens, Align())  # doctest: +SKIP

Legend: position = adaptor positions, 10 per second; word = 1 + tokens that occur in the training texts, blank first.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

import torch
from torch import nn

from palimpsest.data.in_loop import Encoded, Recordings
from palimpsest.files import UserError, hash_value, replacing
from palimpsest.parallel import is_main, share
from palimpsest.training.batching import EpochBatches

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from torch import Tensor

    from palimpsest.data.collate import Collator, Speech
    from palimpsest.data.examples import Example
    from palimpsest.models.speech_lm import SpeechLM
    from palimpsest.records import TrainingRecord
    from palimpsest.training.settings import Align, Settings

CALIBRATION = 256  # utterances that set the adaptor's buffers
BLANK = 0
STATE = "state"


class Counts(Protocol):
    """How many encoder frames each example has."""

    def count(self, example_id: str, /) -> int:
        """Frames of an example, without reading them."""
        ...


class Frames(Counts, Protocol):
    """Encoder frames by example id, as data.features.Features and data.in_loop.Encoded have them."""

    def __getitem__(self, example_id: str, /) -> Float[Tensor, "time d_enc"]: ...


class Adaptor(Protocol):
    """What is aligned: models.speech_lm.SpeechAdaptor, or models.tokens.TokenAdaptor with a row for each token."""

    @property
    def stack_factor(self) -> int: ...

    @property
    def frames_dtype(self) -> torch.dtype: ...

    def __call__(self, frames: Float[Tensor, "batch time d_enc"], /) -> Float[Tensor, "batch position d_lm"]: ...

    def calibrate(self, frames: Float[Tensor, "batch time d_enc"], target_std: float, /) -> None: ...

    def parameters(self) -> Iterator[nn.Parameter]: ...

    def train(self, mode: bool = True) -> Any: ...

    def eval(self) -> Any: ...


class TokenReader(nn.Module):
    """Log-probabilities of tokens at each position: softmax over −(squared distance to the token's embedding).

    Args:
        embedding: of the tokens that can be read, (word − 1, d_lm); stays as it is.
        sharpness: of the softmax, in units of the mean squared norm of the embeddings.
    """

    points: Tensor

    def __init__(self, embedding: Float[Tensor, "tokens d_lm"], sharpness: float) -> None:
        super().__init__()
        self.register_buffer("points", embedding.detach().float())
        self.blank = nn.Parameter(self.points.mean(0, keepdim=True))
        self.log_sharpness = nn.Parameter(torch.tensor(math.log(sharpness)))
        self.unit = float(self.points.square().sum(1).mean())

    def forward(self, outputs: Float[Tensor, "batch position d_lm"]) -> Float[Tensor, "batch position word"]:
        words = torch.cat([self.blank, self.points])
        with torch.autocast(outputs.device.type, torch.bfloat16):
            products = outputs @ words.T
        logits = (2 * products.float() - words.square().sum(1)) / self.unit  # |output|² is the same for every word
        return (self.log_sharpness.exp() * logits).log_softmax(-1)


@dataclass(frozen=True)
class Alignment:
    """What `align_adaptor` found: mean CTC loss of each epoch (nats per token), and how to read an adaptor's output."""

    losses: list[float]
    reader: TokenReader
    tokens: list[int]  # token id of word i + 1
    n_left_out: int  # utterances with fewer positions than their tokens need

    @torch.no_grad()
    def read(self, outputs: Float[Tensor, "position d_lm"]) -> list[int]:
        """The token ids of the likeliest word at each position, repetitions and blanks dropped (greedy CTC)."""
        words = self.reader(outputs[None])[0].argmax(-1).tolist()
        return [
            self.tokens[word - 1]
            for i, word in enumerate(words)
            if word != BLANK and (i == 0 or words[i - 1] != word)
        ]  # fmt: skip


def align_adaptor(
    adaptor: Adaptor,
    embedding: Float[Tensor, "vocabulary d_lm"],
    examples: Sequence[Example],
    frames: Frames,
    tokens: Mapping[str, Sequence[int]],
    settings: Align,
    *,
    seed: int = 0,
    state: Path | None = None,
    progress: Callable[[int, int, float], None] | None = None,
) -> Alignment:
    """Train `adaptor` in place; its buffers are calibrated first.

    Args:
        embedding: the language model's input embedding.
        frames: encoder frames by example id.
        tokens: of each example's question, by its id: what is said, as the language model would read it.
        state: a file that keeps weights and optimizer after every epoch; given again, training continues from there.
        progress: called as progress(steps done, steps in all, loss of the last step) after every step.

    Raises UserError when no utterance is long enough for its tokens, and for a `state` of another run.
    """
    device = embedding.device
    usable, plan = plan_of(examples, frames, tokens, adaptor.stack_factor, settings, seed)
    known = sorted({token for e in usable for token in tokens[e.id]})
    word_of = {token: i + 1 for i, token in enumerate(known)}
    reader = TokenReader(embedding[torch.tensor(known, device=device)], settings.sharpness).to(device)
    sample = random.Random(seed).sample(usable, min(CALIBRATION, len(usable)))
    factor = adaptor.stack_factor
    whole = [frames[e.id][: frames.count(e.id) // factor * factor] for e in sample]  # no position spans two utterances
    adaptor.calibrate(torch.cat(whole)[None].to(device, adaptor.frames_dtype), float(embedding.float().std()))

    total = settings.epochs * len(plan)
    trained = [*adaptor.parameters(), *reader.parameters()]
    optimizer = torch.optim.AdamW(trained, settings.learning_rate, weight_decay=settings.weight_decay)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min(1.0, (step + 1) / settings.warmup_steps) * 0.5 * (1 + math.cos(math.pi * step / total)),
    )
    run = hash_value([asdict(settings), seed, [(e.id, list(tokens[e.id])) for e in usable]])
    parts: dict[str, Any] = {"adaptor": adaptor, "reader": reader, "optimizer": optimizer, "schedule": schedule}
    losses: list[float] = []
    if state is not None and state.exists():
        saved = torch.load(state, weights_only=True)
        if saved["run"] != run:
            raise UserError(f"{state} belongs to an alignment with other settings or texts; delete it to begin anew.")
        for name, part in parts.items():
            part.load_state_dict(saved[name])
        losses = list(saved["losses"])

    adaptor.train()
    for epoch in range(len(losses), settings.epochs):
        loss_sum = 0.0
        for step, rows in enumerate(plan.batches(epoch)):
            batch = [usable[i] for i in rows]
            words = [[word_of[token] for token in tokens[e.id]] for e in batch]
            loss = ctc_loss(adaptor, reader, [frames[e.id].to(device) for e in batch], words)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(trained, settings.max_grad_norm)
            optimizer.step()
            schedule.step()
            loss_sum += loss.item() * len(batch)
            if progress is not None:
                progress(epoch * len(plan) + step + 1, total, loss.item())
        losses.append(loss_sum / len(usable))
        if state is not None:
            with replacing(state) as temporary:
                states = {name: part.state_dict() for name, part in parts.items()}
                torch.save({"run": run, "losses": losses, **states}, temporary)
    adaptor.eval()
    return Alignment(losses, reader, known, len(examples) - len(usable))


def plan_of(
    examples: Sequence[Example],
    frames: Counts,
    tokens: Mapping[str, Sequence[int]],
    stack_factor: int,
    settings: Align,
    seed: int,
) -> tuple[list[Example], EpochBatches]:
    """The examples long enough for their tokens, and their batches. Raises UserError if there are none."""
    usable = [e for e in examples if positions_needed(tokens[e.id]) <= frames.count(e.id) // stack_factor]
    if not usable:
        raise UserError("No utterance has as many speech positions as its text has tokens; check texts and recordings.")
    lengths = [frames.count(e.id) for e in usable]
    budget = settings.batch_size * sorted(lengths)[len(lengths) // 2]  # long ones in smaller batches
    return usable, EpochBatches(len(usable), settings.batch_size, seed, lengths, max(budget, max(lengths)))


# ---------------------------------------------------------------------------------------------------------------------
# As a phase of training
# ---------------------------------------------------------------------------------------------------------------------
def align_steps(examples: Sequence[Example], collator: Collator, settings: Settings) -> int:
    """Optimizer steps of the alignment that the settings ask for."""
    if settings.align is None:
        return 0
    assert collator.features is not None
    counts, factor = collator.features, collator.processor.stack_factor
    plan = plan_of(examples, counts, _spoken(examples, collator), factor, settings.align, settings.seed)[1]
    return settings.align.epochs * len(plan)


def align_phase(
    model: SpeechLM,
    examples: Sequence[Example],
    collator: Collator,
    settings: Settings,
    advance: Callable[[int], None] | None,
    folder: Path,
) -> list[TrainingRecord]:
    """The alignment of a training run, by rank 0 for all; its loss is of another kind, so there are no records."""
    if is_main():
        assert settings.align is not None
        assert collator.features is not None  # the speech modality has them
        align_adaptor(
            model.adaptor,
            model.get_input_embeddings().get_parameter("weight").detach(),
            examples,
            frames_of(collator.features, model, settings),
            _spoken(examples, collator),
            settings.align,
            seed=settings.seed,
            state=folder / STATE,
            progress=None if advance is None else lambda done, _total, _loss: advance(done),
        )
    weights = {name: value.cpu() for name, value in model.adaptor.state_dict().items()} if is_main() else None
    model.adaptor.load_state_dict(share(weights))
    return []


def frames_of(speech: Speech, model: SpeechLM, settings: Settings) -> Frames:
    """Cached frames as they are; of recordings, what the model's own encoder makes of them."""
    if isinstance(speech, Recordings):
        return Encoded(speech, model.encoder, settings.compute)
    return cast(Frames, speech)


def _spoken(examples: Sequence[Example], collator: Collator) -> dict[str, list[int]]:
    tokenizer = collator.processor.tokenizer
    return {e.id: tokenizer(e.question, add_special_tokens=False)["input_ids"] for e in examples}


# ---------------------------------------------------------------------------------------------------------------------
def ctc_loss(
    adaptor: Adaptor,
    reader: TokenReader,
    frames: Sequence[Float[Tensor, "time d_enc"]],
    words: Sequence[Sequence[int]],
) -> Float[Tensor, ""]:
    """Negative log-probability of each utterance's words per word, averaged over utterances."""
    padded = nn.utils.rnn.pad_sequence(list(frames), batch_first=True).to(adaptor.frames_dtype)
    log_probs = reader(adaptor(padded).float())
    n_positions = torch.tensor([len(item) // adaptor.stack_factor for item in frames])
    targets: Int[Tensor, " all_words"] = torch.tensor([word for row in words for word in row], device=padded.device)
    n_words = torch.tensor([len(row) for row in words])
    return nn.functional.ctc_loss(log_probs.transpose(0, 1), targets, n_positions, n_words, blank=BLANK)


def positions_needed(tokens: Sequence[int]) -> int:
    """CTC needs a position for each token, and a blank between two equal ones. Empty texts can never be read."""
    if not tokens:
        return 1 << 30
    return len(tokens) + sum(a == b for a, b in itertools.pairwise(tokens))
