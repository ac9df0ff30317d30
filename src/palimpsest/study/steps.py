"""The steps of a study, each in one style: what goes in (JSON), what it writes (one folder), and that it is a step.

`workspace.step` skips what was done before with the same inputs and the same code: the source of the function here, and
of every module that it imports (code.py).
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from palimpsest.config import STUDY_REDUCTIONS, Importance, dump_config
from palimpsest.data.augment import augment, require_library
from palimpsest.data.collate import batches
from palimpsest.data.examples import Example, write_manifest
from palimpsest.data.speech import speak_for_rank_0, speak_several, spoken_all
from palimpsest.data.splits import forget_notes, speak_groups
from palimpsest.data.voices import find_voices
from palimpsest.files import hash_value, read_jsonl, remove_left_over, write_json, write_jsonl, write_tables, write_text
from palimpsest.parallel import is_main, sharded, visible_gpus, world_size
from palimpsest.progress import Advance
from palimpsest.records import BASE, Modality, run_name
from palimpsest.rundir import (
    DROPPED,
    GIVEN,
    MASKS,
    PROVENANCE,
    RESULTS,
    SET_ASIDE,
    STUDY,
    checkpoint_of,
    figures_in,
    folder_of,
    samples_of,
    tokens_folder,
)
from palimpsest.study.workspace import Workspace
from palimpsest.training.methods import OF_FRONTIER


def check(ws: Workspace) -> None:
    """What can be known to be wrong before the long work, then study.yaml.

    Options, sources, audio, the prompt, disk; of every model its files, config and the names and shapes of its weights.
    """
    from palimpsest.models.loading import ROLES, require_loadable
    from palimpsest.training.methods import require_language_model
    from palimpsest.training.train import require_options

    figures_in(ws.path)
    gated = any(method.gate != "none" for method in ws.config.methods.values())
    require_options(ws.settings, ws.device, sharded=sharded(), gated=gated)
    if ws.config.models.compute == "auto":
        ws.reporter.note(f"computing in {ws.compute}; importance and deactivation in {ws.exact_compute}.")
    if ws.device == "cuda" and world_size() == 1 and (n_gpus := visible_gpus()) > 1:
        ws.reporter.note(f"{n_gpus} GPUs are visible and one is used; torchrun --nproc-per-node {n_gpus} uses all.")
    if ws.config.speech.augmentation is not None:
        require_library(ws.config.speech.augmentation)
    if not ws.is_done("data", data, _data_inputs(ws)):
        ws.sources.check()
    models = ws.config.models
    with ws.reporter.step("models") as advance:
        for i, role in enumerate(ROLES):
            if (name := getattr(models, role)) is not None:
                require_loadable(role, name)  # converts an embedded model on its first use
            advance(i + 1, len(ROLES))
    trained = [it for it in ws.config.methods.values() if it.trains]
    require_language_model(models.language_model, trained, collapse=ws.config.collapses)
    read = ws.config.speech.tokens
    if read is not None and read.codec is not None:
        from palimpsest.models.codecs import load_codec

        load_codec(read.codec, read, "meta")
    ws.require_given()
    ws.require_blends()
    ws.require_gated()
    ws.note_inserted()
    if ws.config.drift is not None and ws.general_texts:
        from palimpsest.evaluation.general_text import require_positions
        from palimpsest.models.loading import blank_language_model

        require_positions(blank_language_model(models.language_model).config, ws.config.drift.general_text.window)
    ws.require_replay()
    ws.processor.example_prompts()
    ws.require_adaptor()
    ws.require_disk()
    write_text(ws.path / STUDY, dump_config(ws.config))


# ---------------------------------------------------------------------------------------------------------------------
# Data
# ---------------------------------------------------------------------------------------------------------------------
def data(ws: Workspace) -> None:
    """data/: manifests of training, held-out and task questions, spoken where there was no recording."""

    def write(folder: Path, advance: Advance) -> None:
        def say(groups: Mapping[str, Sequence[Example]]) -> dict[str, list[Example]]:
            voiced = {key: (group, ws.voices[key]) for key, group in groups.items() if key in ws.voices}
            if not voiced:
                return {key: [*group] for key, group in groups.items()}
            spoken = speak_several([*voiced.values()], folder / "audio", progress=advance, distributed=True)
            return {key: [*group] for key, group in groups.items()} | dict(zip(voiced, spoken, strict=True))

        if not is_main():  # reading and deciding is rank 0's
            return speak_for_rank_0()
        remove_left_over(folder)  # by a start that was killed
        groups, dropped = ws.sources.read(folder / "audio", advance, notes=folder)
        groups, unspoken = speak_groups(groups, say, ws.config.data.strict)
        spoken_all()
        if (changes := ws.config.speech.augmentation) is not None:
            seed = ws.seed("augmentation")
            groups["train"] = augment(groups["train"], folder / "audio", changes, seed, progress=advance)
        for key, group in groups.items():
            write_manifest(folder / f"{key}.jsonl", group)
        write_jsonl(folder / f"{DROPPED}.jsonl", [item.to_row(group) for group, item in dropped + unspoken])
        forget_notes(folder)

    inputs = _data_inputs(ws) if is_main() else {}  # rank 0 alone compares them
    ws.remember_recordings()
    ws.step("data", data, inputs, write, together=True)
    ws.read_data_anew()


def _data_inputs(ws: Workspace) -> dict[str, Any]:
    changes = ws.config.speech.augmentation
    return {
        "voices": {key: [[v.label, v.version()] for v in find_voices(it)] for key, it in ws.voices.items()},
        "augmentation": None if changes is None else [asdict(changes), ws.seed("augmentation")],
        "sources": ws.source_inputs,
    }


def features(ws: Workspace) -> None:
    """features/: encoder frames of every recording, computed once for all methods, epochs and measurements.

    Those of the training data, by far the most, are left out where training encodes them in its loop.
    """
    speech = ws.config.speech
    if speech.features != "cache":
        ws.reporter.note(f"encoder frames of the training data: {ws.frames}.")
    inputs = {
        "data": ws.fingerprint("data"),
        "encoder": ws.encoder_hash,
        "length": speech.length,
        "stack_factor": speech.stack_factor,
        "compute": ws.compute.dtype,
        "train": ws.frames.path,
    }

    def write(folder: Path, advance: Advance) -> None:
        from palimpsest.data.features import compute_features
        from palimpsest.models.loading import load_encoder

        cache = folder / "cache" if speech.feature_cache is None else Path(speech.feature_cache).expanduser()
        trained_on = ws.config.trains and ws.frames.path == "cache"
        groups = {key: group for key, group in ws.groups.items() if key != "train" or trained_on}
        if is_main():
            ws.require_disk(0 if speech.feature_cache is not None else sum(map(ws.frame_bytes, groups.values())))
        encoder, _ = load_encoder(ws.encoder, device=ws.device)
        total, before = sum(map(len, groups.values())), 0
        for key, group in groups.items():

            def group_advance(done: int, _: int, before: int = before) -> None:
                advance(before + done, total)

            compute_features(
                encoder,
                ws.processor,
                group,
                folder / key,
                cache=cache,
                compute=ws.compute.dtype,
                progress=group_advance,
                distributed=True,
            )
            before += len(group)

    ws.step("features", features, inputs, write, together=True)
    if not ws.reads_codec:
        _require_budget(ws)


def _require_budget(ws: Workspace) -> None:
    """Of the data's own answers: an example above it is an error now, not after hours of other steps."""
    taught = [ws.config.answers_of(method) for method in ws.config.methods.values() if method.trains]
    if ws.settings.max_tokens is not None and "gold" in taught:
        ws.require_budget(ws.groups["train"])


