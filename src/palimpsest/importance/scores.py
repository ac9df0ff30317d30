"""Importance scores: one non-negative float32 tensor per reduction and parameter, in memory or on disk.

On disk, a folder:

    scores.json               metadata, and the size and sha256 of every other file; written last
    signed_sum-00000.safetensors …   tensors of one reduction, canonical parameter names
    batches.npz               per batch: Σ_j |θ_j · g_bj| of each parameter, number of supervised tokens

Of a reduction whose tensors are not kept (`Scores.keeping`) scores.json has the sums over each parameter.
Opening a folder reads scores.json and the small npz; tensors are memory-mapped and loaded one at a time.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NotRequired

import numpy as np
import torch
from annotated_types import Predicate
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from typing_extensions import TypedDict

from palimpsest.files import UserError, hash_file, hash_value, read_json, replacing, write_json
from palimpsest.importance.reduce import REDUCTIONS
from palimpsest.models.anatomy import scored_parameters
from palimpsest.parallel import is_sharded, reshard, whole

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor, nn

SCHEMA = 1
SCORES_FILE = "scores.json"
BATCHES_FILE = "batches.npz"
SHARD_BYTES = 4 << 30  # a reduction's tensors are spread over files of about this size


class _File(TypedDict):
    file: Annotated[str, Predicate(lambda name: Path(name).name == name)]
    bytes: int
    sha256: str


class _Parameter(TypedDict):
    name: str
    shape: list[int]
    dtype: str
    sha256: str


class _Metadata(TypedDict):
    parameters: list[_Parameter]


class _Stored(TypedDict):
    """What of SCORES_FILE is relied on."""

    schema: int
    metadata: _Metadata
    files: dict[str, list[_File]]
    batches: _File
    sums: NotRequired[dict[str, list[float]]]


class Scores:
    """The scores of one model on one data set, by one or several reductions.

    metadata: what `estimate_importance` recorded; "parameters" has name, shape, dtype and sha256 of each.
    batch_totals: float64 (n_batches, n_parameters), Σ_j |θ_j · g_bj| per batch and parameter, columns in the
        order of `names`, not divided by tokens: enough to bootstrap layer totals over batches.
    batch_tokens: int64 (n_batches,), supervised tokens of each batch.
    sums: reduction → the sum of the scores of each parameter in the order of `names`, of reductions whose tensors are
        not here.
    """

    def __init__(
        self,
        metadata: dict[str, Any],
        tensors: Mapping[str, Mapping[str, Tensor]],
        batch_totals: NDArray[np.float64],
        batch_tokens: NDArray[np.int64],
        origin: str = "these scores",
        sums: Mapping[str, Sequence[float]] | None = None,
    ) -> None:
        self.metadata = metadata
        self.sums = dict(sums or {})
        self.batch_totals = batch_totals
        self.batch_tokens = batch_tokens
        self._tensors = tensors
        self._origin = origin  # for error messages

    @property
    def reductions(self) -> tuple[str, ...]:
        """Those with a score for every weight."""
        return tuple(self._tensors)

    @property
    def estimated(self) -> tuple[str, ...]:
        """Those of which at least the sum over each parameter is known, in the order they were asked for."""
        known = dict.fromkeys((*self._tensors, *self.sums))
        return tuple(name for name in self.metadata.get("reductions", known) if name in known)

    @property
    def names(self) -> tuple[str, ...]:
        """Canonical names of the scored parameters, in model order: the order that breaks ties."""
        return tuple(parameter["name"] for parameter in self.metadata["parameters"])

    def tensors(self, reduction: str) -> Mapping[str, Tensor]:
        """Name → float32 tensor in the parameter's shape, in model order; from disk, loaded when accessed."""
        if reduction not in self._tensors:
            only = ", ".join(self.reductions) or "sums over parameters"
            raise UserError(
                f"{self._origin} have no reduction {reduction!r}, only {only}; "
                f"choose one of them or estimate the importance again with {reduction!r}."
            )
        return self._tensors[reduction]

    def keeping(self, reductions: Collection[str]) -> Scores:
        """These scores with the tensors of some reductions only, and the float64 sums over parameters of the others."""
        kept = {name: tensors for name, tensors in self._tensors.items() if name in reductions}
        sums = {
            name: [float(tensors[key].cpu().numpy().sum(dtype=np.float64)) for key in self.names]
            for name, tensors in self._tensors.items()
            if name not in reductions
        }
        return Scores(
            self.metadata, kept, self.batch_totals, self.batch_tokens, self._origin, sums={**self.sums, **sums}
        )

    def with_batch_sums(self) -> Scores:
        """With the sums of per_batch_abs over parameters, if that was not estimated, from the totals of the batches.

        Σ_b Σ_j |θ_j · g_bj| is both; only where it was rounded to float32 differs.
        """
        name = "per_batch_abs"
        if name in self.estimated:
            return self
        sums = (self.batch_totals.sum(0) / self.batch_tokens.sum()).tolist()
        reductions = {**self.metadata["reductions"], name: REDUCTIONS[name].formula}
        metadata = {**self.metadata, "reductions": reductions}
        return Scores(
            metadata, self._tensors, self.batch_totals, self.batch_tokens, self._origin, sums={**self.sums, name: sums}
        )

    def save(self, folder: Path, shard_bytes: int = SHARD_BYTES) -> None:
        """Write the folder: each file under a temporary name first, scores.json last, so never half of it."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / SCORES_FILE).unlink(missing_ok=True)  # from here on the folder does not count as scores
        files: dict[str, list[dict[str, Any]]] = {}
        for reduction, tensors in self._tensors.items():
            files[reduction] = []
            for number, names in enumerate(_shards(self.metadata["parameters"], shard_bytes)):
                path = folder / f"{reduction}-{number:05d}.safetensors"
                with replacing(path) as temporary:
                    save_file({name: tensors[name].cpu().contiguous() for name in names}, temporary)
                files[reduction].append(_describe_file(path))
        with replacing(folder / BATCHES_FILE) as temporary, temporary.open("wb") as file:
            np.savez(file, totals=self.batch_totals, tokens=self.batch_tokens)
        batches = _describe_file(folder / BATCHES_FILE)
        record = {"schema": SCHEMA, "metadata": self.metadata, "files": files, "batches": batches}
        write_json(folder / SCORES_FILE, {**record, "sums": self.sums} if self.sums else record)

    @classmethod
    def open(cls, folder: Path, verify: bool = False) -> Scores:
        """Open a saved folder. Sizes and tensor names are always checked, checksums if `verify`.

        Raises UserError if a file is missing, cut short or (with `verify`) changed.
        """
        from palimpsest.options import require_shape

        folder = Path(folder)
        record = read_json(folder / SCORES_FILE)
        if isinstance(record, dict) and record.get("schema", SCHEMA) != SCHEMA:
            raise UserError(
                f"{folder / SCORES_FILE} has schema {record['schema']}, this version reads {SCHEMA}; "
                "estimate the importance again."
            )
        require_shape(record, _Stored, str(folder / SCORES_FILE), "estimate the importance again")
        for entry in itertools.chain(*record["files"].values()):
            _check_file(folder / entry["file"], entry, verify)
        _check_file(folder / BATCHES_FILE, record["batches"], verify=True)
        names = [parameter["name"] for parameter in record["metadata"]["parameters"]]
        tensors = {
            reduction: _StoredTensors([folder / entry["file"] for entry in entries], names)
            for reduction, entries in record["files"].items()
        }
        with np.load(folder / BATCHES_FILE) as batches:
            totals, tokens = batches["totals"], batches["tokens"]
        sums = record.get("sums", {})
        return cls(record["metadata"], tensors, totals, tokens, origin=f"the scores in {folder}", sums=sums)

    def check_model(self, model: nn.Module, parameters: Mapping[str, nn.Parameter] | None = None) -> None:
        """Raise UserError naming the first difference if these weights are not those that were scored.

        Compares names, then shapes, then dtype and sha256 of each weight (about a second per 1.5 GB). Weights sharded
        by fully_shard are gathered one at a time; every rank must call.
        """
        reshard(model)
        here = dict(scored_parameters(model) if parameters is None else parameters)
        there = {parameter["name"]: parameter for parameter in self.metadata["parameters"]}

        def differences() -> Iterator[str]:
            yield from (f"{name} was scored, this model does not have it" for name in there if name not in here)
            yield from (f"{name} of this model was not scored" for name in here if name not in there)
            for name, record in there.items():
                shapes = tuple(record["shape"]), tuple(here[name].shape)
                if shapes[0] != shapes[1]:
                    yield f"{name} has shape {shapes[0]} when scored, {shapes[1]} now"
            for name, record in there.items():
                if record["dtype"] != _dtype_name(here[name]) or record["sha256"] != _digest(here[name]):
                    yield f"the weights of {name} differ"

        for what in differences():
            raise UserError(
                f"{self._origin[0].upper()}{self._origin[1:]} belong to another model: {what}; "
                "estimate the importance of this model, or load the model that was scored."
            )


def describe_parameters(parameters: Mapping[str, Tensor]) -> list[dict[str, Any]]:
    """Name, shape, dtype and sha256 of the bytes of each parameter, as stored in the metadata.

    Parameters sharded by fully_shard are gathered one at a time; every rank must call, with the same names.
    """
    if any(map(is_sharded, parameters.values())):  # in one thread: all ranks must gather in the same order
        return list(
            itertools.chain.from_iterable(describe_parameters({n: whole(p.detach())}) for n, p in parameters.items())
        )
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:  # hashing releases the interpreter lock
        digests = pool.map(_digest, parameters.values())
        return [
            {"name": name, "shape": list(p.shape), "dtype": _dtype_name(p), "sha256": digest}
            for (name, p), digest in zip(parameters.items(), digests, strict=True)
        ]


def model_digest(model: nn.Module) -> str:
    """SHA-256 over names, shapes, dtypes and bytes of the scored parameters; sharded: every rank must call."""
    reshard(model)
    return hash_value(describe_parameters(scored_parameters(model)))


class _StoredTensors(Mapping[str, "Tensor"]):
    """The tensors of one reduction in their files, memory-mapped; iterates in model order.

    A file is mapped anew for each tensor, and as long as the tensor lives: pages of tensors that are no longer
    used would otherwise stay resident, and going through all of them would fill the memory.
    """

    def __init__(self, paths: list[Path], names: list[str]) -> None:
        self._path: dict[str, Path] = {}
        for path in paths:
            try:
                with safe_open(path, framework="pt") as file:
                    self._path.update(dict.fromkeys(file.keys(), path))
            except SafetensorError as error:
                raise UserError(f"{path} is damaged ({error}); estimate the importance again.") from error
        if set(self._path) != set(names):
            raise UserError(
                f"{paths[0].parent} does not hold the tensors its {SCORES_FILE} lists; estimate the importance again."
            )
        self._names = names

    def __getitem__(self, name: str) -> Tensor:
        with safe_open(self._path[name], framework="pt") as file:
            tensor: Tensor = file.get_tensor(name)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def _shards(parameters: list[dict[str, Any]], shard_bytes: int) -> Iterator[list[str]]:
    """Parameter names in order, cut into groups of at most `shard_bytes` of float32 (at least one each)."""
    names: list[str] = []
    size = 0
    for parameter in parameters:
        n_bytes = 4 * int(np.prod(parameter["shape"], dtype=np.int64))
        if names and size + n_bytes > shard_bytes:
            yield names
            names, size = [], 0
        names.append(parameter["name"])
        size += n_bytes
    yield names


def _describe_file(path: Path) -> dict[str, Any]:
    """The record of a finished file for scores.json."""
    return {"file": path.name, "bytes": path.stat().st_size, "sha256": hash_file(path)}


def _check_file(path: Path, record: dict[str, Any], verify: bool) -> None:
    if not path.exists():
        raise UserError(f"{path} is missing; estimate the importance again.")
    if path.stat().st_size != record["bytes"]:
        raise UserError(
            f"{path} has {path.stat().st_size} bytes instead of {record['bytes']}: cut short or replaced; "
            "estimate the importance again."
        )
    if verify and hash_file(path) != record["sha256"]:
        raise UserError(f"{path} does not match its checksum; estimate the importance again.")


def _dtype_name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _digest(tensor: Tensor) -> str:
    """SHA-256 of the tensor's bytes, row-major; works for every dtype, bfloat16 included."""
    data: Any = whole(tensor.detach()).cpu().contiguous().flatten().view(torch.uint8).numpy()
    return hashlib.sha256(data).hexdigest()
