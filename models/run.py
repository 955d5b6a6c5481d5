"""`llava-edge train RECIPE`: prepares model, data and features, runs the trainer (`train`) and writes the results."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

import numpy as np
import torch

from llava_edge.errors import CannotCreateError, UsageError
from llava_edge.locks import lock_file
from llava_edge.models import micro, smol
from llava_edge.models.conversations import write_records
from llava_edge.models.data import load_tokenizer
from llava_edge.models.features import FeatureCache
from llava_edge.models.llava import Llava, from_state
from llava_edge.models.lora import merge_lora
from llava_edge.models.recipe import Recipe
from llava_edge.models.shapes import projector_shapes
from llava_edge.models.sources import require_sources
from llava_edge.models.train import Report, Trainer, load_stage, plot_losses
from llava_edge.outputs import check_space, storage_errors

Log = Callable[[str], None]
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Folders:
    """Where a run reads and writes. Recipes that train `smol` need `photos`, others take none."""

    run: Path
    data: Path
    features: Path
    photos: Path | None = None


def train_recipe(
    recipe: Recipe,
    folders: Folders,
    *,
    log: Log = lambda line: None,
    encoding: Progress = lambda done, total: None,
    report: Report = lambda step: None,
    threads: int | None = None,
) -> Path:
    """Train a recipe, resuming an earlier run in `folders.run` if there is one.

    Returns the folder of the finished model (a Hugging Face LLaVA folder; `smol` also gets delta.safetensors).
    Raises `CannotCreateError` if another process trains there.
    """
    _check_prerequisites(recipe, folders)
    torch.manual_seed(recipe.seed)
    if threads:
        torch.set_num_threads(threads)
    with _locked(folders.run):
        return _train(recipe, folders, log, encoding, report)


def _train(recipe: Recipe, folders: Folders, log: Log, encoding: Progress, report: Report) -> Path:
    model = _build_untrained(recipe, folders, log)
    log("preparing conversations")
    with storage_errors(folders.data):
        _write_records(recipe, folders)
    tokenizer, image_tokens = load_tokenizer(folders.run / "base" / "tokenizer.json"), model.config.image_tokens
    stages = [load_stage(stage, folders.data, tokenizer, image_tokens, recipe.seed) for stage in recipe.stages]
    features = FeatureCache(folders.features, model, log=log)
    check_space(folders.run, 4 * sum(parameter.numel() for parameter in model.parameters()), "The trained model")
    log("encoding pictures (once; cached for later runs)")
    pictures = {folders.data / item.image for data in stages for item in data.packs if item.image}
    features.ensure(sorted(pictures), progress=encoding)
    Trainer(model, recipe, stages, features, folders.data, folders.run).train(report)
    _write_results(recipe, folders, model)
    return folders.run / "model"


@contextmanager
def _locked(run: Path) -> Iterator[None]:
    """Let one process at a time write to the folder of a run. Raises `CannotCreateError`."""
    base = run / "base"  # what makes it a run, even one that was killed here
    base.mkdir(parents=True, exist_ok=True)
    with (base / "lock").open("w") as file:
        try:
            lock_file(file, wait=False)
        except BlockingIOError as error:
            raise CannotCreateError(
                f"Another llava-edge is training in {run}; let it end first, or choose another --out."
            ) from error
        yield


def _check_prerequisites(recipe: Recipe, folders: Folders) -> None:
    """Fail before anything is downloaded or computed rather than later."""
    for package in ("gguf", "matplotlib", "onnx", "safetensors"):
        import_module(package)
    # `base` is what a run writes first.
    if folders.run.is_dir() and any(folders.run.iterdir()) and not (folders.run / "base").is_dir():
        raise CannotCreateError(f"{folders.run} is not empty and holds no training run; choose another --out.")
    if recipe.parts == "micro":
        if folders.photos is not None:
            raise UsageError(f"The recipe {recipe.name!r} draws its own pictures; omit --photos.")
        micro.check_data_folder(folders.data)
        return
    if folders.photos is None:
        raise UsageError("This recipe trains on photos: pass their folder with --photos.")
    require_sources(folders.photos, folders.data)


def _build_untrained(recipe: Recipe, folders: Folders, log: Log) -> Llava:
    """Build the model to be trained; write its config and tokenizer to run/base."""
    base = folders.run / "base"
    if recipe.parts == "micro":
        tensors = micro.random_tensors(seed=recipe.seed)
        micro.write_checkpoint(base, tensors=tensors)
        return from_state(micro.CONFIG, tensors)
    readers = smol.base_checkpoint(base, folders.run.parent / "parts", log)
    tensors = {name: read() for name, read in readers.items()}
    rng = np.random.default_rng(recipe.seed)
    for name, shape in projector_shapes(smol.CONFIG).items():
        scale = shape[-1] ** -0.5 if len(shape) > 1 else 0.0
        tensors[name] = (rng.standard_normal(shape, dtype=np.float32) * scale).astype(np.float32)
    return from_state(smol.CONFIG, tensors)


def _write_records(recipe: Recipe, folders: Folders) -> None:
    if recipe.parts == "micro":
        micro.write_data(folders.data, seed=recipe.seed, **recipe.data)
        return
    assert folders.photos is not None
    write_records(folders.data, folders.photos, seed=recipe.seed, **recipe.data)


def _write_results(recipe: Recipe, folders: Folders, model: Llava) -> None:
    plot_losses(folders.run / "log.jsonl", folders.run / "loss.png")
    target = folders.run / "model"
    if recipe.parts == "smol":
        # From the delta file, so that this model is exactly what a user of the delta gets.
        delta = folders.run / "delta.safetensors"
        smol.write_delta(model, delta)
        smol.write_checkpoint(target, folders.run.parent / "parts", delta)
        return
    merge_lora(model)
    tensors = {name: tensor.float().contiguous().numpy() for name, tensor in model.state_dict().items()}
    micro.write_checkpoint(target, tensors=tensors)