def tokens(ws: Workspace, k: int | None = None) -> None:
    """tokens/: centroids fitted on the frames of the training speech, and what tokens they make of it; tokens-K/: of a
    k that a method names.

    tokenizer.safetensors; tokens.json, of training and held-out speech; with start: adaptor rows.safetensors, the mean
    of the adaptor's outputs over the frames of each token, and the number of these. Of a codec GROUP.jsonl instead, the
    tokens of every recording.
    """
    options, seed = ws.config.speech.tokens, ws.seed("tokens")
    assert options is not None
    options = replace(options, k=k or options.k)
    inputs: dict[str, Any] = {
        "features": ws.fingerprint("features"),
        # Frames that training makes in its loop are not among those of features/.
        "frames": [ws.frames.path, ws.compute.dtype],
        # Collapsing is the language model's business.
        "options": {key: value for key, value in asdict(options).items() if key != "collapse"},
        "seed": seed,
    }
    if options.start == "adaptor":
        inputs |= ws.adaptor_inputs
    if options.codec is not None:
        inputs = {
            "data": ws.fingerprint("data"),
            "codec": ws.model_hash(options.codec),
            "options": [options.k, options.codebook],
        }

    def write_codes(folder: Path, advance: Advance) -> None:
        from palimpsest.data.codec_tokens import CodecTokens, write_codec_tokens
        from palimpsest.models.codecs import codec_rate, load_codec
        from palimpsest.models.tokens import Codes, SpeechTokenizer, describe_tokens, write_tokens

        codec, extractor = load_codec(str(options.codec), options, ws.device)
        total, done = sum(map(len, ws.groups.values())), 0
        for group, examples in ws.groups.items():
            if not (folder / f"{group}.jsonl").exists():  # of a start that was killed
                write_codec_tokens(
                    folder / f"{group}.jsonl",
                    examples,
                    codec,
                    extractor,
                    options.codebook,
                    lambda n, done=done: advance(done + n, total),  # type: ignore[misc]
                )
            done += len(examples)
        about = {"kind": "codec", "k": options.k, "codebook": options.codebook, "codec": inputs["codec"]}
        write_tokens(SpeechTokenizer(1, {}, about, codes=options.k), folder / "tokenizer.safetensors")
        described, rate = {}, codec_rate(codec.config)
        for group in ("train", "heldout"):
            read = CodecTokens(folder / f"{group}.jsonl")
            spoken = (read[it.id] for it in ws.groups[group] if it.fault is None)
            described[group] = describe_tokens(Codes(options.k), spoken, rate)
        write_json(folder / "tokens.json", {**about, "speech": described})

    def write(folder: Path, advance: Advance) -> None:
        from safetensors.torch import save_file

        from palimpsest.models.loading import load_encoder
        from palimpsest.models.tokens import describe_tokens, fit_tokens, rows_heard, write_tokens

        encoder = load_encoder(ws.encoder, device=ws.device)[0]
        ids = [example.id for example in ws.groups["train"] if example.fault is None]
        frames = ws.frames_to_read("train", encoder)
        steps = 3 if options.start == "adaptor" else 2
        about = {"encoder": ws.encoder_hash, "features": ws.fingerprint("features")}
        fitted = fit_tokens(ids, frames, options, seed, about)
        write_tokens(fitted, folder / "tokenizer.safetensors")
        advance(1, steps)
        quantiser = fitted.quantiser().to(ws.device)
        described = {}
        for group in ("train", "heldout"):
            read = ws.frames_to_read(group, encoder)
            described[group] = describe_tokens(
                quantiser, (read[it.id].to(ws.device) for it in ws.groups[group] if it.fault is None)
            )
        write_json(folder / "tokens.json", {**fitted.about, "speech": described})
        advance(2, steps)
        if options.start == "adaptor":
            adaptor = ws.adaptor_alone(encoder.config.d_model).to(ws.device)
            rows, counts = rows_heard(adaptor, quantiser, (frames[key].to(ws.device) for key in ids))
            save_file({"rows": rows, "counts": counts}, folder / "rows.safetensors")
            advance(3, steps)

    ws.step(tokens_folder(k), tokens, inputs, write if options.codec is None else write_codes)
    if ws.reads_codec:  # how long prompts are is known only now
        _require_budget(ws)


