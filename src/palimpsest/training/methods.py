"""The training methods: what each trains, how fast, what holds it back (remedies.py), and what it sees.

| method     | trained                                   | learning-rate scale                                  |
|------------|-------------------------------------------|------------------------------------------------------|
| `adaptor`  | adaptor                                   | 1                                                    |
| `full`     | adaptor, whole language model             | 1                                                    |
| `layer_lr` | adaptor, whole language model             | Eq. 3 per layer; 1 for embedding, head and final norm |
| `lora`     | adaptor, low-rank updates (peft)          | 1                                                    |
| `peft`     | adaptor, any tuner of peft                | 1                                                    |
| `inserted` | adaptor, copies of layers between those   | 1                                                    |
| `given`    | nothing: `checkpoint` is there already    |                                                      |
| `blend`    | nothing: base + scale · (`of` − base)     |                                                      |

The encoder is frozen in all of them; the adaptor has a learning rate of its own if one is given. With `modality` "text"
the questions are trained on as text, so the adaptor, which nothing reaches, is frozen too. A remedy is a key of a
method, and several can stand together.
"""

from __future__ import annotations

import inspect
import random
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Annotated, Any, Literal

from annotated_types import Ge, Gt, Le, Lt

from palimpsest.files import UserError
from palimpsest.models.anatomy import layer_index, scored_parameters
from palimpsest.models.inserted import insert_layers
from palimpsest.models.token_settings import SpeechInput
from palimpsest.training.remedies import Distill, Pull, Replay, Slow
from palimpsest.training.rules import Rule, layer_rules
from palimpsest.training.tuners import require_merging, tuner_config

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from palimpsest.importance.scores import Scores
    from palimpsest.models.speech_lm import SpeechLM

MethodKind = Literal["adaptor", "full", "layer_lr", "lora", "peft", "inserted", "given", "blend"]
WITHOUT_TRAINING = ("given", "blend")
OF_FRONTIER = ("curve", "in_full")  # where a method stands and how much is measured of it; no weight depends on them
USED_BY: dict[str, tuple[MethodKind, ...]] = {
    "lambda_": ("layer_lr",),
    "targets": ("lora", "peft"),
    **dict.fromkeys(("rank", "alpha", "dropout"), ("lora",)),
}
WITHOUT_RANK = ("adaptor", "full", "layer_lr")  # beside them nobody takes a rank for more than lora's
ADDING = ("lora", "peft", "inserted")  # train what is added to the language model, whose own weights are frozen
# Their kernels read the weight of out_proj, past an adapter; peft refuses it.
WITHOUT_OUT_PROJ = ("mamba", "mamba2", "falcon_mamba", "falcon_h1", "nemotron_h")
WIDE = ("float32", "float64")  # weights that a low-rank update is merged into without losing much of it


