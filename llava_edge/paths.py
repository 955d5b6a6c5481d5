"""File names as people type or drop them: quoted, escaped by a shell, with ~, or as file:// URLs."""

from __future__ import annotations

import os
import re
from contextlib import suppress
from pathlib import Path
from urllib.parse import unquote, urlsplit


def expand_path(name: str) -> str:
    """Resolve quotes, escapes, ~ and file:// in `name`. If a file of exactly this name exists, return it unchanged."""
    if exists(name):
        return name
    if name.startswith("file://"):
        with suppress(ValueError):  # not a valid URL
            return unquote(urlsplit(name).path, errors="surrogateescape")  # names need not be UTF-8
    plain = name.strip().strip("'\"")
    if not exists(plain):
        plain = re.sub(r"\\(.)", r"\1", plain)
    if plain.startswith("~"):
        with suppress(RuntimeError):  # no such user
            return str(Path(plain).expanduser())
    return plain


def is_file(name: str) -> bool:
    """Whether `name` names a regular file; it may be any text."""
    try:
        return Path(expand_path(name)).is_file()
    except OSError:  # name too long
        return False


def denied(path: str | Path) -> bool:
    """Whether nobody can tell if `path` exists, because this user may not enter one of its folders."""
    try:
        os.stat(path)  # noqa: PTH116 - any text, NUL included
    except PermissionError:
        return True
    except (OSError, ValueError):
        return False
    return False


def exists(path: str | Path) -> bool:
    """Like `Path.exists`, but False for names that are too long or invalid."""
    try:
        return os.access(path, os.F_OK)
    except ValueError:  # contains NUL
        return False
