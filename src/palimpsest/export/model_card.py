"""The README.md of an exported folder: what it is, what it was made of and how, what was measured, how to load it.

Everything comes from the run directory; what the run does not say, the card does not say either.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import yaml

import palimpsest
from palimpsest.evaluation.scoring import PRIMARY
from palimpsest.files import read_json, read_jsonl, without_folders
from palimpsest.models.embedded import MODELS, PREFIX, SHIPPED
from palimpsest.records import method_of
from palimpsest.report.public import JOIN, public
from palimpsest.report.table import inline_markdown

Kind = Literal["text_llm", "speech_lm", "adapter", "light", "grown_llm"]
Study = dict[str, Any]
WITH_SPEECH = ("speech_lm", "light")

WHAT = {
    "text_llm": "The language model inside a speech LLM, taken out unchanged: a plain Hugging Face causal LM.",
    "speech_lm": "A speech LLM (frozen Whisper encoder, adaptor, language model): it answers questions given as speech "
    "or text.",
    "adapter": "The low-rank updates (LoRA) that speech training made to a language model. They change the language "
    "model alone: to hear, it also needs the encoder and the adaptor of the whole speech LLM.",
    "light": "What speech training added to a language model, without the model itself: the adaptor and, if the model "
    "was tuned, low-rank updates (LoRA) or inserted layers. palimpsest makes the speech LLM of these, the language "
    "model and the encoder.",
    "grown_llm": "The language model inside a speech LLM of speech tokens, with a token for each of them at the end of "
    "its vocabulary: a plain Hugging Face causal LM for programs that take token ids and nothing else. It writes text "
    "alone: its generation settings (`suppress_tokens`) keep it from writing speech tokens, and who samples from its "
    "logits without them must do so too.",
}
METHODS = {
    "full": "all weights of the language model and the adaptor trained (Full-FT)",
    "layer_lr": "all weights trained, each layer at a learning rate set by its importance (Eq. 3 of arXiv 2509.23755)",
    "lora": "low-rank updates of the language model (LoRA, merged into its weights) and the adaptor trained",
    "peft": "the adaptor and a tuner of peft trained, which is merged into the weights of the language model",
    "inserted": "layers inserted between those of the language model (block expansion) and the adaptor trained, all "
    "else as it was",
    "blend": "no training: a part of what the method `of` changed (base + scale · change), its adaptor whole",
    "adaptor": "the adaptor trained, the language model frozen",
}
LIBRARY = {
    "text_llm": "transformers", "speech_lm": "palimpsest", "adapter": "peft", "light": "palimpsest",
    "grown_llm": "transformers",
}  # fmt: skip


@dataclass(frozen=True)
class Facts:
    """What is known of the exported model itself."""

    n_parameters: int
    dtype: str
    architecture: str
    chat: bool  # the tokenizer has a chat template
    system: str | None  # the system turn of the study's prompts
    arguments: Mapping[str, Any] = field(default_factory=dict)  # what its chat template was given besides the turns
    # What it was trained on, of a checkpoint outside a run.
    language_model: str | None = None
    encoder: str | None = None
    tokens: Mapping[str, Any] | None = None  # as in SpeechLMConfig, of a speech LLM that does not read frames alone
    instruction: str = ""  # that stands beside the speech

    @property
    def reads_codec(self) -> bool:
        return self.tokens is not None and self.tokens["kind"] == "codec"


@dataclass(frozen=True)
class Additions:
    """What the run does not say.

    sources: what the training data was made of: `kind`, `utterances`, `licence` and, if known, `voice` of each.
    qa: rows of results.json's table of that name, of evaluations outside the run; method "base" or `THIS`.
    notes: Markdown on how the model was made.
    """

    sources: Sequence[Mapping[str, Any]] = ()
    qa: Sequence[Mapping[str, Any]] = ()
    notes: str = ""


NOTHING = Additions()
THIS = "this model"


def study_of(run: Path | None, method: str | None) -> Study:
    """What the card needs of a run: its study.yaml, and `method`, `n_train`, `voices` and `qa` (rows of results.json).

    method: the name of a training run, of the first that of its method. Empty for a checkpoint outside a run, or in one
    whose recipe does not have the method. study.yaml is read as plain YAML: a run of an older version also has a card.
    """
    if run is None or not (run / "study.yaml").exists():
        return {}
    config = yaml.safe_load((run / "study.yaml").read_text(encoding="utf-8"))
    if method is not None and _method_of(config["methods"], method)[0] not in config["methods"]:
        return {}
    manifest, results = run / "data" / "train.jsonl", run / "results.json"
    train = read_jsonl(manifest) if manifest.exists() else []
    return {
        **config,
        "method": method,
        "n_train": len(train) or None,
        "voices": sorted({row.get("voice") or "recording" for row in train}),
        "qa": read_json(results)["qa"] if results.exists() else [],
    }


def _method_of(methods: Mapping[str, Any], run: str) -> tuple[str, int]:
    """(method, number of its training run, from 0)"""
    return (run, 0) if run in methods else method_of(run)


def model_card(kind: Kind, facts: Facts, study: Study, more: Additions = NOTHING) -> str:
    """The whole card as Markdown with YAML front matter."""
    if study:
        models = study["models"]
        facts = replace(facts, language_model=models["language_model"], encoder=models["encoder"])
    title = inline_markdown(f"{study['name']}: {study['method']}") if study else "Speech LLM"
    sections = [
        _front_matter(kind, facts),
        f"# {title}",
        f"{WHAT[kind]}{_reads(kind, facts)} Written by palimpsest {palimpsest.__version__}.",
        _made_of(facts, study),
        _training(study, more.notes),
        _sources(more.sources),
        _measured(kind, study, more.qa),
        _loading(kind, facts),
        _licences(kind, facts, study, more.sources),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


# ---------------------------------------------------------------------------------------------------------------------
# Names: what may stand in a public file
# ---------------------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Part:
    """A model the study names: how the card calls it, its hub name and its licence where they are known."""

    label: str
    hub: str | None
    licence: str | None


def part(name: str) -> Part:
    """An `embedded:` model, a hub name, or a local folder, of which only the last part of the path is shown."""
    if name.startswith(PREFIX):
        if name.removeprefix(PREFIX) in SHIPPED:
            return Part(f"`{name}`, which comes with palimpsest", None, "Apache-2.0")
        model = MODELS.get(name.removeprefix(PREFIX))
        if model is None:
            return Part(name, None, None)
        label = f"{model.origin} (`{name}`: {model.file} of the PyPI wheel {model.package.replace('_', '-')})"
        return Part(label, model.origin, model.licence)
    if _is_path(name):
        return Part(f"a local folder named {inline_markdown(Path(name).name)}", None, None)
    return Part(inline_markdown(name), name, None)


def _is_path(name: str) -> bool:
    return name.startswith((".", "~", "/")) or name.count("/") > 1 or "\\" in name or Path(name).exists()


def _without_path(sources: str) -> str:
    """A question set's name, or those of several; of a local path only its last part."""
    names = []
    for source in sources.split(JOIN):
        prefix, colon, rest = source.rpartition(":")
        names.append(f"{prefix}{colon}{Path(rest).name if _is_path(rest) else rest}")
    return inline_markdown(JOIN.join(names))


