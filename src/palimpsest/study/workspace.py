"""What the steps of a study share: the run directory, seeds, fingerprints, the data and the loaded models."""

from __future__ import annotations

import ctypes
import gc
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from palimpsest.config import StudyConfig
from palimpsest.data.codec_tokens import CodecTokens
from palimpsest.data.collate import Collator
from palimpsest.data.examples import Example, read_manifest
from palimpsest.data.features import Features
from palimpsest.data.in_loop import Encoded, FramesChoice, FramesRecord, Recordings, choose_frames, frame_bytes
from palimpsest.data.splits import Split, StudyData
from palimpsest.data.texts import Text, read_texts, texts_version, windows
from palimpsest.data.voices import Voices
from palimpsest.evaluation.drift_settings import Drift, Sampling
from palimpsest.files import (
    UserError,
    free_bytes,
    hash_file,
    hash_value,
    read_json,
    read_jsonl,
    without_folders,
    write_json,
)
from palimpsest.options import require_shape
from palimpsest.parallel import is_main, share, world_size
from palimpsest.progress import Advance, Reporter
from palimpsest.records import BASE
from palimpsest.rundir import (
    DROPPED,
    FRAMES,
    MASKS,
    RECORDINGS,
    STEP_FILE,
    TOKENS,
    RunDir,
    Step,
    checkpoint_of,
    folder_of,
    provenance,
    tokens_folder,
    utc,
)
from palimpsest.study.code import step_code
from palimpsest.training.remedies import OWN, Replay

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel
    from transformers.models.whisper.modeling_whisper import WhisperEncoder

    from palimpsest.evaluation.drift import BasePasses
    from palimpsest.evaluation.own_text import OwnText
    from palimpsest.importance.mask import Mask
    from palimpsest.importance.scores import Scores
    from palimpsest.models.blend import Blend
    from palimpsest.models.compute import Choice
    from palimpsest.models.paired_weights import PairedWeights
    from palimpsest.models.processor import SpeechLMProcessor
    from palimpsest.models.speech_lm import SpeechAdaptor, SpeechLM
    from palimpsest.models.tokens import Frames as TokenFrames
    from palimpsest.models.tokens import SpeechTokenizer
    from palimpsest.models.trained_adaptor import TrainedAdaptor
    from palimpsest.planning.memory import Decoder
    from palimpsest.training.held_out import HeldOut
    from palimpsest.training.replay import TextRow
    from palimpsest.training.settings import Settings

AskedAs = Literal["text", "speech"]  # what a collator can put; records.Modality has those of evaluation


M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
KEPT_BYTES = 1 << 28


@contextmanager
def keeping_memory() -> Iterator[None]:
    """Within the block glibc keeps what is freed until `give_back_memory`, for what is allocated next.

    By itself it takes each block above 32 MB from the system anew, which clears every page of it, 2 µs per 4 kB; of
    logits and matrices these are many. And what is there already, modules above all, is not looked through again with
    every collection of garbage.
    """
    with suppress(OSError, AttributeError):  # another C library
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_THRESHOLD, KEPT_BYTES)
        libc.mallopt(M_TRIM_THRESHOLD, KEPT_BYTES)
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def give_back_memory() -> None:
    """glibc keeps what a step has freed, up to gigabytes of small blocks that the next step's large ones do not fit."""
    gc.collect()
    with suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


