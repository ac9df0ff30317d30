"""What a second process brings where all divide the work: two of one thread each over one of one thread.

    python benchmarks/ranks.py                                    # SmolLM2-135M, Whisper tiny.en, facts, 3 repeats
    python benchmarks/ranks.py --repeats 1 --questions 32         # briefly
    python benchmarks/ranks.py --clock cpu                        # on a busy machine

Answers (as text), encoder frames (recordings padded to 30 s) and deactivation, as the steps of a study make them. All
three processes have loaded their models before a clock runs. Each repeat lets the one work, then the two, while the
others wait, into an empty folder; the time is that from the order to the last of the replies, and the ratio is that of
the medians. It needs two free cores. With `--clock cpu` the time is the CPU time of the one, or of the busier of the
two: how the work is divided and what that costs, without the waiting of one for the other. The ranking of the
deactivation is that of the weights' magnitudes: which weights are set to zero takes no other time.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

GOAL = 1.8
ONE_THREAD = {f"{library}_NUM_THREADS": "1" for library in ("OMP", "MKL", "OPENBLAS")}
WORK = ("answers", "features", "deactivation")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="embedded:smollm2-135m-instruct")
    parser.add_argument("--encoder", default="embedded:whisper-tiny.en")
    parser.add_argument("--questions", type=int, default=64)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--max-new-tokens", type=int, default=32)
    parser.add_argument("--random-seeds", type=int, default=3, help="masks, beside top, bottom and none")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall")
    parser.add_argument("--only", nargs="+", choices=WORK, default=list(WORK))
    parser.add_argument("--audio", help=argparse.SUPPRESS)  # of a worker
    options = parser.parse_args()
    if options.audio:
        serve(options)
        return

    from palimpsest.data.speech import speak
    from palimpsest.rundir import cpu_name

    with tempfile.TemporaryDirectory() as folder:
        options.audio = folder
        speak(examples_of(options), Path(folder))
        alone, together = start(options, world=1), start(options, world=2)
        print(f"{cpu_name()}, {len(os.sched_getaffinity(0))} cores, load {os.getloadavg()[0]:.1f}; "
              f"Python {platform.python_version()}, torch {version('torch')}, transformers {version('transformers')}, "
              f"float32, {options.repeats} repeats, {options.clock} time")  # fmt: skip
        print(f"{'':14} {'one, s':>8} {'two, s':>8} {'ratio':>7}  {'repeats':14} the same")
        for what in options.only:
            print_work(what, alone, together, Path(folder), options)
        for process in (*alone, *together):
            process.communicate()


def print_work(what: str, alone: list[Any], together: list[Any], folder: Path, options: argparse.Namespace) -> None:
    one, two, same = [], [], True
    for i in range(options.repeats):
        seconds, made = order(alone, what, folder / f"{what}-{i}-one", options.clock)
        one.append(seconds)
        seconds, again = order(together, what, folder / f"{what}-{i}-two", options.clock)
        two.append(seconds)
        same = same and made == again
    ratio = statistics.median(one) / statistics.median(two)
    each = [a / b for a, b in zip(one, two, strict=True)]
    verdict = f"{'yes' if same else 'NO'}{'' if ratio >= GOAL else f'; the ratio is below {GOAL}'}"
    print(f"{what:14} {statistics.median(one):8.2f} {statistics.median(two):8.2f} {ratio:6.2f}×  "
          f"{min(each):.2f} to {max(each):.2f}   {verdict}")  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# Processes
# ---------------------------------------------------------------------------------------------------------------------
def start(options: argparse.Namespace, world: int) -> list[Any]:
    """`world` processes that have joined and loaded their models; each takes orders, a line each."""
    from torch.distributed import TCPStore

    store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    given = [f"--{key.replace('_', '-')}={value}" for key, value in vars(options).items() if key != "only"]
    processes = []
    for rank in range(world):
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "MASTER_PORT": store.port}
        environment = {**os.environ, **ONE_THREAD, **{key: str(value) for key, value in place.items()}}
        environment |= {"MASTER_ADDR": "localhost", "TORCHELASTIC_USE_AGENT_STORE": "True", "CUDA_VISIBLE_DEVICES": ""}
        process: Any = subprocess.Popen(
            [sys.executable, __file__, *given],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        process.store = store  # as long as the process
        processes.append(process)
    for process in processes:
        process.stdout.readline()
    return processes


def order(processes: list[Any], what: str, folder: Path, clock: str) -> tuple[float, Any]:
    """Seconds until all are done, or of the one that computes longest, and what rank 0 made."""
    begin = time.perf_counter()
    for process in processes:
        print(json.dumps([what, str(folder)]), file=process.stdin, flush=True)
    replies = [json.loads(process.stdout.readline()) for process in processes]
    wall = time.perf_counter() - begin
    return wall if clock == "wall" else max(seconds for seconds, _ in replies), replies[0][1]


def serve(options: argparse.Namespace) -> None:
    import torch

    from palimpsest.parallel import joined

    torch.set_num_threads(1)
    with joined():
        work = load(options)
        print("ready", flush=True)
        for line in sys.stdin:
            what, folder = json.loads(line)
            begin = time.process_time()
            made = work[what](Path(folder))
            print(json.dumps([time.process_time() - begin, made]), flush=True)


# ---------------------------------------------------------------------------------------------------------------------
# Work
# ---------------------------------------------------------------------------------------------------------------------
def examples_of(options: argparse.Namespace) -> list[Any]:
    from palimpsest.data.sources import load_examples

    return load_examples("facts", "heldout", options.questions)


def load(options: argparse.Namespace) -> dict[str, Callable[[Path], Any]]:
    """Work by its name; each does it into a folder and returns JSON by which it can be compared."""
    from palimpsest.data.collate import Collator, batches
    from palimpsest.data.features import compute_features
    from palimpsest.data.speech import speak
    from palimpsest.evaluation.answers import answer_questions, text_answerer
    from palimpsest.evaluation.deactivation import deletion_curve
    from palimpsest.evaluation.tasks import Task
    from palimpsest.files import hash_file
    from palimpsest.models.anatomy import scored_parameters
    from palimpsest.models.loading import load_encoder, load_language_model
    from palimpsest.models.processor import SpeechLMProcessor

    language_model, tokenizer = load_language_model(options.model)
    encoder, extractor = load_encoder(options.encoder)
    processor = SpeechLMProcessor(tokenizer, extractor, speech_length="pad_to_30s")
    examples = speak(examples_of(options), Path(options.audio))  # spoken before: found
    magnitudes = {name: weight.detach().abs() for name, weight in scored_parameters(language_model).items()}
    language_model.eval()

    def answers(folder: Path) -> list[str]:
        task, limit = Task("facts", tuple(examples)), options.max_new_tokens
        rows = answer_questions(
            text_answerer(language_model, tokenizer, limit),
            task,
            "text",
            model="model",
            out=folder / "samples.jsonl",
            max_new_tokens=limit,
            batch_size=options.batch_size,
            distributed=True,
        )
        return [row["response"] for row in rows]

    def features(folder: Path) -> list[str]:
        compute_features(encoder, processor, examples, folder, distributed=True)
        return sorted(hash_file(path) for path in folder.rglob("*.safetensors") if not path.name.startswith("."))

    def deactivation(_: Path) -> list[Any]:
        made = partial(batches, Collator(processor, "text"), examples, options.batch_size)
        records = deletion_curve(
            "base",
            language_model,
            magnitudes,
            {"text": made},
            ratios=(0.03,),
            random_seeds=range(options.random_seeds),
            reduction="magnitude",
            distributed=True,
        )
        return [dict(record) for record in records]

    return {"answers": answers, "features": features, "deactivation": deactivation}


if __name__ == "__main__":
    main()
