"""One way to load a model: by `embedded:` name, by local folder, or by hub name.

A SpeechLM's folder is a whole checkpoint or a light one (light.py); both are taken wherever a SpeechLM is.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from safetensors import safe_open

from palimpsest.files import UserError, hash_file, hash_value, read_json
from palimpsest.models import embedded, light
from palimpsest.models.anatomy import scored_parameters

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from transformers import PreTrainedModel, WhisperForConditionalGeneration, WhisperProcessor
    from transformers.models.whisper.modeling_whisper import WhisperEncoder

    from palimpsest.models.processor import SpeechLMProcessor
    from palimpsest.models.speech_lm import SpeechLM

WEIGHT_FILES = ("*.safetensors", "pytorch_model*.bin")


def resolve(name: str) -> str:
    """A local folder's path or a hub name, checked as far as it can be without loading.

    Raises UserError for an unknown embedded model, or a folder without a config or weights.
    """
    if name.startswith(embedded.PREFIX):
        return str(embedded.checkpoint(name))
    path = Path(name)
    if light.is_light(path):
        return str(path)
    if path.is_dir():
        if not (path / "config.json").exists():
            raise UserError(f"{path} has no config.json; give the folder of a Hugging Face checkpoint.")
        if not any(file for pattern in WEIGHT_FILES for file in path.glob(pattern)):
            raise UserError(f"{path} has a config but no weights (*.safetensors); the checkpoint is incomplete.")
        return str(path)
    if path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1 or path.exists():
        raise UserError(
            f"{name} is not a folder; give a checkpoint folder, a hub name (owner/model) or an embedded: name."
        )
    return name


def choose_device(wanted: str) -> str:
    """ "auto" is CUDA if there is one, else the CPU; anything else is taken as it is."""
    import torch

    return ("cuda" if torch.cuda.is_available() else "cpu") if wanted == "auto" else wanted


def fingerprint(name: str) -> str:
    """Identifies the model's weights and config: hashes of the local files, or the hub's commit."""
    where = resolve(name)
    folder = Path(where)
    if folder.is_dir():
        if light.is_light(folder):  # which names its files and the models under it by their hashes
            light.read_light(folder)
            return hash_file(folder / light.FILE)
        files = sorted(f for pattern in ("config.json", *WEIGHT_FILES) for f in folder.glob(pattern))
        return hash_value([[file.name, hash_file(file)] for file in files])
    from transformers import AutoConfig

    return hash_value([where, _from_pretrained(AutoConfig, where)._commit_hash])


def text_source(name: str) -> str:
    """Where the config, the tokenizer and most weights of a language model are: of a light SpeechLM, its base model."""
    where = resolve(name)
    return text_source(light.read_light(Path(where)).language_model.name) if light.is_light(Path(where)) else where


def load_tokenizer(name: str) -> Any:
    """The tokenizer of a language model or SpeechLM."""
    from transformers import AutoTokenizer

    return _from_pretrained(AutoTokenizer, text_source(name))


def embedding_width(name: str) -> int:
    """Numbers per token in a language model's embedding, from its config."""
    from transformers import AutoConfig

    config = _from_pretrained(AutoConfig, text_source(name)).get_text_config()
    return int(getattr(config, "word_embed_proj_dim", None) or config.hidden_size)


def weight_bytes(name: str) -> int:
    """Size of the weights on disk (local folders), or by the config's count of float32 numbers (hub)."""
    where = text_source(name)
    if Path(where).is_dir():
        return sum(file.stat().st_size for pattern in WEIGHT_FILES for file in Path(where).glob(pattern))
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        return 4 * int(AutoModelForCausalLM.from_config(_from_pretrained(AutoConfig, where)).num_parameters())


class StoredLanguageModel(Mapping[str, "Tensor"]):
    """The scored weights of the language model in a SpeechLM's folder by canonical name, read one at a time.

    Names and shapes are those of the model's class, as `scored_parameters` has them. Where the files hold the weights
    in another form (transformers writes the stacked experts of most mixtures one by one) the whole model is read.
    """

    def __init__(self, folder: Path) -> None:
        import torch

        from palimpsest.models.speech_lm import SpeechLM, SpeechLMConfig

        with torch.device("meta"):
            model = SpeechLM(_from_pretrained(SpeechLMConfig, str(folder)))
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
            whole = _from_pretrained(SpeechLM, str(folder), dtype="auto")
            self._loaded = {name: parameter.detach() for name, parameter in scored_parameters(whole).items()}

    def __getitem__(self, name: str) -> Tensor:
        if self._loaded:
            return self._loaded[name]
        tensor: Tensor = self._files[name].get_tensor(self._keys[name])
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._keys)

    def __len__(self) -> int:
        return len(self._keys)


def is_speech_lm(name: str) -> bool:
    path = Path(name)
    return light.is_light(path) or (
        (path / "config.json").exists() and read_json(path / "config.json").get("model_type") == "palimpsest_speech_lm"
    )


def model_kind(where: str) -> Literal["speech_lm", "audio_llm", "language_model"]:
    """What a resolved name is, by its config alone: ours, an audio LLM of transformers, or neither."""
    if is_speech_lm(where):
        return "speech_lm"
    from transformers import AutoConfig

    return "audio_llm" if _takes_audio(_from_pretrained(AutoConfig, where).to_dict()) else "language_model"


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
    from transformers import AutoModelForCausalLM, AutoTokenizer

    where = resolve(name)
    if is_speech_lm(where):
        speech_lm, processor = load_speech_lm(where, dtype=dtype, device=device)
        return speech_lm.language_model, processor.tokenizer
    if model_kind(where) == "audio_llm":
        audio_llm, audio_processor = load_audio_llm(where, dtype=dtype, device=device)
        return audio_llm, audio_processor.tokenizer
    tokenizer = _from_pretrained(AutoTokenizer, where)
    model = _from_pretrained(AutoModelForCausalLM, where, dtype=dtype)
    return model.to(device).eval(), tokenizer