# ---------------------------------------------------------------------------------------------------------------------
# Sections
# ---------------------------------------------------------------------------------------------------------------------
def _front_matter(kind: Kind, facts: Facts) -> str:
    base = part(facts.language_model) if facts.language_model is not None else Part("", None, None)
    pipeline = "audio-text-to-text" if kind in WITH_SPEECH else "text-generation"
    fields: dict[str, Any] = {"library_name": LIBRARY[kind], "pipeline_tag": pipeline, "tags": ["palimpsest"]}
    if base.hub is not None:
        fields["base_model"] = base.hub
    if base.licence is not None:
        fields["license"] = base.licence.lower()
    return f"---\n{yaml.safe_dump(fields, sort_keys=False)}---"


def speech_token(number: int) -> str:
    """What the token of a centroid or code is called in a vocabulary that has it."""
    return f"<|speech_{number}|>"


def _reads(kind: Kind, facts: Facts) -> str:
    """What stands for speech in the prompts, where that is not the adaptor's outputs on encoder frames."""
    if facts.tokens is None:
        return ""
    if kind == "grown_llm":
        first, last = speech_token(0), speech_token(facts.tokens["k"] - 1)
        once = ", of equal ones in a row one" if facts.tokens["collapse"] else ""
        return (
            f" The tokens of an utterance, `{first}` to `{last}`{once}, stand in front of the instruction in the user's"
            " turn. `speech_tokenizer.safetensors` has what makes them of encoder frames."
        )
    k, pool = facts.tokens["k"], facts.tokens["pool"]
    if facts.reads_codec:
        return (
            f" Speech is given to it as the tokens of one codebook of a codec, each of the {k:,} with a row of its own "
            "in the adaptor's place. The codec is not part of it, so it cannot be given recordings."
        )
    frames = f"every {pool} encoder frames" if pool > 1 else "every encoder frame"
    if facts.tokens["reads"] == "centroids":
        return f" Its adaptor reads frames that are first replaced: {frames} by the nearest of {k:,} centroids."
    return (
        f" Speech is given to it as tokens: {frames} are the nearest of {k:,} centroids, each with a row of its own in "
        "the adaptor's place. The vocabulary has not changed, and it writes text alone."
    )


