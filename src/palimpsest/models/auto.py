"""After `import palimpsest`, which imports neither torch nor transformers, transformers' Auto classes know SpeechLM.

transformers finds models of other packages only through classes registered at run time. Registering the real ones would
import torch, so a stand-in for the configuration class is registered as soon as transformers' own table of
configurations is there: at once, or when that module is imported later. The first folder of type palimpsest_speech_lm
that an Auto class reads goes through the stand-in, which imports the real classes; these register themselves.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

MODEL_TYPE = "palimpsest_speech_lm"
TABLE = "transformers.models.auto.configuration_auto"


class StandIn:
    """What AutoConfig does with a configuration class, done with `SpeechLMConfig`, imported here."""

    model_type = MODEL_TYPE

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        return _real()(*args, **kwargs)

    @staticmethod
    def from_dict(*args: Any, **kwargs: Any) -> Any:
        return _real().from_dict(*args, **kwargs)


def _real() -> Any:
    # Importing it registers the processor and, with it, the model.
    return importlib.import_module("palimpsest.models.processor").SpeechLMConfig


class _WhenTableIsImported(MetaPathFinder):
    """Finds nothing itself; lets `TABLE` be found as always and adds the stand-in after it has run. Acts once."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != TABLE:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_register(module: ModuleType) -> None:
                execute(module)
                _register(module)

            spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec


def _register(table: ModuleType) -> None:
    table.AutoConfig.register(MODEL_TYPE, StandIn, exist_ok=True)


def enable() -> None:
    """Register the stand-in, now or when transformers is imported; a second call changes nothing."""
    if (table := sys.modules.get(TABLE)) is not None:
        if MODEL_TYPE not in table.CONFIG_MAPPING:
            _register(table)
    elif not any(isinstance(finder, _WhenTableIsImported) for finder in sys.meta_path):
        sys.meta_path.insert(0, _WhenTableIsImported())