def blank_language_model(name: str) -> PreTrainedModel:
    """The language model that `load_language_model` gives, without its weights: on the meta device, from its config."""
    import torch
    import transformers

    where = text_source(name)
    config = _from_pretrained(transformers.AutoConfig, where)
    with torch.device("meta"):
        if model_kind(where) == "audio_llm":
            return getattr(transformers, config.architectures[0])._from_config(config)
        model = transformers.AutoModelForCausalLM.from_config(config)
    return model.language_model if is_speech_lm(where) else model


def load_text_model(
    name: str, *, dtype: torch.dtype | str = "float32", device: str = "cpu"
) -> tuple[PreTrainedModel, SpeechLMProcessor]:
    """As `load_language_model`, with the processor that writes its prompts: a SpeechLM has a system turn of its own.

    Another model has none, and a processor without features of speech.
    """
    from palimpsest.models.processor import SpeechLMProcessor

    if is_speech_lm(resolve(name)):
        speech_lm, processor = load_speech_lm(name, dtype=dtype, device=device)
        return speech_lm.language_model, processor
    language_model, tokenizer = load_language_model(name, dtype=dtype, device=device)
    return language_model, SpeechLMProcessor(tokenizer, None)


def load_audio_llm(
    name: str, *, dtype: torch.dtype | str = "float32", device: str = "cpu"
) -> tuple[PreTrainedModel, Any]:
    """(audio LLM of transformers in eval mode, its processor), of the class that the checkpoint names.

    Raises UserError for a model that takes no audio, for a class transformers does not have, and for a processor that
    needs a package which is not installed (Voxtral: mistral-common; Granite Speech: torchaudio).
    """
    import transformers

    where = resolve(name)
    config = _from_pretrained(transformers.AutoConfig, where)
    if not _takes_audio(config.to_dict()):
        raise UserError(f"{name} is a {config.model_type} model and takes no audio; ask it in text, or use a cascade.")
    architecture = (config.architectures or ["none"])[0]
    kind = getattr(transformers, architecture, None)
    if kind is None or not hasattr(kind, "generate"):
        raise UserError(
            f"{name} names the class {architecture}, which transformers {transformers.__version__} cannot answer with; "
            "use another version of transformers, or another checkpoint."
        )
    try:
        processor = _from_pretrained(transformers.AutoProcessor, where)
    except ImportError as error:
        reason = " ".join(str(error).split())
        raise UserError(f"The processor of {name} needs a package that is not installed: {reason}") from error
    return _from_pretrained(kind, where, dtype=dtype).to(device).eval(), processor


def load_asr(name: str, *, device: str = "cpu") -> tuple[WhisperForConditionalGeneration, WhisperProcessor]:
    """(Whisper with its decoder in eval mode and float32, its processor)."""
    from transformers import WhisperForConditionalGeneration, WhisperProcessor

    where = resolve(name)
    model = _from_pretrained(WhisperForConditionalGeneration, where, dtype="float32")
    return model.to(device).eval(), _from_pretrained(WhisperProcessor, where)


def load_encoder(name: str, *, dtype: torch.dtype | str = "float32", device: str = "cpu") -> tuple[WhisperEncoder, Any]:
    """(Whisper encoder in eval mode without gradients, its feature extractor)."""
    from transformers import WhisperFeatureExtractor, WhisperModel

    where = resolve(name)
    encoder = _from_pretrained(WhisperModel, where, dtype=dtype).get_encoder()
    encoder.requires_grad_(False)
    return encoder.to(device).eval(), _from_pretrained(WhisperFeatureExtractor, where)


def load_speech_lm(
    folder: str | Path, *, dtype: torch.dtype | str = "float32", device: str = "cpu"
) -> tuple[SpeechLM, SpeechLMProcessor]:
    """(SpeechLM in eval mode, its processor) from a folder written by `save_pretrained` of both, or a light one."""
    from palimpsest.models.processor import SpeechLMProcessor
    from palimpsest.models.speech_lm import SpeechLM

    where = resolve(str(folder))
    if not is_speech_lm(where):
        raise UserError(
            f"{folder} is not a speech LLM written by palimpsest; give a methods/NAME/checkpoint folder of a run."
        )
    if light.is_light(Path(where)):
        parts = light.read_light(Path(where))
        dtype = parts.dtype if dtype == "auto" else dtype  # the one it was trained in
        model, processor = light.compose(
            Path(where),
            *load_language_model(parts.language_model.name, dtype=dtype),
            *load_encoder(parts.encoder.name, dtype=dtype),
        )
    else:
        model = _from_pretrained(SpeechLM, where, dtype=dtype)
        processor = _from_pretrained(SpeechLMProcessor, where)
    return model.to(device).eval(), processor


def _from_pretrained(kind: Any, where: str, **options: Any) -> Any:
    try:
        return kind.from_pretrained(where, **options)
    except (OSError, ValueError) as error:  # ValueError: a model type that transformers does not know
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"{where} could not be loaded as {kind.__name__}: {reason}") from error
