"""How near a picture in fewer positions stays to the whole one, where nobody knows right answers.

    python benchmarks/token_budget.py --model BUNDLE --image photo.jpg --image other.jpg

Three numbers for each budget and way of keeping it, means over pictures and questions. `features`: how like each
position of the whole picture is to the most like one that is left (cosine, behind the projector). `tokens`: how often
the model would go on with the same token, asked at each place of the answer that it gave about the whole picture.
`nats`: how far its distributions there are from those with the whole picture (Kullback-Leibler divergence). With random
weights that is about sizes and arithmetic, not about what a trained model loses: for that use `llava-edge eval`.
"""

from __future__ import annotations

import math
import sys
import threading
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import numpy as np

from llava_edge import Llava
from llava_edge.bundle import Bundle
from llava_edge.export.samples import pictures
from llava_edge.image import ImageInput
from llava_edge.options import TOKEN_METHODS, EngineOptions, Options
from llava_edge.prompt import IMAGE_TOKEN_INDEX, Message
from llava_edge.runtimes.language import Key, LanguageModel
from llava_edge.runtimes.pictures import Picture, apply_token_budget, check_budget, prepare
from llava_edge.store import DEFAULT_MODEL, resolve

Array = np.ndarray[Any, Any]

QUESTIONS = ("Describe the picture.", "What is this?", "Which colours are there?")
WHOLE = Options(speculate="off")


@click.command()
@click.option("--model", default=DEFAULT_MODEL, show_default=True)
@click.option("--image", "images", multiple=True, type=click.Path(path_type=Path), help="Drawn ones unless given.")
@click.option("--tokens", default=16, show_default=True, help="Places of an answer, at most.")
@click.option("--image-tokens", "budgets", multiple=True, type=int, help="Two thirds, half and a third of each side.")
def main(model: str, images: Sequence[Path], tokens: int, budgets: Sequence[int]) -> None:
    """Print a line for each budget and method."""
    if not budgets:  # squares, which can be pooled
        side = math.isqrt(Bundle.open(resolve(model)).manifest.vision.image_tokens)
        budgets = [round(side * share) ** 2 for share in (2 / 3, 1 / 2, 1 / 3)]
    ways = {
        f"{method} {count}": replace(WHOLE, image_tokens=count, image_token_method=method)
        for count in budgets
        for method in TOKEN_METHODS
    }
    found: dict[str, list[tuple[float, float, float]]] = {way: [] for way in ways}
    with Llava.load(model, EngineOptions(device="cpu", cache=False)) as llava:
        for options in ways.values():
            check_budget(options, llava.bundle.manifest)
        shown: list[ImageInput | Picture] = [*images] or [*pictures()]
        for number, image in enumerate(shown):
            print(f"picture {number + 1} of {len(shown)}", file=sys.stderr)
            picture = prepare(image, llava.bundle.manifest)
            rows = llava.embed_image(picture)
            said = list(_answers(llava, rows, tokens))
            for way, options in ways.items():
                fewer = llava.embed_image(apply_token_budget(picture, options, llava.bundle.manifest))
                again = _follow(llava, fewer, [answer for answer, _ in said])
                for (_, whole), scores in zip(said, again, strict=True):
                    found[way].append((_likeness(rows, fewer), *_agreement(whole, scores)))
    print(f"{len(shown)} pictures, {len(QUESTIONS)} questions, up to {tokens} places each")
    print("way          features  tokens   nats")
    for way, values in found.items():
        features, same, nats = np.mean(values, axis=0)
        print(f"{way:12} {features:8.3f} {same:7.3f} {nats:6.3f}")


def _answers(llava: Llava, rows: Array, tokens: int) -> Iterator[tuple[list[int], Array]]:
    """For each question the answer's tokens, the likeliest each time, and (tokens, vocab_size) logits."""
    for language in _asked(llava, rows):
        answer, scores = [language.greedy_token()], [language.logits().copy()]
        while len(answer) < tokens and not language.is_end_token(answer[-1]):
            language.evaluate_tokens(answer[-1:], threading.Event())
            answer.append(language.greedy_token())
            scores.append(language.logits().copy())
        yield answer, np.stack(scores)


def _follow(llava: Llava, rows: Array, answers: Sequence[Sequence[int]]) -> Iterator[Array]:
    """For each question the logits at every place of a given answer."""
    for language, answer in zip(_asked(llava, rows), answers, strict=True):
        scores = [language.logits().copy()]
        for token in answer[:-1]:
            language.evaluate_tokens([token], threading.Event())
            scores.append(language.logits().copy())
        yield np.stack(scores)


def _asked(llava: Llava, rows: Array) -> Iterator[LanguageModel]:
    """The language model behind a picture and each of the questions."""
    engine, never = llava._engine, threading.Event()
    language = engine._require_open()
    keys: list[Key] = [("rows", i) for i in range(len(rows))]
    language.truncate(0)
    for question in QUESTIONS:
        ids = engine.encode_prompt([Message("user", question, 1)])
        at = ids.index(IMAGE_TOKEN_INDEX)
        if not language.cached_keys:
            language.evaluate_tokens(ids[:at], never)
            language.evaluate_embeddings(rows, keys, never)
        language.truncate(at + len(rows))
        language.evaluate_tokens(ids[at + 1 :], never)
        yield language


def _likeness(rows: Array, fewer: Array) -> float:
    directions, left = (values / np.linalg.norm(values, axis=1, keepdims=True) for values in (rows, fewer))
    return float((directions @ left.T).max(axis=1).mean())


def _agreement(whole: Array, scores: Array) -> tuple[float, float]:
    one, other = (_log_chances(values.astype(np.float64)) for values in (whole, scores))
    return float((one.argmax(-1) == other.argmax(-1)).mean()), float((np.exp(one) * (one - other)).sum(-1).mean())


def _log_chances(scores: Array) -> Array:
    scores = scores - scores.max(-1, keepdims=True)
    out: Array = scores - np.log(np.exp(scores).sum(-1, keepdims=True))
    return out


if __name__ == "__main__":
    main()
