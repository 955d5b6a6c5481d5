"""`llava-edge export`: convert a LLaVA checkpoint to a bundle and print its parity table."""

from __future__ import annotations

import json
import shlex
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from llava_edge.cli.arguments import require_extra, square_option
from llava_edge.cli.terminal import status_line
from llava_edge.cli.types import CHECKPOINT, PATH
from llava_edge.errors import CannotCreateError, UsageError
from llava_edge.interrupts import interrupt_on_termination
from llava_edge.outputs import check_output, replacing

if TYPE_CHECKING:
    from llava_edge.bundle import ParityRow
    from llava_edge.export import Progress
    from llava_edge.export.report import Report


@click.command()
@click.argument("checkpoint", type=CHECKPOINT)
@click.argument("out", type=PATH)
@click.option(
    "--quant",
    type=click.Choice(["q4_k_m", "q4_0", "q5_k_m", "q8_0", "f16"], case_sensitive=False),  # llama.cpp writes Q4_K_M
    default="q4_k_m",
    help="Quantization of the language model.",
)
@click.option(
    "--vision", type=click.Choice(["fp32", "fp16", "int8"]), default="int8", help="Precision of the vision tower."
)
@click.option(
    "--base", type=CHECKPOINT, metavar="DIR", help="Base model, if CHECKPOINT is a LoRA, a delta or only a projector."
)
@click.option(
    "--vision-tower", type=CHECKPOINT, metavar="DIR", help="CLIP folder, if CHECKPOINT does not contain CLIP."
)
@click.option("--template", metavar="NAME", help="Prompt layout, instead of the one CHECKPOINT suggests.")
@square_option("How pictures are made square, instead of as CHECKPOINT suggests.")
@click.option("--mmproj", type=PATH, metavar="FILE", help="mmproj file of CHECKPOINT, if that is a GGUF.")
@click.option("--emit-mmproj", type=PATH, metavar="FILE", help="Also write an mmproj file for llama.cpp.")
@click.option(
    "--name", default="", show_default=False, metavar="NAME", help="Name of the model; that of OUT if omitted."
)
@click.option("--force", is_flag=True, help="Overwrite an existing bundle OUT and an earlier --emit-mmproj file.")
@click.option("--force-publish", is_flag=True, help="Publish the bundle even if a stage differs too much from PyTorch.")
@click.option("--threads", type=int, default=0, help="Threads for quantization (0: all cores).")
@click.option("--imatrix", is_flag=True, help="Use an importance matrix, measured on drawings, for 4 and 5 bits.")
@click.option(
    "--calibrate",
    type=PATH,
    metavar="DIR",
    help="Photos like those the model will see, to measure the matrix on; implies --imatrix.",
)
@click.option(
    "--report",
    "report_file",
    type=PATH,
    metavar="FILE",
    help="Compare every quantization, with and without --imatrix, in this Markdown file.",
)
@click.option(
    "--report-data",
    type=PATH,
    metavar="FILE",
    help="LLaVA conversations (JSON, images beside it) to measure the report on; drawings if omitted.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the manifest as a JSON object.")
def export(report_file: Path | None, as_json: bool, **values: Any) -> None:
    """Convert CHECKPOINT into the bundle OUT.

    CHECKPOINT is a LLaVA in any published layout, or a GGUF with --mmproj. 'llava-edge info CHECKPOINT' shows its
    layout and what it needs.

    Needs the extra [export]. With [train] every stage is compared with PyTorch, in a table that ends with the worst;
    --imatrix, --calibrate and --report need it.

    \b
    llava-edge export llava-1.5-7b-hf my-bundle
    llava-edge export model.gguf my-bundle --mmproj mmproj.gguf
    """
    from llava_edge.export import exporter

    options = exporter.ExportOptions(**values | {"imatrix": values["imatrix"] or values["calibrate"] is not None})
    if options.mmproj and click.get_current_context().get_parameter_source("quant") is not ParameterSource.DEFAULT:
        raise UsageError("A GGUF's language model is kept as it is; omit --quant.")
    if options.mmproj and (options.imatrix or report_file):
        raise UsageError("A GGUF's language model is kept as it is; omit --imatrix, --calibrate and --report.")
    reports: list[Report] = []
    if options.report_data and not report_file:
        raise UsageError("--report-data needs --report FILE.")
    if report_file:
        _check_report(report_file, options.out, options.emit_mmproj)
    try:
        with require_extra("export", "Exporting"), interrupt_on_termination(), _stages() as progress:
            manifest = exporter.export(options, progress, reports.append if report_file else None)
    except exporter.ParityError as error:
        show_parity(error.rows)
        raise
    show_parity(manifest.parity)
    if report_file:
        _write_report(report_file, reports[0])
    if as_json:
        click.echo(json.dumps(asdict(manifest) | ({"report": asdict(reports[0])} if reports else {})))
    run = f"llava-edge run --model {shlex.quote(str(options.out))} --image photo.jpg"
    click.echo(f"{options.out} is ready ({manifest.size / 1e6:.1f} MB). Try: {run}", err=True)


def _check_report(path: Path, out: Path, emit_mmproj: Path | None) -> None:
    """Raise `CannotCreateError` before hours of measuring if the report cannot be written or would overwrite a file."""
    from llava_edge.export.report import TITLE

    check_output(path, distinct_from=[out, *([emit_mmproj] if emit_mmproj else [])], bundles=[out])
    if path.is_file():
        with path.open("rb") as file:
            if file.read(len(TITLE)) not in (TITLE.encode(), b""):
                raise CannotCreateError(f"{path} exists and is not an earlier report; choose another name.")


@contextmanager
def _stages() -> Iterator[Progress]:
    """Print each stage on stderr when it starts; below it, on a terminal, its progress and remaining time."""
    start, stage_start, current_stage = time.monotonic(), 0.0, ""
    with status_line("") as status:

        def progress(stage: str, share: float | None) -> None:
            nonlocal current_stage, stage_start
            if stage != current_stage:
                status(None)
                stage_start, current_stage = time.monotonic(), stage
                click.echo(f"{stage_start - start:6.1f} s  {stage}", err=True)
            if share:
                minutes, seconds = divmod(int((time.monotonic() - stage_start) * (1 - share) / share), 60)
                status.step(f"          {minutes}:{seconds:02d} left", share)

        yield progress


def _write_report(path: Path, report: Report) -> None:
    from llava_edge.export.report import markdown

    try:
        with replacing(path) as temporary:
            temporary.write_text(markdown(report), "utf-8")
    except OSError as error:
        raise CannotCreateError(
            f"The bundle is ready, but its report {path} cannot be written: {error.strerror}."
        ) from error


def show_parity(rows: list[ParityRow]) -> None:
    """Print the parity table on stderr, worst stage last."""
    if not rows:
        return
    click.echo(f"{'stage':<16}{'max abs':>11}{'relative':>11}  {'limit':<20}", err=True)
    for row in rows:
        sign = ">=" if row.measure in ("cosine", "agreement") else "<="
        comparison = f"{row.measure} {row.value:.6g} {sign} {row.limit:g}"
        verdict = "" if row.passed else "  FAILED"
        click.echo(f"{row.stage:<16}{row.max_abs:>11.3g}{row.relative:>11.3g}  {comparison}{verdict}", err=True)