def _made_of(facts: Facts, study: Study) -> str:
    rows = [("Architecture", f"{facts.architecture}, {facts.n_parameters / 1e6:.1f} M parameters, {facts.dtype}")]
    if facts.language_model is not None:
        rows.append(("Base model", part(facts.language_model).label))
    if facts.encoder is not None:
        rows.append(("Speech encoder", f"{part(facts.encoder).label}, frozen"))
    if study:
        name, number = _method_of(study["methods"], study["method"])
        method, n_runs = study["methods"][name], study.get("seeds") or 1
        which = "" if n_runs == 1 else f"; training run {number + 1} of {n_runs}"
        start, done = study["models"].get("adaptor"), METHODS.get(method["kind"], method["kind"])
        started = "Adaptor started from", "" if start is None else part(start).label
        if method.get("speech") == "tokens":
            done = done.replace("the adaptor", "the rows of the speech tokens")
            of_adaptor = study["speech"]["tokens"]["start"] == "adaptor"
            like = "numbers with the mean and spread of each dimension of the embedding"
            of_frames = f"the mean output, over the frames of each token, of the adaptor of {started[1]}"
            started = "Rows started from", of_frames if of_adaptor else like
        train = study["data"]["train"]
        count = f"{study['n_train']} questions of " if study["n_train"] else ""
        rows += [
            started,
            ("Method", f"`{name}`: {done}{which}"),
            ("Training data", f"{count}{_without_path(train['source'])}, split {train['split']}"),
            ("Voice of the questions", inline_markdown(", ".join(map(without_folders, study["voices"])))),
        ]
    if facts.system is not None:
        rows.append(("System turn", inline_markdown(facts.system)))
    lines = [f"| {name} | {value} |" for name, value in rows if value]
    return "\n".join(["| | |", "|---|---|", *lines])


def _training(study: Study, notes: str) -> str:
    if not study and notes:
        return f"## Training\n\n{notes.strip()}"
    if not study:
        return (
            "This checkpoint lies outside a run directory: how it was trained and measured is not recorded beside it."
        )
    methods = study["methods"]
    name, _ = _method_of(methods, study["method"])
    told = [*(other for key in ("of", "norm_of") if (other := methods[name].get(key))), name]
    given = {it: {key: value for key, value in methods[it].items() if value is not None} for it in told}
    recipe = {
        "seed": study.get("seed"),
        "prompt": study.get("prompt"),
        "speech": {key: value for key, value in (study.get("speech") or {}).items() if key != "feature_cache"},
        "methods": given,
        "training": study.get("training"),
    }
    text = yaml.safe_dump(public(recipe), sort_keys=False, allow_unicode=True)
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    lead = f"{notes.strip()}\n\n" if notes else ""
    study_name = inline_markdown(study["name"])
    return f"## Training\n\n{lead}From the resolved recipe of the study {study_name}:\n\n{fence}yaml\n{text}{fence}"


def _measured(kind: Kind, study: Study, more: Sequence[Mapping[str, Any]]) -> str:
    if not study and not more:
        return ""
    # An adapter and a language model alone take no speech, so only answers to text are theirs.
    with_speech = kind in WITH_SPEECH
    own = ("text", "speech" if with_speech else "")
    shown = {"base": ("text", "cascade" if with_speech else ""), study.get("method"): own, THIS: own}
    rows = [
        row
        for row in [*study.get("qa", []), *more]
        if row["metric"] == PRIMARY and row["modality"] in shown.get(row["method"], ())
    ]
    if not rows:
        return f"## Measured\n\nNothing: the run has no results.json with answers of this method scored by `{PRIMARY}`."
    lines = []
    for row in rows:
        name = "base model" if row["method"] == "base" else row["method"]
        right = f"{row['correct']} of {row['n']} | {100 * row['accuracy']:.1f} %"
        interval = f"{100 * row['ci_low']:.1f} – {100 * row['ci_high']:.1f} %"
        lines.append(f"| {name} | {row['task']} | {row['modality']} | {right} | {interval} |")
    table = ["| model | task | question as | right | accuracy | 95 % interval |", "|---|---|---|---|---|---|", *lines]
    note = f"Greedy answers, metric `{PRIMARY}` version {rows[0]['metric_version']}, Wilson intervals."
    if with_speech:
        note += " In the cascade the base model answers what a speech recogniser has written down."
    return "\n".join(["## Measured", "", note, "", *table])


