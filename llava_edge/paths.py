"""Names of files as people give them: quoted, from the home folder, or as a terminal or browser writes what is dropped.

Knows nothing about what is in them.
"""

from __future__ import annotations

import os
import re
from contextlib import suppress
from pathlib import Path
from urllib.parse import unquote, urlsplit


def meant(name: str) -> str:
    """The path that `name` means. A file of exactly that name goes first; what is no path comes back as it is."""
    if exists(name):
        return name
    if name.startswith("file://"):
        with suppress(ValueError):  # it is no URL
            return unquote(urlsplit(name).path)
    plain = name.strip().strip("'\"")
    if os.sep == "/" and not exists(plain):
        plain = re.sub(r"\\(.)", r"\1", plain)
    if plain.startswith("~"):
        with suppress(RuntimeError):  # there is no such home
            return str(Path(plain).expanduser())
    return plain


def is_file(name: str) -> bool:
    """Whether `name` means a file; any text may be asked about."""
    try:
        return Path(meant(name)).is_file()
    except OSError:  # too long
        return False


def exists(path: str | Path) -> bool:
    """Unlike Path.exists, it takes names that are too long for any file."""
    try:
        return os.access(path, os.F_OK)
    except ValueError:  # a NUL in it
        return False
