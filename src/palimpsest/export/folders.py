"""From a trained SpeechLM to folders that others load: the language model inside, the whole model, the LoRA adapter, or
what was trained alone (a light SpeechLM).

Every folder is written under a temporary name beside its place, then renamed, and has a model card (model_card.py).
"""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from palimpsest.export.model_card import THIS, Additions, Facts, Kind, model_card, speech_token, study_of
from palimpsest.files import (
    UserError,
    hash_value,
    read_json,
    rename_folder,
    require_disk,
    working_folder,
    write_json,
    write_text,
)
from palimpsest.models import light as light_folder
from palimpsest.models.blend import is_blend
from palimpsest.models.embedded import PREFIX
from palimpsest.models.loading import (
    fingerprint,
    is_speech_lm,
    load_encoder,
    load_language_model,
    load_speech_lm,
    resolve,
    weight_bytes,
)
from palimpsest.models.prompts import used_arguments
from palimpsest.records import BASE
from palimpsest.rundir import has_checkpoint, models_in

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from palimpsest.models.processor import SpeechLMProcessor
    from palimpsest.models.speech_lm import SpeechLM

ADAPTER = Path("adapter", "adapter_config.json")  # inside the checkpoint of a LoRA method
SPEECH_TOKENIZER = "speech_tokenizer.safetensors"  # beside a language model whose vocabulary has speech tokens


@dataclass(frozen=True)
class Checkpoint:
    """A SpeechLM's folder; `run` and `method` are None when it lies outside a run directory."""

    path: Path
    run: Path | None
    method: str | None


def export(
    source: Path,
    *,
    method: str | None = None,
    text_llm: Path | None = None,
    speech_lm: Path | None = None,
    adapter: Path | None = None,
    grown_llm: Path | None = None,
    light: Path | None = None,
    language_model: str | None = None,
    encoder: str | None = None,
    sources: Path | None = None,
    evaluations: Sequence[Path] = (),
    notes: Path | None = None,
) -> list[str]:
    """Write the folders that are asked for and return a line about each.

    Args:
        source: a run directory, or a folder with a SpeechLM.
        method: which of the run's methods; needed where there are several.
        text_llm: the language model alone, with its tokenizer, for AutoModelForCausalLM and AutoTokenizer.
        speech_lm: the whole SpeechLM with its processor, for AutoModel(ForCausalLM) and AutoProcessor.
        adapter: the low-rank updates alone, for peft; methods of kind lora and peft only.
        grown_llm: the language model with a token for each centroid or code in its vocabulary, for programs that take
            token ids and nothing else; methods with speech: tokens only.
        light: what was trained alone beside the names of language model and encoder, for palimpsest; methods of
            kind adaptor, lora and inserted only.
        language_model, encoder: those names, for `light` from a checkpoint outside a run.
        sources: JSON list of rows with `kind`, `utterances` and `licence`, and `voice` if known: what the training data
            was made of, for the cards.
        evaluations: folders that `palimpsest evaluate` wrote about this checkpoint or the language model it was trained
            on, whose accuracies the cards then hold.
        notes: Markdown on how the model was made, for the cards.

    Both whole models end their answers where palimpsest ends them: the tokenizer's end of turn is added to the ids that
    end generation, if it is not among them.

    Raises UserError, before anything is loaded or written, for a source without the method or the adapter, and for a
    target that is not empty.
    """
    checkpoint = find_checkpoint(source, method)
    asked: dict[Kind, Path | None] = {
        "text_llm": text_llm, "speech_lm": speech_lm, "adapter": adapter, "light": light,
        "grown_llm": grown_llm,  # last: it changes the model that was loaded
    }  # fmt: skip
    wanted = {kind: folder.absolute() for kind, folder in asked.items() if folder is not None}
    _check(checkpoint, wanted)
    study = study_of(checkpoint.run, checkpoint.method)
    trained_on = study.get("models", {"language_model": language_model, "encoder": encoder})
    more = Additions(
        sources=[] if sources is None else read_sources(sources),
        qa=[row for folder in evaluations for row in read_evaluation(folder, checkpoint, trained_on)],
        notes="" if notes is None else read_text(notes),
    )
    if light is not None and None in (trained_on["language_model"], trained_on["encoder"]):
        raise UserError(
            f"{checkpoint.path} lies outside a run, which would say what it was trained on; give --language-model "
            "NAME and --encoder NAME."
        )
    if set(wanted) != {"adapter"}:
        model, processor = load_speech_lm(checkpoint.path, dtype="auto")
        if grown_llm is not None:
            require_grown(model, processor, str(checkpoint.path))
        _set_end_ids(model.language_model, processor.tokenizer)

    lines = []
    for kind, folder in wanted.items():
        working = working_folder(folder)
        try:
            if kind == "adapter":
                facts = _write_adapter(checkpoint, study.get("models", {}).get("language_model"), working)
            elif kind == "light":
                facts = _write_light(checkpoint, model, processor, trained_on, working)
            elif kind == "text_llm":
                facts = _write_text_llm(model.language_model, processor, working)
            elif kind == "grown_llm":
                facts = _write_grown_llm(model, processor, working)
            else:
                facts = _write_speech_lm(model, processor, working)
            write_text(working / "README.md", model_card(kind, facts, study, more))
            rename_folder(working, folder)  # which is not there or empty: the check has seen it
        finally:
            shutil.rmtree(working, ignore_errors=True)
        n_bytes = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
        size = f"{facts.n_parameters / 1e6:.1f} M parameters, {facts.dtype}, {n_bytes / 1e6:.1f} MB"
        lines.append(f"{kind.replace('_', ' ')}: {folder} ({size})")
    return lines


