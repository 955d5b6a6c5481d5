"""`llava-edge info`: show what a bundle, a GGUF file or a checkpoint folder contains."""

from __future__ import annotations

import shlex
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from llava_edge.bundle import MANIFEST, Bundle, Manifest
from llava_edge.cli.terminal import printable, show_json
from llava_edge.cli.types import MODEL
from llava_edge.errors import CheckpointError, DataError, MissingError, UsageError
from llava_edge.store import DEFAULT_MODEL, resolve

if TYPE_CHECKING:
    from llava_edge.export.checkpoint import Checkpoint


@click.command()
@click.argument("target", type=MODEL, default=DEFAULT_MODEL, metavar="[BUNDLE|FILE.gguf|CHECKPOINT]")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON object.")
def info(target: str, as_json: bool) -> None:
    """Show what a bundle (folder or model name; smol if omitted), GGUF file or checkpoint folder contains."""
    path = resolve(target)
    if path.is_file():
        facts = _gguf_facts(path)
    elif (path / MANIFEST).exists():
        manifest = Bundle.open(path).manifest
        if not as_json:
            _print_bundle(path, manifest)
            return
        facts = asdict(manifest)
    elif any((path / name).exists() for name in ("config.json", "adapter_config.json")):
        facts = _checkpoint_facts(path)
    else:
        raise DataError(f"{path} is neither a bundle (no {MANIFEST}) nor a checkpoint (no config.json).")
    if as_json:
        show_json(facts)
    else:
        click.echo("\n".join(_lines(facts)))


def _print_bundle(path: Path, manifest: Manifest) -> None:
    vision, language, pixels = manifest.vision, manifest.language, manifest.preprocessing
    squaring = f"made square by {pixels.square}"
    if pixels.square == "anyres":
        sizes = ", ".join(f"{width} x {height}" for width, height in pixels.grids)
        squaring = f"whole, and in tiles at {sizes}; {pixels.merge}"
    rows = {
        "model": f"{manifest.name} ({manifest.family}), made by {manifest.created_by}",
        "folder": str(path),
        "identity": manifest.identity,
        "images": f"{pixels.image_size} x {pixels.image_size}, {squaring}",
        "vision": f"CLIP layer {vision.hidden_layer}, {vision.feature}, {vision.image_tokens} tokens of {vision.width}"
        f" (pooled {vision.image_pool} x {vision.image_pool}), {vision.precision}",
        "projector": f"{manifest.projector.type}, {manifest.projector.precision}",
        "language": f"{language.hidden_size} wide, {language.vocab_size} tokens, {language.quantization}"
        + (f", calibrated on {language.calibration}" if language.calibration else ""),
        "context": f"{language.context_length} tokens",
        "template": manifest.template,
        "size": f"{manifest.size:,} bytes",
    }
    click.echo("\n".join(_lines(rows)))
    click.echo("\nfiles")
    for name, entry in manifest.files.items():
        click.echo(f"  {name:18} {entry.size:>14,} bytes  sha256 {entry.sha256}")
    click.echo("\nparity with PyTorch" + ("" if manifest.parity else ": not measured"))
    for row in manifest.parity:
        verdict = "ok" if row.passed else "FAILED"
        click.echo(
            f"  {row.stage:18} {row.measure:9} {row.value:<12.6g} limit {row.limit:<10.6g} "
            f"max abs {row.max_abs:<10.3g} relative {row.relative:<10.3g} {verdict}"
        )
    click.echo("\nprovenance")
    for part in manifest.provenance:
        click.echo(f"  {part.part:18} {part.source} ({part.licence})")


def _gguf_facts(path: Path) -> dict[str, Any]:
    from llava_edge import gguf

    file = gguf.read(path)
    metadata = {key: _abbreviate(value) for key, value in file.metadata.items()}
    kinds = Counter(tensor.kind for tensor in file.tensors.values())
    return {
        "file": str(path),
        "size": path.stat().st_size,
        "tensors": len(file.tensors),
        "tensor types": dict(kinds),
        "metadata": metadata,
    }


def _abbreviate(value: object) -> object:
    from llava_edge.gguf import Array

    if isinstance(value, Array):
        return f"array of {value.count}"
    if isinstance(value, str) and len(value) > 80:
        return value[:77] + "..."
    return value


def _checkpoint_facts(path: Path) -> dict[str, Any]:
    """Layout and configuration of a checkpoint folder, and what is missing or how to export it."""
    from llava_edge.export import layouts
    from llava_edge.export.checkpoint import open_checkpoint

    facts: dict[str, Any] = {"checkpoint": str(path), "layout": layouts.detect_layout(path)}
    try:
        checkpoint = open_checkpoint(path)
    except UsageError as error:
        return {**facts, "needs": str(error)}
    config = checkpoint.config
    files = {item.name: item.stat().st_size for item in sorted(path.iterdir()) if item.is_file()}
    return {
        **facts,
        "notes": " ".join(checkpoint.notes),
        "image_tokens": config.image_tokens,
        **asdict(config),
        "files": files,
        **_export_hint(path, checkpoint),
    }


def _export_hint(path: Path, checkpoint: Checkpoint) -> dict[str, str]:
    """The command that exports it, or the error that its tokenizer would cause."""
    from llava_edge.export.tokenizer import read_tokenizer

    try:
        read_tokenizer(checkpoint.tokenizer, checkpoint.config)
    except (CheckpointError, MissingError) as error:
        return {"needs": str(error)}
    return {"export with": f"llava-edge export {shlex.quote(str(path))} OUT"}


def _lines(facts: dict[str, Any], indent: str = "") -> list[str]:
    width = max((len(name) for name in facts), default=0)
    lines = []
    for name, value in facts.items():
        if isinstance(value, dict):
            lines += [f"{indent}{name}", *_lines(value, indent + "  ")]
        else:
            lines.append(printable(f"{indent}{name:{width}}  {value}"))
    return lines
