"""`llava-edge bench`: measure every stage of an answer in fresh processes, relative to the limits of the machine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from llava_edge.cli.arguments import Decorator, image_path
from llava_edge.cli.types import FILE_NAME, MODEL, PATH
from llava_edge.errors import LlavaEdgeError, StorageError, UsageError
from llava_edge.options import DEFAULT_PROMPT, DEVICES, PRESETS
from llava_edge.outputs import check_output, replacing
from llava_edge.store import DEFAULT_MODEL

if TYPE_CHECKING:
    from llava_edge.bench.records import Configuration, Report
    from llava_edge.bench.runner import Plan


def _parse_integers(_: click.Context, __: click.Parameter, text: str) -> tuple[int, ...]:
    """Parse comma-separated integers, dropping duplicates."""
    try:
        return tuple(dict.fromkeys(int(word) for word in text.split(",")))
    except ValueError:
        raise click.BadParameter(f"{text!r} is not a list of integers such as 1,2.") from None


def _sweep(flag: str, name: str, text: str) -> Decorator:
    """An option for several integers, each of which is measured."""
    return click.option(flag, name, callback=_parse_integers, default="0", metavar="N,N", help=text)


@click.command()
@click.option("--model", "models", type=MODEL, multiple=True, default=[DEFAULT_MODEL], metavar="NAME|DIR",
              help="Model name or bundle folder; repeatable.")  # fmt: skip
@click.option("--device", type=click.Choice(DEVICES), default="auto", help="Device to compute on.")
@_sweep("--threads", "threads", "Thread counts to try (0: one per physical core).")
@_sweep("--context", "contexts", "Context lengths in tokens to try (0: the model's, at most 4096).")
@_sweep("--image-tokens", "budgets", "Tokens per image to try (0: all).")
@click.option("--preset", "presets", type=click.Choice(PRESETS), multiple=True, default=["auto"],
              help="Preset to try; repeatable.")  # fmt: skip
@click.option("--image", type=FILE_NAME, metavar="FILE", help="Image to ask about; a generated one if omitted.")
@click.option("--prompt", default=DEFAULT_PROMPT, metavar="TEXT", help="Question to ask.")
@click.option("--max-tokens", type=int, default=32, help="Maximum number of tokens in an answer.")
@click.option("--repeats", type=click.IntRange(1, 1000), default=5, help="Measured processes per configuration.")
@click.option("--warmup", type=click.IntRange(0, 1000), default=1, help="Uncounted processes before them.")
@click.option("--limits/--no-limits", default=True, help="Measure this machine's limits.")
@click.option("--csv", "csv_file", type=PATH, metavar="FILE", help="Write a CSV file, one row per stage.")
@click.option("--html", "html_file", type=PATH, metavar="FILE", help="Write charts to an HTML page.")
@click.option("--compare", "older", type=PATH, multiple=True, metavar="OLD.json",
              help="Earlier output to compare with; repeatable.")  # fmt: skip
def bench(
    models: tuple[str, ...], image: str | None, csv_file: Path | None, html_file: Path | None, older: tuple[Path, ...],
    **values: Any,
) -> None:  # fmt: skip
    """Measure every stage of an answer, and the share of the machine's limits it reaches.

    Prints a table on stderr and a JSON object on stdout. Each configuration runs in fresh processes, interleaved with
    the others.

    \b
    llava-edge bench
    llava-edge bench --threads 1,2 --repeats 7 > before.json
    llava-edge bench --compare before.json --html report.html
    """
    from llava_edge.bench.compare import compare, condition_differences
    from llava_edge.bench.page import page
    from llava_edge.bench.runner import Plan, configurations, measure
    from llava_edge.bench.table import comparison, table, to_csv
    from llava_edge.cli.terminal import status_line

    picture = None if image is None else Path(image_path(image))
    plan = Plan(models, image=picture, **values)
    planned = configurations(plan)
    inputs = [*older, *([picture] if picture else [])]
    for file in filter(None, (csv_file, html_file)):
        check_output(file, distinct_from=inputs, bundles=[bundle.folder for _, bundle in planned])
        inputs.append(file)
    earlier = {str(path): _read_earlier(path, plan, [configuration for configuration, _ in planned]) for path in older}
    with status_line("Measuring") as status:
        report = measure(plan, status.step)
    click.echo(table(report), err=True)
    for name, old in earlier.items():
        click.echo("\n" + comparison(compare(old, report), name, condition_differences(old, report)), err=True)
    try:
        click.echo(report.to_json())
    finally:  # it took minutes to measure: write what can be written
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


def _read_earlier(path: Path, plan: Plan, planned: Sequence[Configuration]) -> Report:
    """Read a report to compare with. Raises `UsageError` if its times are not comparable, before hours of measuring."""
    from llava_edge.bench.compare import has_common_configuration, setting_differences
    from llava_edge.bench.records import read_report
    from llava_edge.bench.runner import settings

    report = read_report(path)
    if differences := setting_differences(report, settings(plan)):
        raise UsageError(
            f"{path} was measured with other settings: {differences}. Use the same ones, or omit --compare."
        )
    if not has_common_configuration(report, planned):
        click.echo(
            f"llava-edge: {path} has none of this run's configurations, so there is nothing to compare.", err=True
        )
    return report


def _write(*files: tuple[Path | None, Callable[[], str]]) -> None:
    """Write each file that has a path, then raise `StorageError` naming those that could not be written."""
    problems = []
    for path, text in files:
        if path is not None:
            try:
                with replacing(path) as temporary:
                    temporary.write_text(text(), "utf-8", "replace")  # file names may have bytes that are not UTF-8
            except OSError as error:
                problems.append(f"{path} cannot be written: {error.strerror}.")
    if problems:
        raise StorageError(" ".join(problems))
