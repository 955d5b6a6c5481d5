"""Training recipes: small TOML files in `models/recipes/`, read into frozen dataclasses. No torch here."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

from llava_edge.errors import DataError, MissingError

FOLDER = Path(__file__).parent / "recipes"


@dataclass(frozen=True)
class Range:
    """The numbers that a setting may be. `above` leaves the least one out."""

    least: float
    most: float
    above: bool = False

    def allows(self, number: float) -> bool:
        """Whether a number is one of them; NaN never is."""
        return self.least <= number <= self.most and not (self.above and number == self.least)

    def __str__(self) -> str:
        return f"above {self.least} and up to {self.most}" if self.above else f"from {self.least} to {self.most}"


Count = Annotated[int, Range(1, 65536)]
Rate = Annotated[float, Range(0, 1, above=True)]
Share = Annotated[float, Range(0, 1)]
Source = Literal["grocery", "clothing", "objects", "easy-vqa", "emoji", "tuxpaint"]  # of pictures: sources.py


@dataclass(frozen=True)
class Stage:
    """One of LLaVA's two stages. Rates are peaks of a cosine schedule with linear warmup."""

    name: str
    records: str  # file of LLaVA conversation records in the data folder
    template: str  # prompt template of `llava_edge.prompt`
    trains: Literal["projector", "lora", "full"]  # "lora" and "full" include the projector
    learning_rate: Share  # 0 only where the projector is trained alone
    projector_learning_rate: Rate
    batch: Count  # packs an optimiser step
    accumulate: Count = 1  # micro-batches a step
    epochs: Annotated[float, Range(0, 10_000, above=True)] = 1.0
    max_length: Count = 512  # tokens of text in a pack
    warmup_ratio: Share = 0.03
    clip_norm: Annotated[float, Range(0, 1_000_000, above=True)] = 1.0
    lora_rank: Annotated[int, Range(0, 1024)] = 0
    lora_alpha: Annotated[float, Range(0, 65536)] = 0.0


@dataclass(frozen=True)
class Recipe:
    """Which parts are trained, on what, how."""

    name: str
    parts: Literal["micro", "smol"]  # "full" is for "micro": what is written of "smol" is a delta
    seed: Annotated[int, Range(0, 2**32 - 1)]
    bf16: bool  # autocast; weights that are not trained are kept in bfloat16
    checkpoint_every: Annotated[int, Range(1, 1_000_000)]  # steps
    data: dict[str, Any]  # arguments of the parts' data builder
    stages: tuple[Stage, ...]
    compile: bool = False  # torch.compile each block: needs a C++ compiler and half a minute, then 1.4 times as fast


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
    """A built-in recipe by name or a TOML file. Raises `MissingError` or `DataError`."""
    builtin = sorted(path.stem for path in FOLDER.glob("*.toml"))
    path = FOLDER / f"{name_or_path}.toml" if name_or_path in builtin else Path(name_or_path)
    if not path.is_file():
        raise MissingError(f"Recipe {name_or_path!r} is neither built in ({', '.join(builtin)}) nor a file.")
    try:
        return _recipe(tomllib.loads(path.read_text("utf-8")), path)
    except KeyError as error:
        raise DataError(f"{path} is not a training recipe: it has no {error}.") from error
    except (ValueError, TypeError) as error:  # no TOML or no text among them
        raise DataError(f"{path} is not a training recipe: {error}.") from error


def _recipe(raw: dict[str, Any], path: Path) -> Recipe:
    tables = raw.pop("stage")
    if not (isinstance(tables, list) and tables and all(isinstance(table, dict) for table in tables)):
        raise DataError(f"{path} is not a training recipe: it has no tables that begin with [[stage]].")
    named = [(f"{path}, stage {table.get('name', number)!r}", table) for number, table in enumerate(tables, 1)]
    stages = tuple(_strict(Stage, table, where) for where, table in named)
    recipe: Recipe = _strict(Recipe, {**raw, "stages": stages}, str(path))
    _strict(MicroData if recipe.parts == "micro" else SmolData, recipe.data, f"{path}, [data]")
    for (where, _), stage in zip(named, stages, strict=True):
        _check_together(stage, recipe, where)
    return recipe


def _check_together(stage: Stage, recipe: Recipe, where: str) -> None:
    """Raises `DataError` for settings that are good, but not beside each other."""
    if stage.trains == "lora" and not stage.lora_rank:
        raise DataError(f"{where}: trains = 'lora' needs a lora_rank of 1 or more, not 0.")
    if stage.trains == "lora" and not stage.lora_alpha:
        raise DataError(f"{where}: trains = 'lora' needs a lora_alpha above 0, not 0.")
    if stage.trains != "projector" and not stage.learning_rate:
        raise DataError(f"{where}: trains = {stage.trains!r} needs a learning_rate above 0, not 0.")
    if stage.trains == "full" and recipe.parts == "smol":
        raise DataError(
            f"{where}: trains = 'full' would be lost, as only projector and adapters of 'smol' are written; use 'lora'."
        )


def _strict(kind: Any, raw: dict[str, Any], where: str) -> Any:
    unknown = set(raw) - {field.name for field in fields(kind)}
    if unknown:
        raise DataError(f"{where} has unknown settings {sorted(unknown)}.")
    for name, hint in get_type_hints(kind, include_extras=True).items():
        if name in raw:
            _check(name, raw[name], hint, where)
    return kind(**raw)


def _check(name: str, value: Any, hint: Any, where: str) -> None:
    """Raises `DataError` for a value that a setting with this type cannot have."""
    expected = _expected(value, hint)
    if expected:
        raise DataError(f"{where} has {name} = {value!r:.60}; {expected} was expected.")
    if get_origin(hint) is dict:
        keys, values = get_args(hint)
        for key, inner in value.items():
            if expected := _expected(key, keys):
                raise DataError(f"{where} has {name}.{key}; {expected} was expected.")
            _check(f"{name}.{key}", inner, values, where)


def _expected(value: Any, hint: Any) -> str:
    """What should have been there; empty if `value` may."""
    if get_origin(hint) is Literal:
        return "" if value in get_args(hint) else f"one of {', '.join(map(repr, get_args(hint)))}"
    if get_origin(hint) is Annotated:
        kind, numbers = get_args(hint)
        good = isinstance(value, int | kind) and not isinstance(value, bool) and numbers.allows(value)
        return "" if good else f"a {'whole ' if kind is int else ''}number {numbers}"
    names = {str: "a text in quotes", bool: "true or false", dict: "a table"}
    wanted = get_origin(hint) or hint
    return names[wanted] if wanted in names and not isinstance(value, wanted) else ""
