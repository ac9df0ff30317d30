"""One way to load a model: by `embedded:` name, by local folder, or by hub name.

A SpeechLM's folder is a whole checkpoint, a light one (light.py) or a blend (blend.py); each is taken wherever one is.
A PEFT adapter's folder (adapters.py) is taken wherever its base is, and is that base with the adapter merged. A
checkpoint of LLaMA-Omni's or Ultravox's layout (speech_layouts.py) is its language model. docs/models.md is the user's
page.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Literal, TypeVar, get_args

from safetensors import safe_open

from palimpsest.files import UserError, hash_file, hash_value, read_json
from palimpsest.models import blend, embedded, light
from palimpsest.models.adapters import JOIN, Adapter, find_adapter, merge_adapter
from palimpsest.models.anatomy import find_language_model, layer_index, scored_parameters
from palimpsest.models.compute import DEVICE
from palimpsest.models.gate import without_adapters
from palimpsest.models.inserted import insert_layers
from palimpsest.models.prompts import tokenizer_for_text
from palimpsest.models.refusals import TOKENIZER, WEIGHT_FILES, file_refusal, folder_refusal, missing_parts
from palimpsest.models.speech_layouts import Layout, has_language_model, put_own_weights, read_layout, what_is_read

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from transformers import PreTrainedModel, WhisperForConditionalGeneration, WhisperProcessor
    from transformers.models.whisper.modeling_whisper import WhisperEncoder

    from palimpsest.models.processor import SpeechLMProcessor
    from palimpsest.models.speech_lm import SpeechLM

T = TypeVar("T")

# What a model, its tokenizer, chat template, generation settings and processor are read from, by suffix …
READ = {".json", ".safetensors", ".bin", ".jinja", ".model", ".txt", ".tiktoken", ".py"}
# … and what has such a suffix and is a record of how a checkpoint came to be: times differ, results do not.
RECORDS = {"step.json", "files.json", "training.json", "layer_scales.json", "trainer_state.json", "training_args.bin"}
# Keys that a checkpoint may have beside those of a language model, which change nothing that it computes: buffers that
# older versions of transformers stored, heads of other tasks, and the encoders of models that see or listen.
UNUSED = re.compile(
    r"(^|\.)(rotary_emb\.inv_freq|masked_bias|attn\.bias|attention\.bias|position_ids)$"
    r"|^(score|classifier|v_head|value_head|reward_head|mtp)\."
    r"|(^|\.)(vision|visual|image|audio|speech)(_?(tower|model|encoder|embed|projector|projection))?\."
    r"|(^|\.)(multi_modal_projector|mm_projector|embed_vision|embed_audio)\."
)
COMMIT = re.compile("[0-9a-f]{40}")
LFS_POINTER = b"version https://git-lfs"


def resolve(name: str) -> str:
    """A local folder's path or a hub name, checked as far as it can be without loading; of an adapter "BASE + FOLDER".

    Raises UserError for an unknown embedded model, a folder without a config or weights, a file in it that is cut
    short or only a pointer to one (git-lfs), and an adapter whose base is not there.
    """
    if (adapter := find_adapter(name)) is not None:
        return _resolve_adapter(adapter)
    if name.startswith(embedded.PREFIX):
        return str(embedded.checkpoint(name))
    path = Path(name)
    if (source := blended_from(name)) is not None:
        resolve(source)
        resolve(blend.read_blend(path).language_model)
        return str(path)
    if light.is_light(path):
        return str(path)
    if path.is_dir():
        _require_checkpoint(path)
        return _resolve_layout(str(path))
    base, joined, folder = name.rpartition(JOIN)
    if joined and not path.exists() and Path(folder).is_dir():
        _require_checkpoint(Path(folder))
        return _resolve_layout(f"{base}{JOIN}{folder}")
    if path.is_file():
        raise UserError(file_refusal(path))
    if path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:
        raise UserError(
            f"{name} is not a folder; give a checkpoint folder, a hub name (owner/model) or an embedded: name."
        )
    return name


def _resolve_adapter(adapter: Adapter) -> str:
    try:
        resolve(adapter.base)
    except UserError as error:
        raise UserError(
            f"{adapter.folder} is an adapter on {adapter.base}, which is not to be had here: "
            f"{str(error).removesuffix('.')}; name its base in front: 'BASE + {adapter.folder}'."
        ) from error
    _require_whole_files(adapter.folder)
    return adapter.name


def _require_checkpoint(folder: Path) -> None:
    has_weights = any(file for pattern in WEIGHT_FILES for file in folder.glob(pattern))
    if not has_weights or not (folder / "config.json").exists():
        raise UserError(folder_refusal(folder))
    _require_whole_files(folder)


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints of speech LLMs that transformers does not know
# ---------------------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class SpeechCheckpoint:
    where: str  # a folder, or a hub name
    layout: Layout  # whose base is the one that was named in front, if one was


def _speech_checkpoint(where: str) -> SpeechCheckpoint | None:
    """The checkpoint that a resolved name means, None where transformers knows its layout."""
    if Path(where).exists() or JOIN in where:
        return _on_disk(where)
    layout = read_layout(_json_object(_hub_config(where)))
    return None if layout is None else SpeechCheckpoint(where, layout)


def _on_disk(name: str) -> SpeechCheckpoint | None:
    """The same of a folder, alone or behind the name of a base; None for the hub's, too."""
    base, joined, where = name.rpartition(JOIN)
    if not joined or Path(name).exists():
        base, where = "", name
    config = Path(where) / "config.json"
    layout = read_layout(_json_object(config)) if config.is_file() else None
    if layout is None:
        return None
    return SpeechCheckpoint(where, replace(layout, base=base, config=None) if base else layout)


