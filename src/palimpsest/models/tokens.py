"""Speech as tokens: encoder frames become ids, and each id has a row of its own beside the embedding.

    frames, 50 a second → means of `pool` frames → the nearest of k centroids: its number → row of a new embedding

The rows stand where the adaptor's outputs would stand, so all that trains, freezes, measures or stores an adaptor does
so with them. The vocabulary of the language model is not touched: its head proposes no speech token, and a question as
text is answered by the base's weights. docs/speech-tokens.md says what this has in common with a vocabulary that grew,
and what not.

Mean, scale and centroids are numbers that bfloat16 has, and distances are formed in float32 of frames in float16, as
the cache stores them: the ids of a recording are the same in whatever type the weights are loaded.

Legend: position = time // pool; k = centroids; d_enc, d_lm = widths of encoder and language model.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import nn

from palimpsest.files import UserError, replacing
from palimpsest.models.token_settings import WITHOUT_CODEC, Tokens

if TYPE_CHECKING:
    import numpy as np
    from jaxtyping import Bool, Float, Int
    from torch import Tensor

TENSORS = ("mean", "scale", "centroids")
FRAMES_PER_SECOND = 50  # of a Whisper encoder


# ---------------------------------------------------------------------------------------------------------------------
# From frames to ids
# ---------------------------------------------------------------------------------------------------------------------
class Quantiser(nn.Module):
    """Which centroid each mean of `pool` frames is nearest to, in units of the standard deviation of each dimension."""

    mean: Tensor
    scale: Tensor
    centroids: Tensor

    def __init__(self, k: int, dim: int, pool: int) -> None:
        super().__init__()
        self.k, self.pool = k, pool
        self.register_buffer("mean", torch.zeros(dim))
        self.register_buffer("scale", torch.ones(dim))
        self.register_buffer("centroids", torch.zeros(k, dim))

    def pooled(self, frames: Float[Tensor, "speech time d_enc"]) -> Float[Tensor, "speech position d_enc"]:
        """Standardised means, float32; the last `time mod pool` frames are dropped."""
        speech, time, dim = frames.shape
        positions = time // self.pool
        stored = frames[:, : positions * self.pool].to(torch.float16).float()
        means = stored.reshape(speech, positions, self.pool, dim).mean(2)
        return (means - self.mean.float()) * self.scale.float()

    @torch.no_grad()
    def ids(self, frames: Float[Tensor, "speech time d_enc"]) -> Int[Tensor, "speech position"]:
        centroids = self.centroids.float()
        with torch.autocast(frames.device.type, enabled=False):
            # |x|² is the same for every centroid.
            distances = centroids.square().sum(1) - 2 * self.pooled(frames) @ centroids.T
        return distances.argmin(-1)

    def replaced(self, frames: Float[Tensor, "speech time d_enc"]) -> Float[Tensor, "speech time d_enc"]:
        """Each `pool` frames as so many copies of their centroid, as a frame; what is left over stays as it is.

        Zeros are padding: an utterance with some behind it is replaced as it would be alone.
        """
        ids = self.ids(frames)
        nearest = self.centroids.float()[ids] / self.scale.float() + self.mean.float()
        copies = nearest.repeat_interleave(self.pool, dim=1).to(frames.dtype)
        whole, rest = frames[:, : copies.shape[1]], frames[:, copies.shape[1] :]
        left_over = (whole == 0).all(-1).reshape(*ids.shape, self.pool).any(-1).repeat_interleave(self.pool, dim=1)
        return torch.cat([torch.where(left_over[..., None], whole, copies), rest], dim=1)


class Codes(nn.Module):
    """The ids of a codec's codebook, which come as they are, as two numbers that float16 has: 256 · first + second."""

    pool = 1

    def __init__(self, k: int) -> None:
        super().__init__()
        self.k = k

    def ids(self, frames: Float[Tensor, "speech time 2"]) -> Int[Tensor, "speech time"]:
        if frames.shape[-1] != 2:
            raise UserError(f"This model {WITHOUT_CODEC}; ask it in the study that trained it, which has their tokens.")
        return (frames[..., 0].long() * 256 + frames[..., 1].long()).clamp_max(self.k - 1)


