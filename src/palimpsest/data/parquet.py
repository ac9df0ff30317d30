"""Tables in parquet files, one's own and published sets, on this machine or on the hub: row group by row group.

The bytes of a recording are passed on as they are, and read only where wanted; nothing here decodes them. SCHEMAS says
which columns a published set has; a hub name may end in @REVISION.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from palimpsest.data.filters import without_speaker_tag
from palimpsest.data.rows import (
    REQUIRED,
    TABLE,
    Read,
    Row,
    Schema,
    Table,
    instruction_fields,
    label,
    named,
    own_fields,
    text,
)
from palimpsest.files import UserError

BATCH_ROWS = 32  # rows in memory at a time, with their recordings
BUFFER = 4 << 20  # bytes read ahead in each column: no whole row group is held, and a hub request is worth its delay


def _voice_assistant(cells: Mapping[str, Any]) -> dict[str, Any]:
    """One turn of a conversation; only the first stands by itself."""
    answer = text(cells["answer"])
    return {
        "question": without_speaker_tag(text(cells["question"], "question")),
        "answers": (answer,) if answer else (),
        "answer": answer,
        "later_turn": text(cells["round"], "round") != "1",
        "kind": label(cells.get("split_name")) or None,
    }


# The target is the first gold string.
QUESTION_SET = Schema({**REQUIRED, "audio": ("audio", "question_audio")}, {}, own_fields)
SCHEMAS = {
    "voice_assistant": Schema(
        {**named("round", "question", "answer"), "audio": ("question_audio", "audio")},
        named("split_name"),
        _voice_assistant,
    ),
    "spoken_alpaca": Schema(
        {**named("instruction", "output"), "audio": ("input_audio", "audio")},
        named("input", "speech_input", "input_speaker"),
        instruction_fields,
    ),
    "llama_questions": QUESTION_SET,
    "spoken_web_questions": QUESTION_SET,
    "table": TABLE,
}
HUB = {
    "gpt-omni/VoiceAssistant-400K": "voice_assistant",
    "GSQA/spoken-alpaca-gpt4": "spoken_alpaca",
    "fixie-ai/llama-questions": "llama_questions",
    "chiyuanhsiao/spoken-web-questions": "spoken_web_questions",
    "fixie-ai/spoken-web-questions": "spoken_web_questions",
}


def hub_table(source: str, split: str) -> Table | None:
    """The table of a hub name, None for what is none; the hub is asked only when rows are read."""
    name, _, revision = source.partition("@")
    if name not in HUB:
        return None
    kind, where = HUB[name], f"{source}, split {split}"
    answer = cache(lambda: hub_files(name, revision or None, split))  # the hub is asked once
    read = _reader(SCHEMAS[kind], where, lambda: answer()[0])
    return Table(kind, where, read, ["hub", name, revision, split], lambda: answer()[1])


def local_table(kind: str, path: Path, split: str) -> Table:
    """A table of one's own or a local copy, one file or a folder. Raises UserError for a path or split that is not
    there."""
    files = local_files(path, split)
    # Names, sizes and times of change: hashing hundreds of gigabytes at every start would take longer than reading.
    identity: Any = [[Path(file).name, Path(file).stat().st_size, Path(file).stat().st_mtime_ns] for file in files]
    if _names_recordings(SCHEMAS[kind], files[0]):
        identity = None  # the recordings lie beside the table and may change without it: looked at as a manifest's are
    read = _reader(SCHEMAS[kind], str(path), lambda: files)
    return Table(kind, str(path), read, identity, lambda: sum(open_parquet(file).metadata.num_rows for file in files))


def _names_recordings(schema: Schema, url: str) -> bool:
    """Whether a table, by its first file, has paths of recordings, as strings, instead of these."""
    arrow = open_parquet(url).schema_arrow
    try:
        return _has_paths(arrow, schema.columns(arrow.names, url).get("audio"))
    except UserError:  # said with its place when rows are read
        return False


def _has_paths(arrow: Any, column: str | None) -> bool:
    import pyarrow as pa

    kind = None if column is None else arrow.field(column).type
    if kind is not None and pa.types.is_dictionary(kind):
        kind = kind.value_type
    return kind is not None and (
        pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)
    )


def _reader(schema: Schema, where: str, files: Callable[[], Sequence[str]]) -> Read:
    """`read` of a Table over parquet files; `files` gives their paths or URLs and is called at the first read."""

    def read(start: int, only: Collection[int] | None, audio: bool) -> Iterator[Row]:
        def wanted(position: int) -> bool:
            return position >= start and (only is None or position in only)

        first = 0  # position of the row group's first row
        for url in files():
            file = open_parquet(url)
            columns = schema.columns(file.schema_arrow.names, f"{where} ({url.rsplit('/', 1)[-1]})")
            beside = "://" not in url and _has_paths(file.schema_arrow, columns.get("audio"))
            if not audio and not beside:  # paths are no recordings yet
                columns.pop("audio", None)
            for group in range(file.num_row_groups):
                positions = range(first, first + file.metadata.row_group(group).num_rows)
                first = positions.stop
                chosen = [position - positions.start for position in positions if wanted(position)]
                for n, cells in _cells(file, group, columns, url, chosen) if chosen else ():
                    position, values = positions[n], {key: _python(cell) for key, cell in cells.items()}
                    yield schema.row(position, f"{where}, row {position + 1}", values, Path(url).parent)

    return read


def _python(cell: Any) -> Any:
    """The value of an Arrow scalar; a number of few digits keeps them: 0.1 of 32 bits is not 0.10000000149."""
    import pyarrow as pa

    value = cell.as_py()
    narrow = pa.types.is_float32(cell.type) or pa.types.is_float16(cell.type)
    return float(str(cell.type.to_pandas_dtype()(value))) if narrow and value is not None else value


def _cells(
    file: Any, group: int, columns: Mapping[str, str], url: str, chosen: Sequence[int]
) -> Iterator[tuple[int, dict[str, Any]]]:
    """(number in the group, cells) of the chosen rows of a group, which is not read beyond the last of them.

    A file that breaks off or a connection that is lost becomes a UserError.
    """
    import pyarrow as pa
    from huggingface_hub.errors import HfHubHTTPError

    http_error: Any = HfHubHTTPError.__bases__[0]  # of the HTTP package in use, whose name changes between versions
    try:
        first, waiting = 0, deque(chosen)
        for batch in file.iter_batches(BATCH_ROWS, row_groups=[group], columns=[*columns.values()]):
            arrays = {key: batch.column(column) for key, column in columns.items()}
            end = first + batch.num_rows
            while waiting and waiting[0] < end:
                n = waiting.popleft()
                yield n, {key: array[n - first] for key, array in arrays.items()}
            first = end
            if not waiting:
                return
    except (OSError, pa.ArrowException, http_error) as error:
        raise UserError(
            f"{url} cannot be read to its end ({_first_line(error)}); check the connection and start again, "
            "or download it again."
        ) from error


def open_parquet(url: str) -> Any:
    try:
        import fsspec
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise no_datasets() from error
    try:
        filesystem, path = fsspec.core.url_to_fs(url)
        # cache_type "none": the parquet reader asks for exactly the ranges it needs
        handle = filesystem.open(path, "rb") if "://" not in url else filesystem.open(path, "rb", cache_type="none")
        return pq.ParquetFile(handle, pre_buffer=False, buffer_size=BUFFER)
    except (OSError, pa.ArrowInvalid) as error:
        raise UserError(f"{url} cannot be read as parquet ({_first_line(error)}); download it again.") from error


def no_datasets() -> UserError:
    return UserError(
        "Reading parquet and hub data needs the package datasets; run `pip install 'palimpsest-llm[hub]'`."
    )


def local_files(path: Path, split: str) -> list[str]:
    """A file is one split, whatever its name; in a folder the hub's rules say which files are which split.

    (`train-00000-of-00002.parquet`, `data/train/…`, `validation.parquet`; a folder without such names is "train".)
    """
    if path.is_file():
        return [str(path)]
    if not any(path.rglob("*.parquet")):
        raise UserError(f"{path} {'holds no parquet file' if path.is_dir() else 'does not exist'}; check the path.")
    return _of_split(_load_builder("parquet", data_dir=str(path)), split, str(path))


def hub_files(name: str, revision: str | None, split: str) -> tuple[list[str], int | None]:
    """URLs of a hub data set's parquet files, and its number of rows where its card says it; asks the hub."""
    builder = _load_builder(name, revision=revision)
    if builder.name != "parquet":
        raise UserError(
            f"{name} is stored as {builder.name}, not as parquet; give its converted files: "
            f"{name}@refs/convert/parquet."
        )
    files = _of_split(builder, split, name)
    card = (builder.info.splits or {}).get(split)
    return files, card.num_examples if card else None


def _load_builder(name: str, **options: Any) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise no_datasets() from error
    try:
        return datasets.load_dataset_builder(name, **options)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        where = options.get("data_dir", name)
        raise UserError(
            f"The data set {where} cannot be opened ({_first_line(error)}); check its name, your connection and, for a "
            "gated set, `hf auth login`, or give a local copy."
        ) from error


def _of_split(builder: Any, split: str, where: str) -> list[str]:
    files = builder.config.data_files or {}
    if split not in files:
        raise UserError(f"{where} has no split {split!r}; it has: {', '.join(map(str, files)) or 'none'}.")
    return [str(file) for file in files[split]]


def _first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).split("\n")[0].rstrip(".")[:200]