# ---------------------------------------------------------------------------------------------------------------------
# Training
# ---------------------------------------------------------------------------------------------------------------------
def train(ws: Workspace, model: str) -> None:
    """methods/NAME/checkpoint/: the SpeechLM after training, its processor and its loss curve."""
    method, reduction = ws.config.runs[model], ws.config.importance.reduction
    unread = {"tokens": None} if method.speech == "frames" else {}
    inputs: dict[str, Any] = {
        "base": ws.base_hash,
        "encoder": ws.encoder_hash,
        "dtype": ws.config.models.dtype,
        "data": ws.fingerprint("features" if ws.config.takes_speech(model) else "data"),
        "speech": {**asdict(ws.config.speech), "feature_cache": None, "features": ws.frames.path, **unread},
        "prompt": ws.prompt_inputs,
        # Which answers it learns stands below: data.answers has a say in it.
        "method": {key: value for key, value in asdict(method).items() if key not in (*OF_FRONTIER, "answers")},
        "training": {**asdict(ws.config.training), "compute": ws.compute.dtype},
        "seeds": [ws.seed("adaptor", model), ws.seed("train", model)],
        **ws.adaptor_inputs,
    }
    if method.kind == "layer_lr" or method.weighs_by("importance"):
        inputs |= {"scores": ws.fingerprint(f"{BASE}/importance"), "reduction": reduction}
    if method.weighs_by("fisher"):
        inputs["fisher"] = ws.fingerprint(f"{BASE}/fisher")
    if method.speech != "frames":
        inputs["tokens"] = ws.fingerprint(tokens_folder(ws.config.own_k(model)))
    if ws.config.kept_light(model):
        inputs["checkpoint"] = "light"
    if method.importance == "shuffled":
        inputs["shuffle"] = ws.seed("shuffled layers", model)
    if ws.config.answers_of(method) == "own":
        inputs["answers"] = ws.fingerprint(f"{BASE}/own_answers")
    if method.replay is not None:
        inputs["replay"] = ws.replay_version(method.replay)
    if watched := ws.watches_drift(model):
        inputs["own_text"] = [ws.fingerprint(f"{BASE}/own_text"), ws.drift.in_training, ws.drift.batch_size]

    def write(folder: Path, advance: Advance) -> None:
        from palimpsest.training.keep import Keep
        from palimpsest.training.methods import method_scales
        from palimpsest.training.train import train as train_model

        scales, settings = None, replace(ws.settings, seed=ws.seed("train", model))
        if method.modality == "text":  # written questions pass by the adaptor
            settings = replace(settings, align=None, adaptor_first=None)
        if method.kind == "layer_lr":
            seed = ws.seed("shuffled layers", model)
            scales = method_scales(method, ws.scores(BASE), reduction=reduction, seed=seed)
            if is_main():
                write_json(folder / "layer_scales.json", {str(layer): scale for layer, scale in scales.items()})
        speech_lm = ws.new_speech_lm(model)
        records = train_model(
            speech_lm,
            ws.training_examples(model),
            ws.collator(method.modality, "train", model),
            method,
            settings,
            folder,
            name=model,
            scales=scales,
            held_out=ws.held_out(model),
            own_text=ws.own_text_batches() if watched else (),
            replay=() if method.replay is None else ws.replay_rows(method.replay),
            keep=Keep(
                importance=ws.scores(BASE).tensors(reduction) if method.weighs_by("importance") else None,
                fisher=ws.fisher.tensors("fisher") if method.weighs_by("fisher") else None,
            ),
            sharded=sharded(),
            progress=advance,
        )
        if is_main():
            ws.save(model, speech_lm, folder)
            write_json(folder / "training.json", records)
        ws.keep(model, speech_lm)

    ws.step(f"{folder_of(model)}/checkpoint", train, inputs, write, together=True)


