"""What changed between two configurations: a resume with another recipe is refused with these words."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

MOST_SHOWN = 4


def differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[str]:
    """What differs between two JSON mappings, by dotted key, in the order of `new`: ["training.epochs: 1 → 2"]."""
    found: list[str] = []
    for key in [*new, *(key for key in old if key not in new)]:
        before, after = old.get(key), new.get(key)
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            found += differences(before, after, f"{prefix}{key}.")
        elif before != after or (key in old) != (key in new):
            shown = [_shown(values, key) for values in (old, new)]
            found.append(f"{prefix}{key}: {shown[0]} → {shown[1]}")
    return found


def _shown(values: Mapping[str, Any], key: str) -> str:
    if key not in values:
        return "not there"
    text = json.dumps(values[key], ensure_ascii=False)
    return text if len(text) <= 80 else f"{text[:77]}..."


def in_words(found: list[str]) -> str:
    """The first differences for an error message: "seed: 0 → 1; training.epochs: 1 → 2; and 3 more"."""
    more = f"; and {len(found) - MOST_SHOWN} more" if len(found) > MOST_SHOWN else ""
    return "; ".join(found[:MOST_SHOWN]) + more
