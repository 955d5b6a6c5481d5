"""`llava-edge bench`: every stage of an answer measured, in fresh processes, beside the limits of the machine."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from llava_edge.cli.arguments import picture_path
from llava_edge.errors import LlavaEdgeError, StorageError, UsageError
from llava_edge.options import DEFAULT_PROMPT, DEVICES, PRESETS
from llava_edge.outputs import check_output
from llava_edge.store import DEFAULT_MODEL


def _numbers(_: click.Context, __: click.Parameter, text: str) -> tuple[int, ...]:
    """Whole numbers with commas between them."""
    try:
        return tuple(dict.fromkeys(int(word) for word in text.split(",")))
    except ValueError:
        raise click.BadParameter(f"{text!r} is not a list of whole numbers such as 1,2.") from None


@click.command()
@click.option("--model", "models", multiple=True, metavar="NAME|DIR", help="Model or bundle; may be repeated.")
@click.option("--device", type=click.Choice(DEVICES), default="auto", show_default=True)
@click.option(
    "--threads", callback=_numbers, default="0", metavar="N,N", help="Each in turn; 0 is one per physical core."
)
@click.option(
    "--context", "contexts", callback=_numbers, default="0", metavar="N,N", help="Each in turn; 0 is the model's."
)
@click.option(
    "--image-tokens", "budgets", callback=_numbers, default="0", metavar="N,N", help="Each in turn; 0 is all."
)
@click.option("--preset", "presets", type=click.Choice(PRESETS), multiple=True, default=["auto"], show_default=True,
              help="Each in turn; may be repeated.")  # fmt: skip
@click.option("--image", metavar="FILE", help="Picture to show; a drawn one unless given.")
@click.option("--prompt", default=DEFAULT_PROMPT, show_default=True, metavar="TEXT", help="The question.")
@click.option("--max-tokens", type=int, default=32, show_default=True, help="Longest answer.")
@click.option(
    "--repeats", type=click.IntRange(1), default=5, show_default=True, help="Processes for each configuration."
)
@click.option(
    "--warmup", type=click.IntRange(0), default=1, show_default=True, help="Processes before that, not counted."
)
@click.option("--limits/--no-limits", default=True, help="Measure what the machine can do at most.")
@click.option(
    "--csv", "csv_file", type=click.Path(path_type=Path), metavar="FILE", help="Write one row for each stage."
)
@click.option("--html", "html_file", type=click.Path(path_type=Path), metavar="FILE", help="Write a page with charts.")
@click.option("--compare", "older", type=click.Path(path_type=Path), multiple=True, metavar="OLD.json",
              help="Earlier output to compare with; may be repeated.")  # fmt: skip
def bench(
    models: tuple[str, ...], image: str | None, csv_file: Path | None, html_file: Path | None, older: tuple[Path, ...],
    **values: Any,
) -> None:  # fmt: skip
    """Measure every stage of an answer, and what share of the machine's limits it reaches.

    A table goes to stderr, one JSON object to stdout. Each configuration runs in fresh processes, in turns with the
    others.

    \b
    llava-edge bench
    llava-edge bench --threads 1,2 --repeats 7 > now.json
    llava-edge bench --compare before.json --html report.html
    """
    from llava_edge.bench.compare import asked_otherwise, compare, in_common, other_conditions
    from llava_edge.bench.page import page
    from llava_edge.bench.records import read_report
    from llava_edge.bench.runner import Plan, configurations, measure, settings
    from llava_edge.bench.table import comparison, table, to_csv
    from llava_edge.cli.terminal import status_line

    picture = None if image is None else Path(picture_path(image))
    plan = Plan(models or (DEFAULT_MODEL,), image=picture, **values)
    planned = configurations(plan)
    named = [*older, *([picture] if picture else [])]
    for file in filter(None, (csv_file, html_file)):
        check_output(file, apart=named, bundles=[bundle.folder for _, bundle in planned])
        named.append(file)
    earlier = {str(path): read_report(path) for path in older}
    for name, old in earlier.items():
        if differs := asked_otherwise(old, settings(plan)):
            raise UsageError(f"{name} was asked something else: {differs}. Ask the same, or leave out --compare.")
        if not in_common(old, [configuration for configuration, _ in planned]):
            click.echo(
                f"llava-edge: {name} has no configuration of this run, so there is nothing to compare.", err=True
            )
    with status_line("Measuring") as status:
        report = measure(plan, status.step)
    click.echo(table(report), err=True)
    for name, old in earlier.items():
        click.echo("\n" + comparison(compare(old, report), name, other_conditions(old, report)), err=True)
    try:
        click.echo(report.to_json())
    finally:  # minutes went into it: what can be written is
        _write((csv_file, lambda: to_csv(report)), (html_file, lambda: page({"this run": report, **earlier})))
    failed = [run for run in report.runs if run.error]
    if len(failed) == len(report.runs):
        error = LlavaEdgeError(f"Nothing could be measured. {failed[0].error}")
        error.exit_code = failed[0].exit_code
        raise error
    if failed:
        click.echo(
            f"llava-edge: {len(failed)} of {len(report.runs)} configurations failed; the table says why.", err=True
        )


def _write(*files: tuple[Path | None, Callable[[], str]]) -> None:
    """Write what was asked for. Raises `StorageError` naming what could not be, after the others were written."""
    problems = []
    for path, text in files:
        if path is not None:
            try:
                path.write_text(text(), "utf-8")
            except OSError as error:
                problems.append(f"{path} cannot be written: {error.strerror}.")
    if problems:
        raise StorageError(" ".join(problems))