def _resolve_layout(name: str) -> str:
    """Of a local folder, alone or behind the name of a base."""
    found, alone = _on_disk(name), Path(name).exists()
    if found is None:
        if alone:
            return name
        raise UserError(
            f"{name.rpartition(JOIN)[2]} is neither an adapter nor a checkpoint without its language model, so no base "
            "belongs in front of it; give it alone."
        )
    layout = found.layout
    if layout.base is not None:
        _of_base(found, resolve)
    elif layout.config is None or (layout.prefix and not has_language_model(layout, Path(found.where))):
        raise UserError(
            f"{found.where} is a checkpoint like {layout.name}'s without a language model, and its config names none "
            f"(text_model_id); name the one that it was trained from in front: 'BASE{JOIN}{found.where}'."
        )
    return name


def _of_base(found: SpeechCheckpoint, read: Callable[[str], T]) -> T:
    try:
        return read(found.layout.base or "")
    except UserError as error:
        raise UserError(
            f"{found.where} is a checkpoint like {found.layout.name}'s on the language model of {found.layout.base}, "
            f"which is not to be had here: {str(error).removesuffix('.')}; name it in front: 'BASE{JOIN}{found.where}'."
        ) from error


def _load_speech_checkpoint(found: SpeechCheckpoint, dtype: torch.dtype | str, device: str) -> Any:
    from transformers import AutoModelForCausalLM

    layout = found.layout
    if layout.base is None:
        options: dict[str, Any] = {"config": _config(found.where), "dtype": dtype}
        if layout.prefix:
            options["key_mapping"] = {f"^{re.escape(layout.prefix)}": ""}
        return _load(AutoModelForCausalLM, found.where, device, **options)
    model, _ = _of_base(found, partial(load_language_model, device=_first_place(device)))
    put_own_weights(model, layout, _local(found.where))
    return _placed(model, layout.base, f"{layout.base}{JOIN}{found.where}", dtype, device)


def _local(where: str) -> Path:
    """The folder of a checkpoint, downloaded where it is on the hub."""
    if Path(where).is_dir():
        return Path(where)
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(where, revision=_commit(where), allow_patterns=["*.safetensors", "*.json"]))


def reading_notes(name: str) -> list[str]:
    """What of a model is read and what left out, a sentence each; nothing where all of it is."""
    where = resolve(name)
    if (adapter := find_adapter(where)) is not None:
        return reading_notes(adapter.base)
    if (found := _speech_checkpoint(where)) is not None:
        return [what_is_read(found.layout, _local(found.where))]
    if model_kind(where) == "audio_llm":
        return [
            f"{name} is an audio LLM ({_config(where).model_type}): it is asked in text, its audio part is not used."
        ]
    return []


# ---------------------------------------------------------------------------------------------------------------------
# Blends
# ---------------------------------------------------------------------------------------------------------------------
def blended_from(name: str) -> str | None:
    """The model of which a blend's folder takes a part; None for any other name."""
    return blend.source_of(Path(name)) if blend.is_blend(Path(name)) else None


def identity(name: str) -> str:
    """What says whether a model is still the same: the fingerprint of the step that made it, else that of its files."""
    step = Path(name) / "step.json"
    return str(read_json(step)["fingerprint"]) if step.is_file() else fingerprint(name)


def _blended(model: Any, folder: Path) -> Any:
    """The model that the blend in `folder` takes a part of, changed in place into the blend."""
    it = blend.read_blend(folder)
    source = blend.source_of(folder)
    if identity(source) != it.fingerprint or fingerprint(it.language_model) != it.base:
        raise UserError(
            f"{folder} is a blend of other weights than {source} and {it.language_model} have now; run its study again."
        )
    inside = find_language_model(model)
    place = next(inside.parameters())
    base, _ = load_language_model(it.language_model, dtype=place.dtype, device=str(place.device))
    blend.blend_into(inside, base, it)
    return model


def choose_device(wanted: str) -> str:
    """ "auto" is CUDA if there is one, else the CPU. Raises UserError for what is no device, or not there."""
    import torch

    if DEVICE.fullmatch(wanted) is None:
        raise UserError(f"There is no device {wanted!r}; give auto, cpu, cuda, cuda:0, mps or xpu.")
    if wanted == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    place = torch.device(wanted)
    if place.type == "cuda" and (place.index or 0) >= (n_gpus := torch.cuda.device_count()):
        raise UserError(f"There is no device {wanted} here, CUDA shows {n_gpus}; give auto or cpu.")
    try:
        torch.empty(1, device=place)
    except (RuntimeError, AssertionError) as error:  # a torch that was built without it says so in either
        reason = str(error).splitlines()[0]
        raise UserError(f"There is no device {wanted} here ({reason}); give auto or cpu.") from error
    return wanted


