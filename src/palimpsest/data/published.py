"""Published spoken data sets in their own columns, from the hub or from local parquet files.

| prefix | on the hub | columns that are read |
|---|---|---|
| `voice_assistant` | gpt-omni/VoiceAssistant-400K | round, question, answer, question_audio; split_name |
| `spoken_alpaca` | GSQA/spoken-alpaca-gpt4 | instruction, output, input_audio; input, speech_input, input_speaker |
| `llama_questions` | fixie-ai/llama-questions | question, answer, audio |
| `spoken_web_questions` | chiyuanhsiao/ and fixie-ai/spoken-web-questions | question, answers, audio |

Columns after the semicolon may be absent. A hub name may end in @REVISION.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from palimpsest.data.filters import without_speaker_tag
from palimpsest.data.parquet import Schema, hub_files, local_count, local_files, local_identity, parquet_table
from palimpsest.data.rows import Table, text, texts

HUB = {
    "gpt-omni/VoiceAssistant-400K": "voice_assistant",
    "GSQA/spoken-alpaca-gpt4": "spoken_alpaca",
    "fixie-ai/llama-questions": "llama_questions",
    "chiyuanhsiao/spoken-web-questions": "spoken_web_questions",
    "fixie-ai/spoken-web-questions": "spoken_web_questions",
}


def _voice_assistant(cells: Mapping[str, Any]) -> dict[str, Any]:
    """One turn of a conversation; only the first stands by itself."""
    return {
        "question": without_speaker_tag(text(cells["question"])),
        "answers": texts(cells["answer"]),
        "answer": text(cells["answer"]),
        "later_turn": text(cells["round"]) != "1",
        "kind": text(cells.get("split_name")) or None,
    }


def _spoken_alpaca(cells: Mapping[str, Any]) -> dict[str, Any]:
    """The question is what was spoken: `speech_input` where it is filled, else instruction and input."""
    return {
        "question": text(cells.get("speech_input")) or joined(cells["instruction"], cells.get("input")),
        "answers": texts(cells["output"]),
        "answer": text(cells["output"]),
        "voice": text(cells.get("input_speaker")) or None,
    }


def _question_set(cells: Mapping[str, Any]) -> dict[str, Any]:
    """Gold strings; the target sentence is the first of them."""
    golds = texts(cells["answers"])
    return {"question": text(cells["question"]), "answers": golds, "answer": golds[0] if golds else ""}


def joined(instruction: Any, context: Any) -> str:
    """An instruction and the input it speaks about, on a line of its own."""
    return "\n".join(part for part in (text(instruction), text(context)) if part)


QUESTION_SET = Schema(
    required={"question": ("question", "questions"), "answers": ("answers", "answer")},
    read=_question_set,
    audio=("audio", "question_audio"),
    audio_is_required=True,
)
SCHEMAS = {
    "voice_assistant": Schema(
        required={"round": ("round",), "question": ("question",), "answer": ("answer",)},
        read=_voice_assistant,
        optional={"split_name": ("split_name",)},
        audio=("question_audio", "audio"),
        audio_is_required=True,
    ),
    "spoken_alpaca": Schema(
        required={"instruction": ("instruction",), "output": ("output",)},
        read=_spoken_alpaca,
        optional={"input": ("input",), "speech_input": ("speech_input",), "input_speaker": ("input_speaker",)},
        audio=("input_audio", "audio"),
        audio_is_required=True,
    ),
    "llama_questions": QUESTION_SET,
    "spoken_web_questions": QUESTION_SET,
}


def hub_table(source: str, split: str) -> Table | None:
    """The table of a hub name, None for what is none; the hub is asked only when rows are read."""
    name, _, revision = source.partition("@")
    if name not in HUB:
        return None
    prefix = HUB[name]
    found: list[tuple[list[str], int | None]] = []  # the hub is asked once

    def answer() -> tuple[list[str], int | None]:
        if not found:
            found.append(hub_files(name, revision or None, split))
        return found[0]

    return parquet_table(
        prefix,
        f"{source}, split {split}",
        SCHEMAS[prefix],
        lambda: answer()[0],
        identity=["hub", name, revision, split],
        count=lambda: answer()[1],
    )


def local_table(prefix: str, path: Path, split: str) -> Table:
    """A local copy, one file or a folder. Raises UserError for a path or split that is not there."""
    files = local_files(path, split)
    identity, count = local_identity(files), lambda: local_count(files)
    return parquet_table(prefix, str(path), SCHEMAS[prefix], lambda: files, identity=identity, count=count)
