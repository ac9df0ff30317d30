"""palimpsest: what speech training writes over in a language model, and how to keep it.

The public names are imported on first use, so that `import palimpsest` costs nothing. It also makes transformers' Auto
classes know SpeechLM (auto.py).
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

from palimpsest.models import auto

__version__ = "0.1.0"

_PUBLIC = {
    "SpeechLM": "palimpsest.models.speech_lm",
    "SpeechLMConfig": "palimpsest.models.speech_lm",
    "SpeechLMProcessor": "palimpsest.models.processor",
    "load_language_model": "palimpsest.models.loading",
    "load_speech_lm": "palimpsest.models.loading",
    "Example": "palimpsest.data.examples",
    "read_manifest": "palimpsest.data.examples",
    "Scores": "palimpsest.importance.scores",
    "estimate_importance": "palimpsest.importance.estimate",
    "select": "palimpsest.importance.select",
    "deactivate": "palimpsest.importance.deactivate",
    "layer_scales": "palimpsest.training.methods",
    "parameter_groups": "palimpsest.training.rules",
    "StudyConfig": "palimpsest.config",
    "run_study": "palimpsest.study.run",
}
__all__ = ["__version__", *_PUBLIC]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'palimpsest' has no attribute {name!r}")
    return getattr(import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return __all__


auto.enable()