def given(ws: Workspace, model: str) -> None:
    """methods/NAME/checkpoint/given.json: which model this is, in place of one that was trained. Its files stay put."""
    about = ws.given_models[model]

    def write(folder: Path, advance: Advance) -> None:
        write_json(folder / GIVEN, about)
        advance(1, 1)

    ws.step(f"{folder_of(model)}/checkpoint", given, {"given": about["hash"], "speech": about["speech"]}, write)


def blend(ws: Workspace, model: str) -> None:
    """methods/NAME/checkpoint/blend.json: of which method how much of its update; the weights are made when needed."""
    method, base = ws.config.runs[model], ws.config.models.language_model
    of = ws.config.origin_of(model)
    norm_of = None if method.norm_of is None else run_name(method.norm_of, ws.config.number_of(model))
    inputs: dict[str, Any] = {
        "base": ws.base_hash,
        "dtype": ws.config.models.dtype,
        "of": [of, ws.fingerprint(f"{folder_of(of)}/checkpoint")],
        "scale": method.scale,
        "layers": method.layers,
        "norm_of": norm_of and [norm_of, ws.fingerprint(f"{folder_of(norm_of)}/checkpoint")],
    }

    def write(folder: Path, advance: Advance) -> None:
        from palimpsest.models.blend import Blend, matching_scale, update_norm, write_blend
        from palimpsest.models.loading import identity

        scale, norms, source = method.scale, None, ws.given(of)
        if norm_of is not None:
            norms = (update_norm(ws.weights(BASE), ws.weights(norm_of)), update_norm(ws.weights(BASE), ws.weights(of)))
            scale = matching_scale(norms, norm_of, of)
        mark = identity(source or str(checkpoint_of(ws.path, of)))
        write_blend(folder, Blend(base, ws.base_hash, of, source, mark, scale, method.layers, norm_of, norms))
        advance(1, 1)

    ws.step(f"{folder_of(model)}/checkpoint", blend, inputs, write)


def own_answers(ws: Workspace) -> None:
    """base/own_answers/: what the base says to every training question as text, for methods that learn to say that.

    answers.jsonl, a line of each question; learned.jsonl, the answer that each example teaches; left_out.json, which do
    not, and why.
    """
    options = ws.config.evaluation
    inputs = {
        "model": ws.model_inputs(BASE),
        "data": ws.fingerprint("data"),
        "options": [options.max_new_tokens, options.batch_size],
        "prompt": ws.prompt_inputs,
        "compute": ws.compute.dtype,
    }

    def write(folder: Path, advance: Advance) -> None:
        from palimpsest.evaluation.answers import answer_questions, text_answerer
        from palimpsest.evaluation.own_answers import learned, questions_of
        from palimpsest.evaluation.tasks import Task

        limit, compute = options.max_new_tokens, ws.compute.dtype
        rows = answer_questions(
            text_answerer(ws.base, ws.processor.tokenizer, limit, ws.config.prompt, compute=compute),
            Task("train", tuple(questions_of(ws.groups["train"]))),
            "text",
            model=hash_value(inputs["model"]),
            out=folder / "answers.jsonl",
            max_new_tokens=limit,
            batch_size=options.batch_size,
            compute=compute,
            progress=advance,
            notice=ws.reporter.note,
            distributed=True,
        )
        found = learned(ws.groups["train"], rows, ws.processor)
        if is_main():
            write_jsonl(folder / "learned.jsonl", ({"id": it.id, "answer": it.answer} for it in found.examples))
            write_json(folder / "left_out.json", found.to_json())
            if said := str(found):
                ws.reporter.note(said)

    ws.step(f"{BASE}/own_answers", own_answers, inputs, write, together=True)
    if ws.settings.max_tokens is not None:
        ws.require_budget(ws.own_examples)


def replay_text(ws: Workspace) -> None:
    """base/replay_text/: texts that the base writes, for methods that train on them; others than those of own_text."""
    from palimpsest.evaluation.own_text import describe, sample_own_text, write_own_text

    sampling, seed = ws.replay_sampling, ws.seed("replay text")
    inputs = {
        "model": ws.model_inputs(BASE),
        "prompt": ws.prompt_inputs,
        "options": asdict(sampling),
        "seed": seed,
        "compute": ws.compute.dtype,
    }

    def write(folder: Path, advance: Advance) -> None:
        about: dict[str, Any] = {"seed": seed, "compute": ws.compute.dtype}
        texts = sample_own_text(
            ws.base,
            ws.processor.tokenizer,
            sampling,
            style=ws.config.prompt,
            progress=advance,
            distributed=True,
            **about,
        )
        if is_main():
            write_own_text(folder / "replay_text.jsonl", texts, describe(ws.base_hash, sampling, **about))

    ws.step(f"{BASE}/replay_text", replay_text, inputs, write, together=True)


