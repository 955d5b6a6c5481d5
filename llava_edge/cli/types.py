"""Types of arguments: names and paths, as typed, which shells complete."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.types import StringParamType

from llava_edge.errors import LlavaEdgeError
from llava_edge.store import entries, refuse_download

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem


class _FileName(StringParamType):
    """The name of a file."""

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        from click.shell_completion import CompletionItem

        return [CompletionItem(incomplete, type="file")]


class _Model(StringParamType):
    """The name of an installed model, or a folder."""

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        from click.shell_completion import CompletionItem

        try:
            names = [entry.name for entry in entries() if entry.folder]
        except LlavaEdgeError:  # without a home
            names = []
        models = [CompletionItem(name) for name in names if name.startswith(incomplete)]
        return [*models, CompletionItem(incomplete, type="dir")]


class _CheckpointPath(click.Path):
    """Path of a checkpoint. Raises `MissingError` for one that would have to be downloaded."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Check the text as typed: a Path would drop a slash of a URL."""
        refuse_download(str(value), "download it, then give its folder")
        return super().convert(value, param, ctx)


FILE_NAME, MODEL = _FileName(), _Model()
PATH = click.Path(path_type=Path)
CHECKPOINT = _CheckpointPath(path_type=Path)
