"""`llava-edge verify`: read every byte of a bundle and compare with its manifest."""

from __future__ import annotations

import click

from llava_edge.cli.terminal import status_line
from llava_edge.store import DEFAULT_MODEL


@click.command()
@click.argument("bundle", default=DEFAULT_MODEL, metavar="[BUNDLE]")
def verify(bundle: str) -> None:
    """Check every byte of BUNDLE, a folder or model name, against the hashes in its manifest."""
    from llava_edge import gguf
    from llava_edge.bundle import LANGUAGE, PROJECTOR, Bundle
    from llava_edge.store import resolve

    opened = Bundle.open(resolve(bundle))
    total = sum(entry.size for entry in opened.manifest.files.values())
    done = 0
    with status_line(f"Verifying {opened.folder}") as status:

        def progress(count: int) -> None:
            nonlocal done
            done += count
            status(done / total)

        opened.verify(progress)
    gguf.read(opened.part(PROJECTOR))
    gguf.check_language(gguf.read(opened.part(LANGUAGE)))
    click.echo(f"{opened.folder}: {len(opened.manifest.files)} files, {total:,} bytes, all as the manifest says.")