# ---------------------------------------------------------------------------------------------------------------------
# Measurements of one model
# ---------------------------------------------------------------------------------------------------------------------
def importance(ws: Workspace, model: str, other: bool = False) -> None:
    """NAME/importance/: Eq. 2 on training or held-out questions given as text, by two reductions in one pass.

    NAME/importance_other/: the same on other questions, which says how much the choice of data matters; as many, if
    there are as many.
    """
    options = ws.config.importance
    inputs = {
        "model": ws.model_inputs(model),
        "data": ws.fingerprint("data"),
        "options": [options.n_examples, options.batch_size, options.questions],
        "prompt": ws.prompt_inputs,
        "seed": ws.seed("importance"),
        "other": other,
        "compute": ws.exact_compute.dtype,
    }
    masks = other and options.keep_other == "masks"
    if options.accumulate == "kept":
        inputs["accumulated"] = list(options.keep)
    if masks:
        inputs["masks"] = [options.reduction, ws.config.deactivation.ratio]
    elif options.keep != STUDY_REDUCTIONS:
        inputs["keep"] = list(options.keep)

    def write(folder: Path, advance: Advance) -> None:
        from palimpsest.analysis.overlap import most_important

        chosen = importance_questions(ws.groups, options, ws.seed("importance"), other=other)
        reductions = options.keep if options.accumulate == "kept" else STUDY_REDUCTIONS
        scores = _estimated(ws, model, chosen, reductions, folder, advance)
        if is_main():
            scores = scores.with_batch_sums()
            if masks:
                most_important(scores.tensors(options.reduction), ws.config.deactivation.ratio).save(folder / MASKS)
            scores.keeping(() if masks else options.keep).save(folder)

    ws.step(f"{folder_of(model)}/importance{'_other' * other}", importance, inputs, write, together=True)


def fisher(ws: Workspace) -> None:
    """base/fisher/: the Fisher information of every weight, for methods that are pulled to the base by it (EWC).

    On the questions of base/importance. Its gradients are of single sequences, so it is a pass of its own.
    """
    options = ws.config.importance
    inputs = {
        "model": ws.model_inputs(BASE),
        "data": ws.fingerprint("data"),
        "options": [options.n_examples, options.batch_size, options.questions],
        "prompt": ws.prompt_inputs,
        "seed": ws.seed("importance"),
        "compute": ws.exact_compute.dtype,
    }

    def write(folder: Path, advance: Advance) -> None:
        chosen = importance_questions(ws.groups, options, ws.seed("importance"))
        scores = _estimated(ws, BASE, chosen, ("fisher",), folder, advance)
        if is_main():
            scores.save(folder)

    ws.step(f"{BASE}/fisher", fisher, inputs, write, together=True)


