"""Opens what `export` converts and `verify` compares with: a checkpoint folder, or a pair of GGUF files."""

from __future__ import annotations

from pathlib import Path

from llava_edge.bundle import Square
from llava_edge.errors import UsageError
from llava_edge.export.checkpoint import Checkpoint, open_checkpoint
from llava_edge.export.gguf_pair import open_pair


def open_source(
    checkpoint: Path,
    *,
    base: Path | None = None,
    vision_tower: Path | None = None,
    mmproj: Path | None = None,
    template: str | None = None,
    square: Square | None = None,
) -> Checkpoint:
    """Open a folder as `open_checkpoint` does, or with its `mmproj` the language file of a pair, as `open_pair` does.

    Raises what those raise, and `UsageError` for arguments that do not go together.
    """
    check_arguments(checkpoint, base, vision_tower, mmproj)
    if mmproj is not None:
        return open_pair(checkpoint, mmproj, template or "", square)
    if checkpoint.is_file():
        raise UsageError(
            f"{checkpoint} is a file; a GGUF language model needs its picture encoder too (--mmproj FILE), "
            "and a checkpoint is given as a folder."
        )
    return open_checkpoint(checkpoint, base=base, vision_tower=vision_tower, template=template, square=square)


def check_arguments(checkpoint: Path, base: Path | None, vision_tower: Path | None, mmproj: Path | None) -> None:
    """Raise `UsageError` if an `mmproj` is given with a folder, or with parts that a pair has."""
    if mmproj and checkpoint.is_dir():
        raise UsageError(
            f"{checkpoint} is a folder, but --mmproj belongs to a language model that is a GGUF file; "
            "omit it (--emit-mmproj of 'llava-edge export' writes such a file)."
        )
    if mmproj and (base or vision_tower):
        raise UsageError("A pair of GGUF files is complete; leave out --base and --vision-tower.")