def find_checkpoint(source: Path, method: str | None = None) -> Checkpoint:
    """The checkpoint that `source` and `method` name. Raises UserError with the methods there are."""
    if str(source).startswith(PREFIX):
        source = Path(resolve(str(source)))
    if is_speech_lm(str(source)):
        if method is not None:
            raise UserError(f"{source} is one checkpoint; leave out --method, or give the run directory.")
        parents = source.absolute().parents
        if source.absolute().name == "checkpoint" and len(parents) > 2 and parents[1].name == "methods":
            return Checkpoint(source, run=parents[2], method=parents[0].name)
        return Checkpoint(source, run=None, method=None)
    present = [name for name in models_in(source) if name != BASE and has_checkpoint(source, name)]
    if not present:
        raise UserError(
            f"{source} is neither a run with trained methods nor the folder of a speech LLM; give the --out of a study "
            "or a methods/NAME/checkpoint folder."
        )
    if method is None and len(present) > 1:
        raise UserError(f"{source} has the methods {', '.join(present)}; choose one with --method NAME.")
    if method is not None and method not in present:
        raise UserError(f"{source} has no trained method {method!r}; it has {', '.join(present)}.")
    name = method or present[0]
    return Checkpoint(source / "methods" / name / "checkpoint", run=source, method=name)


def _check(checkpoint: Checkpoint, wanted: dict[Kind, Path]) -> None:
    if not wanted:
        raise UserError("Nothing to export was named; give --text-llm DIR, --speech-lm, --adapter or --light.")
    if len(set(wanted.values())) < len(wanted):
        raise UserError("Two exports were given the same folder; give each a folder of its own.")
    for folder in wanted.values():
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise UserError(f"{folder} is there already and not empty; give a new folder.")
    if "adapter" in wanted and not (checkpoint.path / ADAPTER).exists():
        raise UserError(f"{checkpoint.path} has no adapter to export; only methods of kind lora and peft have one.")
    if "light" in wanted and checkpoint.run is None and light_folder.is_light(checkpoint.path):
        raise UserError(f"{checkpoint.path} is a light folder already; copy it.")
    if "light" in wanted and is_blend(checkpoint.path):
        raise UserError(f"{checkpoint.path} is a blend, which has no light form; give --speech-lm or --text-llm.")
    if (
        "light" in wanted
        and (adapter := checkpoint.path / ADAPTER).exists()
        and read_json(adapter)["peft_type"] != "LORA"
    ):
        raise UserError(f"{checkpoint.path} has an adapter that is no LoRA, and a light folder holds LoRA alone.")
    if light_folder.is_gated(checkpoint.path) and ({"text_llm", "speech_lm", "grown_llm"} & set(wanted)):
        raise UserError(
            f"{checkpoint.path} has LoRA for speech alone, which is in no weights: text is answered by the base as it "
            "is, and speech with --light, which keeps the gate."
        )
    for kind, folder in wanted.items():
        if kind in ("text_llm", "speech_lm", "grown_llm"):
            require_disk(folder.parent, weight_bytes(str(checkpoint.path)), f"The export to {folder}")