def fingerprint(name: str) -> str:
    """Identifies all that a model's results depend on: hashes of the local files, or the hub's commit.

    The files are weights, config, tokenizer, chat template, generation settings and processor (`READ`).
    Raises UserError for what `resolve` refuses, and for a hub name whose commit is not known.
    """
    where = resolve(name)
    folder = Path(where)
    if (adapter := find_adapter(where)) is not None:
        return hash_value([_hashes(adapter.folder), fingerprint(adapter.base)])
    if (source := blended_from(where)) is not None:
        under = [fingerprint(name) for name in (source, blend.read_blend(folder).language_model)]
        return hash_value([hash_file(folder / blend.FILE), *under])
    if (found := _speech_checkpoint(where)) is not None and found.layout.base is not None:
        own = _hashes(Path(found.where)) if Path(found.where).is_dir() else [[found.where, _commit(found.where)]]
        return hash_value([own, _of_base(found, fingerprint)])
    if folder.is_dir():
        if light.is_light(folder):  # which names the weights under it by their hashes, but not tokenizer and template
            parts = light.read_light(folder)
            under = [fingerprint(part.name) for part in (parts.language_model, parts.encoder)]
            return hash_value([hash_file(folder / light.FILE), *under])
        return hash_value(_hashes(folder))
    return hash_value([where, _commit(where)])


def _hashes(folder: Path) -> list[list[str]]:
    return [[file.relative_to(folder).as_posix(), hash_file(file)] for file in _files_read(folder)]


def _commit(name: str) -> str:
    """The version of a hub's model that this process uses: what is fingerprinted is what is loaded later."""
    commit = _hub_config(name).parent.name
    if not COMMIT.fullmatch(commit):
        raise UserError(
            f"The hub does not say which version of {name} this is, so results could not be told apart from those of "
            "another; download it and give the folder."
        )
    return commit


@cache
def _hub_config(name: str) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.constants import is_offline_mode

    try:
        return Path(hf_hub_download(name, "config.json"))
    except Exception as error:  # of the hub, of the network, of the name: they have no common kind
        if is_offline_mode():
            raise UserError(
                f"There is no folder {name}, and the hub, which may have a model of that name, is switched off "
                "(HF_HUB_OFFLINE); correct the path, or unset that."
            ) from error
        raise UserError(
            f"{name} is no local folder, and the hub does not give its config.json: {_reason(error)}"
        ) from error


def _reason(error: Exception) -> str:
    """What a library says is wrong, in one line: its first, or all where that only announces the others."""
    lines = [line.strip() for line in str(error).strip().splitlines()] or [type(error).__name__]
    return " ".join(lines) if lines[0].endswith(":") else lines[0]


def _files_read(folder: Path) -> list[Path]:
    """The files of a checkpoint that can change a result, in order of their names."""
    templates = (folder / "additional_chat_templates").glob("*.jinja")
    return sorted(
        file
        for file in (*folder.iterdir(), *templates)
        if file.suffix in READ and file.name not in RECORDS and not file.name.startswith(".") and file.is_file()
    )


def _require_whole_files(folder: Path) -> None:
    """Raise UserError for a pointer of git-lfs, a safetensors file that is cut short, and a part that is not there."""
    for file in _files_read(folder):
        with file.open("rb") as opened:
            start = opened.read(len(LFS_POINTER))
        if start == LFS_POINTER:
            raise UserError(f"{file} is only the pointer that git-lfs leaves; run `git lfs pull` in its folder.")
        if file.suffix == ".safetensors":
            _require_whole(file)
    for index in folder.glob("*.index.json"):
        parts = _json_object(index).get("weight_map")
        if not isinstance(parts, dict) or not all(isinstance(part, str) for part in parts.values()):
            raise UserError(f"{index} is damaged: it has no weight_map of names to files; copy or download it again.")
        absent = sorted({part for part in parts.values() if not (folder / part).is_file()})
        if absent:
            raise UserError(
                f"{folder} lacks {', '.join(absent[:3])}, which {index.name} names ({len(absent)} in all); "
                "copy or download the checkpoint again."
            )
    if absent := missing_parts(folder):
        raise UserError(
            f"{folder} lacks {', '.join(absent[:3])}, by the names of its other parts ({len(absent)} in all); copy or "
            "download the checkpoint again."
        )


def _require_whole(file: Path) -> None:
    """A safetensors file has as many bytes as its header says: 8 for the header's length, the header, the tensors."""
    size = file.stat().st_size
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        try:
            header: Any = json.loads(opened.read(length)) if 0 < length <= size - 8 else None
            ends = [about["data_offsets"][1] for key, about in header.items() if key != "__metadata__"]
            wanted = 8 + length + max(ends, default=0)
        except (ValueError, TypeError, KeyError, AttributeError):
            wanted = None
    if wanted != size:
        said = "its header cannot be read" if wanted is None else f"{size:,} bytes where its header names {wanted:,}"
        raise UserError(f"{file} is cut short or damaged ({said}); copy or download it again.")


