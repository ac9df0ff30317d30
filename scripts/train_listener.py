"""Train the adaptor of the shipped speech LLM: python scripts/train_listener.py --corpus corpus --out listener

1. features   encoder frames of every utterance of the corpus (scripts/make_corpus.py)
2. align      CTC between the adaptor's outputs and the embeddings of the words (palimpsest.training.align)
3. answers    the language model's own greedy answers to some written questions of WebQuestions
4. listen     through the frozen language model: write down what is said (every utterance), and answer (facts: the
              answer of the set; WebQuestions: the model's own): two instructions, mixed at random

The language model never changes, so from text it answers as before. It runs in bfloat16 on the turns that follow the
speech; keys and values of the template's beginning, which is always the same, are computed once. Each stage leaves its
state in OUT and continues after a kill. OUT/speech_lm is the result, a SpeechLM folder for `ask`, `evaluate`, `export`.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache

from palimpsest.data.examples import Example, read_manifest
from palimpsest.data.features import Features, compute_features
from palimpsest.evaluation.answers import text_answerer
from palimpsest.files import write_json
from palimpsest.models.loading import load_encoder, load_language_model
from palimpsest.models.processor import SpeechLMProcessor
from palimpsest.models.speech_lm import SPEECH_POSITION, SpeechAdaptor, SpeechLM
from palimpsest.training.align import align_adaptor
from palimpsest.training.batching import EpochBatches
from palimpsest.training.settings import Align

LANGUAGE_MODEL, ENCODER = "embedded:smollm2-135m-instruct", "embedded:whisper-tiny.en"
REPEAT = "Repeat what is said in the speech."
HIDDEN, STACK = 2048, 5
HELD_OUT = 150  # texts of the corpus, in all their voices
MAX_ANSWER = 40  # tokens


@dataclass(frozen=True)
class Task:
    """An utterance and what the model should write: `target` ends with the end-of-turn token."""

    id: str
    instruction: int  # 0: repeat, 1: answer
    target: list[int]


def main() -> None:
    arguments = parse_arguments()
    arguments.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(arguments.seed)
    language_model, tokenizer = load_language_model(LANGUAGE_MODEL, dtype="bfloat16")
    language_model.requires_grad_(False)
    encoder, extractor = load_encoder(ENCODER)
    processor = SpeechLMProcessor(tokenizer, extractor, STACK, "trim")

    questions = read_manifest(arguments.corpus / "questions.jsonl", check=False)
    examples = questions + read_manifest(arguments.corpus / "sentences.jsonl", check=False)
    compute_features(
        encoder, processor, examples, arguments.out / "features", cache=arguments.cache, progress=said("features")
    )
    features = Features(arguments.out / "features")
    texts = sorted({text_id(e) for e in examples})
    random.Random(arguments.seed).shuffle(texts)
    chosen = set(texts[:HELD_OUT])
    train = [e for e in examples if text_id(e) not in chosen]
    held_out = [e for e in examples if text_id(e) in chosen]

    adaptor = aligned(arguments, language_model, tokenizer, train, features)
    own = own_answers(arguments, language_model, tokenizer, train)
    listener = Listener(language_model, processor, adaptor)
    tasks = {name: listener.tasks(group, own) for name, group in {"train": train, "held out": held_out}.items()}
    listen(arguments, listener, tasks, features)

    whole, _ = load_language_model(LANGUAGE_MODEL)
    model = SpeechLM.from_parts(encoder, whole, stack_factor=STACK, adaptor_hidden_size=HIDDEN, speech_length="trim")
    model.adaptor.load_state_dict(adaptor.state_dict())
    model.save_pretrained(arguments.out / "speech_lm")
    processor.save_pretrained(arguments.out / "speech_lm")


# ---------------------------------------------------------------------------------------------------------------------
# Stages
# ---------------------------------------------------------------------------------------------------------------------
def aligned(
    arguments: argparse.Namespace, language_model: Any, tokenizer: Any, train: Sequence[Example], features: Features
) -> SpeechAdaptor:
    """OUT/aligned.safetensors, or --aligned."""
    adaptor = SpeechAdaptor(features.dim, HIDDEN, language_model.config.hidden_size, STACK)
    file = arguments.aligned or arguments.out / "aligned.safetensors"
    if not file.exists():
        tokens = {e.id: tokenizer(e.question, add_special_tokens=False)["input_ids"] for e in train}
        settings = Align(epochs=arguments.align_epochs)
        embedding = language_model.get_input_embeddings().weight.float()
        alignment = align_adaptor(
            adaptor, embedding, train, features, tokens, settings, seed=arguments.seed,
            state=arguments.out / "align.state", progress=said("align"),
        )  # fmt: skip
        write_json(arguments.out / "align.json", {"losses": alignment.losses, "left_out": alignment.n_left_out})
        save_file(adaptor.state_dict(), file)
    adaptor.load_state_dict(load_file(file))
    return adaptor


def own_answers(
    arguments: argparse.Namespace, language_model: Any, tokenizer: Any, train: Sequence[Example]
) -> dict[str, str]:
    """OUT/answers.jsonl: the language model's answers to `--answers` questions of WebQuestions, by text id."""
    file = arguments.out / "answers.jsonl"
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.exists() else []
    answers = {row["id"]: row["answer"] for row in rows}
    asked = {text_id(e): e for e in train if e.kind == "webquestions"}
    wanted = random.Random(arguments.seed).sample(sorted(asked), min(arguments.answers, len(asked)))
    answer = text_answerer(language_model, tokenizer, MAX_ANSWER)
    missing = [asked[key] for key in wanted if key not in answers]
    for start in range(0, len(missing), 64):
        batch = missing[start : start + 64]
        with file.open("a", encoding="utf-8") as out:
            for example, given in zip(batch, answer(batch, "text"), strict=True):
                answers[text_id(example)] = given.response
                out.write(json.dumps({"id": text_id(example), "answer": given.response}) + "\n")
        said("answers")(start + len(batch), len(missing))
    return answers


