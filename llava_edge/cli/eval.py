"""`llava-edge eval`: accuracy of the default model on held-out questions."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import click

from llava_edge import store
from llava_edge.cli.arguments import require_extra
from llava_edge.cli.terminal import status_line
from llava_edge.cli.types import MODEL, PATH
from llava_edge.errors import UsageError
from llava_edge.interrupts import held_back
from llava_edge.options import TOKEN_METHODS, EngineOptions, Options, TokenMethod

if TYPE_CHECKING:
    from llava_edge.api import Llava
    from llava_edge.models.evaluate import Progress, Question, Score


@click.command("eval")
@click.option(
    "--bundle",
    "bundles",
    type=MODEL,
    multiple=True,
    metavar="NAME|DIR",
    help="Model name or bundle folder; repeatable.",
)
@click.option("--checkpoint", type=PATH, metavar="DIR", help="Checkpoint to evaluate in PyTorch (float32).")
@click.option("--photos", type=PATH, required=True, metavar="DIR", help="Photos with labels.jsonl.")
@click.option(
    "--data",
    type=PATH,
    metavar="DIR",
    show_default="~/.cache/llava-edge/data/smol",
    help="Folder for the held-out data.",
)
@click.option("--limit", type=click.IntRange(1), help="Maximum number of questions per set, evenly spread; else all.")
@click.option(
    "--image-tokens",
    "budgets",
    multiple=True,
    type=click.IntRange(0),
    help="Tokens per image (0: all), for bundles; repeatable.",
)
@click.option(
    "--token-method",
    "methods",
    multiple=True,
    type=click.Choice(TOKEN_METHODS),
    default=["cls"],
    help="How images are reduced to fewer tokens; repeatable.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the scores as JSON.")
def eval(
    bundles: tuple[str, ...],
    checkpoint: Path | None,
    photos: Path,
    data: Path | None,
    limit: int | None,
    budgets: tuple[int, ...],
    methods: tuple[TokenMethod, ...],
    as_json: bool,
) -> None:
    """Measure accuracy on each held-out set, beside majority, blank-image and shuffled-image baselines.

    Needs the extra [train].

    \b
    llava-edge eval --photos photos --bundle smol --checkpoint runs/smol/model
    llava-edge eval --photos photos --bundle smol --image-tokens 0 --image-tokens 25 --image-tokens 9
    """
    if not bundles and checkpoint is None:
        raise UsageError("Name at least one --bundle or a --checkpoint to evaluate.")
    variants = _variants(budgets, methods)
    _check(bundles, variants)
    with require_extra("train", "Evaluation"), held_back():
        from llava_edge.models.data import load_tokenizer
        from llava_edge.models.evaluate import check_supported, majority_baseline, question_sets, score_model
        from llava_edge.models.llava import from_state
        from llava_edge.models.sources import collect
    if checkpoint is not None:
        from llava_edge.export.checkpoint import open_checkpoint

        opened = open_checkpoint(checkpoint)
        check_supported(opened.config, opened.normalisation)
        tokenizer = load_tokenizer(opened.tokenizer / "tokenizer.json")
    data = data or store.home() / "data" / "smol"
    _log("preparing the questions (the first time fetches and draws pictures, which takes minutes)")
    with require_extra("train", "Evaluation"):
        items = collect(data, photos)
    train = question_sets(items, "train")
    held_out = question_sets(items)
    sets = {name: _subsample(questions, limit) for name, questions in held_out.items() if questions and train[name]}
    with status_line("Evaluating") as status:

        def progress(label: str) -> Progress:
            return lambda done, total: status.step(f"{label} {done}/{total}", done / total)

        scores = [majority_baseline(train[name], questions, name) for name, questions in sets.items()]
        if checkpoint is not None:
            model = from_state(opened.config, opened.tensors)
            scores += score_model(model, tokenizer, data, sets, progress, _log)
        for bundle in bundles:
            scores += _judge_bundle(bundle, data, sets, variants, progress)
    if as_json:
        click.echo(json.dumps([{**asdict(score), "accuracy": score.accuracy} for score in scores]))
    else:
        click.echo(_table(scores))


def _log(line: str) -> None:
    click.echo(f"llava-edge: {line}", err=True)


def _subsample(questions: list[Question], limit: int | None) -> list[Question]:
    return questions if limit is None else questions[:: -(-len(questions) // limit)]


def _variants(budgets: Sequence[int], methods: Sequence[TokenMethod]) -> dict[str, Options]:
    """Options to evaluate a bundle with, by the suffix of the column's name."""
    base = Options(max_tokens=32)
    variants = {} if budgets and 0 not in budgets else {"": base}
    for method in methods:
        for budget in filter(None, budgets):
            variants[f", {method} {budget}"] = replace(base, image_tokens=budget, image_token_method=method)
    return variants


def _check(bundles: Sequence[str], variants: dict[str, Options]) -> None:
    """Raise an error for options that a bundle does not support, before minutes of evaluating the others."""
    from llava_edge.bundle import Bundle
    from llava_edge.runtimes.pictures import check_budget

    for bundle in bundles:
        manifest = Bundle.open(store.resolve(bundle)).manifest
        for options in variants.values():
            check_budget(options, manifest)


def _judge_bundle(
    bundle: str,
    data: Path,
    sets: dict[str, list[Question]],
    variants: dict[str, Options],
    progress: Callable[[str], Progress],
) -> list[Score]:
    from llava_edge.api import Llava
    from llava_edge.models.evaluate import Score, count_correct

    scores = []
    with Llava.load(bundle, EngineOptions(cache=False)) as model:  # these pictures are not asked about again
        manifest = model.bundle.manifest
        # The name as given: other bundles may have its precisions, and copies its manifest's name.
        name = f"{bundle}, {manifest.language.quantization} + {manifest.vision.precision}"
        for suffix, options in variants.items():
            ask = partial(_ask, model, options)
            for set_name, questions in sets.items():
                right = count_correct(ask, data, questions, progress(f"{name}{suffix}: {set_name}"))
                scores.append(Score(set_name, name + suffix, right, len(questions)))
    return scores


def _ask(model: Llava, options: Options, image: Path, question: str) -> str:
    return model.ask(question, image, options).text


def _table(scores: Sequence[Score]) -> str:
    """One row per set, one column per model or baseline, in per cent."""
    names = list(dict.fromkeys(score.name for score in scores))
    sets = list(dict.fromkeys(score.set for score in scores))
    by_name = {(score.set, score.name): score for score in scores}
    rows = [["set", "questions", *names]]
    for set_name in sets:
        total = next(score.total for score in scores if score.set == set_name)
        rows.append([set_name, str(total), *(f"{100 * by_name[set_name, name].accuracy:.1f}" for name in names)])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(line.rstrip() for line in lines)