def text_source(name: str) -> str:
    """Where the config, the tokenizer and most weights of a language model are.

    Of a light SpeechLM, an adapter and a speech LLM's checkpoint on a base that is this base; the latter two may have a
    tokenizer of their own (`load_tokenizer`). On the hub it is the checkpoint, whose config names its base.
    """
    where = Path(resolve(name))
    if (adapter := find_adapter(str(where))) is not None:
        return text_source(adapter.base)
    if (source := blended_from(str(where))) is not None:
        return text_source(source)
    if (found := _on_disk(str(where))) is not None:
        return text_source(found.layout.base) if found.layout.base is not None else found.where
    return text_source(light.read_light(where).language_model.name) if light.is_light(where) else str(where)


def load_tokenizer(name: str) -> Any:
    """The tokenizer of a language model or SpeechLM."""
    where = resolve(name)
    if (adapter := find_adapter(where)) is not None:
        own = adapter.folder / "tokenizer_config.json"
        return _load_tokenizer(str(adapter.folder)) if own.is_file() else load_tokenizer(adapter.base)
    if (source := blended_from(where)) is not None:
        return load_tokenizer(source)
    found = _speech_checkpoint(where)
    if found is not None and found.layout.base is not None:
        own = _local(found.where) / "tokenizer_config.json"
        return _load_tokenizer(found.where) if own.is_file() else _of_base(found, load_tokenizer)
    return _load_tokenizer(text_source(where))


def embedding_width(name: str) -> int:
    """Numbers per token in a language model's embedding, from its config."""
    config = _config(text_source(name)).get_text_config()
    return int(getattr(config, "word_embed_proj_dim", None) or config.hidden_size)


def encoder_source(name: str) -> str:
    """Where an encoder's config and weights are: Whisper's, or those inside a SpeechLM; a light one names its own."""
    where = resolve(name)
    if (source := blended_from(where)) is not None:
        return encoder_source(source)
    return encoder_source(light.read_light(Path(where)).encoder.name) if light.is_light(Path(where)) else where


def encoder_config(name: str) -> Any:
    """Whisper's, without the weights."""
    where = encoder_source(name)
    if not is_speech_lm(where):
        return _config(where)
    from palimpsest.models.speech_lm import SpeechLMConfig

    return _from_pretrained(SpeechLMConfig, where).encoder_config


def encoder_width(name: str) -> int:
    """Numbers in a frame of a Whisper encoder, without its weights."""
    return int(encoder_config(name).d_model)


def weight_bytes(name: str) -> int:
    """Size of the weights on disk (local folders), or by the config's count of float32 numbers (hub)."""
    where = text_source(name)
    if Path(where).is_dir():
        return sum(file.stat().st_size for pattern in WEIGHT_FILES for file in Path(where).glob(pattern))
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return 4 * int(AutoModelForCausalLM.from_config(_config(where)).num_parameters())


def stored_dtypes(where: str) -> set[str]:
    """The dtypes, in the terms of safetensors (F32, BF16 …), of the matrices in a folder; none where none shows."""
    dtypes = set()
    for path in sorted(Path(where).glob("*.safetensors")) if Path(where).is_dir() else ():
        with safe_open(path, framework="pt") as file:
            slices = map(file.get_slice, file.keys())
            dtypes |= {one.get_dtype() for one in slices if len(one.get_shape()) > 1}
    return dtypes


class StoredLanguageModel(Mapping[str, "Tensor"]):
    """The scored weights of a language model's or SpeechLM's folder by canonical name, read one at a time.

    Names and shapes are those of the model's class, as `scored_parameters` has them. Where the files hold the weights
    in another form (transformers writes the stacked experts of most mixtures one by one) the whole model is read.
    """

    def __init__(self, folder: Path) -> None:
        import torch

        from palimpsest.models.speech_lm import SpeechLM, SpeechLMConfig

        if is_speech_lm(str(folder)):
            with torch.device("meta"):
                model = SpeechLM(_from_pretrained(SpeechLMConfig, str(folder)))
        else:
            model = blank_language_model(str(folder))
        written = {id(parameter): name for name, parameter in model.named_parameters()}
        scored = scored_parameters(model)
        self._keys = {name: written[id(parameter)] for name, parameter in scored.items()}
        files: dict[str, Any] = {}
        for path in sorted(folder.glob("*.safetensors")):
            file: Any = safe_open(path, framework="pt")
            files |= dict.fromkeys(file.keys(), file)
        self._files: dict[str, Any] = {}
        self._loaded: dict[str, Tensor] = {}
        for name, key in self._keys.items():
            if key in files and list(files[key].get_slice(key).get_shape()) == list(scored[name].shape):
                self._files[name] = files[key]
        if len(self._files) < len(scored):
            where = str(folder)
            speech_lm = is_speech_lm(where)
            whole = (
                _from_pretrained(SpeechLM, where, dtype="auto")
                if speech_lm
                else load_language_model(where, dtype="auto")[0]
            )
            self._loaded = {name: parameter.detach() for name, parameter in scored_parameters(whole).items()}

    def __getitem__(self, name: str) -> Tensor:
        tensor: Tensor = self._loaded[name] if self._loaded else self._files[name].get_tensor(self._keys[name])
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._keys)

    def __len__(self) -> int:
        return len(self._keys)


