"""A study from data to report: the steps in order, each written once and skipped when nothing it depends on changed.

data → features → base (importance, deactivation, probe, answers) → each method (train, and the same)
→ analysis → results.json, figures, report.html

`Study.run` reads from top to bottom; every step is a method that writes one folder of the run directory.
"""

from __future__ import annotations

import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from palimpsest.config import StudyConfig, dump_config, require_same_recipe
from palimpsest.data.augment import augment, require_library
from palimpsest.data.collate import batches
from palimpsest.data.examples import Example, write_manifest
from palimpsest.data.features import compute_features
from palimpsest.data.speech import speak_several
from palimpsest.data.splits import speak_groups
from palimpsest.data.voices import Voices, find_voices
from palimpsest.files import write_json, write_jsonl, write_text
from palimpsest.parallel import is_main, joined, sharded, share, wait_for_all, world_size
from palimpsest.progress import Advance, Reporter
from palimpsest.records import BASE
from palimpsest.study.answering import answers, cascade, probe
from palimpsest.study.count import n_steps
from palimpsest.study.heldout import perplexity_step
from palimpsest.study.results import collect
from palimpsest.study.workspace import DROPPED, Modality, Workspace, folder_of

BY_MODEL = ("importance", "checkpoints")  # inputs of the analysis


def run_study(config: StudyConfig, folder: Path, reporter: Reporter | None = None, *, changed: bool = False) -> Path:
    """Run or resume a study in `folder`; returns the path of its report.

    A folder that holds a study of another configuration is refused, unless `changed`: then the steps that the change
    touches run again. Raises UserError for bad input, before the long work where it can be known. Several processes
    (torchrun, accelerate launch) train and score together; all else is done by rank 0.
    """
    with joined():
        if is_main() and not changed:
            require_same_recipe(config, folder / "study.yaml")
        return Study(config, folder, reporter).run()