@dataclass(frozen=True)
class Method:
    """One way to train. `alpha` None means 2·rank (the paper); `adaptor_learning_rate` None means `learning_rate`."""

    kind: MethodKind
    learning_rate: Annotated[float, Gt(0)] = 2e-5
    adaptor_learning_rate: Annotated[float, Gt(0)] | None = None
    lambda_: Annotated[float, Ge(0), Le(1)] = 0.4  # layer_lr: Eq. 3
    rank: Annotated[int, Ge(1)] = 8  # lora
    alpha: Annotated[int, Ge(1)] | None = None  # lora
    dropout: Annotated[float, Ge(0), Lt(1)] = 0.0  # lora
    # layer_lr: which layers Eq. 3 slows down; "shuffled", "inverted" and "mean" are controls, see `method_scales`.
    importance: Literal["measured", "shuffled", "inverted", "mean"] = "measured"
    modality: Literal["speech", "text"] = "speech"  # how the training questions are put
    # What stands for speech: the adaptor's outputs; rows of speech.tokens, which take its place in all the keys above;
    # or the outputs of an adaptor on frames that were replaced by the centroids of these tokens.
    speech: SpeechInput = "frames"
    k: Annotated[int, Ge(2)] | None = None  # speech tokens, centroids: how many; None: speech.tokens.k
    targets: tuple[str, ...] | None = None  # lora, peft: names of linear layers, such as q_proj; None: all of a layer
    gate: Literal["none", "speech"] = "none"  # lora; speech: only where there is speech, so that text is the base's
    peft: dict[str, Any] | None = None  # peft: a config of peft's, with peft_type
    new_layers: Annotated[int, Ge(1)] | None = None  # inserted: how many copies, evenly between the layers there are
    answers: Literal["gold", "own"] | None = None  # what is learned; None: what data.answers says
    replay: Replay | None = None
    distill: Distill | None = None
    pull: Pull | None = None
    slow: Slow | None = None
    checkpoint: str | None = None  # given: folder, hub name or PEFT adapter
    of: str | None = None  # blend: the method whose update is taken in part
    scale: float = 1.0  # blend: how much of the update; 0 is the base, 1 the method
    layers: tuple[int, ...] | None = None  # blend: the layers it is scaled in, all else as in the method; None: all
    norm_of: str | None = None  # blend: instead of a scale, the method to whose norm the update is brought
    curve: str | None = None  # of which curve of the frontier this is a point; `over` writes it
    in_full: bool = False  # true: although it is on a curve, measured and compared as methods on none are

    def __post_init__(self) -> None:
        self._require_own_keys()
        if (self.kind == "given") != bool(self.checkpoint):
            raise ValueError("kind given needs a checkpoint, and no other kind has one: it starts from the base")
        if (self.kind == "peft") != (self.peft is not None):
            raise ValueError("kind peft needs a config of peft's (peft: {peft_type: …}), and no other kind has one")
        if (self.kind == "inserted") != (self.new_layers is not None):
            raise ValueError("kind inserted needs a number of layers (new_layers), and no other kind has one")
        if (self.kind == "blend") != (self.of is not None):
            raise ValueError("kind blend needs the name of a method (of), and no other kind has one")
        layers = self.layers or ()
        if len(set(layers)) < len(layers):
            raise ValueError(f"layers {list(layers)} must name each layer once")
        if self.norm_of is not None:
            if self.norm_of == self.of:
                raise ValueError(f"norm_of and of are both {self.of}, whose update has its own norm; name another")
            for name, default in (("scale", 1.0), ("layers", None)):
                if getattr(self, name) != default:
                    raise ValueError(f"norm_of finds the scale of the whole update; remove {name}")
        if self.modality == "text" and self.speech != "frames":
            raise ValueError(f"speech {self.speech} with modality text would not be heard; use speech, or remove it")
        if self.k is not None and self.speech == "frames":
            raise ValueError("k is how many speech tokens there are, and speech frames reads none; remove one")
        if self.modality == "text" and self.kind == "adaptor":
            raise ValueError("kind adaptor with modality text would train nothing; use speech, or another kind")
        if self.in_full and self.curve is None:
            raise ValueError("in_full is for a method on a curve (over, curve); others are measured in full; remove it")
        self._require_sense()

    @property
    def is_point(self) -> bool:
        """A point of a curve and no more: of it only what `frontier.measure` names, compared with the base alone."""
        return self.curve is not None and not self.in_full

    def _require_own_keys(self) -> None:
        """A key that the kind does not use is a mistake where it would be thought to do something."""
        if self.kind in WITHOUT_TRAINING:
            own = {
                "given": ("kind", "checkpoint", "modality", *OF_FRONTIER),
                "blend": ("kind", "of", "scale", "layers", "norm_of", *OF_FRONTIER),
            }[self.kind]
            unused = [it.name for it in fields(self) if it.name not in own and getattr(self, it.name) != it.default]
            if unused:
                raise ValueError(
                    f"kind {self.kind} trains nothing and does not use {', '.join(unused)}; remove what it has"
                )
            return
        if self.importance != "measured" and self.kind != "layer_lr":
            raise ValueError(f"importance {self.importance!r} belongs to kind layer_lr; {self.kind} does not use it")
        if self.gate != "none" and self.kind != "lora":
            raise ValueError(f"gate {self.gate} belongs to kind lora; {self.kind} changes the weights themselves")
        for name, default in (("scale", 1.0), ("layers", None), ("norm_of", None)):
            if getattr(self, name) != default:
                raise ValueError(f"{name} belongs to kind blend; {self.kind} does not use it")
        for name, kinds in USED_BY.items():
            usual = next(it.default for it in fields(self) if it.name == name)
            used = self.kind in kinds or (name == "rank" and self.kind in WITHOUT_RANK)
            if not used and getattr(self, name) != usual:
                instead = " (its own options stand under the key peft)" if self.kind == "peft" else ""
                raise ValueError(f"{name} belongs to kind {' and '.join(kinds)}; {self.kind} does not use it{instead}")

    def _require_sense(self) -> None:
        """Of what holds back: only where it can do something."""
        for name in ("replay", "distill", "pull", "slow"):
            if getattr(self, name) is not None and self.kind == "adaptor":
                raise ValueError(f"{name} has nothing to hold back: kind adaptor leaves the language model as it is")
        for name in ("pull", "slow"):
            if getattr(self, name) is not None and self.kind in ADDING:
                raise ValueError(
                    f"{name} is for weights that have a value in the base, and {self.kind} trains others beside them; "
                    "use it with full or layer_lr"
                )
        if self.distill is not None and self.distill.text and self.replay is None:
            raise ValueError("distill.text is the weight on replayed text; add replay, or remove it")
        if self.distill is not None and self.distill.speech and self.modality == "text":
            raise ValueError(
                "distill.speech needs spoken questions; with modality text set it to 0 and use distill.text with replay"
            )
        if self.distill is not None and (self.peft or {}).get("bias", "none") != "none":
            raise ValueError("peft.bias trains biases of the base, which is then not there to distil from; remove one")
        if self.gate == "speech":
            if self.modality == "text":
                raise ValueError("gate speech with modality text would train nothing; use speech, or no gate")
            if self.replay is not None:
                raise ValueError("gate speech leaves text to the base, so replay would train nothing; remove one")

    @property
    def trains(self) -> bool:
        return self.kind not in WITHOUT_TRAINING

    def weighs_by(self, scores: Literal["importance", "fisher"]) -> bool:
        """Whether a remedy asks for these scores of the base's weights."""
        pulled = self.pull is not None and self.pull.by == scores
        return pulled or (scores == "importance" and self.slow is not None)

    @property
    def tunes(self) -> bool:
        """Whether training changes what the language model does with text."""
        return self.trains and self.kind != "adaptor" and self.gate == "none"


