"""What holds a method's weights back, and what else it sees: the options. training/keep.py does what they say.

| key       | what it does                                                  | source                                |
|-----------|---------------------------------------------------------------|---------------------------------------|
| `replay`  | batches of text between those of speech                       | Robins 1995; Chaudhry et al. 2019     |
| `distill` | KL from the base's distributions, on text or from speech      | Hinton et al. 2015; Li & Hoiem 2016   |
| `pull`    | each step takes the weights a little back to the base's       | Li et al. 2018; Kirkpatrick et al. 2017 |
| `slow`    | the base's most important weights learn slowly, or not at all | beyond the paper                      |
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Annotated, Literal

from annotated_types import Ge, Gt, Le, Lt

from palimpsest.records import Scope

OWN = "own"  # of replayed text: what the base wrote itself
REPLAYED = "replayed"  # key of a batch of replayed text; it does not reach the model
AT_ONCE = 1 << 22  # numbers of a float32 array over tokens and vocabulary that are there at a time, to distil


@dataclass(frozen=True)
class Replay:
    """Batches of text, whole ones, so many that they are `share` of all batches; those of the questions stay all."""

    share: Annotated[float, Gt(0), Lt(1)] = 0.2
    text: str = OWN  # own, or a source of general text as in drift.general_text
    split: str = "train"  # of a folder or hub set
    limit: Annotated[int, Ge(2)] | None = None  # only the first texts of a source
    n_texts: Annotated[int, Ge(2)] = 200  # own: of each kind, plain and chat, that the base writes
    new_tokens: Annotated[int, Ge(2)] = 64  # own: most tokens of such a text
    window: Annotated[int, Ge(2)] = 256  # most tokens of a row; a longer text of a source makes several

    def __post_init__(self) -> None:
        unused = ("split", "limit", "window") if self.text == OWN else ("n_texts", "new_tokens")
        for name in unused:
            if getattr(self, name) != next(it.default for it in fields(self) if it.name == name):
                of = "a source of text" if self.text == OWN else "text of the base's own"
                raise ValueError(f"{name} is of {of}, which replay.text {self.text!r} is not; remove it")

    def n_batches(self, n_questions: int) -> int:
        """Batches of text in an epoch of so many batches of questions."""
        return max(1, round(n_questions * self.share / (1.0 - self.share)))


@dataclass(frozen=True)
class Distill:
    """Loss = labels · cross-entropy + weight · temperature² · KL(base ‖ model), per supervised token.

    speech: weight where the model is asked in speech and the base reads the same question. text: weight on replayed
    text, which both read.
    """

    speech: Annotated[float, Ge(0)] = 1.0
    text: Annotated[float, Ge(0)] = 0.0
    labels: Annotated[float, Ge(0)] = 1.0
    temperature: Annotated[float, Gt(0)] = 1.0

    def __post_init__(self) -> None:
        if not self.speech and not self.text:
            raise ValueError("distill has weight 0 both for speech and for text; give one of them, or leave it out")
        if not self.speech and not self.labels:
            raise ValueError("distill with labels 0 and speech 0 learns nothing of the questions; give one of them")


@dataclass(frozen=True)
class Pull:
    """Before each step θ ← θ − rate · strength · c · (θ − base), with the rate of the parameter at that step.

    c is 1 (plain: L2-SP, decoupled as AdamW's decay is), or the base's fisher (EWC) or importance of each weight,
    divided by its mean over all weights that are scored, so that one strength means the same pull on the whole.
    """

    strength: Annotated[float, Gt(0)]
    by: Literal["plain", "fisher", "importance"] = "plain"


@dataclass(frozen=True)
class Slow:
    """The most important `top` of the base's scored weights move `scale` times as far in each step; 0: not at all."""

    top: Annotated[float, Gt(0), Lt(1)]
    scope: Scope = "global"  # the most important of all, or of each matrix
    scale: Annotated[float, Ge(0), Le(1)] = 0.0