class OnCpu(Mapping[str, "Tensor"]):
    """Tensors by name, each brought to the CPU on access: analysis runs there, wherever the model is."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = tensors

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[name].detach().cpu()

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


def is_speech_lm(name: str) -> bool:
    if (adapter := find_adapter(name)) is not None:
        return is_speech_lm(resolve(adapter.base))
    if (source := blended_from(name)) is not None:
        return is_speech_lm(source)
    path = Path(name)
    if light.is_light(path):
        return True
    file = path / "config.json"
    return file.exists() and _json_object(file).get("model_type") == "palimpsest_speech_lm"


def _json_object(file: Path) -> dict[str, Any]:
    value = read_json(file)
    if not isinstance(value, dict):
        raise UserError(f"{file} is damaged: a JSON object belongs there; copy or download it again.")
    return value


def model_kind(where: str) -> Literal["speech_lm", "audio_llm", "language_model"]:
    """What a resolved name is, by its config alone: ours, an audio LLM of transformers, or neither.

    An adapter is what its base is.
    """
    if (adapter := find_adapter(where)) is not None:
        return model_kind(resolve(adapter.base))
    if (source := blended_from(where)) is not None:
        return model_kind(resolve(source))
    if is_speech_lm(where):
        return "speech_lm"
    if _speech_checkpoint(where) is not None:
        return "language_model"
    return "audio_llm" if _takes_audio(_config(where).to_dict()) else "language_model"


def _takes_audio(config: Mapping[str, Any]) -> bool:
    """Whether the config, or one inside it, describes an audio part beside a language model."""
    marks = ("audio_config", "audio_token_id", "audio_token_index")
    inner = (value for value in config.values() if isinstance(value, Mapping))
    return any(config.get(mark) is not None for mark in marks) or any(map(_takes_audio, inner))


def load_language_model(
    name: str, *, dtype: torch.dtype | str = "float32", device: str = "cpu"
) -> tuple[PreTrainedModel, Any]:
    """(causal language model in eval mode, tokenizer).

    For a SpeechLM's folder: the language model inside it. For an audio LLM of transformers: that model, which answers
    text as it is.
    """
    language_model, processor = load_text_model(name, dtype=dtype, device=device)
    return language_model, processor.tokenizer


def blank_language_model(name: str) -> PreTrainedModel:
    """The language model that `load_language_model` gives, without its weights: on the meta device, from its config."""
    import torch
    import transformers

    where = text_source(name)
    config = _config(where)
    with torch.device("meta"):
        if model_kind(where) == "audio_llm":
            return getattr(transformers, config.architectures[0])._from_config(config)
        model = transformers.AutoModelForCausalLM.from_config(config)
    language_model: PreTrainedModel = model.language_model if is_speech_lm(where) else model
    if light.is_light(Path(name)) and (n_new := light.read_light(Path(name)).new_layers):
        insert_layers(language_model, n_new)
    return language_model


def load_text_model(
    name: str, *, dtype: torch.dtype | str = "float32", device: str = "cpu"
) -> tuple[PreTrainedModel, SpeechLMProcessor]:
    """As `load_language_model`, with the processor that writes its prompts: a SpeechLM has a system turn of its own.

    Another model has none, and a processor without features of speech.
    """
    from transformers import AutoModelForCausalLM

    from palimpsest.models.processor import SpeechLMProcessor

    where = resolve(name)
    kind = model_kind(where)
    if kind == "speech_lm":
        speech_lm, processor = load_speech_lm(where, dtype=dtype, device=device)
        inside = speech_lm.language_model
        return without_adapters(inside) if speech_lm.gated else inside, processor
    if (source := blended_from(where)) is not None:
        language_model, text_processor = load_text_model(source, dtype=dtype, device=device)
        return _blended(language_model, Path(where)), text_processor
    if kind == "audio_llm":
        audio_tokenizer = _tokenizer_without_audio(where)
        audio_llm = _load_audio_model(where, dtype, device)
        if getattr(audio_llm.config, "has_lora_adapter", False) and getattr(audio_llm, "_hf_peft_config_loaded", False):
            audio_llm.disable_adapters()  # Granite Speech's is for audio; it does the same when it generates from text
        return audio_llm, SpeechLMProcessor(audio_tokenizer, None)
    if (adapter := find_adapter(where)) is not None:
        base, _ = load_language_model(adapter.base, device=_first_place(device))
        return _adapted(base, adapter, dtype, device), SpeechLMProcessor(load_tokenizer(where), None)
    if (found := _speech_checkpoint(where)) is not None:
        return _load_speech_checkpoint(found, dtype, device), SpeechLMProcessor(load_tokenizer(where), None)
    tokenizer = _load_tokenizer(where)
    return _load(AutoModelForCausalLM, where, device, dtype=dtype), SpeechLMProcessor(tokenizer, None)


def load_audio_llm(
    name: str, *, dtype: torch.dtype | str = "float32", device: str = "cpu"
) -> tuple[PreTrainedModel, Any]:
    """(audio LLM of transformers in eval mode, its processor), of the class that the checkpoint names.

    Raises UserError for a model that takes no audio, for a class transformers does not have, and for a processor that
    needs a package which is not installed (Voxtral: mistral-common; Granite Speech: torchaudio).
    """
    where = resolve(name)
    _audio_class(where)
    processor = load_audio_processor(where)
    return _load_audio_model(where, dtype, device), processor


def _load_audio_model(name: str, dtype: torch.dtype | str, device: str) -> PreTrainedModel:
    where = resolve(name)
    if (adapter := find_adapter(where)) is not None:
        base = _load_audio_model(adapter.base, "float32", _first_place(device))
        adapted: PreTrainedModel = _adapted(base, adapter, dtype, device)
        return adapted
    loaded: PreTrainedModel = _load(_audio_class(where), where, device, dtype=dtype)
    return loaded


def _audio_class(name: str) -> Any:
    """The class of transformers that an audio LLM's checkpoint names; of an adapter its base's."""
    import transformers

    where = resolve(name)
    if (adapter := find_adapter(where)) is not None:
        return _audio_class(adapter.base)
    config = _config(where)
    if not _takes_audio(config.to_dict()):
        raise UserError(f"{name} is a {config.model_type} model and takes no audio; ask it in text, or use a cascade.")
    architecture = (config.architectures or ["none"])[0]
    kind = getattr(transformers, architecture, None)
    if kind is None or not hasattr(kind, "generate"):
        raise UserError(
            f"{name} names the class {architecture}, which transformers {transformers.__version__} cannot answer with; "
            "use another version of transformers, or another checkpoint."
        )
    return kind


def load_audio_processor(name: str) -> Any:
    """Of an audio LLM. Raises UserError where it needs a package that is not installed."""
    from transformers import AutoProcessor

    where = resolve(name)
    adapter = find_adapter(where)
    return _from_pretrained(AutoProcessor, where) if adapter is None else load_audio_processor(adapter.base)


def _tokenizer_without_audio(name: str) -> Any:
    """The tokenizer, with the chat template, that an audio LLM is asked in text with.

    A processor that lacks a package or a file of its audio part is not needed for that, unless it has the template.
    Raises UserError as `load_audio_processor` where there is none.
    """
    try:
        return tokenizer_for_text(load_audio_processor(name))
    except UserError as error:
        with suppress(UserError):
            tokenizer = load_tokenizer(name)
            if getattr(tokenizer, "chat_template", None):
                return tokenizer_for_text(SimpleNamespace(tokenizer=tokenizer))
        raise error


def load_asr(name: str, *, device: str = "cpu") -> tuple[WhisperForConditionalGeneration, WhisperProcessor]:
    """(Whisper with its decoder in eval mode and float32, its processor)."""
    from transformers import WhisperForConditionalGeneration, WhisperProcessor

    where = resolve(name)
    model = _load(WhisperForConditionalGeneration, where, device, dtype="float32")
    return model, _from_pretrained(WhisperProcessor, where)


def load_any(name: str, device: str = "cpu") -> tuple[PreTrainedModel, Any]:
    """(what AutoModel makes of a checkpoint, in eval mode and float32, its feature extractor)."""
    from transformers import AutoFeatureExtractor, AutoModel

    where = resolve(name)
    return _load(AutoModel, where, device, dtype="float32"), _from_pretrained(AutoFeatureExtractor, where)


def load_encoder(name: str, *, dtype: torch.dtype | str = "float32", device: str = "cpu") -> tuple[WhisperEncoder, Any]:
    """(Whisper encoder in eval mode without gradients, its feature extractor); `name` may be a SpeechLM with one."""
    from transformers import WhisperModel

    from palimpsest.models.speech_lm import SpeechLM

    where = encoder_source(name)
    kind = SpeechLM if is_speech_lm(where) else WhisperModel
    encoder = _load(kind, where, device, part="encoder", dtype=dtype)
    encoder.requires_grad_(False)
    return encoder, load_feature_extractor(name)


def load_feature_extractor(name: str) -> Any:
    """Whisper's, of the encoder `name`."""
    from transformers import WhisperFeatureExtractor

    return _from_pretrained(WhisperFeatureExtractor, encoder_source(name))


