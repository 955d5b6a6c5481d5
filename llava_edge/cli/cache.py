"""`llava-edge cache`: list and clear the image cache."""

from __future__ import annotations

import json
import os
import time
from dataclasses import asdict

import click

from llava_edge.cache import Cache, Entry, user_cache
from llava_edge.cli.terminal import printable
from llava_edge.errors import MissingError
from llava_edge.paths import denied

_MINUTE, _HOUR, _DAY = 60, 3600, 86400


@click.group()
def cache() -> None:
    """List or clear the image cache: what the model computed from images, not the images or answers."""


@cache.command("ls")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON object.")
def list_cache(as_json: bool) -> None:
    """List entries, most recently used first."""
    image_cache = _readable_cache()
    folder, limit, entries = image_cache.folder, image_cache.limit, image_cache.entries()
    total = sum(entry.size for entry in entries)
    if as_json:
        listed = [{**asdict(entry), "path": str(entry.path), "about": _parse_numbers(entry.about)} for entry in entries]
        click.echo(json.dumps({"folder": str(folder), "limit": limit, "bytes": total, "entries": listed}))
        return
    for entry in entries:
        click.echo(_line(entry))
    click.echo(f"{len(entries)} entries, {total / 1e6:.1f} of {limit / 1e6:.0f} MB, in {folder}", err=True)


@cache.command("clear")
def clear_cache() -> None:
    """Remove all entries."""
    count, size = _readable_cache().clear()
    click.echo(f"{count} entries removed, {size / 1e6:.1f} MB.", err=True)


def _readable_cache() -> Cache:
    """The cache, unless its folder may not be read: it would look empty. Raises `MissingError`."""
    image_cache = user_cache()
    folder = image_cache.folder
    if denied(folder) or (folder.is_dir() and not os.access(folder, os.R_OK | os.X_OK)):
        raise MissingError(f"{folder} cannot be read: Permission denied.")
    return image_cache


def _parse_numbers(about: dict[str, str]) -> dict[str, str | int]:
    """Convert the values that are numbers."""
    return {name: int(text) if name == "positions" and text.isdecimal() else text for name, text in about.items()}


def _line(entry: Entry) -> str:
    kind, positions, model = (entry.about.get(name, "?") for name in ("kind", "positions", "model"))
    size, age = f"{entry.size / 1e6:.1f} MB", _age(entry.used)
    return printable(f"{entry.path.name[:12]}  {kind:10}  {size:>9}  {positions:>5} positions  {age:>7}  {model}")


def _age(timestamp: float) -> str:
    seconds = max(0.0, time.time() - timestamp)
    if seconds < _HOUR:
        return f"{seconds // _MINUTE:.0f} min"
    return f"{seconds // _HOUR:.0f} h" if seconds < _DAY else f"{seconds // _DAY:.0f} d"