def layer_totals(scores: Scores, reduction: str) -> dict[int, float]:
    """Sum of importance over each layer, in float64."""
    totals: dict[int, float] = {}
    for name, tensor in scores.tensors(reduction).items():
        layer = layer_index(name)
        if layer is not None:
            totals[layer] = totals.get(layer, 0.0) + float(tensor.double().sum())
    return dict(sorted(totals.items()))


def layer_scales(
    scores: Scores | Mapping[int, float], lambda_: float = 0.4, reduction: str = "signed_sum"
) -> dict[int, float]:
    """Eq. 3: scale_l = 1 − λ·(I_l − min I)/(max I − min I), so 1 for the least and 1 − λ for the most important layer.

    Args:
        scores: importance of the *pre-trained* model, or its sums per layer.
        lambda_: λ in [0, 1]; the paper's is 0.4.
        reduction: which of the scores' reductions to sum.

    Raises UserError for λ outside [0, 1] and for importance that is the same in all layers.
    """
    totals = scores if isinstance(scores, Mapping) else layer_totals(scores, reduction)
    if not 0.0 <= lambda_ <= 1.0:
        raise UserError(f"λ is {lambda_}; Eq. 3 needs a value from 0 to 1 (the paper's is 0.4).")
    if not totals:
        raise UserError(
            "The scores name no layers, so there is nothing to scale; score the weights of the transformer layers."
        )
    low, high = min(totals.values()), max(totals.values())
    if not high > low:
        raise UserError(f"All {len(totals)} layers have the same importance ({low:g}); Eq. 3 cannot tell them apart.")
    return {layer: 1.0 - lambda_ * (total - low) / (high - low) for layer, total in totals.items()}


