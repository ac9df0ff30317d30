"""Can speech tokens carry the words? python scripts/speech_token_gate.py --train DATA --test DATA --out gate

Before a study of speech tokens: how many tokens of the text does a reader get wrong that was trained by CTC for a few
hundred steps (palimpsest.training.align, no language model), from

    frames         encoder frames, through the adaptor                       the continuous paradigm
    centroids-K    the same adaptor on frames replaced by their centroids    what quantising alone costs
    tokens-K       a row for each of K tokens                                the discrete paradigm

Each is read position by position, as `training.align` does, and with --context also after a small recurrent network
over the positions: a token can stand for a sound that many words share, and then only its neighbours say which. All
readers see the same utterances in the same order for the same number of steps. OUT/NAME/result.json is made once; a
killed one continues from its last epoch. OUT/gate.md is the table. --readers leaves some out; called again with more of
them, only these are made.

DATA is a manifest, "facts:train", or another source of docs/data.md with its split; what has no recording is spoken.
"""

from __future__ import annotations

import argparse
import math
import random
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from palimpsest.data.examples import Example
from palimpsest.data.features import Features, compute_features
from palimpsest.data.sources import load_examples
from palimpsest.data.speech import speak
from palimpsest.files import UserError, hash_value, read_json, write_json, write_text
from palimpsest.intervals import bootstrap_ratio
from palimpsest.models.loading import load_encoder, load_language_model
from palimpsest.models.processor import SpeechLMProcessor
from palimpsest.models.speech_lm import SpeechAdaptor
from palimpsest.models.token_settings import Tokens
from palimpsest.models.tokens import (
    SpeechTokenizer,
    TokenAdaptor,
    describe_tokens,
    fit_tokens,
    read_tokens,
    rows_heard,
    rows_like,
    write_tokens,
)
from palimpsest.training.align import Adaptor, Alignment, align_adaptor
from palimpsest.training.settings import Align

FRAMES = "frames"
READERS = (FRAMES, "centroids", "tokens")


class InContext(nn.Module):
    """An adaptor and a two-way recurrent network over its positions, added to its outputs; at first it adds nothing."""

    def __init__(self, adaptor: SpeechAdaptor | TokenAdaptor, width: int, hidden: int) -> None:
        super().__init__()
        self.adaptor = adaptor
        self.network = nn.GRU(width, hidden, batch_first=True, bidirectional=True)
        self.out = nn.Linear(2 * hidden, width)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    @property
    def stack_factor(self) -> int:
        return self.adaptor.stack_factor

    @property
    def frames_dtype(self) -> torch.dtype:
        return self.adaptor.frames_dtype

    def calibrate(self, frames: Tensor, target_std: float) -> None:
        self.adaptor.calibrate(frames, target_std)

    def forward(self, frames: Tensor) -> Tensor:
        """(batch, time, d_enc) → (batch, position, d_lm); frames that are all zero are padding."""
        outputs: Tensor = self.adaptor(frames)
        counts = (frames != 0).any(2).sum(1) // self.stack_factor
        packed = pack_padded_sequence(outputs, counts.clamp_min(1).cpu(), batch_first=True, enforce_sorted=False)
        around, _ = pad_packed_sequence(self.network(packed)[0], batch_first=True, total_length=outputs.shape[1])
        return outputs + self.out(around)


