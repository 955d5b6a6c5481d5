"""`llava-edge verify`: compare every byte of a bundle with its manifest, or its stages with those of its checkpoint."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from llava_edge.cli.arguments import require_extra, square_option
from llava_edge.cli.terminal import status_line
from llava_edge.cli.types import CHECKPOINT, MODEL, PATH
from llava_edge.errors import CheckpointError, UnavailableError, UsageError
from llava_edge.store import DEFAULT_MODEL

if TYPE_CHECKING:
    from llava_edge.bundle import Bundle, ParityRow
    from llava_edge.export.checkpoint import Checkpoint


@click.command()
@click.argument("bundle", type=MODEL, default=DEFAULT_MODEL, metavar="[BUNDLE]")
@click.option("--against", type=CHECKPOINT, metavar="CHECKPOINT", help="Checkpoint to compare every stage with.")
@click.option("--base", type=CHECKPOINT, metavar="DIR", help="Its base model, as for export.")
@click.option("--vision-tower", type=CHECKPOINT, metavar="DIR", help="Its CLIP folder, as for export.")
@click.option("--mmproj", type=PATH, metavar="FILE", help="Its mmproj file, as for export.")
@square_option("How its pictures are made square, as for export.")
@click.option("--json", "as_json", is_flag=True, help="Print the parity table as a JSON object.")
def verify(bundle: str, against: Path | None, as_json: bool, **source: Any) -> None:
    """Check every byte of BUNDLE (a folder or model name; smol if omitted) against the hashes in its manifest.

    With --against, which needs the extra [train], then run its parts beside the checkpoint in PyTorch, and print the
    parity table.
    """
    from llava_edge.bundle import Bundle
    from llava_edge.store import resolve

    if against is None and (any(source.values()) or as_json):
        raise UsageError("--base, --vision-tower, --mmproj, --square and --json go with --against CHECKPOINT.")
    opened = Bundle.open(resolve(bundle))
    checkpoint = None if against is None else _open_checkpoint(opened, against, source)
    _read_all(opened)
    manifest = opened.manifest
    summary = f"{opened.folder}: {len(manifest.files)} files, {manifest.size:,} bytes, all as in the manifest."
    click.echo(summary, err=as_json)
    if checkpoint is None:
        return
    rows = _measure(opened, checkpoint)
    if as_json:
        click.echo(json.dumps({"model": manifest.name, "parity": [asdict(row) for row in rows]}))
    failed = [row.stage for row in rows if not row.passed]
    if failed:
        raise CheckpointError(f"{opened.folder} does not agree with {checkpoint.folder} in: {', '.join(failed)}.")


def _read_all(opened: Bundle) -> None:
    """Verify hashes and GGUF headers."""
    from llava_edge import gguf
    from llava_edge.bundle import LANGUAGE, PROJECTOR

    total, done = opened.manifest.size, 0
    with status_line(f"Verifying {opened.folder}") as status:

        def progress(count: int) -> None:
            nonlocal done
            done += count
            status(done / total)

        opened.verify(progress)
    gguf.read(opened.part(PROJECTOR))
    language = gguf.read(opened.part(LANGUAGE))
    gguf.check_language(language)
    if opened.adapter is not None:
        gguf.check_adapter(gguf.read(opened.adapter), language)


def _open_checkpoint(opened: Bundle, against: Path, source: dict[str, Any]) -> Checkpoint:
    """Open the checkpoint to compare with, before minutes of reading. Raises `UnavailableError` without PyTorch.

    source: the other arguments of `open_source`, from options of these names.
    """
    from llava_edge.export import parity
    from llava_edge.export.opening import open_source

    reason = parity.unavailable_reason()
    if reason:
        raise UnavailableError(reason)
    with require_extra("export", "--against"):  # a GGUF checkpoint needs it
        checkpoint = open_source(against, template=opened.manifest.template, **source)
    parity.check_same_sizes(opened, checkpoint)
    return checkpoint


def _measure(opened: Bundle, checkpoint: Checkpoint) -> list[ParityRow]:
    from llava_edge.cli.export import show_parity
    from llava_edge.export import parity

    with status_line(f"Measuring {opened.folder} against {checkpoint.folder}") as status:
        rows = parity.measure(
            opened, checkpoint, progress=lambda what, share: status.step(f"Measuring {what} of {opened.folder}", share)
        )
    show_parity(rows)
    return rows