def _loading(kind: Kind, facts: Facts) -> str:
    if kind == "adapter":
        name = facts.language_model or "BASE MODEL"
        code = ADAPTER_CODE.replace("BASE", Path(name).name if _is_path(name) else name)
    elif kind in ("text_llm", "grown_llm"):
        system = {"role": "system", "content": facts.system}
        turn = "" if facts.system is None else f"{json.dumps(system, ensure_ascii=False)}, "
        given = "".join(f"{name}={value!r}, " for name, value in facts.arguments.items())
        chat = CHAT.replace("[", f"[{turn}", 1).replace("return_tensors", f"{given}return_tensors", 1)
        asked = chat if facts.chat else PLAIN
        if kind == "grown_llm":
            spoken = SPEECH_TOKENS.replace("INSTRUCTION", json.dumps(facts.instruction, ensure_ascii=False))
            asked = asked.replace('"What is the capital of France?"', "question")
            asked = asked.replace('"Question: What is the capital of France?', 'f"Question: {question}')
            asked = spoken + asked
        code = LOAD_TEXT + asked + ANSWER_TEXT
    else:
        code = LOAD_SPEECH if kind == "speech_lm" else LOAD_LIGHT
        code = code.replace("import soundfile\n", "") + ASK_TEXT if facts.reads_codec else code + ANSWER_SPEECH
    return f"## How to load it\n\n```python\n{code}```"


def _sources(sources: Sequence[Mapping[str, Any]]) -> str:
    if not sources:
        return ""
    rows = [f"| {row['kind']} | {row.get('voice') or ''} | {row['utterances']} | {row['licence']} |" for row in sources]
    return "\n".join(["## Training data", "", "| set | voice | utterances | licence |", "|---|---|---|---|", *rows])


def _licences(kind: Kind, facts: Facts, study: Study, sources: Sequence[Mapping[str, Any]]) -> str:
    unknown = "not recorded in the run; see where it comes from"
    named = [("Base model", facts.language_model)]
    if kind in WITH_SPEECH:
        named.append(("Speech encoder", facts.encoder))
    found = [(what, part(name)) for what, name in named if name is not None]
    lines = [f"- {what}, {item.label}: {item.licence or unknown}" for what, item in found]
    if sources:
        sets = dict.fromkeys((row["kind"], row["licence"]) for row in sources)
        lines += [f"- Training data, {name}: {licence}" for name, licence in sets]
    elif study:
        source = study["data"]["train"]["source"]
        lines.append(f"- Training data, {_without_path(source)}: {'Apache-2.0' if source == 'facts' else unknown}")
    return "\n".join(["## Licences of what it was made of", "", *lines]) if lines else ""


# ---------------------------------------------------------------------------------------------------------------------
# Code of the cards; the tests run it
# ---------------------------------------------------------------------------------------------------------------------
LOAD_TEXT = """from transformers import AutoModelForCausalLM, AutoTokenizer

path = "."  # this folder, or its name on the hub
tokenizer = AutoTokenizer.from_pretrained(path)
model = AutoModelForCausalLM.from_pretrained(path)
"""
CHAT = """messages = [{"role": "user", "content": "What is the capital of France?"}]
prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
"""
PLAIN = """prompt = tokenizer("Question: What is the capital of France?\\nAnswer:", return_tensors="pt")
"""
SPEECH_TOKENS = """ids = [1, 0, 1]  # the numbers of an utterance's tokens
question = "".join(f"<|speech_{i}|>" for i in ids) + "\\n" + INSTRUCTION
"""
ANSWER_TEXT = """output = model.generate(**prompt, max_new_tokens=64, do_sample=False)
print(tokenizer.decode(output[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True))
"""

LOAD_SPEECH = """import palimpsest  # the Auto classes know the model type from here on
import soundfile
from transformers import AutoModelForCausalLM, AutoProcessor

path = "."  # this folder, or its name on the hub
processor = AutoProcessor.from_pretrained(path)
model = AutoModelForCausalLM.from_pretrained(path)
"""
LOAD_LIGHT = """import soundfile
from palimpsest import load_speech_lm

model, processor = load_speech_lm(".")  # this folder
"""
ANSWER_SPEECH = """wave, rate = soundfile.read("question.wav", dtype="float32")  # mono, 16 kHz, up to 30 s
output = model.generate(**processor(audio=wave), max_new_tokens=64, do_sample=False)
print(processor.tokenizer.decode(output[0], skip_special_tokens=True))
"""
ASK_TEXT = """inputs = processor(text="What is the capital of France?")
output = model.generate(**inputs, max_new_tokens=64, do_sample=False)
print(processor.tokenizer.decode(output[0], skip_special_tokens=True))
"""

ADAPTER_CODE = """from palimpsest import load_language_model  # embedded: names, folders and hub names
from peft import PeftModel

language_model, tokenizer = load_language_model("BASE")
model = PeftModel.from_pretrained(language_model, ".")  # this folder, or its name on the hub
model = model.merge_and_unload()  # a plain causal LM again
"""