def read_sources(file: Path) -> list[dict[str, Any]]:
    """The rows of --sources. Raises UserError for a file that is not such a list."""
    try:
        rows = json.loads(read_text(file))
    except ValueError as error:
        raise UserError(f"{file} is not JSON ({error}); --sources takes a list of what was trained on.") from error
    keys = {"kind", "utterances", "licence"}
    if not (isinstance(rows, list) and rows and all(isinstance(row, dict) and keys <= row.keys() for row in rows)):
        raise UserError(f"{file} is no list of rows with kind, utterances and licence, which --sources takes.")
    return rows


def read_text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read as text ({error}); give another file.") from error


def read_evaluation(folder: Path, checkpoint: Checkpoint, names: Mapping[str, str | None]) -> list[dict[str, Any]]:
    """The rows `qa` of an evaluation's folder, their method THIS or "base".

    Raises UserError unless it is of the checkpoint, of its language model, or of that behind its encoder as recogniser.
    """
    language_model, encoder = names["language_model"], names["encoder"]
    known = {fingerprint(str(checkpoint.path)): THIS}
    if language_model is not None:
        known[fingerprint(language_model)] = "base"
    if language_model is not None and encoder is not None:
        known[hash_value([fingerprint(language_model), fingerprint(encoder)])] = "base"
    files = sorted(folder.glob("results-*.json"))
    if not files:
        raise UserError(f"{folder} has no results-MODALITY.json; give the --out of `palimpsest evaluate`.")
    rows = []
    for file in files:
        measured = read_json(folder / file.name.replace("results-", "samples-"))["model"]
        if measured not in known:
            raise UserError(f"{file} was measured on another model than {checkpoint.path} and {language_model}.")
        rows += [{**row, "method": known[measured]} for row in read_json(file)["qa"]]
    return rows


# ---------------------------------------------------------------------------------------------------------------------
# What each folder holds
# ---------------------------------------------------------------------------------------------------------------------
def _set_end_ids(language_model: PreTrainedModel, tokenizer: Any) -> None:
    from palimpsest.evaluation.generation import end_ids

    settings = language_model.generation_config
    own = settings.eos_token_id if isinstance(settings.eos_token_id, list) else [settings.eos_token_id]
    ends = end_ids(language_model, tokenizer)
    if set(ends) != set(own):
        settings.eos_token_id = ends


def _write_text_llm(language_model: PreTrainedModel, processor: SpeechLMProcessor, folder: Path) -> Facts:
    language_model.save_pretrained(folder)
    processor.tokenizer._set_processor_class(None)  # of the audio or vision model it may have come with
    processor.tokenizer.save_pretrained(folder)
    return _facts(language_model, processor)


def _write_grown_llm(model: SpeechLM, processor: SpeechLMProcessor, folder: Path) -> Facts:
    """The language model with the rows in its embedding; changes model and tokenizer.

    Its head has a place for each new token too, which is what this form of a vocabulary cannot do without; the
    generation settings keep them from being written.
    """
    import torch

    from palimpsest.models.tokens import TokenAdaptor, as_value, write_tokens

    language_model, tokenizer, adaptor = model.language_model, processor.tokenizer, model.adaptor
    assert isinstance(adaptor, TokenAdaptor)  # require_grown has seen it
    rows = adaptor.rows.weight.detach()
    new_ids = add_speech_tokens(tokenizer, len(rows))
    embedding = language_model.get_input_embeddings()
    n_rows = max(len(embedding.weight), new_ids[-1] + 1)  # some embeddings have more rows than there are tokens
    language_model.resize_token_embeddings(n_rows, mean_resizing=False)
    with torch.no_grad():
        head = language_model.get_output_embeddings()
        if head.weight is not language_model.get_input_embeddings().weight:
            for parameter in head.parameters():  # a bias too
                parameter[new_ids] = 0
        language_model.get_input_embeddings().weight[new_ids] = rows
    settings = language_model.generation_config
    settings.suppress_tokens = [*(settings.suppress_tokens or ()), *new_ids]
    write_tokens(as_value(adaptor.quantiser), folder / SPEECH_TOKENIZER)
    facts = _write_text_llm(language_model, processor, folder)
    return replace(facts, tokens=model.config.tokens, instruction=processor.style.speech_instruction)


def add_speech_tokens(tokenizer: Any, k: int) -> list[int]:
    """The ids of `k` tokens that a tokenizer now has."""
    names = [speech_token(number) for number in range(k)]
    tokenizer.add_tokens(names, special_tokens=True)
    found: list[int] = tokenizer.convert_tokens_to_ids(names)
    return found