def main() -> None:
    arguments = parse_arguments()
    out: Path = arguments.out
    language_model, text_tokenizer = load_language_model(arguments.language_model)
    embedding = language_model.get_input_embeddings().weight.detach().float()
    del language_model
    encoder, extractor = load_encoder(arguments.encoder)
    processor = SpeechLMProcessor(text_tokenizer, extractor, arguments.stack_factor)
    groups = {
        "train": examples_of(arguments.train, arguments.train_limit, out, arguments.seed),
        "test": examples_of([arguments.test], arguments.test_limit, out, arguments.seed),
    }
    for name, group in groups.items():
        compute_features(encoder, processor, group, out / "features" / name, cache=arguments.cache or out / "cache")
    train, test = groups["train"], groups["test"]
    frames = {name: Features(out / "features" / name) for name in groups}
    tokens = {e.id: text_tokenizer(e.question, add_special_tokens=False)["input_ids"] for e in train + test}

    started = {"language_model": arguments.language_model, "encoder": arguments.encoder, "seed": arguments.seed}
    started |= {"train": hash_value(sorted(e.id for e in train)), "test": hash_value([e.id for e in test])}
    started |= {"steps": arguments.steps, "batch_size": arguments.batch_size, "hidden": arguments.hidden}

    def setup(name: str, made: Any, tokenizer: SpeechTokenizer | None, rate: float) -> None:
        """Align what `made()` gives and measure it, position by position and in context."""
        for context in (False, True) if arguments.context else (False,):
            folder = out / (f"{name}-context" if context else name)
            inputs = {
                **started,
                "rate": arguments.learning_rate if context else rate,
                "tokenizer": dict(tokenizer.about) if tokenizer else None,
            }
            inputs |= {"start": arguments.start} if name.startswith("tokens") else {}
            if (folder / "result.json").exists() and read_json(folder / "result.json")["inputs"] == inputs:
                continue
            folder.mkdir(parents=True, exist_ok=True)
            torch.manual_seed(arguments.seed)
            adaptor = made()
            if context:
                adaptor = InContext(adaptor, embedding.shape[1], arguments.hidden)
            chosen, settings = for_steps(train, arguments, inputs["rate"])
            n_parameters = sum(parameter.numel() for parameter in adaptor.parameters())
            print(f"{folder.name}: {len(chosen)} utterances, {settings.epochs} epochs", flush=True)
            began = time.time()
            alignment = align_adaptor(
                adaptor, embedding, chosen, frames["train"], tokens, settings, seed=arguments.seed,
                state=folder / "state", progress=said(folder.name),
            )  # fmt: skip
            if name == FRAMES and not context:
                torch.save(adaptor.state_dict(), folder / "adaptor.pt")
            result = {
                "inputs": inputs,
                "settings": asdict(settings),
                "n_train": len(chosen),
                "n_parameters": n_parameters,
                "losses": alignment.losses,
                "left_out": alignment.n_left_out,
                "seconds": time.time() - began,
                **error_rates(adaptor, alignment, test, frames["test"], tokens),
            }
            if tokenizer is not None:
                quantiser = tokenizer.quantiser()
                result["speech"] = describe_tokens(quantiser, (frames["test"][e.id] for e in test))
            write_json(folder / "result.json", result)
            (folder / "state").unlink(missing_ok=True)

    def continuous(tokenizer: SpeechTokenizer | None) -> SpeechAdaptor:
        quantiser = None if tokenizer is None else tokenizer.quantiser()
        width = frames["train"].dim
        return SpeechAdaptor(width, arguments.adaptor_hidden, embedding.shape[1], arguments.stack_factor, quantiser)

    def rows(tokenizer: SpeechTokenizer) -> TokenAdaptor:
        adaptor = TokenAdaptor(tokenizer.quantiser(), embedding.shape[1], collapse=True)
        adaptor.rows.weight.data.copy_(rows_like(embedding, tokenizer.k, arguments.seed))
        if arguments.start == "adaptor":
            aligned = continuous(None)
            aligned.load_state_dict(torch.load(out / FRAMES / "adaptor.pt", weights_only=True))
            found, counts = rows_heard(aligned.eval(), adaptor.quantiser, (frames["train"][e.id] for e in train))
            adaptor.rows.weight.data[counts > 0] = found[counts > 0]
        return adaptor

    names = []
    if FRAMES in arguments.readers:
        names.append(FRAMES)
        setup(FRAMES, lambda: continuous(None), None, arguments.learning_rate)
    for k in arguments.k if {*arguments.readers} - {FRAMES} else ():
        tokenizer = fitted(out / f"tokens-{k}.safetensors", train, frames["train"], k, arguments)
        if "centroids" in arguments.readers:
            names.append(f"centroids-{k}")
            setup(names[-1], lambda t=tokenizer: continuous(t), tokenizer, arguments.learning_rate)
        if "tokens" in arguments.readers:
            names.append(f"tokens-{k}")
            setup(names[-1], lambda t=tokenizer: rows(t), tokenizer, arguments.rows_learning_rate)
    results = {
        name: read_json(out / name / "result.json")
        for plain in names
        for name in (plain, f"{plain}-context")
        if (out / name / "result.json").exists()
    }
    write_json(out / "gate.json", results)
    write_text(out / "gate.md", table(results))
    print(table(results))


