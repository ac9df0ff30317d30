"""The documentation as a site: hooks of mkdocs (mkdocs.yml), which add what docs/ does not hold and mend its links.

    make docs      # site/index.html, from disk too; its search needs no network

The Markdown files stay as they are read in the repository. Added are README, CONTRIBUTING and CHANGELOG, every file
outside docs/ that a page links to, and two pages made of the code: every key of a recipe, from the dataclasses that
read it, and every option of every command.
"""

from __future__ import annotations

import dataclasses
import inspect
import io
import posixpath
import re
import tokenize
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import annotated_types as bounds
import typer
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.pages import Page

from palimpsest import cli
from palimpsest.config import StudyConfig

ROOT = Path(__file__).parent.parent
# Of the repository → in the site.
PAGES = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
LANGUAGES = {".py": "python", ".yaml": "yaml", ".yml": "yaml", ".txt": "text", ".toml": "toml"}
SHIM, FRAME_WORKER = "https://unpkg.com/iframe-worker/shim", "assets/frame_worker.js"
FENCE = re.compile(r"(^```.*?^```)", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"(?P<text>\[[^\]]*\])\((?P<target>[^)\s:#]+)(?P<anchor>#[^)\s]*)?\)")


# ---------------------------------------------------------------------------------------------------------------------
# Hooks
# ---------------------------------------------------------------------------------------------------------------------
def on_files(files: Files, config: MkDocsConfig) -> Files:
    for name, page in PAGES.items():
        files.append(File.generated(config, page, content=(ROOT / name).read_text(encoding="utf-8")))
    files.append(File.generated(config, "reference/recipe.md", content=recipe_page()))
    files.append(File.generated(config, "reference/commands.md", content=commands_page()))
    for path in sorted(linked_files()):
        language = LANGUAGES.get(path.suffix)
        uri = _uri(path)
        if language is None:
            files.append(File.generated(config, uri, content=path.read_bytes()))
        else:
            shown = f"# {path.name}\n\n```{language}\n{path.read_text(encoding='utf-8')}\n```\n"
            file = File.generated(config, uri, content=f"---\nsearch: {{exclude: true}}\n---\n{shown}")
            file.inclusion = InclusionLevel.NOT_IN_NAV
            files.append(file)
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    parts = FENCE.split(markdown)
    parts[::2] = [LINK.sub(lambda link: _mended(link, page.file.src_uri), part) for part in parts[::2]]
    return "".join(parts)


def on_post_page(output: str, page: Page, config: MkDocsConfig) -> str:
    """The theme's search from disk without the network: what it would load from elsewhere is in docs/assets."""
    return output.replace(SHIM, posixpath.relpath(FRAME_WORKER, posixpath.dirname(page.url) or "."))


def on_post_template(output_content: str, template_name: str, config: MkDocsConfig) -> str:
    return output_content.replace(SHIM, FRAME_WORKER)


# ---------------------------------------------------------------------------------------------------------------------
# Links
# ---------------------------------------------------------------------------------------------------------------------
def linked_files() -> Iterator[Path]:
    """Every file that a page links to and that is no page itself."""
    found: set[Path] = set()
    for page in (*PAGES, *(f"docs/{file.name}" for file in (ROOT / "docs").glob("*.md"))):
        prose = FENCE.sub("", (ROOT / page).read_text(encoding="utf-8"))
        found |= {(ROOT / page).parent / link["target"] for link in LINK.finditer(prose)}
    there = {path.resolve().relative_to(ROOT.resolve()) for path in found if path.is_file()}
    return (ROOT / path for path in there if str(path) not in PAGES and not is_of_docs(path))


def is_of_docs(path: Path) -> bool:
    return path.parts[0] == "docs"


def _uri(path: Path) -> str:
    """Where a file of the repository stands in the site; one that is shown as a page is Markdown there."""
    inside = path.resolve().relative_to(ROOT.resolve()).as_posix()
    return f"files/{inside}.md" if path.suffix in LANGUAGES else f"files/{inside}"


def _mended(link: re.Match[str], page: str) -> str:
    """A link of the repository as one of the site; of a folder its text alone, as a site has none."""
    original = next((name for name, uri in PAGES.items() if uri == page), f"docs/{page}")
    path = (ROOT / original).parent / link["target"]
    if page.startswith("reference/") or not path.exists():
        return link[0]  # made for the site; or broken, which mkdocs says
    inside = path.resolve().relative_to(ROOT.resolve())
    if path.is_dir():
        return link["text"][1:-1]
    target = PAGES.get(str(inside)) or (inside.name if is_of_docs(inside) else _uri(path))
    return f"{link['text']}({posixpath.relpath(target, posixpath.dirname(page) or '.')}{link['anchor'] or ''})"


# ---------------------------------------------------------------------------------------------------------------------
# Every key of a recipe
# ---------------------------------------------------------------------------------------------------------------------
def recipe_page() -> str:
    """From the classes that read a recipe: types, bounds, defaults, and the comments beside them."""
    about = (
        "Made from the classes that read it. A key that is not here is refused, with the nearest one that is. "
        "`palimpsest plan RECIPE` checks a recipe and runs nothing.\n"
    )
    return "\n".join(["# Every key of a recipe\n", about, *_section("", StudyConfig)])