Role = Literal["language_model", "encoder", "asr"]
ROLES: tuple[Role, ...] = get_args(Role)  # of a study's models


def require_loadable(role: Role, name: str) -> None:
    """Raise UserError for a model that would not load as what it is in a study: files, config, names and shapes.

    No weight is read; of a SpeechLM as the language model only the files are looked at.
    """
    if role == "encoder":
        load_encoder(name, device="meta")
    elif role == "asr":
        load_asr(name, device="meta")
    elif not is_speech_lm(resolve(name)):
        load_language_model(name, device="meta")


def load_speech_lm(
    folder: str | Path, *, dtype: torch.dtype | str = "float32", device: str = "cpu"
) -> tuple[SpeechLM, SpeechLMProcessor]:
    """(SpeechLM in eval mode, its processor) from a folder written by `save_pretrained` of both, or a light one."""
    from palimpsest.models.processor import SpeechLMProcessor
    from palimpsest.models.speech_lm import SpeechLM

    where = Path(resolve(str(folder)))
    if not is_speech_lm(str(where)):
        raise UserError(
            f"{folder} is not a speech LLM written by palimpsest; give a methods/NAME/checkpoint folder of a run."
        )
    if (adapter := find_adapter(str(where))) is not None:
        base, base_processor = load_speech_lm(adapter.base, device=_first_place(device))
        return _adapted(base, adapter, dtype, device), base_processor
    if (source := blended_from(str(where))) is not None:
        speech_lm, speech_processor = load_speech_lm(source, dtype=dtype, device=device)
        return _blended(speech_lm, where), speech_processor
    if light.is_light(where):
        parts = light.read_light(where)
        dtype = parts.dtype if dtype == "auto" else dtype  # the one it was trained in
        model, processor = light.compose(
            where,
            *load_language_model(parts.language_model.name, dtype=dtype),
            *load_encoder(parts.encoder.name, dtype=dtype),
        )
        require_finite(model.adaptor.state_dict().items(), str(where))
        return model.to(device).eval(), processor
    model = _load(SpeechLM, str(where), device, dtype=dtype)
    processor = _from_pretrained(SpeechLMProcessor, str(where))
    _require_tokens(processor.tokenizer, str(where))
    return model, processor