def method_scales(
    method: Method, scores: Scores | Mapping[int, float], *, reduction: str = "signed_sum", seed: int = 0
) -> dict[int, float]:
    """The layers' scales of a layer_lr method: Eq. 3 as measured, or one of its three controls.

    "shuffled": the same scales, dealt out to the layers at random from `seed`: is it the layers, or only the lower mean
    rate? "mean": their mean for every layer. "inverted": Eq. 3 with 1 − (I_l − min I)/(max I − min I), so that the most
    important layer learns fastest.
    """
    scales = layer_scales(scores, method.lambda_, reduction)
    if method.importance == "shuffled":
        dealt = list(scales.values())
        random.Random(seed).shuffle(dealt)
        return dict(zip(scales, dealt, strict=True))
    if method.importance == "mean":
        return dict.fromkeys(scales, sum(scales.values()) / len(scales))
    if method.importance == "inverted":
        # scale = 1 − λ·n with n in [0, 1], so 1 − λ·(1 − n) = 2 − λ − scale.
        return {layer: 2.0 - method.lambda_ - scale for layer, scale in scales.items()}
    return scales


def rules_for(method: Method, scales: Mapping[int, float] | None = None) -> list[Rule]:
    """The ordered rules of a method for a SpeechLM's parameter names; `scales` (Eq. 3) for layer_lr."""
    adaptor_rate = method.adaptor_learning_rate if method.adaptor_learning_rate is not None else method.learning_rate
    adaptor_scale = None if method.modality == "text" else adaptor_rate / method.learning_rate
    start: list[Rule] = [(r"^encoder\.", None), (r"^adaptor\.", adaptor_scale)]
    if not method.trains:
        raise UserError(f"{method.checkpoint or method.of} is there already, so there is nothing to train.")
    if method.kind == "adaptor":
        return [*start, (r".*", None)]
    if method.kind in ("full", "peft", "inserted"):  # of these two what is left trainable, see Phase.keeps_frozen
        return [*start, (r".*", 1.0)]
    if method.kind == "lora":
        return [*start, (r"\.lora_", 1.0), (r".*", None)]
    if scales is None:
        raise UserError("layer_lr needs the importance of the pre-trained model; estimate it first (base/importance).")
    return [*start, *layer_rules(scales)]


def add_lora(model: SpeechLM, method: Method) -> None:
    """Wrap the language model with peft's LoRA, or another of its tuners, on `method.targets` or all linear maps of its
    layers, in place.

    Experts that stand stacked in one tensor are no linear layers, nor are most routers: by default they stay as they
    are.

    Raises UserError for a target that is no linear layer of the language model, and for what peft cannot adapt.
    """
    model.language_model = _adapted(model.language_model, method)
    require_merging(model.language_model)


def add_layers(model: SpeechLM, n_new: int) -> None:
    """Insert so many layers into the language model of `model`, in place; they alone of it stay trainable."""
    insert_layers(model.language_model, n_new)
    model.config.text_config = model.language_model.config


def require_language_model(name: str, methods: Iterable[Method], *, collapse: bool = False) -> None:
    """Raise UserError for a language model that the methods could not train, or that could not answer speech then.

    collapse: whether repeated speech tokens are left out.
    Nothing is read but its config: the adapters are put on a model without weights.
    """
    from palimpsest.models.cache import attends_to_everything
    from palimpsest.models.loading import blank_language_model
    from palimpsest.models.packing import takes_places

    methods = list(methods)
    blank = blank_language_model(name)
    prepare = getattr(blank, "prepare_inputs_for_generation", None)
    embeds = prepare is not None and "inputs_embeds" in inspect.signature(prepare).parameters
    if collapse and not (takes_places(blank) and attends_to_everything(blank)):
        raise UserError(
            f"{name} has windows, recurrence or no positions that can be given, so repeated speech tokens cannot be "
            "left out in front of it; set speech.tokens.collapse to false."
        )
    if not embeds and any(method.modality == "speech" for method in methods):
        raise UserError(
            f"{name} is a {type(blank).__name__}, which cannot generate from embeddings as a speech prompt needs; "
            "use a text-only checkpoint of it."
        )
    for method in methods:
        if method.kind in ("lora", "peft"):
            require_merging(_adapted(blank_language_model(name), method))
        elif method.new_layers is not None:
            insert_layers(blank_language_model(name), method.new_layers)


