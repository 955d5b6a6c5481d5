"""Training recipes: small TOML files in `models/recipes/`, read into frozen dataclasses. No torch here."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from llava_edge.errors import DataError, MissingError

FOLDER = Path(__file__).parent / "recipes"


@dataclass(frozen=True)
class Stage:
    """One of LLaVA's two stages. Rates are peaks of a cosine schedule with linear warmup."""

    name: str
    records: str  # file of LLaVA conversation records in the data folder
    template: str  # prompt template of `llava_edge.prompt`
    trains: Literal["projector", "lora", "full"]  # "lora" and "full" include the projector
    learning_rate: float
    projector_learning_rate: float
    batch: int  # packs an optimiser step
    accumulate: int = 1  # micro-batches a step
    epochs: float = 1.0
    max_length: int = 512  # tokens of text in a pack
    warmup_ratio: float = 0.03
    clip_norm: float = 1.0
    lora_rank: int = 0
    lora_alpha: float = 0.0


@dataclass(frozen=True)
class Recipe:
    """Which parts are trained, on what, how."""

    name: str
    parts: Literal["micro", "smol"]  # "full" is for "micro": what is written of "smol" is a delta
    seed: int
    bf16: bool  # autocast; weights that are not trained are kept in bfloat16
    checkpoint_every: int  # steps
    data: dict[str, Any]  # arguments of the parts' data builder
    stages: tuple[Stage, ...]
    compile: bool = False  # torch.compile each block: needs a C++ compiler and half a minute, then 1.4 times as fast


def load_recipe(name_or_path: str) -> Recipe:
    """A built-in recipe by name or a TOML file. Raises `MissingError` or `DataError`."""
    builtin = sorted(path.stem for path in FOLDER.glob("*.toml"))
    path = FOLDER / f"{name_or_path}.toml" if name_or_path in builtin else Path(name_or_path)
    if not path.is_file():
        raise MissingError(f"Recipe {name_or_path!r} is neither built in ({', '.join(builtin)}) nor a file.")
    try:
        raw = tomllib.loads(path.read_text("utf-8"))
        stages = tuple(_strict(Stage, stage, path) for stage in raw.pop("stage"))
        recipe: Recipe = _strict(Recipe, {**raw, "stages": stages}, path)
    except KeyError as error:
        raise DataError(f"{path} is not a training recipe: it has no {error}.") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, TypeError) as error:
        raise DataError(f"{path} is not a training recipe: {error}.") from error
    for stage in recipe.stages:
        where = f"{path}, stage {stage.name!r}"
        if stage.trains == "lora" and not (isinstance(stage.lora_rank, int) and stage.lora_rank > 0):
            raise DataError(f"{where}: trains = 'lora' needs a lora_rank of 1 or more, not {stage.lora_rank!r}.")
        if stage.trains == "full" and recipe.parts == "smol":
            raise DataError(
                f"{where}: trains = 'full' would be lost, as only projector and adapters of 'smol' are written; "
                "use 'lora'."
            )
    return recipe


def _strict(kind: Any, raw: dict[str, Any], path: Path) -> Any:
    unknown = set(raw) - {field.name for field in fields(kind)}
    if unknown:
        raise DataError(f"{path} has unknown settings {sorted(unknown)}.")
    for name, hint in get_type_hints(kind).items():
        if get_origin(hint) is Literal and name in raw and raw[name] not in get_args(hint):
            raise DataError(f"{path} has {name} = {raw[name]!r}; it is one of {', '.join(map(repr, get_args(hint)))}.")
    return kind(**raw)