def _first_place(device: str) -> str:
    """Where an adapter is merged: with the base in host memory, so that a GPU holds one copy."""
    return "meta" if device == "meta" else "cpu"


def _adapted(base: Any, adapter: Adapter, dtype: torch.dtype | str, device: str) -> Any:
    """The base, which is in float32 and changed in place, with the adapter merged; then in `dtype`, on `device`."""
    return _placed(merge_adapter(base, adapter.folder), adapter.base, adapter.name, dtype, device)


def _placed(model: Any, base: str, name: str, dtype: torch.dtype | str, device: str) -> Any:
    """A model that was put together in float32 from `base` and more, in `dtype` ("auto": the base's), on `device`."""
    import torch

    wanted = _config(text_source(base)).dtype if dtype == "auto" else dtype
    if device == "meta":
        return model.eval()
    require_finite(model.state_dict().items(), name)
    return model.to(device, getattr(torch, wanted) if isinstance(wanted, str) else wanted or torch.float32).eval()


def _load_tokenizer(where: str) -> Any:
    from transformers import AutoTokenizer

    # AutoTokenizer would ask transformers for the config of a model that it does not know.
    options = {} if _speech_checkpoint(where) is None else {"config": _config(where)}
    try:
        tokenizer = _from_pretrained(AutoTokenizer, where, **options)
    except UserError as error:
        if Path(where).is_dir() and not any((Path(where) / name).exists() for name in TOKENIZER):
            raise UserError(
                f"{where} has no tokenizer ({TOKENIZER[0]} …); copy the tokenizer's files of the model that it was "
                "trained from into it."
            ) from error
        raise
    _require_tokens(tokenizer, where)
    return tokenizer


def _require_tokens(tokenizer: Any, where: str) -> None:
    """Raise UserError for a tokenizer that loads and then cannot tokenise: its settings are not what they should be."""
    try:
        tokenizer.decode(tokenizer("Is it so?", add_special_tokens=False)["input_ids"])
    except Exception as error:  # what libraries raise for these has no common kind
        raise UserError(
            f"The tokenizer of {where} is damaged ({_reason(error)}); copy or download it again."
        ) from error


def _config(where: str) -> Any:
    """Of a speech LLM's checkpoint the config of its language model."""
    from transformers import AutoConfig

    if (found := _speech_checkpoint(where)) is not None:
        if found.layout.base is not None:
            return _of_base(found, lambda base: _config(text_source(base)))
        try:
            return AutoConfig.for_model(**(found.layout.config or {}))
        except Exception as error:  # of transformers' configs, which have no common kind
            raise UserError(f"The config of {where} describes no language model: {error}") from error
    return _from_pretrained(AutoConfig, where)


def _load(kind: Any, where: str, device: str, *, part: str | None = None, **options: Any) -> Any:
    """The model in eval mode on `device`, every parameter from the files of `where`; `part`: only this module of it.

    On the device "meta" names and shapes are checked and no weight is read.
    Raises UserError for a checkpoint whose keys are not the model's, one of quantised weights, and a weight that is not
    finite.
    """
    _require_plain_weights(where)
    placed = {"device_map": "meta"} if device == "meta" else {}
    checked: dict[str, Any] = {"output_loading_info": True, "ignore_mismatched_sizes": True}
    model, found = _from_pretrained(kind, where, **checked, **placed, **options)
    if getattr(model, "_hf_peft_config_loaded", False):  # transformers then reports of the adapter alone
        if not getattr(model.config, "has_lora_adapter", False):  # Granite Speech's, which is for audio, lies there
            raise UserError(
                f"{where} holds a whole model and an adapter, and whether the model has the adapter's update already "
                f"does not show: if it has, move the files adapter_* away; if not, give 'BASE{JOIN}FOLDER', each in a "
                "folder of its own."
            )
        with _without_adapter(where) as folder:
            blank, found = _from_pretrained(kind, str(folder), device_map="meta", **checked, **options)
        _require_same_keys(blank, found, where, part)
    else:
        _require_same_keys(model, found, where, part)
    _require_token_ids(model, where)
    if part is not None:
        model = model.get_submodule(part)
    if device != "meta":
        model = model.to(device)
        require_finite(model.state_dict().items(), where)
    return model.eval()