def examples_of(sources: Sequence[str], limit: int | None, out: Path, seed: int) -> list[Example]:
    """Of "SOURCE:SPLIT", or of manifests; spoken where there is no recording."""
    found: list[Example] = []
    for source in sources:
        if source.endswith(".jsonl"):
            name, split = source, "train"
        else:
            name, _, split = source.rpartition(":")
        if not name:
            raise UserError(f"{source} names no split; give SOURCE:SPLIT, as facts:train, or a manifest (.jsonl).")
        found += load_examples(name, split, audio=out / "audio")
    found = found if limit is None else random.Random(seed).sample(found, min(limit, len(found)))
    return speak(found, out / "audio", workers=1)


def for_steps(train: Sequence[Example], arguments: argparse.Namespace, rate: float) -> tuple[list[Example], Align]:
    """As many utterances and epochs as come to the wanted number of optimizer steps; where long ones stand in smaller
    batches there are a few more."""
    wanted = arguments.steps * arguments.batch_size
    epochs = max(1, math.ceil(wanted / len(train)))
    chosen = random.Random(arguments.seed).sample(list(train), math.ceil(wanted / epochs))
    return chosen, Align(epochs, rate, warmup_steps=max(1, arguments.steps // 10), batch_size=arguments.batch_size)


def fitted(
    path: Path, train: Sequence[Example], frames: Features, k: int, arguments: argparse.Namespace
) -> SpeechTokenizer:
    """Fitted once."""
    options = Tokens(k=k, pool=arguments.pool, fit_on=arguments.fit_on)
    wanted = {"train": hash_value(sorted(e.id for e in train)), "encoder": arguments.encoder, **asdict(options)}
    wanted["seed"] = arguments.seed
    about = hash_value(wanted)
    if path.exists() and read_tokens(path).about.get("made_of") == about:
        return read_tokens(path)
    began = time.time()
    tokenizer = fit_tokens([e.id for e in train], frames, options, arguments.seed, {"made_of": about})
    write_tokens(tokenizer, path)
    print(f"{path.name}: fitted in {time.time() - began:.0f} s", flush=True)
    return read_tokens(path)


# ---------------------------------------------------------------------------------------------------------------------
# Token error rate
# ---------------------------------------------------------------------------------------------------------------------
@torch.no_grad()
def error_rates(
    adaptor: Adaptor, alignment: Alignment, examples: Sequence[Example], frames: Features, tokens: dict[str, list[int]]
) -> dict[str, Any]:
    """Edits per token of the texts, with a 95 % bootstrap interval over utterances, and what was read."""
    read = {e.id: alignment.read(adaptor(frames[e.id][None])[0].float()) for e in examples}
    edits = [edit_distance(tokens[e.id], read[e.id]) for e in examples]
    lengths = [len(tokens[e.id]) for e in examples]
    (low,), (high,) = bootstrap_ratio([[count] for count in edits], lengths, seed=0)
    known = set(alignment.tokens)
    return {
        "n": len(examples),
        "token_error_rate": sum(edits) / sum(lengths),
        "interval": [float(low), float(high)],
        "never_seen": sum(token not in known for e in examples for token in tokens[e.id]) / sum(lengths),
        "read": read,
    }


def edit_distance(wanted: Sequence[int], found: Sequence[int]) -> int:
    """Fewest insertions, deletions and replacements (Levenshtein)."""
    row = list(range(len(found) + 1))
    for i, token in enumerate(wanted):
        before, row[0] = row[0], i + 1
        for j, other in enumerate(found):
            before, row[j + 1] = row[j + 1], min(row[j] + 1, row[j + 1] + 1, before + (token != other))
    return row[-1]


def table(results: dict[str, dict[str, Any]]) -> str:
    lines = [
        "| what is read | token error rate | tokens a second | without repetitions | used | perplexity | parameters "
        "| seconds |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, it in results.items():
        low, high = it["interval"]
        speech = it.get("speech")
        cells = ["", "", "", ""]
        if speech is not None:
            cells = [f"{speech['per_second']:.1f}", f"{speech['collapsed_per_second']:.1f}"]
            cells += [f"{speech['used']:,}", f"{speech['perplexity']:.0f}"]
        rate = f"{it['token_error_rate']:.1%} [{low:.1%}, {high:.1%}]"
        cells = [name, rate, *cells, f"{it['n_parameters']:,}", f"{it['seconds']:.0f}"]
        lines.append(f"| {' | '.join(cells)} |")
    first = next(iter(results.values()))
    lines += ["", f"{first['n']} recordings; {first['never_seen']:.1%} of their tokens are in no training text."]
    return "\n".join(lines) + "\n"


# ---------------------------------------------------------------------------------------------------------------------
def said(stage: str) -> Any:
    """A progress callback: a line every 10 seconds."""
    last = [0.0]

    def show(done: int, total: int, loss: float) -> None:
        if time.time() - last[0] > 10 or done == total:
            last[0] = time.time()
            print(f"{stage} {done}/{total} loss {loss:.3f}", flush=True)

    return show


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", nargs="+", required=True, help="manifests or SOURCE:SPLIT")
    parser.add_argument("--train-limit", type=int, help="so many of them at random")
    parser.add_argument("--test", required=True, help="recordings to read, a manifest or SOURCE:SPLIT")
    parser.add_argument("--test-limit", type=int)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--cache", type=Path, help="folder of encoder frames to share; default: inside OUT")
    parser.add_argument("--language-model", default="embedded:smollm2-135m-instruct")
    parser.add_argument("--encoder", default="embedded:whisper-tiny.en")
    parser.add_argument("--k", type=int, nargs="+", default=[500, 1000, 4000])
    parser.add_argument("--pool", type=int, default=2, help="encoder frames of a token")
    parser.add_argument("--fit-on", type=int, default=200_000, help="pooled frames that k-means sees")
    parser.add_argument("--start", choices=("embedding", "adaptor"), default="embedding",
                        help="first rows; adaptor: mean outputs of the one that was aligned on frames")  # fmt: skip
    parser.add_argument("--steps", type=int, default=500, help="optimizer steps of every reader")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--learning-rate", type=float, default=1e-3, help="of adaptors")
    parser.add_argument("--rows-learning-rate", type=float, default=1e-3, help="of rows without a network")
    parser.add_argument("--readers", nargs="+", choices=READERS, default=READERS)
    parser.add_argument("--context", action="store_true", help="also readers that see the positions around")
    parser.add_argument("--hidden", type=int, default=256, help="width of their network, each way")
    parser.add_argument("--stack-factor", type=int, default=5, help="encoder frames of a position of the adaptor")
    parser.add_argument("--adaptor-hidden", type=int, default=2048)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    if arguments.start == "adaptor" and FRAMES not in arguments.readers:
        parser.error("--start adaptor begins the rows with the adaptor that reads frames; name frames in --readers")
    return arguments


if __name__ == "__main__":
    main()