def require_grown(model: SpeechLM, processor: SpeechLMProcessor, name: str) -> None:
    """Raise UserError for a SpeechLM without speech tokens, and for a tokenizer that would write its prompts otherwise.

    Tried on a copy of the tokenizer, with two tokens.
    """
    from palimpsest.models.prompts import render
    from palimpsest.models.speech_lm import SPEECH_POSITION
    from palimpsest.models.tokens import TokenAdaptor

    if not isinstance(model.adaptor, TokenAdaptor):
        raise UserError(f"{name} reads no speech tokens, so its vocabulary would not grow; give --text-llm.")
    tokenizer = copy.deepcopy(processor.tokenizer)
    names = map(speech_token, range(len(model.adaptor.rows.weight)))
    known = next((token for token in names if token in tokenizer.get_vocab()), None)
    new_ids = add_speech_tokens(tokenizer, 2)
    said = f"{speech_token(0)}{speech_token(1)}\n{processor.style.speech_instruction}"
    text, templated = render(tokenizer, said, processor.style)
    found = tokenizer(text, add_special_tokens=not templated)["input_ids"]
    spoken = iter(new_ids)
    wanted = [next(spoken) if it == SPEECH_POSITION else it for it in processor.speech_prompt(2)]
    if known is not None or found != wanted:
        why = f"has a token {known} already" if known else "writes other tokens around tokens that are added to it"
        raise UserError(
            f"The tokenizer of {name} {why}, so the prompts of its training could not be written with it; use the "
            "speech LLM itself (--speech-lm)."
        )


def _write_speech_lm(model: SpeechLM, processor: SpeechLMProcessor, folder: Path) -> Facts:
    for part in (model.config.text_config, model.config.encoder_config):
        part._name_or_path = ""  # where the part once lay on this machine
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return _facts(model, processor)


def _write_adapter(checkpoint: Checkpoint, base: str | None, folder: Path) -> Facts:
    from safetensors.torch import load_file

    source = checkpoint.path / ADAPTER.parent
    for file in source.iterdir():
        if file.name != "README.md":  # peft's empty form
            shutil.copy2(file, folder / file.name)
    config = read_json(folder / ADAPTER.name)
    if base is not None:  # as the study names it, not the cache folder it was loaded from
        config["base_model_name_or_path"] = base
    write_json(folder / ADAPTER.name, config)
    tensors = load_file(folder / "adapter_model.safetensors").values()
    dtypes = sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors})
    n_parameters = sum(tensor.numel() for tensor in tensors)
    return Facts(n_parameters, " and ".join(dtypes), config["peft_type"], chat=True, system=None)


def _write_light(
    checkpoint: Checkpoint, model: SpeechLM, processor: SpeechLMProcessor, names: Mapping[str, str], folder: Path
) -> Facts:
    from safetensors.torch import load_file

    adapter = checkpoint.path / ADAPTER
    step = checkpoint.path / "step.json"
    trained = {"method": checkpoint.method, "fingerprint": read_json(step)["fingerprint"]} if step.exists() else {}
    light_folder.write_light(
        folder,
        model,
        processor,
        language_model=(names["language_model"], load_language_model(names["language_model"], dtype=model.dtype)[0]),
        encoder=(names["encoder"], load_encoder(names["encoder"], dtype=model.dtype)[0]),
        adapter=adapter.parent if adapter.exists() else None,
        trained=trained,
    )
    written = light_folder.read_light(folder)
    rows = written.tokens is not None and written.tokens["reads"] == "tokens"
    updates = f" and LoRA of rank {read_json(adapter)['r']}" if adapter.exists() else ""
    updates += ", on where there is speech," if model.gated else ""
    if n_new := written.new_layers:
        updates += f" and {n_new} inserted layers"
    tensors = [tensor for file in folder.rglob("*.safetensors") for tensor in load_file(file).values()]
    return Facts(
        sum(tensor.numel() for tensor in tensors),
        "float16",
        f"{'rows of speech tokens' if rows else 'adaptor'}{updates} of a SpeechLM",
        chat=True,
        system=processor.style.system,
        language_model=names["language_model"],
        encoder=names["encoder"],
        tokens=written.tokens,
    )


def _facts(model: PreTrainedModel, processor: SpeechLMProcessor) -> Facts:
    return Facts(
        model.num_parameters(),
        str(model.dtype).removeprefix("torch."),
        type(model).__name__,
        chat=processor.tokenizer.chat_template is not None,
        system=processor.style.system,
        arguments=used_arguments(processor.tokenizer, processor.style),
        tokens=getattr(model.config, "tokens", None),
    )
