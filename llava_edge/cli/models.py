"""`llava-edge models`: list, pull and remove models."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import click

from llava_edge import store
from llava_edge.bundle import Bundle
from llava_edge.cli.arguments import require_extra
from llava_edge.cli.terminal import printable, status_line
from llava_edge.cli.types import MODEL
from llava_edge.errors import CannotCreateError, LlavaEdgeError, UnavailableError, UsageError
from llava_edge.interrupts import interrupt_on_termination
from llava_edge.outputs import write_problem

if TYPE_CHECKING:
    from llava_edge.export import Progress


@click.group()
def models() -> None:
    """List, pull or remove models."""


@models.command("list")
def list_models() -> None:
    """List known and installed models."""
    for entry in store.entries():
        state = _state(entry.folder) if entry.folder is not None else "not installed"
        default = " (default)" if entry.name == store.DEFAULT_MODEL else ""
        click.echo("  ".join(filter(None, (f"{entry.name}{default}", state, entry.description))))
        if entry.folder is not None:
            click.echo(f"    {entry.folder}")


def _state(folder: Path) -> str:
    try:
        manifest = Bundle.open(folder).manifest
    except LlavaEdgeError as error:  # damaged, or of another version
        return printable(f"cannot be used: {error}")
    return f"installed  {manifest.size / 1e6:.0f} MB"


@models.command("pull")
@click.argument("name", default=store.DEFAULT_MODEL, metavar="[NAME]")
@click.option("--force", is_flag=True, help="Rebuild the model if it is already installed.")
def pull_model(name: str, force: bool) -> None:
    """Download the parts of NAME (smol if omitted) and build its bundle.

    Needs the extra [export].
    """
    installed = {entry.name: entry.folder for entry in store.entries()}
    store.refuse_download(name, "download the checkpoint, then run 'llava-edge export CHECKPOINT BUNDLE'")
    if name not in store.KNOWN_MODELS:
        raise UsageError(f"There is no model {name!r} to pull; choose one of {', '.join(store.KNOWN_MODELS)}.")
    if installed.get(name) and not force:
        click.echo(f"{name} is already installed in {store.resolve(name)}; --force rebuilds it.", err=True)
        return
    with interrupt_on_termination(), status_line(f"Pulling {name}") as status:
        folder = _pull(name, status.step)
        status.step("Measuring the fastest way to encode images", None)
        _tune(folder)
    click.echo(f"{name} is ready in {folder}. Try: llava-edge run --image photo.jpg", err=True)


@models.command("rm")
@click.argument("name", type=MODEL)
def remove_model(name: str) -> None:
    """Remove the pulled model NAME.

    Bundles made by 'llava-edge export' are not touched. Downloads stay for the next pull, in the folder that is named.
    """
    size, parts = store.remove(name), store.home() / "parts"
    kept = f" Its downloads stay in {parts} for the next pull; delete that folder to free their space, too."
    kept = kept if parts.exists() else ""
    click.echo(f"{name} is removed: {size / 1e6:.0f} MB freed.{kept}", err=True)


def _tune(folder: Path) -> None:
    """Measure the fastest settings now, because a pull takes long anyway."""
    from llava_edge.runtimes import tune

    with suppress(UnavailableError):  # the machine is busy; doctor says how to measure later
        tune.measure(Bundle.open(folder))


def _pull(name: str, progress: Progress) -> Path:
    from llava_edge.export.pull import pull

    target = store.models_folder() / name
    home = store.home()
    if problem := write_problem(home) or write_problem(target.parent):
        raise CannotCreateError(f"{home} cannot be written to ({problem}); set LLAVA_EDGE_HOME to a folder of yours.")
    target.parent.mkdir(parents=True, exist_ok=True)
    with require_extra("export", "Pulling a model"):
        pull(target, progress)
    return target