@contextmanager
def _without_adapter(where: str) -> Iterator[Path]:
    """A folder of links to the files of a loaded checkpoint, but not to those of the adapter that lies beside them."""
    folder = Path(where) if Path(where).is_dir() else _hub_config(where).parent
    with tempfile.TemporaryDirectory() as links:
        for file in folder.iterdir():
            if file.is_file() and not file.name.startswith("adapter_"):
                (Path(links) / file.name).symlink_to(file.resolve())
        yield Path(links)


def _require_same_keys(model: Any, found: Mapping[str, Any], where: str, part: str | None) -> None:
    """Raise UserError unless the files have every parameter of the model (or of `part`), and no others that matter.

    transformers leaves out of `found` what is absent by design, such as a head tied to the embedding, and draws at
    random what is missing otherwise. Parts that the model does not have may stand beside it: `UNUSED`, and modules of
    another name at the top, unless they are layers.
    """
    modules = {name for name, _ in model.named_children()}

    def matters(key: str) -> bool:
        if part is not None:
            return re.search(rf"(^|\.){part}\.", key) is not None
        return UNUSED.search(key) is None and (layer_index(key) is not None or key.partition(".")[0] in modules)

    missing = sorted(key for key in found["missing_keys"] if part is None or key.startswith(f"{part}."))
    extra = sorted(filter(matters, found["unexpected_keys"]))
    if missing and not extra:
        extra = sorted(found["unexpected_keys"])  # how the missing ones may be called there
    other = sorted(key for key, *_ in found["mismatched_keys"] if part is None or key.startswith(f"{part}."))
    faults = [
        f"{text} ({', '.join(keys[:3])}{', …' if len(keys) > 3 else ''})"
        for text, keys in (
            (f"it lacks {len(missing)} of the model's weights", missing),
            (f"it has {len(extra)} that the model does not have", extra),
            (f"{len(other)} have another shape", other),
        )
        if keys
    ]
    if faults:
        raise UserError(
            f"{where} is no checkpoint of {type(model).__name__} as its config describes it: {'; '.join(faults)}. Give "
            "one that is complete, with its own config and the names that transformers writes."
        )


def _require_token_ids(model: Any, where: str) -> None:
    """Raise UserError for generation settings whose tokens are no ids: transformers looks at them when it answers."""
    settings = getattr(model, "generation_config", None)
    for key in ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id"):
        value = getattr(settings, key, None)
        ids = value if isinstance(value, list) else [] if value is None else [value]
        if not all(isinstance(number, int) and not isinstance(number, bool) for number in ids):
            raise UserError(
                f"{where}: the generation settings name {value!r} as {key}; give one of the tokenizer's ids, or a list."
            )


def _require_plain_weights(where: str) -> None:
    config = _config(where).to_dict()
    settings = next((c["quantization_config"] for c in (config, config.get("text_config")) if _quantised(c)), None)
    if settings is not None:
        method = settings.get("quant_method", "unnamed") if isinstance(settings, Mapping) else settings
        raise UserError(
            f"{where} holds quantised weights ({method}), which can be neither measured nor trained as they are; give "
            "the checkpoint that it was made from."
        )


def _quantised(config: Any) -> bool:
    return isinstance(config, Mapping) and bool(config.get("quantization_config"))


def require_finite(tensors: Iterable[tuple[str, Tensor]], where: str) -> None:
    """Raise UserError, naming the first of the tensors that holds NaN or infinity."""
    import torch

    for name, tensor in tensors:
        # A sum costs no memory; only if it is not finite, which large numbers can do too, each is looked at.
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor.sum())):
            bad = int(tensor.numel() - torch.isfinite(tensor).sum())
            if bad:
                raise UserError(
                    f"{where}: the weight {name} is not finite ({bad:,} of {tensor.numel():,} numbers are NaN or "
                    "infinite), so nothing can be measured; use a checkpoint from before it diverged."
                )


def _from_pretrained(kind: Any, where: str, **options: Any) -> Any:
    """From a local folder, or from the hub in the version that `fingerprint` names."""
    import torch

    if not Path(where).is_dir():
        options["revision"] = _commit(where)

    try:
        return kind.from_pretrained(where, **options)
    except torch.OutOfMemoryError:
        raise
    except ImportError as error:
        reason = " ".join(str(error).split())
        what = kind.__name__.removeprefix("Auto").lower()
        raise UserError(f"The {what} of {where} needs a package that is not installed: {reason}") from error
    # A model type that transformers does not know, or files that are not what their names promise: what libraries raise
    # for these has no common kind (tokenizers: Exception itself).
    except Exception as error:
        raise UserError(f"{where} could not be loaded as {kind.__name__}: {_reason(error)}") from error
