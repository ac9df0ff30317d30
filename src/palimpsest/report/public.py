"""What a page that others read may say of the machine it was made on: no folder of it, only the last part of a path."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from palimpsest.files import is_file, without_folders

JOIN = " + "  # parts the sources of a split
MAX_PATH = 4096  # characters
_QUOTED = re.compile(r"""(['"])(?:~|/)[^'"\n]*/([^'"/\n]+)/*\1""")
_BARE = re.compile(r"(?<![\w…/.~])(?:~(?=/)|(?=/(?!/)))[^\s'\"`<>|;,()]*/([^\s'\"`<>|;,()/]+)/*")


def without_paths(text: str, *folders: Path) -> str:
    """A sentence with …/NAME in place of every path below the root or a home folder; URLs stay.

    folders: those that are known to be named, which may have spaces in their names.

    >>> without_paths("Error opening '/home/ada lovelace/a.wav': no such file; see /srv/data/b.json or https://x.org/y")
    "Error opening '…/a.wav': no such file; see …/b.json or https://x.org/y"
    """
    known = {str(path) for folder in (*folders, Path.home()) for path in (folder.absolute(), folder.resolve())}
    for name in sorted(known - {"/"}, key=len, reverse=True):
        text = text.replace(name, f"…/{Path(name).name}" if Path(name) != Path.home() else "~")
    return _BARE.sub(r"…/\1", _QUOTED.sub(r"\1…/\2\1", text))


def public(value: Any) -> Any:
    """The strings in a configuration or in provenance, without the folders of the machine."""
    if isinstance(value, dict):
        return {public(key): public(item) for key, item in value.items()}
    if isinstance(value, list):
        return [public(item) for item in value]
    if not isinstance(value, str):
        return value
    return without_paths(JOIN.join(map(without_folders, value.split(JOIN))))


def last_parts(value: Any) -> Any:
    """The strings in it with …/NAME for a path that is written as a relative one, as seen from the folder here."""
    if isinstance(value, dict):
        return {key: last_parts(item) for key, item in value.items()}
    if isinstance(value, list):
        return [last_parts(item) for item in value]
    if not isinstance(value, str) or "/" not in value or len(value) > MAX_PATH:
        return value
    return JOIN.join(map(_last_part, value.split(JOIN)))


def _last_part(name: str) -> str:
    """…/NAME of a path out of the folder here, or of a file or folder that is there; a hub's name stays.

    >>> _last_part("../acme/memo.txt"), _last_part("alpaca:../acme/a.json"), _last_part("me/model"), _last_part("…/x")
    ('…/memo.txt', 'alpaca:…/a.json', 'me/model', '…/x')
    """
    kind, _, path = name.rpartition(":")
    if "/" in path and (path.startswith(("./", "../")) or is_file(Path(path)) or Path(path).is_dir()):
        return f"{kind}{':' * bool(kind)}…/{Path(path).name}"
    return name
