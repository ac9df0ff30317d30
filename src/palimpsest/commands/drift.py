"""palimpsest drift: what training changed where it did not teach: the base's own text, and general text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from annotated_types import Ge
from typing_extensions import Doc

from palimpsest.evaluation.drift_settings import GeneralText, Sampling
from palimpsest.files import UserError, hash_value, locked, write_tables
from palimpsest.models import MODEL
from palimpsest.models.compute import Choice, ComputeOption, DeviceOption, DtypeOption
from palimpsest.progress import Reporter

if TYPE_CHECKING:
    from palimpsest.data.texts import Text
    from palimpsest.evaluation.drift import BasePasses
    from palimpsest.evaluation.general_text import TextLoss
    from palimpsest.evaluation.own_text import OwnText
    from palimpsest.records import DriftRecord


@dataclass(frozen=True)
class Options:
    """Distance of tuned models from their base on text that the base writes, and the loss of text that you give.

    Example: palimpsest drift embedded:smollm2-135m-instruct runs/demo/methods/full/checkpoint --out runs/drift
    """

    base: Annotated[str, typer.Argument(), Doc(f"What training began with. {MODEL}")]
    tuned: Annotated[list[str], typer.Argument(), Doc("What training made of it, in any of these forms.")]
    out: Annotated[Path, Doc("Folder for drift.json, general_text.json and the texts.")]
    general: GeneralText = field(default_factory=GeneralText)
    sampling: Sampling = field(default_factory=Sampling)
    seed: Annotated[int, Ge(0), Doc("Of the texts and of the bootstrap.")] = 0
    batch_size: Annotated[int, Ge(1)] = 8
    device: DeviceOption = "auto"
    dtype: DtypeOption = None
    compute: ComputeOption = "auto"


def run(options: Options) -> Iterator[str]:
    with locked(options.out):
        yield from _run(options)


def _run(options: Options) -> Iterator[str]:
    """Writes drift.json, with --text general_text.json, and what they are made of; yields the lines of two tables.

    What stands in the folder already is not measured again. Raises UserError for bad input before a model is loaded.
    """
    from palimpsest.data.texts import read_texts
    from palimpsest.models.compute import choose_compute
    from palimpsest.models.loading import choose_device, fingerprint, load_tokenizer, reading_notes

    if twice := sorted(name for name in set(options.tuned) if options.tuned.count(name) > 1):
        raise UserError(f"{twice[0]} is given twice; give every tuned model once.")
    given = options.general
    texts = None if given.text is None else read_texts(given.text, given.split, given.limit)
    names = [options.base, *options.tuned]
    prints = {name: fingerprint(name) for name in names}
    for name in names:
        load_tokenizer(name)  # one that is not there is said before the base writes
    device = choose_device(options.device)
    compute = choose_compute(options.compute, device, weights=options.dtype or "float32", exact=True)
    n_steps = 1 + len(options.tuned) + (0 if texts is None else len(prints))
    work = Work(options, prints, device, compute, Reporter(n_steps))

    own = work.own_text()
    drifts, left_out = [], []
    losses = {} if texts is None else {options.base: work.losses(options.base, texts)}
    for name in options.tuned:
        records, reason = work.drift(name, own)
        drifts += records
        left_out += [] if reason is None else [{"model": name, "reason": reason}]
        if texts is not None:
            losses[name] = work.losses(name, texts)
        work.forget(name)
    about = {"compute": {**asdict(compute), "device": device, "weights": options.dtype}, "models": prints}
    write_tables(
        options.out / "drift.json",
        {"schema": 1, "seed": options.seed, **about, **work.files, "drift": drifts, "left_out": left_out},
    )
    for name in names:
        yield from reading_notes(name)
    yield from _drift_lines(drifts)
    yield from (f"left out: {row['model']}: {row['reason']}" for row in left_out)
    if texts is not None:
        yield from _general_text(options, texts, losses, about)
    yield f"computed in {compute}"


def _general_text(
    options: Options, texts: Sequence[Text], losses: dict[str, list[TextLoss]], about: dict[str, Any]
) -> Iterator[str]:
    """Writes general_text.json; yields its lines."""
    from palimpsest.comparison.general_text_pairs import general_text_comparisons
    from palimpsest.data.texts import texts_version
    from palimpsest.evaluation.general_text import summarise_text
    from palimpsest.files import without_folders

    name = without_folders(str(options.general.text))
    records = [summarise_text(of, model, name, options.seed) for model, of in losses.items()]
    base = (options.base, losses[options.base])
    rows = general_text_comparisons(base, {model: losses[model] for model in options.tuned}, name)
    write_tables(
        options.out / "general_text.json",
        {
            "schema": 1,
            "seed": options.seed,
            "text": name,
            "version": texts_version(texts),
            "window": options.general.window,
            **about,
            "general_text": records,
            "comparisons": rows,
        },
    )
    first = records[0]
    yield f"general text: {first['n_texts']} texts of {first['n_documents']} documents, {first['n_bytes']:,} bytes"
    if n_long := max(record["n_long"] for record in records):
        window = options.general.window
        yield f"  {n_long} are longer than {window} tokens and were cut into windows; nothing is left out"
    for record in records:
        yield (
            f"  {record['model']}: {record['per_byte']:.4f} nats per byte [{record['per_byte_ci_low']:.4f}, "
            f"{record['per_byte_ci_high']:.4f}], {record['loss']:.4f} per token, perplexity {record['perplexity']:.4g}"
        )
    for row in rows:
        yield (
            f"  {row['method']} − base: {row['difference']:+.4f} nats per byte [{row['ci_low']:+.4f}, "
            f"{row['ci_high']:+.4f}], p {row['p_holm']:.2g}: {row['verdict']}"
        )


def _drift_lines(records: Sequence[DriftRecord]) -> Iterator[str]:
    """All tokens of each kind of text first, then the classes."""
    for name in dict.fromkeys(record["model"] for record in records):
        yield f"drift of {name} from the base, nats per token [95 %]"
        for record in records:
            if record["model"] == name:
                indent = "" if record["tokens"] == "all" else "  "
                one = (record["text"], record["tokens"]) == ("plain", "token 1")
                yield (
                    f"  {indent}{record['text'] + ', ' + record['tokens'] if not indent else record['tokens']:<32}"
                    f"KL {record['kl']:.4f} [{record['kl_ci_low']:.4f}, {record['kl_ci_high']:.4f}]  "
                    f"reverse {record['reverse_kl']:.4f}  same top token {100 * record['agreement']:.1f} %  "
                    f"n {record['n_tokens']}{', one context in all texts' * one}"
                )


class Work:
    """What is in the folder, measured where it is not; a model is loaded when something has to be measured."""

    def __init__(
        self, options: Options, prints: dict[str, str], device: str, compute: Choice, reporter: Reporter
    ) -> None:
        self.options, self.prints, self.device = options, prints, device
        self.compute, self.reporter = compute, reporter
        self.files: dict[str, Any] = {}
        self.passes: BasePasses | None = None
        self._loaded: dict[str, Any] = {}

    def own_text(self) -> list[OwnText]:
        from palimpsest.evaluation.own_text import describe, read_own_text, sample_own_text, write_own_text

        options, file = self.options, self.options.out / "own_text.jsonl"
        print_ = hash_value([self.prints[options.base], options.dtype])
        about = describe(print_, options.sampling, options.seed, self.compute.dtype)
        step = "text of the base's own"
        if (texts := read_own_text(file, about)) is not None:
            self.reporter.skipped(step)
        else:
            with self.reporter.step(step) as advance:
                model, processor = self.model(options.base)
                texts = sample_own_text(
                    model,
                    processor.tokenizer,
                    options.sampling,
                    seed=options.seed,
                    style=processor.style,
                    compute=self.compute.dtype,
                    progress=advance,
                )
                write_own_text(file, texts, about)
        self.files["own_text"] = {**about, "file": file.name}
        return texts

    def drift(self, name: str, texts: list[OwnText]) -> tuple[list[DriftRecord], str | None]:
        """The records, or why there are none."""
        from palimpsest.evaluation.drift import (
            BasePasses,
            VocabularyError,
            measure_drift,
            read_drift,
            require_same_tokens,
            summarise_drift,
            token_classes,
            write_drift,
        )
        from palimpsest.evaluation.own_text import tokens_hash
        from palimpsest.models.loading import load_tokenizer

        options, base = self.options, self.options.base
        bound = [self.prints[base], self.prints[name], tokens_hash(texts), options.dtype, self.compute.dtype]
        file = options.out / f"drift-{hash_value([*bound, options.batch_size])[:12]}.jsonl"
        tokenizer = load_tokenizer(base)
        try:
            require_same_tokens(tokenizer, load_tokenizer(name))
            if file.exists():
                self.reporter.skipped(f"drift of {name}")
                drifts = read_drift(file)
            else:
                self.passes = self.passes or BasePasses()
                with self.reporter.step(f"drift of {name}") as advance:
                    drifts = measure_drift(
                        self.model(base)[0],
                        self.model(name)[0],
                        texts,
                        batch_size=options.batch_size,
                        compute=self.compute.dtype,
                        progress=advance,
                        passes=self.passes,
                    )
                    write_drift(file, drifts)
        except VocabularyError as error:
            return [], str(error)
        self.files.setdefault("files", {})[name] = file.name
        classes = [token_classes(tokenizer, text) for text in texts]
        return summarise_drift(drifts, texts, classes, model=name, base=base, seed=options.seed), None

    def losses(self, name: str, texts: Sequence[Text]) -> list[TextLoss]:
        from palimpsest.data.texts import texts_version
        from palimpsest.evaluation.general_text import read_text_losses, text_losses, write_text_losses

        options = self.options
        bound = [self.prints[name], texts_version(texts), options.general.window, options.dtype, self.compute.dtype]
        file = options.out / f"general_text-{hash_value([*bound, options.batch_size])[:12]}.jsonl"
        step = f"general text by {name}"
        if file.exists():
            self.reporter.skipped(step)
            return read_text_losses(file)
        with self.reporter.step(step) as advance:
            model, processor = self.model(name)
            losses = text_losses(
                model,
                processor.tokenizer,
                texts,
                window=options.general.window,
                batch_size=options.batch_size,
                compute=self.compute.dtype,
                progress=advance,
            )
        write_text_losses(file, losses)
        return losses

    def model(self, name: str) -> tuple[Any, Any]:
        from palimpsest.models.loading import load_text_model

        if name not in self._loaded:
            dtype = self.options.dtype or "float32"
            self._loaded[name] = load_text_model(name, dtype=dtype, device=self.device)
        found: tuple[Any, Any] = self._loaded[name]
        return found

    def forget(self, name: str) -> None:
        if name != self.options.base:
            self._loaded.pop(name, None)
