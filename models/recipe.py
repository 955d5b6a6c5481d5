"""Training recipes: small TOML files in `models/recipes/`, read into frozen dataclasses. Imports no torch."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from llava_edge.errors import DataError, MissingError
from llava_edge.templates import TEMPLATES
from llava_edge.typed import Range, build

FOLDER = Path(__file__).parent / "recipes"


Count = Annotated[int, Range(1, 65536)]
Rate = Annotated[float, Range(0, 1, exclusive_low=True)]
Share = Annotated[float, Range(0, 1)]
Source = Literal["grocery", "clothing", "objects", "easy-vqa", "emoji", "tuxpaint"]  # of pictures: sources.py


@dataclass(frozen=True)
class Stage:
    """One of LLaVA's two stages. Learning rates are the peaks of a cosine schedule with linear warmup."""

    name: str
    records: str  # file of LLaVA conversation records in the data folder
    template: str  # prompt template of `llava_edge.prompt`
    trains: Literal["projector", "lora", "full"]  # "lora" and "full" include the projector
    learning_rate: Share  # 0 only where the projector is trained alone
    projector_learning_rate: Rate
    batch: Count  # packs per optimiser step
    accumulate: Count = 1  # micro-batches per step
    epochs: Annotated[float, Range(0, 10_000, exclusive_low=True)] = 1.0
    max_length: Count = 512  # tokens of text in a pack
    warmup_ratio: Share = 0.03
    clip_norm: Annotated[float, Range(0, 1_000_000, exclusive_low=True)] = 1.0
    lora_rank: Annotated[int, Range(0, 1024)] = 0
    lora_alpha: Annotated[float, Range(0, 65536)] = 0.0


@dataclass(frozen=True)
class Recipe:
    """Which model is trained, on what and how."""

    name: str
    parts: Literal["micro", "smol"]  # model to start from; "smol" ships as a delta, so it cannot be trained in "full"
    seed: Annotated[int, Range(0, 2**32 - 1)]
    bf16: bool  # autocast, and keep frozen weights in bfloat16
    checkpoint_every: Annotated[int, Range(1, 1_000_000)]  # steps
    data: dict[str, Any]  # arguments of the parts' data builder
    stages: tuple[Stage, ...]
    compile: bool = False  # torch.compile each block: needs a C++ compiler and 30 s, then 1.4 times as fast


@dataclass(frozen=True)
class MicroData:
    """`Recipe.data` for "micro"."""

    pictures: Count


@dataclass(frozen=True)
class SmolData:
    """`Recipe.data` for "smol"."""

    rounds: dict[Source, Annotated[float, Range(0, 1000)]]
    per_picture: Count
    multi_turn: Share


def load_recipe(name_or_path: str) -> Recipe:
    """Load a built-in recipe by name, or a TOML file. Raises `MissingError` or `DataError`."""
    builtin = sorted(path.stem for path in FOLDER.glob("*.toml"))
    path = FOLDER / f"{name_or_path}.toml" if name_or_path in builtin else Path(name_or_path)
    if not path.is_file():
        raise MissingError(f"Recipe {name_or_path!r} is neither built in ({', '.join(builtin)}) nor a file.")
    try:
        return _parse(tomllib.loads(path.read_text("utf-8")))
    except ValueError as error:  # includes invalid TOML and invalid UTF-8
        raise DataError(f"{path} is not a training recipe: {error}.") from error


def _parse(raw: dict[str, Any]) -> Recipe:
    """Raises `ValueError` with what is wrong."""
    tables = raw.pop("stage", None)
    if not (isinstance(tables, list) and tables and all(isinstance(table, dict) for table in tables)):
        raise ValueError("it has no [[stage]] tables")
    labels = [f"stage {table.get('name', number)!r}" for number, table in enumerate(tables, 1)]
    stages = [build(Stage, table, label) for label, table in zip(labels, tables, strict=True)]
    recipe = build(Recipe, {**raw, "stages": stages})
    build(MicroData if recipe.parts == "micro" else SmolData, recipe.data, "[data]")
    names = [stage.name for stage in stages]
    if duplicates := [name for name in names if names.count(name) > 1]:
        raise ValueError(f"two stages are called {duplicates[0]!r}; names must be unique, because the log uses them")
    for label, stage in zip(labels, stages, strict=True):
        _check_stage(stage, recipe, label)
    return recipe


def _check_stage(stage: Stage, recipe: Recipe, label: str) -> None:
    """Raise `ValueError` for settings that have the right type but are invalid or contradict each other."""
    if stage.template not in TEMPLATES:
        raise ValueError(f"{label} has template = {stage.template!r}; expected one of {', '.join(TEMPLATES)}")
    if stage.trains == "lora" and not stage.lora_rank:
        raise ValueError(f"{label}: trains = 'lora' needs a lora_rank of 1 or more, not 0")
    if stage.trains == "lora" and not stage.lora_alpha:
        raise ValueError(f"{label}: trains = 'lora' needs a lora_alpha above 0, not 0")
    if stage.trains != "projector" and not stage.learning_rate:
        raise ValueError(f"{label}: trains = {stage.trains!r} needs a learning_rate above 0, not 0")
    if stage.trains == "full" and recipe.parts == "smol":
        raise ValueError(
            f"{label}: trains = 'full' would be lost, as only projector and adapters of 'smol' are written; use 'lora'"
        )
