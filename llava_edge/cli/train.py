"""`llava-edge train`: train both of LLaVA's stages from a recipe."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import click

from llava_edge import store
from llava_edge.cli.arguments import require_extra
from llava_edge.cli.terminal import Status, status_line
from llava_edge.cli.types import FILE_NAME, PATH
from llava_edge.errors import CannotCreateError
from llava_edge.interrupts import held_back
from llava_edge.outputs import write_problem

if TYPE_CHECKING:
    from llava_edge.models.train import Step


@click.command()
@click.argument("recipe", type=FILE_NAME)
@click.option(
    "--out",
    type=PATH,
    metavar="DIR",
    show_default="~/.cache/llava-edge/runs/RECIPE",
    help="Run folder; resumes an interrupted run there.",
)
@click.option(
    "--data",
    type=PATH,
    metavar="DIR",
    show_default="~/.cache/llava-edge/data/RECIPE",
    help="Folder for training data and cached features.",
)
@click.option("--photos", type=PATH, metavar="DIR", help="Folder of photos with labels.jsonl (for smol).")
@click.option("--threads", type=click.IntRange(1, 1024), help="Number of threads.")
def train(recipe: str, out: Path | None, data: Path | None, photos: Path | None, threads: int | None) -> None:
    """Train RECIPE (micro, smol or a TOML file).

    Needs the extra [train].

    \b
    llava-edge train micro --out runs/micro
    llava-edge export runs/micro/model bundles/micro
    """
    with require_extra("train", "Training"), held_back():
        from llava_edge.models.recipe import load_recipe
        from llava_edge.models.run import Folders, train_recipe
    loaded_recipe = load_recipe(recipe)
    run = _writable(out, "--out", store.home() / "runs" / loaded_recipe.name)
    data = _writable(data, "--data", store.home() / "data" / loaded_recipe.name)
    with require_extra("train", "Training"), status_line(f"Training {loaded_recipe.name}") as status:
        report = _Reporter(status)
        model = train_recipe(
            loaded_recipe,
            Folders(run, data, data / "features", photos),
            log=lambda line: click.echo(f"llava-edge: {line}", err=True),
            encoding=lambda done, total: status.step(f"encoding images {done}/{total}", done / total),
            report=report,
            threads=threads,
        )
    click.echo(f"llava-edge: training finished; log and plot are in {run}.", err=True)
    click.echo(str(model))


def _writable(given: Path | None, option: str, default: Path) -> Path:
    """The folder to use. Raises `CannotCreateError` if it cannot be written to, before anything is computed."""
    folder = given or default
    if problem := write_problem(folder):
        remedy = f"name another folder with {option}" + ("" if given else ", or set LLAVA_EDGE_HOME to one of yours")
        raise CannotCreateError(f"{folder} cannot be written to ({problem}); {remedy}.")
    return folder


class _Reporter:
    """Updates a status line on a terminal; elsewhere prints a line every 30 s."""

    def __init__(self, status: Status) -> None:
        self._status = status
        self._smoothed_loss: float | None = None
        self._last_line_time = 0.0

    def __call__(self, step: Step) -> None:
        self._smoothed_loss = (
            step.loss if self._smoothed_loss is None else 0.95 * self._smoothed_loss + 0.05 * step.loss
        )
        minutes, seconds = divmod(int(step.seconds_left), 60)
        text = (
            f"{step.stage} {step.step}/{step.steps}  loss {self._smoothed_loss:.4f}  "
            f"{step.packs_per_s:.1f} pictures/s  {minutes}:{seconds:02d} left"
        )
        self._status.step(text, step.step / step.steps)
        if not sys.stderr.isatty() and (time.monotonic() - self._last_line_time > 30 or step.step == step.steps):
            self._last_line_time = time.monotonic()
            click.echo(text, err=True)