def _section(name: str, of: type[Any]) -> list[str]:
    """A table of the keys of a class, then the sections that stand under them."""
    hints, comments = get_type_hints(of, include_extras=True), comments_of(of)
    rows, below = [], []
    for key, default in _defaults(of):
        shown, kind = key.removesuffix("_"), _shown(hints[key])  # lambda is a word of Python's
        if (inside := _class_inside(hints[key])) is not None:
            under = f"{name}.{shown}" if name else shown
            under += ".NAME" if get_origin(_plain(hints[key])) is dict else ""
            below += _section(under, inside)
            kind = f"[section](#{_anchor(under)})"
        rows.append(f"| `{shown}` | {kind} | {_default(default)} | {_cell(comments.get(key, ''))} |")
    title = f"## {name}" if name else "## At the top"
    about = (inspect.getdoc(of) or "").split("\n\n")[0].replace("\n", " ")
    about = "" if about.startswith(f"{of.__name__}(") else about  # made by dataclasses
    table = ["| key | value | default | |", "|---|---|---|---|", *rows]
    return [f"{title}\n", f"{_cell(about)}\n" if about else "", *table, "", *below]


def _defaults(of: type[Any]) -> Iterator[tuple[str, Any]]:
    """Each key and its default; `...` where it must be given."""
    if dataclasses.is_dataclass(of):
        for field in dataclasses.fields(of):
            if field.init and field.name != "curve":
                made = field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default
                yield field.name, ... if made is dataclasses.MISSING else made
    else:
        for name, info in of.model_fields.items():
            yield name, ... if info.is_required() else info.default


def comments_of(of: type[Any]) -> dict[str, str]:
    """The comment on the line of each field, or on lines of its own above it; those of classes it is made from too."""
    found: dict[str, str] = {}
    for base in reversed([it for it in of.__mro__ if it.__module__ not in ("builtins", "pydantic.main")]):
        above: list[str] = []
        for line in inspect.getsource(base).splitlines():
            comment = _comment(line)
            if line.strip().startswith("#"):
                above.append(comment)
            elif field := re.match(r"    (\w+): ", line):
                found[field[1]] = " ".join(filter(None, [*above, comment]))
                above = []
            else:
                above = []
    return found


def _comment(line: str) -> str:
    try:
        tokens = list(tokenize.generate_tokens(io.StringIO(line.strip()).readline))
    except tokenize.TokenError:  # the line is a part of an expression
        return ""
    return next((token.string.lstrip("# ") for token in tokens if token.type == tokenize.COMMENT), "")


def _plain(hint: Any) -> Any:
    return _plain(get_args(hint)[0]) if get_origin(hint) is Annotated else hint


def _class_inside(hint: Any) -> type[Any] | None:
    """The dataclass that a key holds, or several of, or a mapping to."""
    hint = _plain(hint)
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return hint
    if get_origin(hint) in (Union, types.UnionType, tuple, list, dict):
        return next((found for it in get_args(hint) if (found := _class_inside(it)) is not None), None)
    return None


def _shown(hint: Any) -> str:
    about = get_args(hint)[1:] if get_origin(hint) is Annotated else ()
    limits = [text for it in about for text in _limits(it)]
    return _type(_plain(hint)) + (f", {', '.join(limits)}" if limits else "")


def _limits(about: Any) -> Iterator[str]:
    for kind, name, sign in (
        (bounds.Ge, "ge", "≥"),
        (bounds.Gt, "gt", ">"),
        (bounds.Le, "le", "≤"),
        (bounds.Lt, "lt", "<"),
    ):
        if isinstance(about, kind):
            yield f"{sign} {getattr(about, name)}"
    if isinstance(about, bounds.MinLen):
        yield "one or more"


def _type(hint: Any) -> str:
    origin, inside = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return _shown(hint)
    if origin is Literal:
        return ", ".join(f"`{it}`" for it in inside)
    if origin in (Union, types.UnionType):
        return " or ".join(_type(it) for it in inside if it is not type(None))
    if origin in (tuple, list):
        return f"list of {_type(inside[0])}"
    if origin is dict:
        return "mapping"
    names = {str: "text", int: "whole number", float: "number", bool: "true or false", Path: "path"}
    return names.get(hint, getattr(hint, "__name__", str(hint)))


def _default(value: Any) -> str:
    if value is ...:
        return "required"
    if value is None:
        return ""
    if dataclasses.is_dataclass(value):
        return "that section's"
    if isinstance(value, tuple):
        value = list(value)
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _anchor(heading: str) -> str:
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


# ---------------------------------------------------------------------------------------------------------------------
# Every option of every command
# ---------------------------------------------------------------------------------------------------------------------
def commands_page() -> str:
    """What `palimpsest COMMAND --help` says, of all of them."""
    parts = ["# Every command\n\nMade from the command line itself; `palimpsest COMMAND --help` says the same.\n"]
    main = typer.main.get_command(cli.app)
    for name, command in _commands(main):
        about, _, example = (command.help or "").partition("Example: ")
        parts += [f"## {name}\n", _cell(about.strip()) + "\n"]
        if example:
            parts.append(f"```\n{' '.join(example.split())}\n```\n")
        parts += ["| option | default | |", "|---|---|---|"]
        for option in command.params:
            if option.name == "help":
                continue
            given = " ".join(f"`{it}`" for it in (*option.opts, *option.secondary_opts))
            given = f"`{option.name.upper()}`" if option.param_type_name == "argument" else given
            default = "required" if option.required else _default(option.default if option.default != () else None)
            parts.append(f"| {given} | {default} | {_cell(getattr(option, 'help', None) or '')} |")
        parts.append("")
    return "\n".join(parts)


def _commands(group: Any, before: str = "palimpsest") -> Iterator[tuple[str, Any]]:
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from _commands(command, f"{before} {name}")
        else:
            yield f"{before} {name}", command
