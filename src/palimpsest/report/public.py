"""What a page that others read may say of the machine it was made on: no folder of it, only the last part of a path."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from palimpsest.files import without_folders

JOIN = " + "  # parts the sources of a split
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
