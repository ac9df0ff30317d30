"""palimpsest: what speech training writes over in a language model, and how to keep it.

The public names are imported on first use, so that `import palimpsest` costs nothing. It also makes transformers' Auto
classes know SpeechLM (models/auto.py), and keeps documented import paths of earlier versions.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from palimpsest.models import auto

__version__ = "0.2.0"

_PUBLIC = {
    "SpeechLM": "palimpsest.models.speech_lm",
    "SpeechLMConfig": "palimpsest.models.speech_lm",
    "SpeechLMProcessor": "palimpsest.models.processor",
    "load_language_model": "palimpsest.models.loading",
    "load_speech_lm": "palimpsest.models.loading",
    "pair_weights": "palimpsest.models.paired_weights",
    "Example": "palimpsest.data.examples",
    "read_manifest": "palimpsest.data.examples",
    "Scores": "palimpsest.importance.scores",
    "estimate_importance": "palimpsest.importance.estimate",
    "select": "palimpsest.importance.select",
    "deactivate": "palimpsest.importance.deactivate",
    "layer_scales": "palimpsest.training.methods",
    "parameter_groups": "palimpsest.training.rules",
    "RetentionCallback": "palimpsest.comparison.retention_callback",
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


# Documented in earlier versions → where it is now.
_MOVED = {
    "palimpsest.data.records": "palimpsest.data.examples",
    "palimpsest.evaluation.stats": "palimpsest.intervals",
    "palimpsest.importance.distributed": "palimpsest.importance.layouts",
    "palimpsest.processes": "palimpsest.parallel",
    "palimpsest.workspace": "palimpsest.study.workspace",
}


class _Moved(MetaPathFinder, Loader):
    """Gives a module under the name that it had, with a DeprecationWarning."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        return ModuleSpec(fullname, self) if fullname in _MOVED else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        warnings.warn(f"{spec.name} is {_MOVED[spec.name]} now; import that.", DeprecationWarning, stacklevel=2)
        return import_module(_MOVED[spec.name])

    def exec_module(self, module: ModuleType) -> None:
        """It was executed under its own name."""


sys.meta_path.append(_Moved())
auto.enable()
