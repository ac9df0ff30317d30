"""Options as values: frozen dataclasses whose bounds are `Annotated`, checked by pydantic where they come from a user.

An option is written once, beside the code that uses it. A recipe, a command and `NAME=VALUE` on a command line all make
it here. An unknown key is an error that names the nearest known one; a value out of range one that names the key.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from functools import cache
from typing import Any, TypeVar, cast, get_args, get_type_hints

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError, with_config
from typing_extensions import TypedDict

from palimpsest.files import UserError

T = TypeVar("T")
# Where a value may be of several types, pydantic names in its location which of them it tried.
TRIED = re.compile(r"(str|int|float|bool|list|tuple|dict)(\[.*\])?")
UNKNOWN = ("extra_forbidden", "unexpected_keyword_argument")


@cache
def _checker(kind: Any) -> TypeAdapter[Any]:
    """Around the kind there is a mapping whose refusal of unknown keys holds for the dataclasses inside."""
    around: Any = with_config(ConfigDict(extra="forbid", allow_inf_nan=False))(TypedDict("around", {"made": kind}))  # type: ignore[operator]
    return TypeAdapter(around)


def checked(kind: type[T], values: Mapping[str, Any], origin: str) -> T:
    """`kind` made of `values`. Raises UserError, one sentence, for the first thing wrong in them."""
    try:
        made: dict[str, T] = _checker(cast(Any, kind)).validate_python({"made": values})
        return made["made"]
    except ValidationError as error:
        first = _first(error.errors())
        location = first["loc"][1:]
        where = ".".join(part for part in map(str, location) if not TRIED.fullmatch(part))
        if first["type"] in UNKNOWN:
            near = nearest(str(location[-1]), _keys_at(kind, location[:-1]))
            raise UserError(f"{origin}: there is no key {where!r}; the nearest known key is {near!r}.") from error
        said = first["msg"].removeprefix("Value error, ")
        if first["type"] in ("dataclass_type", "dict_type", "model_type"):
            keys = _keys_at(kind, location)
            said = f"a mapping of keys belongs there ({', '.join(keys[:3])}{', …' if len(keys) > 3 else ''})"
        raise UserError(f"{origin}: {f'{where}: ' if where else ''}{said}.") from error


def _first(errors: Sequence[Any]) -> Any:
    """The first error; where that is a key that must be given, an unknown key beside it that is like it: a slip."""
    first = errors[0]
    if first["type"] == "missing":
        place, name = first["loc"][:-1], str(first["loc"][-1])
        slips = {str(it["loc"][-1]): it for it in errors if it["type"] in UNKNOWN and it["loc"][:-1] == place}
        if like := difflib.get_close_matches(name, [*slips], n=1):
            return slips[like[0]]
    return first


def require_shape(value: Any, kind: Any, where: str, remedy: str) -> None:
    """Raise UserError for the first thing in which `value`, read from the file `where`, is not a `kind`."""
    try:
        _shape(kind).validate_python(value, strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise UserError(f"{where} is damaged ({f'{place}: ' if place else ''}{first['msg']}); {remedy}.") from error


@cache
def _shape(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind)


def nearest(key: str, known: Sequence[str]) -> str:
    return difflib.get_close_matches(key, known, n=1, cutoff=0.0)[0]


def _keys_at(kind: Any, location: Sequence[int | str]) -> list[str]:
    """The known keys of the section at `location`; names of methods and numbers of tasks are passed over."""
    section = kind
    for part in location:
        hint = _hints(section).get(str(part))
        if hint is not None:
            section = next(iter(_sections(hint)))
    return list(_hints(section))


def _hints(section: Any) -> dict[str, Any]:
    if is_dataclass(section):
        hints = get_type_hints(section)
        return {field.name: hints[field.name] for field in fields(section)}
    return {name: field.annotation for name, field in section.model_fields.items()}


def _sections(hint: Any) -> list[Any]:
    """The kinds of sections in a type such as `dict[str, Method]` or `Split | None`."""
    if isinstance(hint, type) and (is_dataclass(hint) or issubclass(hint, BaseModel)):
        return [hint]
    return [section for part in get_args(hint) for section in _sections(part)]