def _estimated(
    ws: Workspace, model: str, chosen: Sequence[Example], reductions: Sequence[str], folder: Path, advance: Advance
) -> Any:
    """Scores of a model on the questions, put as text; every rank calls, and has them."""
    from palimpsest.importance.estimate import estimate_importance

    options = ws.config.importance
    total = -(-len(chosen) // options.batch_size)
    language_model = ws.language_model(model)
    # In random order: batches sorted by length would not be alike, and the bootstrap draws batches.
    made = batches(
        ws.collator("text", "train"), chosen, options.batch_size, ws.device, by_length=False, distributed=True
    )
    with _checkpointed(language_model, options):
        return estimate_importance(
            language_model, made, reductions, **_estimation(ws, model, "text", folder, total, advance)
        )


@contextmanager
def _checkpointed(language_model: Any, options: Importance) -> Iterator[None]:
    """Gradient checkpointing within the block, if the recipe says so."""
    if options.gradient_checkpointing:
        language_model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    yield
    if options.gradient_checkpointing:
        language_model.gradient_checkpointing_disable()


def _estimation(
    ws: Workspace, model: str, modality: Modality, folder: Path, total: int, advance: Advance
) -> dict[str, Any]:
    """How a study estimates importance, whatever of; total: batches of all ranks."""
    options = ws.config.importance
    return {
        "offload": {"none": None, "cpu": "cpu", "disk": folder}[options.offload],
        "metadata": {"scored_model": model, "modality": modality, "questions": options.questions},
        "progress": lambda done, _: advance(min(total, done * world_size()), total),
        "distributed": world_size() > 1,
        "compute": ws.exact_compute.dtype,
    }


def importance_parts(ws: Workspace, model: str) -> None:
    """NAME/importance_parts/: Eq. 2 on the questions of NAME/importance, spoken: of the layers, the old rows of the
    embedding and those of the speech tokens. records.json has the sums; scores of weights are not kept.
    """
    options = ws.config.importance
    inputs = {
        "model": ws.model_inputs(model, in_speech=True),
        "data": ws.fingerprint("features"),
        "frames": ws.frames.path,
        "options": [options.n_examples, options.batch_size, options.questions],
        "prompt": ws.prompt_inputs,
        "seed": ws.seed("importance"),
        "compute": ws.exact_compute.dtype,
    }

    def write(folder: Path, advance: Advance) -> None:
        from palimpsest.analysis.parts import estimate_parts, part_records
        from palimpsest.data.in_loop import encode_batch

        chosen = importance_questions(ws.groups, options, ws.seed("importance"))
        spoken = [example for example in chosen if example.fault is None]
        total = -(-len(spoken) // options.batch_size)
        speech_lm, collator = ws.speech_lm(model), ws.collator("speech", options.questions, model)
        made = batches(collator, spoken, options.batch_size, ws.device, by_length=False, distributed=True)
        encoded = (encode_batch(it, speech_lm.encoder, ws.config.speech.length, ws.compute.dtype) for it in made)
        with _checkpointed(speech_lm.language_model, options):
            scores = estimate_parts(
                speech_lm, encoded, ("signed_sum",), **_estimation(ws, model, "speech", folder, total, advance)
            )
        if is_main():
            records = part_records(model, scores.with_batch_sums(), seed=ws.seed("results"))
            write_json(folder / "records.json", records)

    ws.step(f"{folder_of(model)}/importance_parts", importance_parts, inputs, write, together=True)


def importance_questions(
    groups: Mapping[str, Sequence[Example]], options: Importance, seed: int, *, other: bool = False
) -> list[Example]:
    """The questions on which importance is measured; `other`: those of the noise floor, none of which is among them.

    The others are the rest of the same group, or all of the other group, of training and held-out questions, where
    most of the group was needed: then they may be fewer.
    """
    # A changed copy asks the same question as its original: as text they are one example.
    # No variable is called `train`: that is a step, on whose code this one would seem to depend.
    learned = [example for example in groups["train"] if example.augmentation is None]
    pool, elsewhere = (learned, groups["heldout"]) if options.questions == "train" else (groups["heldout"], learned)
    n_examples = min(len(pool), options.n_examples or max(2, len(learned) // 30))
    order = random.Random(seed).sample(pool, len(pool))
    if not other:
        return order[:n_examples]
    rest = order[n_examples:]
    return list((rest if len(rest) >= n_examples else elsewhere)[:n_examples])


def deactivation(ws: Workspace, model: str) -> None:
    """NAME/deactivation/: perplexity of held-out answers with the top, bottom and random weights set to zero."""
    options, reduction = ws.config.deactivation, ws.config.importance.reduction
    inputs = {
        "model": ws.model_inputs(model, in_speech=True),
        "importance": ws.fingerprint(f"{folder_of(model)}/importance"),
        "reduction": reduction,
        **ws.questions,
        "options": asdict(options),
        "prompt": ws.prompt_inputs,
        "seed": ws.seed("deactivation"),
        "compute": ws.exact_compute.dtype,
    }

    def write(folder: Path, advance: Advance) -> None:
        from palimpsest.evaluation.deactivation import deletion_curve

        held_out = ws.groups["heldout"][: options.n_examples]
        records = deletion_curve(
            model,
            ws.whole(model),
            ws.scores(model).tensors(reduction),
            {
                modality: partial(
                    batches, ws.collator(modality, "heldout", model), held_out, options.batch_size, ws.device
                )
                for modality in ws.modalities(model)
            },
            ratios=(options.ratio,),
            scopes=options.scopes,
            random_seeds=[ws.seed(f"deactivation/{i}") for i in range(options.random_seeds)],
            reduction=reduction,
            progress=advance,
            compute=ws.exact_compute.dtype,
            distributed=True,
        )
        if is_main():
            write_json(folder / "records.json", records)

    ws.step(f"{folder_of(model)}/deactivation", deactivation, inputs, write, together=True)


def perplexity(ws: Workspace, model: str) -> None:
    """NAME/perplexity/: losses-MODALITY.jsonl of every held-out answer, and records.json."""
    size = ws.config.deactivation.batch_size
    inputs = {
        "model": ws.model_inputs(model, in_speech=True),
        **ws.questions,
        "prompt": ws.prompt_inputs,
        "batch_size": size,
        "compute": ws.compute.dtype,
    }

    def write(folder: Path, advance: Advance) -> None:
        from palimpsest.evaluation.perplexity import measure_losses

        records = []
        for modality in ws.modalities(model):
            asked = ws.language_model(model) if modality == "text" else ws.speech_lm(model)
            about: dict[str, Any] = {"method": model, "task": "heldout", "progress": advance}
            about |= {"compute": ws.compute.dtype, "distributed": True}
            collator = ws.collator(modality, "heldout", model)
            records.append(measure_losses(asked, collator, ws.groups["heldout"], size, folder, **about))
        if is_main():
            write_json(folder / "records.json", records)

    ws.step(f"{folder_of(model)}/perplexity", perplexity, inputs, write, together=True)


def probe(ws: Workspace, model: str) -> None:
    """NAME/probe/: right against wrong continuations, the losses of every pair and their summary."""
    from palimpsest.evaluation.probe import load_pairs, pair_losses, pairs_version, summarise_probe

    def write(folder: Path, advance: Advance) -> None:
        asked, tokenizer = ws.language_model(model), ws.processor.tokenizer
        losses = pair_losses(asked, tokenizer, load_pairs(), progress=advance, distributed=True)
        if is_main():
            write_jsonl(folder / "pairs.jsonl", (loss.to_row() for loss in losses))
            write_json(folder / "records.json", summarise_probe(losses, model))

    inputs = {"model": ws.model_inputs(model), "pairs": pairs_version()}
    ws.step(f"{folder_of(model)}/probe", probe, inputs, write, together=True)


def own_text(ws: Workspace) -> None:
    """base/own_text/: texts that the base writes, once, with their tokens; the drift of every method is on them."""
    from palimpsest.evaluation.own_text import describe, sample_own_text, write_own_text

    options, seed = ws.drift, ws.seed("own text")
    inputs = {
        "model": ws.model_inputs(BASE),
        "prompt": ws.prompt_inputs,
        "options": asdict(options.own_text),
        "seed": seed,
        "compute": ws.exact_compute.dtype,
    }

    def write(folder: Path, advance: Advance) -> None:
        compute = ws.exact_compute.dtype
        about: dict[str, Any] = {"seed": seed, "compute": compute}
        texts = sample_own_text(
            ws.base,
            ws.processor.tokenizer,
            options.own_text,
            style=ws.config.prompt,
            progress=advance,
            distributed=True,
            **about,
        )
        if is_main():
            write_own_text(folder / "own_text.jsonl", texts, describe(ws.base_hash, options.own_text, **about))

    ws.step(f"{BASE}/own_text", own_text, inputs, write, together=True)


def drift(ws: Workspace, model: str) -> None:
    """NAME/drift/: KL to the base and back of every token of the base's own text, and its summary.

    The base stands in memory beside the one tuned model.
    """
    options, seed = ws.drift, ws.seed("drift")
    inputs = {
        "model": ws.model_inputs(model),
        "base": ws.model_inputs(BASE),
        "own_text": ws.fingerprint(f"{BASE}/own_text"),
        "batch_size": options.batch_size,
        "seed": seed,
        "compute": ws.exact_compute.dtype,
    }

    def write(folder: Path, advance: Advance) -> None:
        from palimpsest.evaluation.drift import measure_drift, summarise_drift, token_classes, write_drift

        texts = ws.own_text
        drifts = measure_drift(
            ws.base,
            ws.language_model(model),
            texts,
            batch_size=options.batch_size,
            compute=ws.exact_compute.dtype,
            progress=advance,
            distributed=True,
            passes=ws.base_passes,
        )
        if is_main():
            write_drift(folder / "tokens.jsonl", drifts)
            classes = [token_classes(ws.processor.tokenizer, text) for text in texts]
            records = summarise_drift(drifts, texts, classes, model=model, base=BASE, seed=seed)
            write_json(folder / "records.json", records)

    ws.step(f"{folder_of(model)}/drift", drift, inputs, write, together=True)


def general_text(ws: Workspace, model: str) -> None:
    """NAME/general_text/: the loss of every text that the recipe names, and its summary."""
    from palimpsest.data.texts import texts_version
    from palimpsest.evaluation.general_text import summarise_text, text_losses, write_text_losses

    options, texts, seed = ws.drift, ws.general_texts, ws.seed("general text")
    inputs = {
        "model": ws.model_inputs(model),
        "texts": texts_version(texts),
        "name": ws.general_text_name,
        "options": [options.general_text.window, options.batch_size],
        "seed": seed,
        "compute": ws.exact_compute.dtype,
    }

    def write(folder: Path, advance: Advance) -> None:
        losses = text_losses(
            ws.language_model(model),
            ws.processor.tokenizer,
            texts,
            window=options.general_text.window,
            batch_size=options.batch_size,
            compute=ws.exact_compute.dtype,
            progress=advance,
            distributed=True,
        )
        if is_main():
            write_text_losses(folder / "losses.jsonl", losses)
            write_json(folder / "records.json", [summarise_text(losses, model, ws.general_text_name, seed)])

    ws.step(f"{folder_of(model)}/general_text", general_text, inputs, write, together=True)


def answers(ws: Workspace, model: str, task: str, modality: Modality) -> None:
    """NAME/samples/TASK-MODALITY/: an answer to every question, as text, as speech or as a transcript.

    "cascade": the base model answers the recogniser's transcripts, the reference for S2T; "text_asr": a tuned model
    answers the same transcripts, which must have been made.
    """
    options = ws.config.evaluation
    inputs = {
        "model": ws.model_inputs(model, in_speech=modality == "speech"),
        "data": ws.fingerprint("data"),
        "task": task,
        "options": [options.max_new_tokens, options.batch_size],
        "prompt": ws.prompt_inputs,
        "compute": ws.compute.dtype,
    }
    if modality == "cascade":
        inputs["asr"] = ws.model_hash(str(ws.config.models.asr))
    elif modality == "text_asr":
        inputs["cascade"] = ws.fingerprint(f"{BASE}/samples/{task}-cascade")
    else:
        inputs |= ws.questions

    def write(folder: Path, advance: Advance) -> None:
        from palimpsest.evaluation.answers import answer_questions
        from palimpsest.evaluation.tasks import Task

        answer_questions(
            _answerer(ws, model, task, modality),
            Task(task, tuple(ws.groups[f"task-{task}"])),
            modality,
            model=hash_value(inputs["model"]),
            out=folder / "samples.jsonl",
            max_new_tokens=options.max_new_tokens,
            batch_size=options.batch_size,
            compute=ws.compute.dtype,
            progress=advance,
            notice=ws.reporter.note,
            distributed=True,
        )

    ws.step(f"{folder_of(model)}/samples/{task}-{modality}", answers, inputs, write, together=True)


def _answerer(ws: Workspace, model: str, task: str, modality: Modality) -> Any:
    from palimpsest.evaluation.answers import text_answerer
    from palimpsest.evaluation.cascade import cascade_answerer, transcribe, transcribed_before
    from palimpsest.evaluation.spoken import speech_answerer
    from palimpsest.models.loading import load_asr

    limit, compute = ws.config.evaluation.max_new_tokens, ws.compute.dtype
    if modality == "speech" and ws.config.takes_recordings(model):
        from palimpsest.evaluation.audio_llm import audio_llm_answerer

        prompt = ws.config.prompt
        asked_with = (limit, prompt.system, prompt.speech_instruction, compute)
        return audio_llm_answerer(ws.language_model(model), ws.audio_processor(model), *asked_with)
    if modality == "speech":
        return speech_answerer(ws.speech_lm(model), ws.collator("speech", f"task-{task}", model), limit, compute)
    by_text = text_answerer(ws.language_model(model), ws.processor.tokenizer, limit, ws.config.prompt, compute=compute)
    if modality == "cascade":
        recogniser = load_asr(str(ws.config.models.asr), device=ws.device)
        return cascade_answerer(partial(transcribe, *recogniser, compute=compute), by_text)
    if modality == "text_asr":
        rows = read_jsonl(samples_of(ws.path, BASE, task, "cascade"))
        return cascade_answerer(transcribed_before({row["id"]: row["transcript"] for row in rows}), by_text)
    return by_text


# ---------------------------------------------------------------------------------------------------------------------
# Analysis and report
# ---------------------------------------------------------------------------------------------------------------------
def analysis(ws: Workspace) -> None:
    """analysis/: layer distribution, shift, clustering, parameter change."""
    names = [BASE, *(run for run in ws.config.runs if ws.config.measures(run, "importance"))]
    clustered = [name for name in names if ws.config.measures(name, "clustering")]
    inputs = {**_analysis_inputs(ws, names), "options": asdict(ws.config.analysis), "clustered": clustered}

    def write(folder: Path, advance: Advance) -> None:
        from palimpsest.analysis.analyse import write_tables

        if not ws.given(names[-1]):  # which is the one in memory, and the first that is asked for
            ws.forget()  # the base is loaded beside what checkpoints hold
        options = ws.config.analysis
        write_tables(
            folder,
            models=names,
            clustered=clustered,
            scores=ws.scores,
            weights=ws.weights,
            paired={name: partial(ws.paired, name) for name in clustered if name != BASE and ws.given(name)},
            other=lambda: ws.scores(BASE, other=True),
            other_mask=ws.other_mask if ws.config.importance.keep_other == "masks" else None,
            reduction=ws.config.importance.reduction,
            ratio=ws.config.deactivation.ratio,
            rank=ws.rank,
            n_shuffles=options.shuffles,
            rank_draws=options.rank_draws,
            n_draws=options.bootstrap,
            seed=ws.seed("analysis"),
            progress=advance,
        )

    ws.step("analysis", analysis, inputs, write)


def maps(ws: Workspace) -> None:
    """maps/: heat maps of importance and change, of the first run of each method; further ones would only repeat."""
    names = [BASE, *(name for name in ws.config.methods if ws.config.measures(name, "importance"))]

    def write(folder: Path, advance: Advance) -> None:
        from palimpsest.analysis.analyse import write_study_maps

        reduction = ws.config.importance.reduction
        write_study_maps(folder, models=names, scores=ws.scores, weights=ws.weights, reduction=reduction)
        advance(1, 1)

    ws.step("maps", maps, _analysis_inputs(ws, names), write)


def _analysis_inputs(ws: Workspace, names: Sequence[str]) -> dict[str, Any]:
    return {
        # In order: noise is drawn for one model after the other.
        "importance": [[name, ws.fingerprint(f"{folder_of(name)}/importance")] for name in names],
        "other": ws.fingerprint(f"{BASE}/importance_other"),
        "checkpoints": {name: ws.fingerprint(f"{folder_of(name)}/checkpoint") for name in names if name != BASE},
        "rank": ws.rank,
        "reduction": ws.config.importance.reduction,
        "ratio": ws.config.deactivation.ratio,
        "seed": ws.seed("analysis"),
    }


def report(ws: Workspace, started: float) -> Path:
    """results.json, provenance.json, figures/ and report.html, from what the steps left; made anew each time."""
    from palimpsest.report.figures import write_figures
    from palimpsest.report.inputs import read_inputs
    from palimpsest.report.page import write_report
    from palimpsest.study.results import collect

    if old := ws.dir.set_aside([step.name for step in ws.done]):
        ws.reporter.note(f"this recipe makes no {', '.join(old)}: moved to {ws.path / SET_ASIDE}.")
    with ws.reporter.step("report") as advance:
        results = collect(ws.dir, ws.config, [step.name for step in ws.done], ws.seed("results"))
        write_tables(ws.path / RESULTS, results)
        write_json(ws.path / PROVENANCE, ws.provenance(started))
        advance(1, 3)
        inputs = read_inputs(ws.path)
        write_figures(ws.path, inputs)
        advance(2, 3)
        page = write_report(ws.path, inputs=inputs)
        advance(3, 3)
    return page
