"""Write spoken-instruction data with sentence answers, and general text, from files of Alpaca's form.

    python scripts/make_instructions.py alpaca_en_demo.json alpaca_eval_gpt4.json --out data/dose

The files hold a JSON list of `instruction`, `input` (may be missing) and `output`. Written are

    data/dose/train.jsonl, heldout.jsonl   instructions without input of at most 25 words, whose answer begins
                                           with prose; the answer is its first sentences, 40 words at most
    data/dose/general.jsonl                the outputs of all other instructions, in which nothing is trained: of each
                                           the first 90 words, with its lines as they stand

Which instructions are held out is decided by a hash of their words, so that neither the order nor the number of the
rows moves one from one side to the other. A row whose instruction is there twice is taken once.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

INSTRUCTION_WORDS, ANSWER_WORDS, LEAST_WORDS, GENERAL_WORDS = 25, 40, 4, 90
HELDOUT_SHARE = 0.15
SENTENCE_END = re.compile(r"(?<=[.!?])[\"')\]]*\s+(?=[A-Z\"'(])")
PLAIN = str.maketrans({"\u2018": "'", "\u2019": "'", "\u201c": '"', "\u201d": '"', "\u2013": "-", "\u2014": "-"})
SPOKEN = re.compile(r"[A-Za-z0-9 ,.;:!?'\"()%$-]+")  # what a voice can say as it is written


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--out", type=Path, required=True, help="a folder")
    options = parser.parse_args()
    rows = [row for file in options.files for row in read(file)]
    spoken: dict[str, dict[str, str]] = {}
    general: dict[str, str] = {}
    for instruction, given, output in rows:
        key = " ".join(re.findall(r"\w+", instruction.lower()))
        answer = first_sentences(output)
        if key in spoken or f"{key} {given}" in general:
            continue
        if given or len(instruction.split()) > INSTRUCTION_WORDS or not SPOKEN.fullmatch(instruction) or not answer:
            general[f"{key} {given}"] = output.strip()
        else:
            name = hashlib.sha256(key.encode()).hexdigest()
            spoken[key] = {"id": f"instruction-{name[:12]}", "question": instruction, "answer": answer, "hash": name}
    held_out = [row for row in spoken.values() if int(row["hash"][:8], 16) < HELDOUT_SHARE * 2**32]
    trained = [row for row in spoken.values() if row not in held_out]
    options.out.mkdir(parents=True, exist_ok=True)
    for name, part in (("train", trained), ("heldout", held_out)):
        write(options.out / f"{name}.jsonl", ({k: v for k, v in row.items() if k != "hash"} for row in part))
    texts = [text for text in general.values() if len(text.split()) >= ANSWER_WORDS]
    write(options.out / "general.jsonl", ({"text": beginning(text)} for text in texts))
    print(f"{len(trained)} to train on, {len(held_out)} held out, {len(texts)} general texts in {options.out}")


def read(file: Path) -> Iterator[tuple[str, str, str]]:
    rows: list[Mapping[str, Any]] = json.loads(file.read_text(encoding="utf-8"))
    for row in rows:
        instruction = " ".join(str(row["instruction"]).translate(PLAIN).split())
        yield instruction, str(row.get("input") or "").strip(), str(row["output"])


def first_sentences(output: str) -> str | None:
    """The first whole sentences of an answer that begins with prose; None of one that does not, as a list.

    What ends in a colon introduces such a list and is left out.
    """
    paragraph = " ".join(output.strip().split("\n")[0].translate(PLAIN).split())
    if re.match(r"[\d*#|`-]", paragraph):
        return None
    kept = ""
    for sentence in SENTENCE_END.split(paragraph):
        longer = f"{kept} {sentence}".strip()
        if sentence[-1:] not in (".", "!", "?", '"', ")") or len(longer.split()) > ANSWER_WORDS:
            break
        kept = longer
    return kept if len(kept.split()) >= LEAST_WORDS else None


def beginning(text: str) -> str:
    """Its first words, and what stands between them."""
    words = list(re.finditer(r"\S+", text))[:GENERAL_WORDS]
    return text[: words[-1].end()]


def write(file: Path, rows: Iterator[dict[str, str]]) -> None:
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


if __name__ == "__main__":
    main()