class Study:
    def __init__(self, config: StudyConfig, folder: Path, reporter: Reporter | None = None) -> None:
        self.config = config
        self.ws = Workspace(config, folder, reporter or Reporter(n_steps(config), quiet=not is_main()))

    # -- the whole study ----------------------------------------------------------------------------------------------
    def run(self) -> Path:
        started = time.time()
        if is_main():
            self.check()
        wait_for_all()
        self.base()
        for name in self.config.runs:
            self.method(name)
        self.ws.forget()
        self.analysis()
        return share(self.report(started) if is_main() else None)

    def base(self) -> None:
        """What all methods share: data, features, and the base model measured."""
        self.data()
        self.features()
        self.ws.require_budget()
        self.importance(BASE)
        self.importance(BASE, other=True)
        self.deactivation(BASE)
        perplexity_step(self.ws, BASE)
        probe(self.ws, BASE)
        for task in self.config.evaluation.tasks:
            answers(self.ws, BASE, task, "text")
            if self.ws.hears(BASE):
                answers(self.ws, BASE, task, "speech")
            if self.config.models.asr:
                cascade(self.ws, task)

    def method(self, name: str) -> None:
        """One training run of a method, and its measurements; `base` must be done."""
        self.train(name)
        if self.config.measures(name, "importance"):
            self.importance(name)
        if self.config.measures(name, "deactivation"):
            self.deactivation(name)
        perplexity_step(self.ws, name)
        if self.config.measures(name, "probe"):
            probe(self.ws, name)
        for task in self.config.evaluation.tasks:
            answers(self.ws, name, task, "text")
            if self.ws.hears(name):
                answers(self.ws, name, task, "speech")
            if self.config.evaluation.text_asr:
                answers(self.ws, name, task, "text_asr")

    def check(self) -> None:
        """What can be known to be wrong before the long work: sources, audio, models, disk; then study.yaml."""
        from palimpsest.models.loading import resolve
        from palimpsest.training.train import require_options

        require_options(self.ws.settings, self.ws.device, sharded=sharded())
        if self.config.speech.augmentation is not None:
            require_library(self.config.speech.augmentation)
        if not self.ws.is_done("data", "data", self._data_inputs):
            self.ws.sources.check()
        models = self.config.models
        used = [name for name in (models.language_model, models.encoder, models.asr) if name is not None]
        with self.ws.reporter.step("models") as advance:
            for i, name in enumerate(used):
                resolve(name)  # converts an embedded model on its first use
                advance(i + 1, len(used))
        self.ws.require_adaptor()
        self.ws.require_disk()
        write_text(self.ws.dir.path / "study.yaml", dump_config(self.config))

    # -- data ---------------------------------------------------------------------------------------------------------
    def data(self) -> None:
        """data/: manifests of training, held-out and task questions, spoken where there was no recording."""

        def write(folder: Path, advance: Advance) -> None:
            def say(groups: Mapping[str, Sequence[Example]]) -> dict[str, list[Example]]:
                workers = min(2, max(1, sum(map(len, groups.values()))))
                voiced = [(group, self._voices[key]) for key, group in groups.items()]
                spoken = speak_several(voiced, folder / "audio", workers, progress=advance)
                return dict(zip(groups, spoken, strict=True))

            groups, dropped = self.ws.sources.read(folder / "audio", advance)
            groups, unspoken = speak_groups(groups, say, self.config.data.strict)
            if (changes := self.config.speech.augmentation) is not None:
                seed = self.ws.seed("augmentation")
                groups["train"] = augment(groups["train"], folder / "audio", changes, seed, progress=advance)
            for key, group in groups.items():
                write_manifest(folder / f"{key}.jsonl", group)
            write_jsonl(folder / f"{DROPPED}.jsonl", [item.to_row(group) for group, item in dropped + unspoken])

        self.ws.step("data", "data", self._data_inputs, write)

    @cached_property
    def _data_inputs(self) -> dict[str, Any]:
        changes = self.config.speech.augmentation
        return {
            "voices": {key: [[v.label, v.version()] for v in find_voices(it)] for key, it in self._voices.items()},
            "augmentation": None if changes is None else [asdict(changes), self.ws.seed("augmentation")],
            "sources": self.ws.sources.inputs(),
        }

    @cached_property
    def _voices(self) -> dict[str, Voices]:
        """Names of the voices that speak what has no recording, by group: the split's own, or those of all."""
        data, common = self.config.data, self.config.speech.voice
        heldout = data.heldout or data.train  # taken out of the training source
        splits = {"train": data.train, "heldout": heldout}
        splits |= {f"task-{task.name}": task for task in self.config.evaluation.tasks}
        return {key: common if split.voice is None else split.voice for key, split in splits.items()}

    def features(self) -> None:
        """features/: encoder frames of every recording, computed once for all methods, epochs and measurements."""
        inputs = {
            "data": self.ws.fingerprint("data"),
            "encoder": self.ws.encoder_hash,
            "length": self.config.speech.length,
            "stack_factor": self.config.speech.stack_factor,
        }

        def write(folder: Path, advance: Advance) -> None:
            from palimpsest.models.loading import load_encoder

            shared = self.config.speech.feature_cache
            cache = folder / "cache" if shared is None else Path(shared).expanduser()
            encoder, _ = load_encoder(self.config.models.encoder, device=self.ws.device)
            total, before = sum(map(len, self.ws.groups.values())), 0
            for key, group in self.ws.groups.items():

                def group_advance(done: int, _: int, before: int = before) -> None:
                    advance(before + done, total)

                compute_features(encoder, self.ws.processor, group, folder / key, cache=cache, progress=group_advance)
                before += len(group)

        self.ws.step("features", "features", inputs, write)

    # -- importance and deactivation ----------------------------------------------------------------------------------
    def importance(self, name: str, other: bool = False) -> None:
        """NAME/importance/: Eq. 2 on training questions given as text, by two reductions in one pass.

        NAME/importance_other/: the same on as many other questions, which tells how much the choice of data matters.
        """
        options = self.config.importance
        inputs = {
            "model": self.ws.model_inputs(name),
            "data": self.ws.fingerprint("data"),
            "options": {**asdict(options), "reduction": None},
            "prompt": asdict(self.config.prompt),
            "seed": self.ws.seed("importance"),
        }

        def write(folder: Path, advance: Advance) -> None:
            from palimpsest.importance.estimate import estimate_importance
            from palimpsest.importance.layouts import my_share

            # A changed copy asks the same question as its original: as text they are one example.
            pool = [example for example in self.ws.groups["train"] if example.augmentation is None]
            n_examples = min(len(pool), options.n_examples or max(2, len(pool) // 30))
            order = random.Random(self.ws.seed("importance")).sample(pool, len(pool))
            chosen = order[:n_examples]
            if other:  # the rest of the training data, or held-out questions where most of it was needed
                rest = order[n_examples:]
                chosen = (rest if len(rest) >= n_examples else self.ws.groups["heldout"])[:n_examples]
            total = -(-len(chosen) // options.batch_size)
            collator = self.ws.collator("text", "train")
            scores = estimate_importance(
                self.ws.language_model(name),
                # In random order: batches sorted by length would not be alike, and the bootstrap draws batches.
                my_share(batches(collator, chosen, options.batch_size, self.ws.device, by_length=False)),
                ("signed_sum", "per_batch_abs"),
                metadata={"scored_model": name, "modality": "text"},
                progress=lambda done, _: advance(min(total, done * world_size()), total),
                distributed=world_size() > 1,
            )
            if is_main():
                scores.save(folder)

        self.ws.step(f"{folder_of(name)}/importance{'_other' * other}", "importance", inputs, write, together=True)

    def deactivation(self, name: str) -> None:
        """NAME/deactivation/: perplexity of held-out answers with the top, bottom and random weights set to zero."""
        inputs = {
            "model": self.ws.model_inputs(name, heard=True),
            "importance": self.ws.fingerprint(f"{folder_of(name)}/importance"),
            "reduction": self.config.importance.reduction,
            "features": self.ws.fingerprint("features"),
            "options": asdict(self.config.deactivation),
            "prompt": asdict(self.config.prompt),
            "seed": self.ws.seed("deactivation"),
        }

        def write(folder: Path, advance: Advance) -> None:
            from palimpsest.evaluation.deactivation import deactivation_records

            options, reduction = self.config.deactivation, self.config.importance.reduction
            heldout = self.ws.groups["heldout"][: options.n_examples]
            modalities: list[Modality] = ["text", "speech"] if self.ws.hears(name) else ["text"]
            collators = {modality: self.ws.collator(modality, "heldout") for modality in modalities}
            records = deactivation_records(
                name,
                self.ws.base if name == BASE and not self.ws.hears(BASE) else self.ws.speech_lm(name),
                self.ws.scores(name).tensors(reduction),
                {
                    modality: partial(batches, collator, heldout, options.batch_size, self.ws.device)
                    for modality, collator in collators.items()
                },
                ratio=options.ratio,
                scope=options.scope,
                random_seeds=[self.ws.seed(f"deactivation/{i}") for i in range(options.random_seeds)],
                reduction=reduction,
                progress=advance,
            )
            write_json(folder / "records.json", records)

        self.ws.step(f"{folder_of(name)}/deactivation", "deactivation", inputs, write)

    # -- training -----------------------------------------------------------------------------------------------------
    def train(self, name: str) -> None:
        """methods/NAME/checkpoint/: the SpeechLM after training, its processor and its loss curve."""
        options, method = self.config.training, self.config.runs[name]
        inputs: dict[str, Any] = {
            "base": self.ws.base_hash,
            "encoder": self.ws.encoder_hash,
            "dtype": self.config.models.dtype,
            "data": self.ws.fingerprint("features" if self.ws.hears(name) else "data"),
            "speech": {**asdict(self.config.speech), "feature_cache": None},
            "prompt": asdict(self.config.prompt),
            "method": asdict(method),
            "training": asdict(options),
            "seeds": [self.ws.seed("adaptor", name), self.ws.seed("train", name)],
            **self.ws.adaptor_inputs,
        }
        if method.kind == "layer_lr":
            inputs["scores"] = self.ws.fingerprint(f"{BASE}/importance")
            inputs["reduction"] = self.config.importance.reduction
        if method.importance == "shuffled":
            inputs["shuffle"] = self.ws.seed("shuffled layers", name)

        def write(folder: Path, advance: Advance) -> None:
            from palimpsest.training.methods import method_scales
            from palimpsest.training.train import train

            scales = None
            settings = replace(self.ws.settings, seed=self.ws.seed("train", name))
            if method.modality == "text":  # written questions pass by the adaptor
                settings = replace(settings, align=None, adaptor_first=None)
            if method.kind == "layer_lr":
                reduction, seed = self.config.importance.reduction, self.ws.seed("shuffled layers", name)
                scales = method_scales(method, self.ws.scores(BASE), reduction=reduction, seed=seed)
                if is_main():
                    write_json(folder / "layer_scales.json", {str(layer): scale for layer, scale in scales.items()})
            model = self.ws.new_speech_lm(name)
            records = train(
                model,
                self.ws.groups["train"],
                self.ws.collator(method.modality, "train"),
                method,
                settings,
                folder,
                name=name,
                scales=scales,
                held_out=self.ws.held_out(name),
                sharded=sharded(),
                progress=advance,
            )
            if is_main():
                model.save_pretrained(folder)
                self.ws.processor.save_pretrained(folder)
                write_json(folder / "training.json", records)
            self.ws.keep(name, model)

        self.ws.step(f"methods/{name}/checkpoint", "train", inputs, write, together=True)

    # -- analysis and report ------------------------------------------------------------------------------------------
    def analysis(self) -> None:
        """analysis/: layer distribution, shift, clustering, parameter change; maps/: their heat maps."""
        names = [BASE, *(run for run in self.config.runs if self.config.measures(run, "importance"))]
        clustered = [name for name in names if self.config.measures(name, "clustering")]
        inputs: dict[str, Any] = {
            "importance": {name: self.ws.fingerprint(f"{folder_of(name)}/importance") for name in names},
            "other": self.ws.fingerprint(f"{BASE}/importance_other"),
            "checkpoints": {name: self.ws.fingerprint(f"methods/{name}/checkpoint") for name in names[1:]},
            "options": asdict(self.config.analysis),
            "reduction": self.config.importance.reduction,
            "ratio": self.config.deactivation.ratio,
            "seed": self.ws.seed("analysis"),
        }
        mapped = [BASE, *self.config.methods]  # further runs would only repeat the picture
        of_maps = {**inputs, **{key: {n: inputs[key][n] for n in mapped if n in inputs[key]} for key in BY_MODEL}}
        if clustered != names:
            inputs["clustered"] = clustered

        def tables(folder: Path, advance: Advance) -> None:
            from palimpsest.analysis.analyse import write_tables

            write_tables(
                folder,
                models=names,
                clustered=clustered,
                scores=self.ws.scores,
                weights=self.ws.weights,
                other=lambda: self.ws.scores(BASE, other=True),
                reduction=self.config.importance.reduction,
                ratio=self.config.deactivation.ratio,
                rank=next((m.rank for m in self.config.methods.values() if m.kind == "lora"), 8),
                n_shuffles=self.config.analysis.shuffles,
                rank_draws=self.config.analysis.rank_draws,
                n_draws=self.config.analysis.bootstrap,
                seed=self.ws.seed("analysis"),
                progress=advance,
            )

        def maps(folder: Path, advance: Advance) -> None:
            from palimpsest.analysis.analyse import write_study_maps

            write_study_maps(
                folder,
                models=mapped,
                scores=self.ws.scores,
                weights=self.ws.weights,
                reduction=self.config.importance.reduction,
            )
            advance(1, 1)

        self.ws.step("analysis", "analysis", inputs, tables)
        self.ws.step("maps", "analysis", of_maps, maps)

    def report(self, started: float) -> Path:
        """results.json, provenance.json, figures/ and report.html, from what the steps left."""
        from palimpsest.report.figures import write_figures
        from palimpsest.report.page import write_report

        folder = self.ws.dir.path
        with self.ws.reporter.step("report") as advance:
            results = collect(self.ws.dir, self.config, [s.name for s in self.ws.done], self.ws.seed("results"))
            write_json(folder / "results.json", results)
            write_json(folder / "provenance.json", self.ws.provenance(started))
            advance(1, 3)
            write_figures(folder)
            advance(2, 3)
            report = write_report(folder)
            advance(3, 3)
        return report
