"""Tables in parquet files, on this machine or on the hub: read row group by row group, recordings only where wanted.

Audio is the hub's Audio feature: a struct of `bytes` and `path`, plain bytes, or a path relative to the file. The bytes
are passed on as they are; nothing here decodes them.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from palimpsest.data.rows import Row, Table, find_columns
from palimpsest.files import UserError

BATCH_ROWS = 32  # rows in memory at a time, with their recordings
BUFFER = 4 << 20  # bytes read ahead in each column: no whole row group is held, and a hub request is worth its delay


@dataclass(frozen=True)
class Schema:
    """The columns of a kind of table: our names → accepted spellings in lower case, and how a row is read from them."""

    required: Mapping[str, Sequence[str]]
    read: Callable[[Mapping[str, Any]], dict[str, Any]]  # cells by our names → fields of Row
    optional: Mapping[str, Sequence[str]] = field(default_factory=dict)
    audio: Sequence[str] = ("audio",)
    audio_is_required: bool = False


def parquet_table(
    name: str,
    where: str,
    schema: Schema,
    files: Callable[[], Sequence[str]],
    *,
    identity: Any,
    count: Callable[[], int | None],
) -> Table:
    """A table over parquet files; `files` gives their paths or URLs and is called at the first read."""

    def read(start: int, only: Collection[int] | None, audio: bool) -> Iterator[Row]:
        first = 0  # position of the file's first row
        for url in files():
            file = _open(url)
            columns = _columns(file.schema_arrow.names, schema, f"{where} ({url.rsplit('/', 1)[-1]})")
            chosen = [column for key, column in columns.items() if audio or key != "audio"]
            for group in range(file.num_row_groups):
                last = first + file.metadata.row_group(group).num_rows
                wanted = (
                    range(max(start, first), last) if only is None else [i for i in range(first, last) if i in only]
                )
                if wanted and wanted[-1] >= start:
                    batches = file.iter_batches(BATCH_ROWS, row_groups=[group], columns=chosen)
                    yield from _rows(_told(batches, url), first, start, only, columns, schema, where, url)
                first = last

    return Table(name, where, read, identity, count)


def _columns(present: Sequence[str], schema: Schema, where: str) -> dict[str, str]:
    audio = {"audio": schema.audio}
    if schema.audio_is_required:
        return find_columns(present, {**schema.required, **audio}, schema.optional, where)
    return find_columns(present, schema.required, {**schema.optional, **audio}, where)


def _rows(
    batches: Iterator[Any],
    first: int,
    start: int,
    only: Collection[int] | None,
    columns: Mapping[str, str],
    schema: Schema,
    where: str,
    url: str,
) -> Iterator[Row]:
    position = first
    for batch in batches:
        cells = {key: batch.column(column) for key, column in columns.items() if column in batch.schema.names}
        for i in range(batch.num_rows):
            if position >= start and (only is None or position in only):
                values = {key: column[i].as_py() for key, column in cells.items()}
                audio = _recording(values.pop("audio", None), url)
                yield Row(position, f"{where}, row {position + 1}", audio=audio, **schema.read(values))
            position += 1


def _told(batches: Iterator[Any], url: str) -> Iterator[Any]:
    """The batches; a file that breaks off or a connection that is lost becomes a UserError."""
    import pyarrow as pa
    from huggingface_hub.errors import HfHubHTTPError

    http_error: Any = HfHubHTTPError.__bases__[0]  # of the HTTP package in use, whose name changes between versions
    try:
        yield from batches
    except (OSError, pa.ArrowException, http_error) as error:
        raise UserError(
            f"{url} cannot be read to its end ({_first_line(error)}); check the connection and start again, "
            "or download it again."
        ) from error


def _recording(cell: Any, url: str) -> bytes | Path | None:
    if isinstance(cell, dict):
        cell = cell.get("bytes") or cell.get("path")
    if isinstance(cell, str):
        return Path(url).parent / cell if cell else None
    return bytes(cell) if cell else None


def _open(url: str) -> Any:
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


# ------------------------------------------------------------------------------------------------------------
# Which files
# ------------------------------------------------------------------------------------------------------------
def local_files(path: Path, split: str) -> list[str]:
    """A file is one split, whatever its name; in a folder the hub's rules say which files are which split.

    (`train-00000-of-00002.parquet`, `data/train/…`, `validation.parquet`; a folder without such names is "train".)
    """
    if path.is_file():
        return [str(path)]
    if not any(path.rglob("*.parquet")):
        raise UserError(f"{path} {'holds no parquet file' if path.is_dir() else 'does not exist'}; check the path.")
    return _of_split(_load_builder("parquet", data_dir=str(path)), split, str(path))


def local_count(files: Sequence[str]) -> int:
    return sum(_open(file).metadata.num_rows for file in files)


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


def local_identity(files: Sequence[str]) -> list[list[Any]]:
    """Names, sizes and times of change: hashing hundreds of gigabytes at every start would take longer than reading."""
    return [[Path(file).name, Path(file).stat().st_size, Path(file).stat().st_mtime_ns] for file in files]
