"""The command line: every command by name, its options made from the dataclass `Options` of its module.

Bad input ends with one sentence and exit code 2. Nothing heavy is imported before a command runs.
"""

from __future__ import annotations

import dataclasses
import inspect as introspection
import io
import logging
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import annotated_types as bounds
import typer
from rich.console import Console
from typer.models import ArgumentInfo, OptionInfo
from typing_extensions import Doc

from palimpsest import __version__
from palimpsest.commands import (
    ask,
    compare,
    deactivate,
    demo,
    diagnose,
    doctor,
    drift,
    evaluate,
    export,
    figure,
    importance,
    inspect,
    plan,
    prepare,
    probe,
    publish,
    report,
    scales,
    setup,
    study,
    ui,
    validate_importance,
)
from palimpsest.files import UserError, system_failure
from palimpsest.parallel import require_one_process
from palimpsest.progress import printable

COMMANDS: dict[str, ModuleType] = {
    "study": study,
    "demo": demo,
    "diagnose": diagnose,
    "plan": plan,
    "report": report,
    "figure": figure,
    "ui": ui,
    "ask": ask,
    "evaluate": evaluate,
    "probe": probe,
    "drift": drift,
    "compare": compare,
    "importance": importance,
    "deactivate": deactivate,
    "validate-importance": validate_importance,
    "scales": scales,
    "export": export,
    "publish": publish,
    "setup": setup,
    "doctor": doctor,
}
DATA_COMMANDS: dict[str, ModuleType] = {"prepare": prepare, "inspect": inspect}
DIVIDED = ("demo", "study", "diagnose")  # what several processes can share; of the rest each would do all


def main() -> None:
    """Entry point."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"transformers\..*")
    logging.getLogger("transformers").setLevel(logging.ERROR)
    # transformers' loading bars and notices would tear up our own progress; set before it is imported.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TQDM_DISABLE", "1")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    for stream in (sys.stdout, sys.stderr):  # a console of another encoding than UTF-8 shows → as \\u2192
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        app()
    except Exception as error:
        sentence = str(error) if isinstance(error, UserError) else system_failure(error)
        if sentence is None:
            raise
        Console(stderr=True).print(printable(f"palimpsest: {sentence}"), markup=False, highlight=False, soft_wrap=True)
        sys.exit(2)


def _application(help: str, commands: dict[str, ModuleType], **options: Any) -> typer.Typer:
    made = typer.Typer(help=help, no_args_is_help=True, rich_markup_mode=None, **options)
    for name, module in commands.items():
        made.command(name, short_help=first_sentence(module.Options.__doc__))(_function(name, module))
    return made


def first_sentence(text: str) -> str:
    """What stands beside a command's name: up to a full stop or question mark that is not of an "Eq. 3".

    typer's own would end there, and cuts a sentence where the line does.
    """
    found = re.match(r".+?(?<!\bEq)[.?](?=\s|$)", text, re.DOTALL)
    return " ".join((found[0] if found else text).split())


def _function(name: str, module: ModuleType) -> Callable[..., None]:
    """What typer makes a command of: a keyword for every field of `options`, and its docstring."""
    options = module.Options
    parameters = list(_parameters(options))

    def command(**values: Any) -> None:
        if name not in DIVIDED:
            require_one_process(name)
        for line in module.run(_filled(options, values)):
            typer.echo(printable(line))  # a line may hold what a model answered, or a text of somebody's data

    command.__doc__ = options.__doc__
    command.__signature__ = introspection.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return command


def _parameters(options: Any) -> Iterator[introspection.Parameter]:
    """One for each field, those of a dataclass inside beside the others. What may be None need not be given."""
    hints = get_type_hints(options, include_extras=True)
    for field in dataclasses.fields(options):
        hint = hints[field.name]
        if dataclasses.is_dataclass(hint):
            yield from _parameters(hint)
            continue
        kind, *about = get_args(hint) if get_origin(hint) is Annotated else (hint,)
        default: Any = introspection.Parameter.empty
        if field.default is not dataclasses.MISSING:
            default = field.default
        elif field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        elif type(None) in get_args(kind):
            default = None
        annotation: Any = Annotated[kind, _described(field.name, about, default)]
        yield introspection.Parameter(
            field.name, introspection.Parameter.KEYWORD_ONLY, annotation=annotation, default=default
        )


def _described(name: str, about: list[Any], default: Any) -> ArgumentInfo | OptionInfo:
    """typer's description of one option, from its help (Doc), its bounds and, where it is there, an own description.

    A switch that is on without being given can be turned off: --audio/--no-audio.
    """
    info = next((item for item in about if isinstance(item, (ArgumentInfo, OptionInfo))), None)
    if info is None:
        info = typer.Option(f"--{name.replace('_', '-')}") if default is False else typer.Option()
    for item in about:
        if isinstance(item, Doc):
            info.help = item.documentation
        elif isinstance(item, bounds.Ge):
            info.min = item.ge
        elif isinstance(item, bounds.Le):
            info.max = item.le
    return info


def _filled(options: Any, values: dict[str, Any]) -> Any:
    hints = get_type_hints(options)
    inside = {name: hint for name, hint in hints.items() if dataclasses.is_dataclass(hint)}
    own = {name: values[name] for name in hints if name not in inside}
    return options(**own, **{name: _filled(hint, values) for name, hint in inside.items()})


app = _application(
    "What speech training writes over in a language model, and how to keep it.",
    COMMANDS,
    name="palimpsest",
    pretty_exceptions_enable=False,
)


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(f"palimpsest {__version__}")
        raise typer.Exit


@app.callback()
def _before_every_command(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


app.add_typer(_application("Get data in: prepare, inspect.", DATA_COMMANDS, add_completion=False), name="data")

if __name__ == "__main__":
    main()