def added_parameters(language_model: PreTrainedModel, method: Method) -> int:
    """How many numbers a method of kind lora, peft or inserted trains in a language model, which it is put on in place.

    The language model may be without its weights.
    """
    if method.new_layers is None:
        language_model = _adapted(language_model, method)
    else:
        insert_layers(language_model, method.new_layers)
    return sum(parameter.numel() for parameter in language_model.parameters() if parameter.requires_grad)


def _adapted(language_model: PreTrainedModel, method: Method) -> Any:
    from peft import LoraConfig, get_peft_model

    what = "LoRA" if method.peft is None else str(method.peft.get("peft_type"))
    linear = _linear_layers(language_model)  # whole name → last part
    names = sorted(set(linear.values()))
    targets = list(method.targets) if method.targets is not None else names
    if method.targets is None and getattr(language_model.config, "model_type", None) in WITHOUT_OUT_PROJ:
        targets = [name for name in names if name != "out_proj"]
    unknown = [name for name in targets if name not in names]
    if unknown or not targets:
        wanted = ", ".join(unknown) or "none"
        raise UserError(
            f"{what}'s targets ({wanted}) are not in the language model; its layers have {', '.join(names) or 'none'}."
        )
    # peft takes a name wherever a module ends in it: where others do (a vision tower), whole names say which are meant.
    meant = [name for name, last in linear.items() if last in targets]
    matched = [name for name, _ in language_model.named_modules() if name.rpartition(".")[2] in targets]
    wanted_modules = targets if set(matched) == set(meant) else meant
    if method.kind == "peft":
        config = tuner_config(method, wanted_modules)
    else:
        config = LoraConfig(
            r=method.rank,
            lora_alpha=2 * method.rank if method.alpha is None else method.alpha,
            lora_dropout=method.dropout,
            target_modules=wanted_modules,
            task_type="CAUSAL_LM",
        )
    try:
        return get_peft_model(language_model, config)
    except (ValueError, NotImplementedError, TypeError, ImportError) as error:
        reason = " ".join(str(error).split())
        remedy = "name others as targets" if method.peft is None else "change its options, or name others as targets"
        raise UserError(
            f"{what} cannot be put on {', '.join(targets)} of this language model ({reason}); {remedy}."
        ) from error


def _linear_layers(language_model: PreTrainedModel) -> dict[str, str]:
    """Names of the linear maps whose weights are scored: whole name → last part."""
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    scored = {id(parameter) for parameter in scored_parameters(language_model).values()}
    return {
        name: name.rpartition(".")[2]
        for name, module in language_model.named_modules()
        if type(module) in (nn.Linear, Conv1D) and id(module.weight) in scored
    }


def require_mergeable(method: Method, model: SpeechLM) -> None:
    """Raise UserError for LoRA, or another tuner, on weights whose bits are too few to take its update in."""
    dtype = _dtype(model)
    if method.kind in ("lora", "peft") and method.gate == "none" and dtype not in WIDE:
        what = "LoRA" if method.kind == "lora" else "The tuner"
        raise UserError(
            f"{what} would be merged into {dtype} weights, which loses most of a small update to rounding; "
            "load the model in float32 (models.dtype) and compute in bfloat16 (models.compute)."
        )


def merge_lora(model: SpeechLM) -> None:
    """Fold the low-rank updates into the weights, in place: from here on a plain language model.

    In float32: of a 16-bit model all weights become float32 and stay so, because rounding the sum to 16 bits again
    would take most of a small update.
    """
    if _dtype(model) not in WIDE:
        model.float()
    model.language_model = model.language_model.merge_and_unload()


def _dtype(model: SpeechLM) -> str:
    return str(model.language_model.dtype).removeprefix("torch.")
