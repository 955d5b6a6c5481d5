"""Models on this machine: a cache folder with one bundle folder per pulled model.

Knows nothing about engines or how a model is built.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from llava_edge.bundle import MANIFEST, PARTS
from llava_edge.errors import MissingError, UsageError
from llava_edge.paths import denied, exists, expand_path

DEFAULT_MODEL = "smol"

KNOWN_MODELS = {"smol": "CLIP ViT-B/16 and SmolLM2-135M, trained in this project"}


@dataclass(frozen=True)
class Entry:
    """A known or installed model. `folder` is None while it is not installed."""

    name: str
    description: str
    folder: Path | None


def home() -> Path:
    """The cache folder: $LLAVA_EDGE_HOME, or llava-edge in $XDG_CACHE_HOME or ~/.cache. It may not exist yet."""
    try:
        if configured := os.environ.get("LLAVA_EDGE_HOME"):
            return Path(configured).expanduser()  # with ~, unless a shell has expanded it
        if base := os.environ.get("XDG_CACHE_HOME"):
            return Path(base) / "llava-edge"
        return Path.home() / ".cache" / "llava-edge"
    except RuntimeError as error:
        raise MissingError("There is no home folder; set LLAVA_EDGE_HOME to a folder for models.") from error


def models_folder() -> Path:
    """The folder of pulled models."""
    return home() / "models"


def resolve(model: str | Path) -> Path:
    """The bundle folder of a model given by name or path. A pulled model wins over a folder of its name (use `./NAME`).

    Raises `MissingError` that says how to get it.
    """
    name = str(model)
    if not isinstance(model, Path) and _is_name(name) and _is_installed(name):
        return models_folder() / name
    path = expand_path(name)
    if name.strip() and exists(path):
        return Path(path)
    _refuse_denied(name)
    if name in KNOWN_MODELS:
        location = f" in {models_folder()}, where LLAVA_EDGE_HOME says" if os.environ.get("LLAVA_EDGE_HOME") else ""
        raise MissingError(f"Model {name!r} is not installed{location}. Run 'llava-edge models pull {name}'.")
    if denied(path):
        raise MissingError(f"{path} cannot be read: Permission denied.")
    refuse_download(name, "download the checkpoint, then run 'llava-edge export CHECKPOINT BUNDLE' and give BUNDLE")
    known = ", ".join(entry.name for entry in entries())
    raise MissingError(f"{name!r} is neither a bundle folder nor a model name; known models: {known}.")


def refuse_download(name: str, remedy: str) -> None:
    """Raise `MissingError` if a name is a URL or OWNER/MODEL on a hub, and no such path exists."""
    is_remote = "://" in name or re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name)
    if is_remote and not exists(Path(name)):
        raise MissingError(f"{name!r} does not exist, and llava-edge downloads only its own models: {remedy}.")


def entries() -> list[Entry]:
    """Known models, then other installed ones. A known one in a folder that may not be entered counts as installed."""
    try:
        found = {path.name for path in models_folder().iterdir() if _is_installed(path.name)}
    except OSError:
        found = set()
    found |= {name for name in KNOWN_MODELS if denied(models_folder() / name / MANIFEST)}
    names = [*KNOWN_MODELS, *sorted(found - set(KNOWN_MODELS))]
    return [
        Entry(name, KNOWN_MODELS.get(name, ""), models_folder() / name if name in found else None) for name in names
    ]


def remove(name: str) -> int:
    """Delete the bundle of a pulled model; returns its size in bytes.

    Raises `MissingError` with the installed names, `UsageError` for what `pull` did not create: links, other files.
    """
    if not (_is_name(name) and _is_installed(name)):
        _refuse_denied(name)
        installed = ", ".join(entry.name for entry in entries() if entry.folder) or "none"
        raise MissingError(f"There is no model {name!r} in {models_folder()}; installed: {installed}.")
    folder = models_folder() / name
    if folder.is_symlink():
        raise UsageError(f"{folder} is a link to {folder.resolve()}, which was not pulled; remove the link itself.")
    if other_files := sorted({path.name for path in folder.iterdir()} - {MANIFEST, *PARTS}):
        raise UsageError(f"{folder} also holds {', '.join(other_files[:5])}; move that away first.")
    files = [folder / part for part in (*PARTS, MANIFEST) if os.path.lexists(folder / part)]
    size = sum(path.lstat().st_size for path in files)
    for path in files:  # the manifest last, so that a half removed model is still listed
        path.unlink()
    folder.rmdir()
    return size


def _refuse_denied(name: str) -> None:
    """Raise `MissingError` if this user may not enter the folder of a model."""
    if _is_name(name) and denied(models_folder() / name / MANIFEST):
        remedy = "set LLAVA_EDGE_HOME to a folder of yours, or have its permissions changed"
        raise MissingError(f"{models_folder() / name} cannot be read: Permission denied; {remedy}.")


def _is_name(text: str) -> bool:
    return bool(text) and text not in (".", "..") and not any(character in text for character in "/\\\0")


def _is_installed(name: str) -> bool:
    return exists(models_folder() / name / MANIFEST)
