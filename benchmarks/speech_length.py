"""What trimming speech to its real length changes against padding it to 30 s: encoder output, positions, time.

    python benchmarks/speech_length.py                                # built-in facts spoken by hibari
    python benchmarks/speech_length.py --llama ../shared/data/llama_questions

The relative difference of a frame is |trim − pad| / |pad|, Euclidean over the encoder's width, in float32, at the
frames that hold audio. Scales beside it: the same for two frames of one utterance a second apart, and for what float16
storage rounds away. What the difference is to a listener: the same Whisper's decoder on the question's true text,
token by token, from three encoder outputs: padded; padded, cut to the real frames; trimmed. Times: CPU seconds of this
process, log-mel included, batches of 8 sorted by length, both ways in turn, medians of all repeats.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoTokenizer

from palimpsest.data.examples import Example
from palimpsest.data.sources import load_examples
from palimpsest.data.speech import read_audio, speak
from palimpsest.models.loading import load_asr, resolve
from palimpsest.models.processor import SAMPLES_PER_FRAME, SpeechLMProcessor
from palimpsest.models.speech_lm import SpeechLength, encode_speech
from palimpsest.rundir import cpu_name

LAST = (1, 2, 3, 5, 10, 25)  # frames from the end of the audio
N_PARTS = 5  # of the utterance, by position
SECOND = 50  # frames
BATCH = 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--encoder", default="embedded:whisper-tiny.en")
    parser.add_argument("--language-model", default="embedded:smollm2-135m-instruct", help="its tokenizer is used")
    parser.add_argument("--llama", type=Path, help="folder of Llama Questions with its recordings")
    parser.add_argument("--n", type=int, default=32, help="utterances of each set")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(f"{cpu_name()}, {options.threads} threads; Python {platform.python_version()}, torch {version('torch')}, "
          f"transformers {version('transformers')}; {options.encoder}")  # fmt: skip
    asr, asr_processor = load_asr(options.encoder)
    tokenizer = AutoTokenizer.from_pretrained(resolve(options.language_model))
    processors = {
        length: SpeechLMProcessor(tokenizer, asr_processor.feature_extractor, speech_length=length)
        for length in ("trim", "pad_to_30s")
    }
    with tempfile.TemporaryDirectory() as folder:
        sets = {"facts, hibari": speak(load_examples("facts", "train", options.n, seed=0), Path(folder))}
        if options.llama:
            sets["Llama Questions"] = load_examples(f"llama_questions:{options.llama}", "test", options.n, seed=0)
        for name, examples in sets.items():
            waves = [read_audio(example.audio) for example in examples if example.audio is not None]
            print(f"\n{name}: {len(waves)} utterances, median {statistics.median(map(len, waves)) / 16_000:.2f} s")
            print(json.dumps(difference(asr, asr_processor, processors, examples, waves), indent=1))
            print(json.dumps(positions(processors, examples, waves), indent=1))
            print(json.dumps(times(asr, processors, waves, options.repeats), indent=1))


def encode(asr: Any, processor: SpeechLMProcessor, waves: list[Any]) -> torch.Tensor:
    mels, counts = processor.features(waves)
    length: SpeechLength = processor.speech_length
    return encode_speech(asr.model.encoder, mels, counts, length)


def difference(asr: Any, asr_processor: Any, processors: Any, examples: list[Example], waves: list[Any]) -> Any:
    """Relative differences, and what they are to Whisper's decoder."""
    found: dict[str, list[float]] = {"all": [], "a second apart": [], "float16": []}
    heard: dict[str, list[tuple[list[bool], float, float]]] = {"padded": [], "padded, cut": [], "trimmed": []}
    for example, wave in zip(examples, waves, strict=True):
        n = -(-len(wave) // SAMPLES_PER_FRAME)
        padded, trimmed = (encode(asr, processors[way], [wave])[0] for way in ("pad_to_30s", "trim"))
        pad, trim = padded[:n], trimmed[:n]
        each = ((trim - pad).norm(dim=1) / pad.norm(dim=1)).tolist()
        found["all"] += each
        for part in range(N_PARTS):
            span = each[part * n // N_PARTS : (part + 1) * n // N_PARTS]
            found.setdefault(f"part {part + 1} of {N_PARTS}", []).extend(span)
        for k in LAST:
            found.setdefault(f"frame {k} from the end", []).append(each[-k])
        found["a second apart"] += ((pad[SECOND:] - pad[:-SECOND]).norm(dim=1) / pad[:-SECOND].norm(dim=1)).tolist()
        found["float16"] += ((pad.half().float() - pad).norm(dim=1) / pad.norm(dim=1)).tolist()
        for name, frames in (("padded", padded), ("padded, cut", pad), ("trimmed", trimmed)):
            heard[name].append(hear(asr, asr_processor.tokenizer, frames, example.question))
    table: dict[str, Any] = {
        name: {q: round(float(np.quantile(values, p)), 4) for q, p in (("median", 0.5), ("p95", 0.95))}
        for name, values in found.items()
    }
    for name, rows in heard.items():
        hits = [hit for row in rows for hit in row[0]]
        table[f"decoder, {name}"] = {
            "tokens right, %": round(100 * statistics.fmean(hits), 1),
            "nats per token, median": round(statistics.median(row[1] for row in rows), 3),
            "nats of the end, median": round(statistics.median(row[2] for row in rows), 3),
        }
    return table


@torch.no_grad()
def hear(asr: Any, tokenizer: Any, frames: torch.Tensor, text: str) -> tuple[list[bool], float, float]:
    """Whether each token of `text` is the decoder's first choice after the true ones before it; nats of text, end."""
    config = asr.generation_config
    start = [config.decoder_start_token_id, config.no_timestamps_token_id]
    wanted = torch.tensor([*tokenizer(" " + text, add_special_tokens=False)["input_ids"], config.eos_token_id])
    inputs = torch.tensor([[*start, *wanted[:-1].tolist()]])
    logits = asr(decoder_input_ids=inputs, encoder_outputs=(frames[None],)).logits[0, len(start) - 1 :]
    nats = torch.nn.functional.cross_entropy(logits, wanted, reduction="none")
    return (logits.argmax(1) == wanted)[:-1].tolist(), float(nats[:-1].mean()), float(nats[-1])


def positions(processors: Any, examples: list[Example], waves: list[Any]) -> Any:
    """Speech positions of a query, and tokens of the whole training sequence."""
    table = {}
    for way, processor in processors.items():
        counts = [processor.n_frames(len(wave)) // processor.stack_factor for wave in waves]
        tokens = [
            len(processor.speech_prompt(n)) + len(processor.answer(example.answer))
            for n, example in zip(counts, examples, strict=True)
        ]
        table[way] = {
            "speech positions": {"median": statistics.median(counts), "least": min(counts), "most": max(counts)},
            "tokens of the sequence, mean": round(statistics.fmean(tokens), 1),
        }
    trim, pad = (table[way]["tokens of the sequence, mean"] for way in ("trim", "pad_to_30s"))
    table["share of the sequence saved"] = round(1 - trim / pad, 3)
    return table


def times(asr: Any, processors: Any, waves: list[Any], repeats: int) -> Any:
    """CPU seconds for an utterance, log-mel and encoder."""
    ordered = sorted(waves, key=len)
    groups = [ordered[start : start + BATCH] for start in range(0, len(ordered), BATCH)]
    seconds: dict[str, list[float]] = {way: [] for way in processors}
    for processor in processors.values():
        encode(asr, processor, groups[0])  # warm up
    for _ in range(repeats):
        for way, processor in processors.items():
            started = time.process_time()
            for group in groups:
                encode(asr, processor, group)
            seconds[way].append((time.process_time() - started) / len(waves))
    medians = {way: statistics.median(values) for way, values in seconds.items()}
    return {
        "CPU seconds for an utterance": {way: round(value, 4) for way, value in medians.items()},
        "range": {way: [round(min(values), 4), round(max(values), 4)] for way, values in seconds.items()},
        "padded / trimmed": round(medians["pad_to_30s"] / medians["trim"], 1),
    }


if __name__ == "__main__":
    main()