class Workspace:
    """State of one study in progress; at most one tuned model is in memory at a time, beside the base."""

    def __init__(self, config: StudyConfig, folder: Path, reporter: Reporter) -> None:
        self.config = config
        self.dir = RunDir(folder)
        self.path = folder
        self.reporter = reporter
        self.done: list[Step] = []
        self._said_why = False
        self._tuned: tuple[str, SpeechLM] | None = None
        self._text: tuple[str, PreTrainedModel] | None = None  # a given model that is asked in text alone
        self._replayed: dict[tuple[str, str, int | None], list[Text]] = {}

    # -- steps --------------------------------------------------------------------------------------------------------
    def step(
        self,
        name: str,
        made_by: Callable[..., None],
        inputs: Mapping[str, Any],
        write: Callable[[Path, Advance], None],
        *,
        together: bool = False,
    ) -> None:
        """Run `write(folder, advance)` unless the step is there with the same inputs and code, that of `made_by`.

        Of several processes rank 0 does this, and the others wait; `together`: all call `write`, with the same folder,
        in which rank 0 writes what is not divided.
        """
        full = {**inputs, "code": step_code(made_by)}
        step = share(self.dir.finished(name, full) if is_main() else None)
        if step is not None:
            self.reporter.skipped(name)
        else:
            self._say_why(name, full)
            with self.reporter.step(name) as advance:
                if is_main():
                    step = self.dir.step(
                        name, full, lambda folder: write(share(folder) if together else folder, advance)
                    )
                elif together:
                    write(share(), advance)
                step = share(step)
            give_back_memory()
        self.done.append(step)

    def _say_why(self, name: str, inputs: Mapping[str, Any]) -> None:
        """A finished step is made again: its files were damaged, or what went in differs; and what was begun of one.

        The latter is said once, of the first such step; the steps after it follow from that.
        """
        if not is_main():
            return
        for left in self.dir.begun_otherwise(name, inputs):
            size = sum(file.stat().st_size for file in left.rglob("*") if file.is_file())
            said = f"{name} was begun with other inputs or other code and begins anew"
            if free_bytes(self.path) < 2 * size:  # it will need as much, and as much again for what it leaves
                shutil.rmtree(left)
                self.reporter.note(f"{said}; the {size / 1e9:.2f} GB that were done of it are deleted to make room.")
            else:
                self.reporter.note(
                    f"{said}; the {size / 1e9:.2f} GB that were done of it stay in {left} until this is finished: undo "
                    "the change to go on there."
                )
        if (damage := self.dir.damage(name)) is not None:
            self.reporter.note(f"{self.path / name} was finished before and is made again: its {damage}.")
        found = [] if self._said_why else self.dir.outdated(name, inputs)
        if found:
            self._said_why = True
            what = "code" if found == ["code"] else ", ".join(found)
            self.reporter.note(
                f"{name} was finished before and is made again, as is what depends on it: its {what} changed."
            )

    def is_done(self, name: str, made_by: Callable[..., None], inputs: Mapping[str, Any]) -> bool:
        return self.dir.finished(name, {**inputs, "code": step_code(made_by)}) is not None

    def fingerprint(self, step: str) -> str:
        return next(s.fingerprint for s in self.done if s.name == step)

    def seed(self, purpose: str, run: str = BASE) -> int:
        """Every seed of a study derives from its one seed, the purpose it serves and, after the first, the run."""
        number = self.config.number_of(run)
        return int(hash_value([self.config.seed, purpose, *([number] if number else [])])[:8], 16) % (2**31)

    # -- data ---------------------------------------------------------------------------------------------------------
    @cached_property
    def sources(self) -> StudyData:
        """Where the study's examples come from; nothing is read yet."""
        data = self.config.data

        return StudyData(
            data.train,
            data.heldout if data.heldout is not None else data.heldout_examples or 0,
            {task.name: task for task in self.config.evaluation.tasks},
            data.filters,
            data.strict,
            self.seed("data"),
            data.decontaminate,
            self._known_recordings(),
        )

    def _known_recordings(self) -> dict[str, str]:
        """What an earlier start found in recordings that have their size and time still; any other file is none."""
        file = self.path / RECORDINGS
        with suppress(UserError):
            found = read_json(file) if file.exists() else {}
            return found if isinstance(found, dict) else {}
        return {}

    def remember_recordings(self) -> None:
        """So that the next start need not read them all."""
        if is_main() and self.sources.found != self._known_recordings():
            write_json(self.path / RECORDINGS, self.sources.found)

    @cached_property
    def source_inputs(self) -> dict[str, Any]:
        """What the examples follow from, as JSON; read once."""
        return self.sources.inputs()

    @cached_property
    def voices(self) -> dict[str, Voices]:
        """Names of the voices that speak what has no recording, by group: the split's own, or those of all.

        A group that no model of the study is asked in speech is not there.
        """
        data, common = self.config.data, self.config.speech.voice
        heldout = data.heldout or data.train  # taken out of the training source
        splits: dict[str, Split] = {"train": data.train} if self.config.trains else {}
        if self.config.speaks:
            splits |= {"heldout": heldout, **{f"task-{task.name}": task for task in self.config.evaluation.tasks}}
        return {key: common if split.voice is None else split.voice for key, split in splits.items()}

    @cached_property
    def groups(self) -> dict[str, list[Example]]:
        """The examples of data/, with audio, by manifest: train, heldout, task-NAME."""
        paths = sorted((self.path / "data").glob("*.jsonl"))
        # One process looks at the recordings' headers.
        return {path.stem: read_manifest(path, check=is_main()) for path in paths if path.stem != DROPPED}

    def read_data_anew(self) -> None:
        """When data/ was made: what is remembered of it may be an earlier start's."""
        for name in ("groups", "dropped"):
            self.__dict__.pop(name, None)

    @cached_property
    def dropped(self) -> dict[str, dict[str, int]]:
        """How many examples were left out of each group, by reason."""
        rows = read_jsonl(self.path / "data" / f"{DROPPED}.jsonl")
        groups = {row["split"] for row in rows}
        return {g: dict(Counter(row["reason"] for row in rows if row["split"] == g)) for g in sorted(groups)}

    @property
    def questions(self) -> dict[str, str]:
        """What held-out and task questions follow from: their encoder frames, in a study of text alone the data."""
        step = "data" if self.config.models.encoder is None else "features"
        return {step: self.fingerprint(step)}

    def modalities(self, model: str) -> list[AskedAs]:
        """How a model's losses are measured."""
        return ["text", "speech"] if self.config.takes_speech(model) else ["text"]

    def collator(self, modality: AskedAs, group: str, run: str = BASE) -> Collator:
        return Collator(self.processor_of(run), modality, self.speech(group, run) if modality == "speech" else None)

    def speech(self, group: str, run: str = BASE) -> Features | Recordings | CodecTokens:
        """Only training may encode in its loop: held-out and task questions are few and asked of every model."""
        if self.reads_codec and self.config.speech_of(run) == "tokens":
            return CodecTokens(self.path / TOKENS / f"{group}.jsonl")
        if group == "train" and self.frames.path == "loop":
            return Recordings(self.processor, self.groups[group])
        return Features(self.path / "features" / group)

    @property
    def reads_codec(self) -> bool:
        """Whether speech tokens are those of a codec."""
        tokens = self.config.speech.tokens
        return tokens is not None and tokens.kind == "codec"

    @cached_property
    def frames(self) -> FramesChoice:
        """Where training takes encoder frames from; all processes must ask at the same place."""
        return share(self._choose_frames() if is_main() else None)

    def _choose_frames(self) -> FramesChoice:
        """What `auto` came to is kept: once the frames are written, the disk would say another thing."""
        wanted, reads = self.config.speech.features, self.config.speech_reads
        if wanted != "auto":
            return choose_frames(wanted, frame_bytes=0, free=0, reads=reads)
        n_bytes, file = self.frame_bytes(self.groups["train"]), self.path / FRAMES
        asked = {"frame_bytes": n_bytes, "reads": reads}
        if file.exists():
            before = read_json(file)
            require_shape(before, FramesRecord, str(file), "delete it and run the study again")
            if before["asked"] == asked:
                return FramesChoice(**before["choice"])
        cache = self.config.speech.feature_cache
        free = free_bytes(self.path if cache is None else Path(cache).expanduser())
        choice = choose_frames(wanted, frame_bytes=n_bytes, free=free, reads=reads)
        write_json(file, {"asked": asked, "free": free, "choice": asdict(choice)})
        return choice

    def frames_to_read(self, group: str, encoder: WhisperEncoder) -> TokenFrames:
        """Encoder frames of a group by example id, from the cache or, of training that encodes in its loop, anew."""
        speech = self.speech(group)
        return Encoded(speech, encoder, self.compute.dtype) if isinstance(speech, Recordings) else speech

    def adaptor_alone(self, d_model: int) -> SpeechAdaptor:
        """That of models.adaptor, behind no language model."""
        from palimpsest.models.speech_lm import SpeechAdaptor

        assert self.adaptor is not None
        trained = self.adaptor
        adaptor = SpeechAdaptor(d_model, trained.hidden, trained.output, trained.stack_factor)
        adaptor.load_state_dict(trained.tensors)
        return adaptor.eval()

    def frame_bytes(self, examples: Sequence[Example]) -> int:
        from palimpsest.models.loading import encoder_width

        return frame_bytes(examples, self.processor, encoder_width(self.encoder))

    def held_out(self, name: str) -> HeldOut | None:
        """What a method's training is evaluated on between its steps, if it is; in speech only if it takes speech."""
        if self.config.training.eval_every is None:
            return None
        groups = self.groups
        return {
            modality: (self.collator(modality, "heldout", name), groups["heldout"])
            for modality in self.modalities(name)
        }

    @property
    def drift(self) -> Drift:
        """Of a study that measures it."""
        assert self.config.drift is not None
        return self.config.drift

    @cached_property
    def own_text(self) -> list[OwnText]:
        """What base/own_text/ has."""
        from palimpsest.evaluation.own_text import read_own_text

        texts = read_own_text(self.path / BASE / "own_text" / "own_text.jsonl")
        assert texts is not None
        return texts

    @cached_property
    def base_passes(self) -> BasePasses:
        """Of the base over its own text, once for the drift of all methods."""
        from palimpsest.evaluation.drift import BasePasses

        return BasePasses()

    def watches_drift(self, name: str) -> bool:
        """Whether a training estimates the drift between its steps: one that leaves the language model has none."""
        asked = self.config.drift is not None and self.config.training.eval_every is not None
        return asked and self.drift.in_training > 0 and self.config.runs[name].tunes

    def own_text_batches(self) -> list[dict[str, Any]]:
        """The first texts of each kind, on which training estimates the drift."""
        from palimpsest.evaluation.drift import batch_of

        n, size = self.drift.in_training, self.drift.batch_size
        kinds = dict.fromkeys(text.kind for text in self.own_text)
        first = [text for kind in kinds for text in [text for text in self.own_text if text.kind == kind][:n]]
        return [batch_of(first[start : start + size], "cpu") for start in range(0, len(first), size)]

    @cached_property
    def general_texts(self) -> list[Text]:
        """The texts that the recipe's drift.general_text names; none without."""
        options = self.drift.general_text
        return [] if options.text is None else read_texts(options.text, options.split, options.limit)

    @property
    def general_text_name(self) -> str:
        return without_folders(str(self.drift.general_text.text))

    # -- training -----------------------------------------------------------------------------------------------------
    @cached_property
    def settings(self) -> Settings:
        return replace(self.config.training, seed=self.seed("train"), compute=self.compute.dtype)

    def training_examples(self, run: str) -> list[Example]:
        """What a run is trained on, with the answers that it learns."""
        own = self.config.answers_of(self.config.runs[run]) == "own"
        return self.own_examples if own else self.groups["train"]

    @cached_property
    def own_examples(self) -> list[Example]:
        """The training examples with what the base answers to them; some have no such answer."""
        rows = read_jsonl(self.path / BASE / "own_answers" / "learned.jsonl")
        learned = {row["id"]: row["answer"] for row in rows}
        return [replace(it, answer=learned[it.id]) for it in self.groups["train"] if it.id in learned]

    @property
    def replays(self) -> list[Replay]:
        """Of every method that has some."""
        return [it.replay for it in self.config.methods.values() if it.trains and it.replay is not None]

    @property
    def replay_sampling(self) -> Sampling:
        """How much the base writes to be replayed: as much as the method that takes most; others take its beginning."""
        own = [replay for replay in self.replays if replay.text == OWN]
        return Sampling(max(replay.n_texts for replay in own), max(replay.new_tokens for replay in own))

    def replay_version(self, replay: Replay) -> str:
        """What the rows of a replay follow from, besides the base, which has its own place among a step's inputs."""
        return self.fingerprint(f"{BASE}/replay_text") if replay.text == OWN else texts_version(self._texts_of(replay))

    def _texts_of(self, replay: Replay) -> list[Text]:
        """Of a source; read once, whatever the number of methods."""
        key = (replay.text, replay.split, replay.limit)
        if key not in self._replayed:
            self._replayed[key] = read_texts(*key)
        return self._replayed[key]

    def replay_rows(self, replay: Replay) -> list[TextRow]:
        """Rows of text to train on. Of the base's own what it sampled is learned, of a source all but its beginning."""
        from palimpsest.evaluation.own_text import beginning, read_own_text
        from palimpsest.models.prompts import encode
        from palimpsest.training.replay import TextRow

        if replay.text == OWN:
            texts = read_own_text(self.path / BASE / "replay_text" / "replay_text.jsonl") or []
            kinds = dict.fromkeys(text.kind for text in texts)
            chosen = [text for kind in kinds for text in [it for it in texts if it.kind == kind][: replay.n_texts]]
            return [TextRow(text.id, text.prompt_ids, text.ids[: replay.new_tokens]) for text in chosen]
        tokenizer = self.processor.tokenizer
        before = beginning(tokenizer)
        # The first token of a row is read alone, so that none is learned twice; a budget below makes the rows shorter.
        learned = max(1, min(replay.window, self.settings.max_tokens or replay.window) - len(before))
        return [
            TextRow(f"text {text.id}/{number}", tuple(context), tuple(tokens))
            for text in self._texts_of(replay)
            for number, (context, tokens) in enumerate(windows(encode(tokenizer, text.text), before, learned))
        ]

    def require_replay(self) -> None:
        """Text to replay that is not there, too short, or longer than the model has positions is an error at once."""
        from palimpsest.evaluation.own_text import kinds_of
        from palimpsest.models.loading import blank_language_model
        from palimpsest.training.replay import fitting, require_batch

        size, budget = self.settings.batch_size, self.settings.max_tokens
        for replay in self.replays:
            if replay.text == OWN:
                if budget is None:  # else what fills it is known when the texts are there
                    require_batch(replay.n_texts * len(kinds_of(self.processor.tokenizer)), size)
                continue
            blank = blank_language_model(self.config.models.language_model)
            longest = getattr(blank.config, "max_position_embeddings", None)
            if longest is not None and replay.window > longest:
                raise UserError(
                    f"replay.window is {replay.window} tokens, and {self.config.models.language_model} has {longest} "
                    "positions; set it to as many at most."
                )
            fitting(self.replay_rows(replay), size, budget)

    def require_budget(self, examples: Sequence[Example]) -> None:
        """A training example above the token budget is an error now, not after hours of other steps."""
        if self.settings.max_tokens is not None:
            from palimpsest.training.batching import require_budget, sequence_lengths

            read = {(self.config.stack_factor(run), self.config.speech_of(run)): run for run in self.config.methods}
            for run in read.values():
                lengths = sequence_lengths(self.collator("speech", "train", run), examples)
                require_budget(examples, lengths, self.settings.max_tokens)

    def require_disk(self, frames: int = 0) -> None:
        """Raise UserError that names the first step yet to come whose files would not fit beside those before it.

        frames: bytes of encoder frames that the run directory gets; known when the data are there.
        """
        from palimpsest.models.loading import blank_language_model
        from palimpsest.planning.needs import StepDisk, disk_of_steps, first_that_fails, steps_at_most
        from palimpsest.planning.plan import setups_of
        from palimpsest.planning.sizes import decoder_of, encoder_sizes

        models = self.config.models
        decoder, encoder = decoder_of(blank_language_model(models.language_model)), encoder_sizes(models.encoder)[0]
        self._require_memory_for_two(decoder)
        before = self.path / "data" / "train.jsonl"  # of an earlier start; nothing but the number is read of it
        n_examples = before.read_bytes().count(b"\n") if before.exists() else None
        setups = setups_of(self.config, decoder, encoder)
        n_steps = {name: steps_at_most(self.config, n_examples, self.config.methods[name].replay) for name in setups}
        steps = disk_of_steps(self.config, decoder, setups, n_steps, world_size())
        left = [
            step for step in (StepDisk("features", frames), *steps) if not (self.path / step.name / STEP_FILE).exists()
        ]
        begun = (file for file in (self.path / ".working").rglob("*") if file.is_file())
        have, free = sum(file.stat().st_size for file in begun), free_bytes(self.path)
        short = first_that_fails(left, have + free)
        if short is not None:
            step, needed = short
            raise UserError(
                f"The study {self.config.name} needs {(needed - have) / 1e9:.2f} GB by its step {step} but {self.path} "
                f"has {free / 1e9:.2f} GB free; free some space, choose another folder with --out, or let the recipe "
                "keep less (docs/run-directory.md, Keeping less)."
            )

    def _require_memory_for_two(self, decoder: Decoder) -> None:
        """Raise UserError where the device has no room for the weights of the base and of a model given."""
        from palimpsest.planning.plan import device_of

        if all(method.trains for method in self.config.methods.values()):
            return
        capacity, name, _ = device_of(self.config)
        needed = 2 * (4 if self.config.models.dtype == "float32" else 2) * decoder.parameters
        if needed > capacity:
            raise UserError(
                f"The weights of the base and of a model beside it take {needed / 1e9:.1f} GB in "
                f"{self.config.models.dtype}, and {name} has {capacity / 1e9:.1f} GB; use weights in bfloat16 (dtype), "
                "or a device with more memory."
            )

    # -- models -------------------------------------------------------------------------------------------------------
    @cached_property
    def device(self) -> str:
        from palimpsest.models.loading import choose_device

        return choose_device(self.config.models.device)

    @cached_property
    def compute(self) -> Choice:
        """The arithmetic of whatever runs a model, but for importance, deactivation and the probe."""
        from palimpsest.models.compute import choose_compute

        return choose_compute(self.config.models.compute, self.device, weights=self.config.models.dtype)

    @cached_property
    def exact_compute(self) -> Choice:
        from palimpsest.models.compute import choose_compute

        models = self.config.models
        return choose_compute(models.compute, self.device, weights=models.dtype, exact=True)

    @cached_property
    def processor(self) -> SpeechLMProcessor:
        from palimpsest.models.loading import load_feature_extractor, load_tokenizer
        from palimpsest.models.processor import SpeechLMProcessor

        speech, prompt, encoder = self.config.speech, self.config.prompt, self.config.models.encoder
        return SpeechLMProcessor(
            load_tokenizer(self.config.models.language_model),
            None if encoder is None else load_feature_extractor(encoder),
            stack_factor=speech.stack_factor,
            speech_length=speech.length,
            style=prompt,
        )

    def processor_of(self, run: str) -> SpeechLMProcessor:
        """That of the study, with as many frames a position as the run's tokens have."""
        from palimpsest.models.processor import SpeechLMProcessor

        whole, factor = self.processor, self.config.stack_factor(run)
        if factor == whole.stack_factor:
            return whole
        return SpeechLMProcessor(
            whole.tokenizer,
            whole.feature_extractor,
            factor,
            whole.speech_length,
            whole.style,
            rounded_to=whole.stack_factor,  # the frames of features/ are
        )

    @cached_property
    def base(self) -> PreTrainedModel:
        from palimpsest.models.loading import load_language_model

        models = self.config.models
        return load_language_model(models.language_model, dtype=models.dtype, device=self.device)[0]

    @cached_property
    def adaptor(self) -> TrainedAdaptor | None:
        """What every method starts from, if the recipe names one."""
        from palimpsest.models.trained_adaptor import read_adaptor

        source = self.config.models.adaptor
        return None if source is None else read_adaptor(source)

    def require_adaptor(self) -> None:
        """An adaptor that does not fit the study is an error before the long work."""
        if self.adaptor is not None:
            from palimpsest.models.trained_adaptor import require_fit

            models, speech = self.config.models, self.config.speech
            require_fit(
                self.adaptor,
                models.language_model,
                self.encoder,
                stack_factor=speech.stack_factor,
                length=speech.length,
                hidden=speech.adaptor_hidden_size,
            )

    def require_given(self) -> None:
        """A given model that cannot be compared with the base is an error before the long work; oddities are noted."""
        for notes in self.given_notes.values():
            for note in notes:
                self.reporter.note(note)

    @cached_property
    def given_notes(self) -> dict[str, list[str]]:
        """By given model what is not compared, and how it is not asked, a sentence each; a name is in each.

        Raises UserError for one that cannot be compared with the base.
        """
        from palimpsest.models.given import require_pair, same_prompts
        from palimpsest.models.loading import reading_notes

        base, found = self.config.models.language_model, {}
        for name, method in self.config.methods.items():
            if (given := method.checkpoint) is None:
                continue
            found[name] = [f"{name}: {note}" for note in require_pair(base, given)]
            if self.given_models[name]["form"] == "language_model":  # of a layout of others
                found[name] += [note.replace(given, name) for note in reading_notes(given)]
            if self.given_models[name]["hash"] == self.base_hash:
                found[name].append(f"warning: {name} is the base itself, so every difference is 0.")
            if not same_prompts(base, given):
                found[name].append(
                    f"{name} writes prompts by another chat template than the base; it is asked with the base's."
                )
            found[name] += self._notes_on_speech(name, given)
        return found

    def _notes_on_speech(self, name: str, given: str) -> list[str]:
        from palimpsest.models.given import is_audio_llm, require_same_speech, speech_settings, takes_speech

        speech = self.config.speech
        if self.config.takes_speech(name):
            require_same_speech(self.encoder, speech.stack_factor, speech.length, given)
            if speech_settings(given)[2] == self.config.prompt:
                return []
            return [f"{name} was trained with another prompt than the recipe's, with which all models are asked."]
        if self.config.takes_recordings(name):
            from palimpsest.evaluation.audio_llm import require_place_for_audio

            try:
                require_place_for_audio(self.audio_processor(name))
            except UserError as error:
                said = str(error).removesuffix(".")
                raise UserError(f"{said}; or ask {name} in text alone (modality: text).") from error
            return [
                f"{name} is an audio LLM: it answers recordings by its own processor and chat template, and its losses "
                "are measured in text."
            ]
        if takes_speech(given) or is_audio_llm(given):
            return [f"{name} takes speech and is asked in text alone."]
        return []

    def require_blends(self) -> None:
        """A blend of layers that are not there, or of a given model that does not fit, is an error before the work."""
        from palimpsest.models.anatomy import decoder_layers, find_language_model
        from palimpsest.models.blend import Blend, blend_into
        from palimpsest.models.light import is_light
        from palimpsest.models.loading import blank_language_model, load_language_model

        base = self.config.models.language_model
        blends = {name: method for name, method in self.config.methods.items() if method.of is not None}
        for name, method in blends.items():
            there = decoder_layers(blank_language_model(base)) if method.layers is not None else {}
            wrong = [layer for layer in method.layers or () if layer not in there]
            if wrong or method.layers == ():
                named = f"{wrong[0]}, which is none" if wrong else "no layer"
                raise UserError(
                    f"methods.{name}.layers names {named}; the layers of {base} are {min(there)} to {max(there)}."
                )
            for of in (method.of, method.norm_of):
                given = None if of is None else self.given(of)
                if given is not None:
                    light = is_light(Path(given))
                    theirs = blank_language_model(given) if light else load_language_model(given, device="meta")[0]
                    blend_into(
                        find_language_model(theirs),
                        blank_language_model(base),
                        Blend(base, "", str(of), given, "", 0.0),
                    )

    def require_gated(self) -> None:
        """A given model with adapters for speech alone must be on this base; what is left out of all such is noted."""
        from palimpsest.models.light import read_light

        for name, method in self.config.methods.items():
            if not self.config.gated(name):
                continue
            if method.checkpoint is not None:
                under = read_light(Path(method.checkpoint)).language_model.name
                if self.model_hash(under) != self.base_hash:
                    raise UserError(
                        f"{method.checkpoint} answers texts as {under} does, whose files are not those of "
                        f"{self.config.models.language_model}; give that as the base."
                    )
            self.reporter.note(
                f"{name} answers texts as the base does, its LoRA being for speech alone: importance, parameter change "
                "and deactivation would be the base's and are left out."
            )

    def note_inserted(self) -> None:
        """What is left out of methods whose models have layers that the base does not have."""
        for name, method in self.config.methods.items():
            if method.kind == "inserted":
                self.reporter.note(
                    f"{name} leaves every weight of the base as it is and adds layers beside them: importance, "
                    "parameter change and deactivation, which compare layer with layer, are left out."
                )

    def new_speech_lm(self, run: str) -> SpeechLM:
        """The base language model behind the adaptor that a run starts from: a fresh one, or that of models.adaptor.

        A fresh one is the same for every method's run of the same number.
        """
        from palimpsest.models.loading import load_language_model

        models = self.config.models
        self.__dict__.pop("base", None)  # training needs the room; read again when asked for
        self.forget()
        return self._behind_adaptor(load_language_model(models.language_model, dtype=models.dtype)[0], run)

    def _behind_adaptor(self, language_model: PreTrainedModel, run: str = BASE) -> SpeechLM:
        from palimpsest.models.loading import load_encoder
        from palimpsest.models.speech_lm import SpeechLM

        models, speech, reads = self.config.models, self.config.speech, self.config.speech_of(run)
        encoder, _ = load_encoder(self.encoder, dtype=models.dtype)
        model = SpeechLM.from_parts(
            encoder,
            language_model,
            stack_factor=speech.stack_factor,
            adaptor_hidden_size=speech.adaptor_hidden_size,
            speech_length=speech.length,
            seed=self.seed("adaptor", run),
            reads=reads,
            tokenizer=None if reads == "frames" else self.speech_tokens(self.config.own_k(run)),
            collapse=speech.tokens is not None and speech.tokens.collapse,
        )
        if reads == "tokens":
            assert speech.tokens is not None
            if speech.tokens.start == "adaptor":
                self._start_rows(model, self.config.own_k(run))
        elif self.adaptor is not None:
            quantiser = model.adaptor.quantiser
            centroids = {} if quantiser is None else quantiser.state_dict(prefix="quantiser.")
            model.adaptor.load_state_dict({**self.adaptor.tensors, **centroids})
        elif speech.calibrate_adaptor:
            import torch

            frames = self.frames_to_read("train", encoder.to(self.device))
            sample = torch.cat([frames[example.id].cpu() for example in self.groups["train"][:64]])
            spread = language_model.get_input_embeddings().weight.detach().float().std()
            model.adaptor.calibrate(sample[None], float(spread))
        model.to(self.device)
        return model

    def speech_tokens(self, k: int | None) -> SpeechTokenizer:
        """What tokens/ has, or tokens-K/ of another k than the recipe's."""
        from palimpsest.models.tokens import read_tokens

        return read_tokens(self.path / tokens_folder(k) / "tokenizer.safetensors")

    def _start_rows(self, model: SpeechLM, k: int | None) -> None:
        """The rows that tokens/ made of the adaptor's outputs; of a token that it never met, those that were drawn."""
        from safetensors.torch import load_file

        stored = load_file(self.path / tokens_folder(k) / "rows.safetensors")
        heard = stored["counts"] > 0
        rows = model.adaptor.get_parameter("rows.weight").data
        rows[heard] = stored["rows"][heard].to(rows.dtype)

    def save(self, run: str, model: SpeechLM, folder: Path) -> None:
        """Write the checkpoint of a run that was just trained; a light one leaves `model` on the CPU."""
        from palimpsest.models.light import ADAPTER, write_light
        from palimpsest.models.loading import load_encoder, load_language_model

        if not self.config.kept_light(run):
            model.save_pretrained(folder)
            self.processor_of(run).save_pretrained(folder)
            return
        models, adapter = self.config.models, folder / ADAPTER.parent
        write_light(
            folder,
            model.to("cpu"),
            self.processor_of(run),
            language_model=(models.language_model, load_language_model(models.language_model, dtype=models.dtype)[0]),
            encoder=(self.encoder, load_encoder(self.encoder, dtype=models.dtype)[0]),
            adapter=adapter if adapter.exists() else None,
            trained={"method": run},
            exact=True,
        )

    def keep(self, name: str, model: SpeechLM) -> None:
        """Remember a model that was just trained, so that it need not be read back.

        Not one whose checkpoint is light: merged elsewhere than in training it may differ in the last bit, and a study
        that is continued must measure the same model as one that was not interrupted.
        """
        if not self.config.kept_light(name):
            self._tuned = (name, model)

    def forget(self) -> None:
        self._tuned = self._text = None
        gc.collect()

    def speech_lm(self, name: str) -> SpeechLM:
        """A trained model, or the base behind the adaptor of the recipe."""
        from palimpsest.models.loading import load_speech_lm

        if name == BASE and (self._tuned is None or self._tuned[0] != BASE):
            self.forget()
            self._tuned = (BASE, self._behind_adaptor(self.base).eval())
        if self._tuned is None or self._tuned[0] != name:
            self.forget()
            self._tuned = (name, self._loaded(load_speech_lm, name))
        return self._tuned[1]

    def _loaded(self, load: Callable[..., Any], name: str) -> Any:
        """A tuned model; of a blend the one that it takes a part of, changed into the blend."""
        from palimpsest.models.anatomy import find_language_model
        from palimpsest.models.blend import blend_into

        origin = self.config.origin_of(name)
        where = self.given(origin) or checkpoint_of(self.path, origin)
        model, _ = load(where, dtype=self.config.models.dtype, device=self.device)
        if origin != name:
            blend_into(find_language_model(model), self.base, self.blended(name))
        return model

    def blended(self, name: str) -> Blend:
        """What a blend is, once its step is done."""
        from palimpsest.models.blend import read_blend

        return read_blend(checkpoint_of(self.path, name))

    def given(self, name: str) -> str | None:
        """Where a given model is; None for one that the study trains."""
        return None if name == BASE else self.config.runs[name].checkpoint

    def language_model(self, name: str) -> PreTrainedModel:
        from palimpsest.models.loading import load_language_model

        if name == BASE or self.config.gated(name):
            return self.base
        if self.given(self.config.origin_of(name)) is None or self.config.takes_speech(name):
            return self.speech_lm(name).language_model
        if self._text is None or self._text[0] != name:
            self.forget()
            self._text = (name, self._loaded(load_language_model, name))
        return self._text[1]

    def audio_processor(self, name: str) -> Any:
        """Of a given audio LLM."""
        from palimpsest.models.loading import load_audio_processor

        return load_audio_processor(str(self.given(name)))

    def whole(self, name: str) -> PreTrainedModel:
        """A SpeechLM where it takes speech or was trained here, else the language model alone."""
        alone = not self.config.takes_speech(name)
        alone = alone and (name == BASE or self.given(self.config.origin_of(name)) is not None)
        return self.language_model(name) if alone else self.speech_lm(name)

    def scores(self, name: str, other: bool = False) -> Scores:
        """Of a model; `other`: on other questions than the models are compared on."""
        from palimpsest.importance.scores import Scores

        return Scores.open(self.path / folder_of(name) / f"importance{'_other' * other}")

    @property
    def fisher(self) -> Scores:
        """Of the base, for methods that are pulled to it by them."""
        from palimpsest.importance.scores import Scores

        return Scores.open(self.path / BASE / "fisher")

    def other_mask(self) -> Mask:
        """The most important weights of the base on other questions, where their scores are not kept."""
        from palimpsest.importance.mask import Mask

        return Mask.open(self.path / BASE / "importance_other" / MASKS)

    def paired(self, name: str) -> PairedWeights:
        """All weights of the base's and a given model's language model; both are in memory."""
        from palimpsest.models.paired_weights import pair_weights

        return pair_weights(self.base, self.language_model(name))

    def weights(self, name: str) -> Mapping[str, Tensor]:
        """The scored weights by canonical name, on the CPU; of a given model all that it has in common with the base.

        Those of a model that was trained are read from its checkpoint as needed.
        """
        from palimpsest.models.anatomy import scored_parameters
        from palimpsest.models.blend import BlendedWeights
        from palimpsest.models.light import LightWeights
        from palimpsest.models.loading import OnCpu, StoredLanguageModel

        if name == BASE or self.config.gated(name):
            return OnCpu(scored_parameters(self.base))
        if (origin := self.config.origin_of(name)) != name:
            return BlendedWeights(self.weights(BASE), self.weights(origin), self.blended(name))
        if self.given(name) is not None:
            return OnCpu(self.paired(name).tuned)
        folder = checkpoint_of(self.path, name)
        return LightWeights(folder, self.base) if self.config.kept_light(name) else StoredLanguageModel(folder)

    # -- what went in -------------------------------------------------------------------------------------------------
    @cached_property
    def base_hash(self) -> str:
        return self.model_hash(self.config.models.language_model)

    @property
    def encoder(self) -> str:
        """For what needs one; a recipe without it has nothing that does."""
        assert self.config.models.encoder is not None
        return self.config.models.encoder

    @cached_property
    def encoder_hash(self) -> str | None:
        encoder = self.config.models.encoder
        return None if encoder is None else self.model_hash(encoder)

    @property
    def rank(self) -> int:
        """To which changes are cut for the clustering that low rank does not explain.

        That of the method `lora`, which claim 7 is about, else the first LoRA's, else 8.
        """
        from palimpsest.models.given import rank_of

        methods = [method for _, method in sorted(self.config.methods.items(), key=lambda item: item[0] != "lora")]
        ranks = (m.rank if m.kind == "lora" else m.checkpoint and rank_of(m.checkpoint) for m in methods)
        return next((rank for rank in ranks if rank), 8)

    @property
    def adaptor_inputs(self) -> dict[str, str]:
        """Nothing without models.adaptor, so that what was made before there was the key keeps its fingerprint."""
        return {} if self.adaptor is None else {"adaptor": self.adaptor.fingerprint, "encoder": str(self.encoder_hash)}

    @cached_property
    def prompt_inputs(self) -> dict[str, Any]:
        """The recipe's prompt, and what becomes of it: other versions of transformers may render it otherwise."""
        return {**asdict(self.config.prompt), "rendered": self.processor.example_prompts()}

    @staticmethod
    def model_hash(name: str) -> str:
        from palimpsest.models.loading import fingerprint

        return fingerprint(name)

    @cached_property
    def given_models(self) -> dict[str, dict[str, Any]]:
        """By method: where it is, what its files are, and whether it is asked in speech."""
        from palimpsest.models.given import form_of
        from palimpsest.models.loading import resolve

        return {
            name: {
                "name": without_folders(method.checkpoint),
                "hash": self.model_hash(method.checkpoint),
                "form": form_of(resolve(method.checkpoint)),
                "speech": "speech" in self.config.asked_as(name),
            }
            for name, method in self.config.methods.items()
            if method.checkpoint is not None
        }

    def model_inputs(self, name: str, in_speech: bool = False) -> dict[str, Any]:
        """What identifies a model; `in_speech`: as asked in speech, which makes a difference for the base."""
        dtype = self.config.models.dtype
        if name == BASE:
            return {"base": self.base_hash, "dtype": dtype, **(self.adaptor_inputs if in_speech else {})}
        return {"checkpoint": self.fingerprint(f"{folder_of(name)}/checkpoint"), "dtype": dtype}

    def provenance(self, started: float) -> dict[str, Any]:
        models = self.config.models
        abouts = [self.speech_tokens(k).about for k in self.config.token_sizes]
        first, seconds = self.dir.times(self.done)
        return {
            **provenance(),
            "study": self.config.name,
            "seed": self.config.seed,
            "models": {
                "language_model": {
                    "name": without_folders(models.language_model),
                    "hash": self.base_hash,
                    "n_parameters": self.base.num_parameters(),
                },
                "encoder": {"name": models.encoder and without_folders(models.encoder), "hash": self.encoder_hash},
                "asr": {"name": models.asr and without_folders(models.asr)},
                "adaptor": {
                    "name": models.adaptor and without_folders(models.adaptor),
                    "hash": self.adaptor and self.adaptor.fingerprint,
                },
                "tokens": abouts[0] if abouts else None,
                **({"tokens_by_k": {str(it["k"]): it for it in abouts}} if len(abouts) > 1 else {}),
                "given": {name: {**it, "notes": self.given_notes[name]} for name, it in self.given_models.items()},
            },
            "compute": {
                "wanted": models.compute,
                "device": self.device,
                **asdict(self.compute),
                "importance": asdict(self.exact_compute),
                "deactivation": asdict(self.exact_compute),
            },
            "features": None
            if models.encoder is None
            else {"wanted": self.config.speech.features, **asdict(self.frames)},
            "prompts": self.processor.example_prompts(),
            "data": {
                name: {
                    "n": len(group),
                    "sha256": hash_file(self.path / "data" / f"{name}.jsonl"),
                    "voices": sorted({example.voice or "recording" for example in group}),
                    "dropped": self.dropped.get(name, {}),
                }
                for name, group in self.groups.items()
            },
            "steps": {s.name: {"fingerprint": s.fingerprint, "skipped": s.skipped} for s in self.done},
            "started": min(filter(None, (first, utc(started)))),
            "seconds": time.time() - started + seconds,
        }