def as_frames(ids: Sequence[int]) -> Float[Tensor, "time 2"]:
    """Ids as `Codes` takes them."""
    values = torch.tensor(ids, dtype=torch.long)
    return torch.stack([values // 256, values % 256], dim=-1).float()


def repeats(ids: Int[Tensor, "speech position"]) -> Bool[Tensor, "speech position"]:
    """Where an id is that of the position before."""
    same = torch.zeros_like(ids, dtype=torch.bool)
    same[:, 1:] = ids[:, 1:] == ids[:, :-1]
    return same


def collapsed(ids: Iterable[int]) -> tuple[list[int], list[int]]:
    """(ids without repetitions in a row, how often each stood there).

    >>> collapsed([7, 7, 2, 7])
    ([7, 2, 7], [2, 1, 1])
    """
    runs = [(token, len(list(run))) for token, run in itertools.groupby(ids)]
    return [token for token, _ in runs], [length for _, length in runs]


class TokenAdaptor(nn.Module):
    """The row of each token, in the place of an adaptor's output; `quantiser` is no parameter and is never trained."""

    def __init__(self, quantiser: Quantiser | Codes, output_dim: int, *, collapse: bool) -> None:
        super().__init__()
        self.quantiser = quantiser
        self.rows = nn.Embedding(quantiser.k, output_dim)
        self.collapse = collapse

    @property
    def stack_factor(self) -> int:
        """Encoder frames of a position."""
        return self.quantiser.pool

    @property
    def frames_dtype(self) -> torch.dtype:
        """In which it takes frames."""
        return torch.float32

    def forward(self, frames: Float[Tensor, "speech time d_enc"]) -> Float[Tensor, "speech position d_lm"]:
        return self.rows(self.quantiser.ids(frames))  # type: ignore[no-any-return]

    def calibrate(self, frames: Float[Tensor, "speech time d_enc"], target_std: float) -> None:
        """Nothing: rows have the spread of the embedding from the start, and the quantiser its own scale."""


# ---------------------------------------------------------------------------------------------------------------------
# Fitting
# ---------------------------------------------------------------------------------------------------------------------
class Frames(Protocol):
    """Encoder frames by example id, as data.features.Features and data.in_loop.Encoded have them."""

    def count(self, example_id: str, /) -> int: ...

    def __getitem__(self, example_id: str, /) -> Float[Tensor, "time d_enc"]: ...


@dataclass(frozen=True)
class SpeechTokenizer:
    """A quantiser as a value: its tensors, how many frames make a token, and where it comes from (JSON).

    Of a codec's codebook there are no tensors, but how many `codes` it has.
    """

    pool: int
    tensors: Mapping[str, Tensor]  # TENSORS, float32
    about: Mapping[str, Any] = field(default_factory=dict)
    codes: int = 0

    @property
    def k(self) -> int:
        return self.codes or len(self.tensors["centroids"])

    def quantiser(self) -> Quantiser:
        """Of frames."""
        made = Quantiser(self.k, self.tensors["centroids"].shape[1], self.pool)
        made.load_state_dict(dict(self.tensors))
        return made


def as_value(quantiser: Quantiser | Codes) -> SpeechTokenizer:
    """The tokenizer that a quantiser was made of."""
    if isinstance(quantiser, Codes):
        return SpeechTokenizer(quantiser.pool, {}, codes=quantiser.k)
    tensors = {name: quantiser.get_buffer(name).detach().float().cpu() for name in TENSORS}
    return SpeechTokenizer(quantiser.pool, tensors, {"kind": "kmeans", "k": quantiser.k})


def stored_tokenizer(adaptor: Mapping[str, Tensor], pool: int) -> SpeechTokenizer | None:
    """The quantiser among the tensors of an adaptor; None of one that reads frames."""
    if "quantiser.centroids" in adaptor:
        return SpeechTokenizer(pool, {name: adaptor[f"quantiser.{name}"].float() for name in TENSORS})
    return SpeechTokenizer(pool, {}, codes=len(adaptor["rows.weight"])) if "rows.weight" in adaptor else None


def fit_tokens(
    ids: Sequence[str], frames: Frames, options: Tokens, seed: int, about: Mapping[str, Any] | None = None
) -> SpeechTokenizer:
    """k-means (scikit-learn's MiniBatchKMeans) on a random part of the pooled frames of the examples `ids`.

    One thread, so that the same frames and seed give the same centroids. about: goes into the file as provenance.

    Raises UserError where scikit-learn is not installed, and for fewer frames than centroids.
    """
    try:
        import sklearn
        from sklearn.cluster import MiniBatchKMeans
    except ImportError as error:
        raise UserError(
            "Speech tokens of kind kmeans need scikit-learn, which is not installed; install palimpsest-llm[tokens]."
        ) from error
    from threadpoolctl import threadpool_limits

    sample = _sample(ids, frames, options, seed)
    if len(sample) < options.k:
        raise UserError(
            f"speech.tokens.k is {options.k} and the training speech has {len(sample)} tokens of {options.pool} frames "
            "to fit on; set a smaller k, or give more speech."
        )
    mean, spread = torch.from_numpy(sample.mean(0)), torch.from_numpy(sample.std(0))
    blank = Quantiser(options.k, sample.shape[1], options.pool)
    blank.mean.copy_(_short(mean))
    blank.scale.copy_(_short(1 / spread.clamp_min(1e-5)))
    standardised = ((torch.from_numpy(sample) - blank.mean) * blank.scale).numpy()
    size = max(4096, 2 * options.k)
    with threadpool_limits(1):
        fitted = MiniBatchKMeans(
            options.k, batch_size=size, init_size=max(size, 3 * options.k), n_init=3, random_state=seed
        ).fit(standardised)
    blank.centroids.copy_(_short(torch.from_numpy(fitted.cluster_centers_)))
    described = {
        "kind": options.kind,
        "k": options.k,
        "pool": options.pool,
        "seed": seed,
        "n_fitted_on": len(sample),
        "unexplained": float(fitted.inertia_ / (standardised**2).sum()),
        "library": f"scikit-learn {sklearn.__version__}",
    }
    return SpeechTokenizer(options.pool, dict(blank.state_dict()), {**described, **(about or {})})


def _sample(
    ids: Sequence[str], frames: Frames, options: Tokens, seed: int
) -> np.ndarray[tuple[int, int], np.dtype[np.float32]]:
    """Pooled frames, not standardised, of positions drawn from all that there are, in their order."""
    import numpy as np

    counts = np.array([frames.count(example_id) // options.pool for example_id in ids], dtype=np.int64)
    total = int(counts.sum())
    if not total:
        raise UserError(
            f"The training speech has no {options.pool} frames to make a token of (speech.tokens.pool); give longer "
            "recordings."
        )
    chosen = np.sort(np.random.default_rng(seed).permutation(total)[: options.fit_on])
    ends = counts.cumsum()
    found: list[Tensor] = []
    for number, example_id in enumerate(ids):
        first, last = np.searchsorted(chosen, [ends[number] - counts[number], ends[number]])
        if first == last:
            continue
        item = frames[example_id]
        pooled = Quantiser(1, item.shape[1], options.pool).to(item.device).pooled(item[None])[0].cpu()
        found.append(pooled[torch.from_numpy(chosen[first:last] - (ends[number] - counts[number]))])
    together: np.ndarray[tuple[int, int], np.dtype[np.float32]] = torch.cat(found).numpy()
    return together


def _short(values: Tensor) -> Tensor:
    """Rounded to what bfloat16 has, as float32."""
    return values.to(torch.bfloat16).float()


# ---------------------------------------------------------------------------------------------------------------------
# The first rows
# ---------------------------------------------------------------------------------------------------------------------
@torch.no_grad()
def rows_like(embedding: Float[Tensor, "vocabulary d_lm"], k: int, seed: int) -> Float[Tensor, "k d_lm"]:
    """Rows with the mean and the standard deviation of each of the embedding's dimensions, normal, from `seed`."""
    values = embedding.detach().float().cpu()
    drawn = torch.randn(k, values.shape[1], generator=torch.Generator().manual_seed(seed))
    return values.mean(0) + drawn * values.std(0)


@torch.no_grad()
def rows_heard(
    adaptor: Any, quantiser: Quantiser, frames: Iterable[Float[Tensor, "time d_enc"]]
) -> tuple[Float[Tensor, "k d_lm"], Int[Tensor, " k"]]:
    """(mean of the adaptor's outputs over the frames of each token, number of these frames); of none: zeros.

    adaptor: one that reads frames. Each frame counts with the output of the position that it is part of, so that the
    adaptor's positions may be longer or shorter than tokens.
    """
    k = quantiser.k
    sums, counts = torch.zeros(0), torch.zeros(k, dtype=torch.long)
    for item in frames:
        token = quantiser.ids(item[None])[0].repeat_interleave(quantiser.pool).cpu()
        output = adaptor(item[None].to(adaptor.frames_dtype))[0].float().repeat_interleave(adaptor.stack_factor, dim=0)
        n = min(len(token), len(output))
        sums = torch.zeros(k, output.shape[1]) if not len(sums) else sums
        sums.index_add_(0, token[:n], output[:n].cpu())
        counts.index_add_(0, token[:n], torch.ones(n, dtype=torch.long))
    return sums / counts.clamp_min(1)[:, None], counts


# ---------------------------------------------------------------------------------------------------------------------
# What the tokens are like
# ---------------------------------------------------------------------------------------------------------------------
def describe_tokens(
    quantiser: Quantiser | Codes,
    frames: Iterable[Float[Tensor, "time d_enc"]],
    per_second: float = FRAMES_PER_SECOND,
) -> dict[str, float]:
    """Of some speech, with its frames `per_second`: seconds, tokens a second as they are and without repetitions, how
    many of the k occur, and the perplexity of their frequencies (k where all are equally frequent)."""
    seconds, n_tokens, n_kept = 0.0, 0, 0
    frequencies = torch.zeros(quantiser.k)
    for item in frames:
        ids = quantiser.ids(item[None])
        seconds += len(item) / per_second
        n_tokens += ids.numel()
        n_kept += int((~repeats(ids)).sum())
        frequencies += torch.bincount(ids[0].cpu(), minlength=len(frequencies))
    shares = frequencies / frequencies.sum().clamp_min(1)
    return {
        "seconds": seconds,
        "per_second": n_tokens / max(seconds, 1e-9),
        "collapsed_per_second": n_kept / max(seconds, 1e-9),
        "used": int((frequencies > 0).sum()),
        "perplexity": float(torch.special.entr(shares).sum().exp()),
    }


# ---------------------------------------------------------------------------------------------------------------------
# Disk
# ---------------------------------------------------------------------------------------------------------------------
def write_tokens(tokenizer: SpeechTokenizer, path: Path) -> None:
    """safetensors, with `about` as JSON in its header."""
    from safetensors.torch import save_file

    about = json.dumps({**tokenizer.about, "pool": tokenizer.pool}, sort_keys=True)
    with replacing(path) as temporary:
        tensors = dict(tokenizer.tensors) or {"codes": torch.tensor(tokenizer.codes)}
        save_file(tensors, temporary, metadata={"tokenizer": about})


def read_tokens(path: Path) -> SpeechTokenizer:
    """Raises UserError for a file that `write_tokens` did not write."""
    from safetensors import SafetensorError, safe_open

    file: Any
    try:
        with safe_open(path, framework="pt") as file:
            about = json.loads((file.metadata() or {})["tokenizer"])
            codes = int(file.get_tensor("codes")) if "codes" in file.keys() else 0  # noqa: SIM118 (not a mapping)
            tensors = {} if codes else {name: file.get_tensor(name) for name in TENSORS}
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise UserError(f"{path} is no file of speech tokens, or damaged ({error}); fit them again.") from error
    return SpeechTokenizer(about["pool"], tensors, about, codes)