def listen(arguments: argparse.Namespace, listener: Listener, tasks: dict[str, list[Task]], features: Features) -> None:
    """Train the adaptor; OUT/listen.state every 100 steps, losses into OUT/listen.jsonl."""
    adaptor, train = listener.adaptor, tasks["train"]
    lengths = [features.count(task.id) // STACK + len(task.target) + 20 for task in train]
    plan = EpochBatches(len(train), 32, arguments.seed, lengths, max_tokens=arguments.max_tokens)
    total = math.ceil(arguments.epochs * len(plan))
    optimizer = torch.optim.AdamW(adaptor.parameters(), arguments.learning_rate)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / 50) * 0.5 * (1 + math.cos(math.pi * min(1.0, step / total)))
    )
    state, done = arguments.out / "listen.state", 0
    parts: dict[str, Any] = {"adaptor": adaptor, "optimizer": optimizer, "schedule": schedule}
    if state.exists():
        saved = torch.load(state, weights_only=True)
        done = saved["step"]
        for name, part in parts.items():
            part.load_state_dict(saved[name])

    adaptor.train()
    began, first, mean, batches = time.time(), done, math.nan, []
    for step in range(done, total):
        epoch, within = divmod(step, len(plan))
        if within == 0 or not batches:
            batches = plan.batches(epoch)
        losses, _ = listener.losses([train[i] for i in batches[within]], features)
        optimizer.zero_grad()
        losses.mean().backward()
        torch.nn.utils.clip_grad_norm_(adaptor.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        loss = float(losses.detach().mean())
        mean = loss if math.isnan(mean) else 0.97 * mean + 0.03 * loss
        if (step + 1) % 20 == 0:
            left = (time.time() - began) / (step + 1 - first) * (total - step - 1)
            print(f"listen {step + 1}/{total} loss {mean:.3f} ({left / 60:.0f} min left)", flush=True)
        if (step + 1) % 100 == 0 or step + 1 == total:
            record = {"step": step + 1, "train": mean, **listener.held_out(tasks["held out"], features)}
            with (arguments.out / "listen.jsonl").open("a", encoding="utf-8") as out:
                out.write(json.dumps(record) + "\n")
            print(record, flush=True)
            torch.save({"step": step + 1, **{name: part.state_dict() for name, part in parts.items()}}, state)
    adaptor.eval()


# ---------------------------------------------------------------------------------------------------------------------
# The frozen language model after an adaptor
# ---------------------------------------------------------------------------------------------------------------------
class Listener:
    """Losses of targets after speech, with the beginning of the prompt from a cache of keys and values."""

    def __init__(self, language_model: Any, processor: SpeechLMProcessor, adaptor: SpeechAdaptor) -> None:
        self.model, self.processor, self.adaptor = language_model, processor, adaptor
        self.embed = language_model.get_input_embeddings()
        before, self.after = [], []
        for instruction in (REPEAT, processor.style.speech_instruction):
            style = replace(processor.style, speech_instruction=instruction)
            prompt = SpeechLMProcessor(
                processor.tokenizer, processor.feature_extractor, STACK, "trim", style
            ).speech_prompt(1)
            at = prompt.index(SPEECH_POSITION)
            before.append(prompt[:at])
            self.after.append(torch.tensor(prompt[at + 1 :]))
        assert before[0] == before[1]  # the instruction follows the speech
        self.n_before = len(before[0])
        with torch.no_grad():
            layers = language_model.model(torch.tensor([before[0]]), use_cache=True).past_key_values.layers
        self.beginning = [(layer.keys, layer.values) for layer in layers]

    def tasks(self, examples: Sequence[Example], own: dict[str, str]) -> list[Task]:
        """Every utterance repeated; facts and the questions with an own answer also answered."""
        found = []
        for e in examples:
            found.append(Task(e.id, 0, self.processor.answer(e.question)))
            answer = own.get(text_id(e)) if e.kind in ("webquestions", "instructions", "sentences") else e.answer
            if answer:
                found.append(Task(e.id, 1, self.processor.answer(answer)[:MAX_ANSWER]))
        return found

    def losses(self, tasks: Sequence[Task], features: Features) -> tuple[Tensor, Tensor]:
        """Cross-entropy of every target token, and the row of the batch it belongs to."""
        frames = [features[task.id] for task in tasks]
        speech = self.adaptor(pad_sequence(frames, batch_first=True)).to(self.model.dtype)
        rows, labels = [], []
        for i, (task, item) in enumerate(zip(tasks, frames, strict=True)):
            target = torch.tensor(task.target)
            text = self.embed(torch.cat([self.after[task.instruction], target[:-1]]))
            rows.append(torch.cat([speech[i, : len(item) // STACK], text]))
            labels.append(torch.cat([torch.full((len(rows[-1]) - len(target),), -100), target]))
        inputs, wanted = (
            pad_sequence(rows, batch_first=True),
            pad_sequence(labels, batch_first=True, padding_value=-100),
        )
        mask = torch.ones(len(tasks), self.n_before + inputs.shape[1], dtype=torch.long)
        for i, row in enumerate(rows):
            mask[i, self.n_before + len(row) :] = 0
        hidden = self.model.model(
            inputs_embeds=inputs, attention_mask=mask, past_key_values=self._cache(len(tasks)), use_cache=True
        ).last_hidden_state
        supervised = wanted != -100
        logits = self.model.lm_head(hidden[supervised]).float()
        return cross_entropy(logits, wanted[supervised], reduction="none"), supervised.nonzero()[:, 0]

    @torch.no_grad()
    def held_out(self, tasks: Sequence[Task], features: Features) -> dict[str, float]:
        """Nats per target token, by task."""
        sums = {0: [0.0, 0], 1: [0.0, 0]}
        ordered = sorted(tasks, key=lambda task: features.count(task.id))
        for start in range(0, len(ordered), 32):
            batch = ordered[start : start + 32]
            losses, rows = self.losses(batch, features)
            for loss, row in zip(losses.tolist(), rows.tolist(), strict=True):
                sums[batch[row].instruction][0] += loss
                sums[batch[row].instruction][1] += 1
        return {name: sums[i][0] / max(1, sums[i][1]) for i, name in enumerate(("repeat", "answer"))}

    def _cache(self, rows: int) -> DynamicCache:
        cache = DynamicCache()
        for i, (keys, values) in enumerate(self.beginning):
            cache.update(keys.expand(rows, -1, -1, -1), values.expand(rows, -1, -1, -1), i)
        return cache


# ---------------------------------------------------------------------------------------------------------------------
def text_id(example: Example) -> str:
    """The same for all voices of one text."""
    return example.id[:-2] if example.id.endswith(("-a", "-b")) else example.id


def said(stage: str) -> Any:
    """A progress callback: a line every 5 seconds."""
    last = [0.0]

    def show(done: int, total: int, loss: float | None = None) -> None:
        if time.time() - last[0] > 5 or done == total:
            last[0] = time.time()
            print(f"{stage} {done}/{total}" + ("" if loss is None else f" loss {loss:.3f}"), flush=True)

    return show


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", type=Path, required=True, help="folder that make_corpus.py wrote")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--cache", type=Path, help="folder of encoder frames to share; default: inside OUT")
    parser.add_argument("--aligned", type=Path, help="an adaptor aligned before, instead of stage 2")
    parser.add_argument("--align-epochs", type=int, default=4)
    parser.add_argument("--answers", type=int, default=1500, help="questions the language model answers for stage 4")
    parser.add_argument("--epochs", type=float, default=2.0, help="of stage 4")
    parser.add_argument("--learning-rate", type=float, default=5e-4, help="of stage 4")
    parser.add_argument("--max-tokens", type=int, default=2000, help="of a batch of stage 4")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


if __name__ == "__main__":
    main()
