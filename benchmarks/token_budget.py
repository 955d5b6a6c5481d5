"""Measures how close a picture in fewer positions stays to the full one, without reference answers.

    python benchmarks/token_budget.py --model BUNDLE --image photo.jpg --image other.jpg

Prints three means over pictures and questions for each budget and method. `features`: similarity of each position of
the full picture to the most similar one that is left (cosine, after the projector). `tokens`: how often the model
predicts the same token, at each position of its answer about the full picture. `nats`: KL divergence of its predictions
there from those with the full picture. With random weights this tests sizes and arithmetic, not what a trained model
loses: for that use `llava-edge eval`.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import click
import numpy as np

from llava_edge import Llava
from llava_edge.bundle import Bundle
from llava_edge.export.report import Array, compare
from llava_edge.export.samples import pictures
from llava_edge.image import ImageInput
from llava_edge.options import TOKEN_METHODS, EngineOptions, Options
from llava_edge.prompt import IMAGE_TOKEN_INDEX, Message
from llava_edge.runtimes.kv_cache import Key
from llava_edge.runtimes.language import LanguageModel
from llava_edge.runtimes.pictures import Picture, apply_token_budget, check_budget, prepare
from llava_edge.store import DEFAULT_MODEL, resolve

QUESTIONS = ("Describe the picture.", "What is this?", "Which colours are there?")
FULL = Options(speculate="off")


@click.command()
@click.option("--model", default=DEFAULT_MODEL, show_default=True)
@click.option("--image", "images", multiple=True, type=click.Path(path_type=Path), help="Default: generated pictures.")
@click.option("--tokens", default=16, show_default=True, help="Of an answer, at most.")
@click.option(
    "--image-tokens", "budgets", multiple=True, type=int, help="Default: two thirds, half and a third of each side."
)
def main(model: str, images: Sequence[Path], tokens: int, budgets: Sequence[int]) -> None:
    """Print a line for each budget and method."""
    if not budgets:  # squares, which can be pooled
        side = math.isqrt(Bundle.open(resolve(model)).manifest.vision.image_tokens)
        budgets = [round(side * share) ** 2 for share in (2 / 3, 1 / 2, 1 / 3)]
    variants = {
        f"{method} {count}": replace(FULL, image_tokens=count, image_token_method=method)
        for count in budgets
        for method in TOKEN_METHODS
    }
    scores: dict[str, list[tuple[float, float, float]]] = {name: [] for name in variants}
    with Llava.load(model, EngineOptions(device="cpu", cache=False)) as llava:
        for options in variants.values():
            check_budget(options, llava.bundle.manifest)
        sources: list[ImageInput | Picture] = [*images] or [*pictures()]
        for number, image in enumerate(sources):
            print(f"picture {number + 1} of {len(sources)}", file=sys.stderr)
            picture = prepare(image, llava.bundle.manifest)
            rows = llava.embed_image(picture)
            answers = list(_answers(llava, rows, tokens))
            for name, options in variants.items():
                fewer = llava.embed_image(apply_token_budget(picture, options, llava.bundle.manifest))
                reduced_logits = _follow(llava, fewer, [answer for answer, _ in answers])
                for (answer, full), reduced in zip(answers, reduced_logits, strict=True):
                    nats, _, same = compare(full, reduced, answer).mean(0)
                    scores[name].append((_similarity(rows, fewer), same, nats))
    print(f"{len(sources)} pictures, {len(QUESTIONS)} questions, up to {tokens} tokens each")
    print("variant      features  tokens   nats")
    for name, values in scores.items():
        features, same, nats = np.mean(values, axis=0)
        print(f"{name:12} {features:8.3f} {same:7.3f} {nats:6.3f}")


def _answers(llava: Llava, rows: Array, tokens: int) -> Iterator[tuple[list[int], Array]]:
    """Yield for each question the greedy answer's tokens and (tokens, vocab_size) logits."""
    for language in _ask_questions(llava, rows):
        answer, logits = [language.greedy_token()], [language.logits().copy()]
        while len(answer) < tokens and not language.vocabulary.is_end_token(answer[-1]):
            language.evaluate_tokens(answer[-1:])
            answer.append(language.greedy_token())
            logits.append(language.logits().copy())
        yield answer, np.stack(logits)


def _follow(llava: Llava, rows: Array, answers: Sequence[Sequence[int]]) -> Iterator[Array]:
    """Yield for each question the logits at every position of a given answer."""
    for language, answer in zip(_ask_questions(llava, rows), answers, strict=True):
        logits = [language.logits().copy()]
        for token in answer[:-1]:
            language.evaluate_tokens([token])
            logits.append(language.logits().copy())
        yield np.stack(logits)


def _ask_questions(llava: Llava, rows: Array) -> Iterator[LanguageModel]:
    """Yield the language model after it has evaluated the picture and each of the questions."""
    engine = llava._engine
    language = engine.model.language
    keys: list[Key] = [("rows", i) for i in range(len(rows))]
    language.truncate(0)
    for question in QUESTIONS:
        ids = engine.encode_prompt([Message("user", question, 1)])
        at = ids.index(IMAGE_TOKEN_INDEX)
        if not language.cached_keys:
            language.evaluate_tokens(ids[:at])
            language.evaluate_embeddings(rows, keys)
        language.truncate(at + len(rows))
        language.evaluate_tokens(ids[at + 1 :])
        yield language


def _similarity(rows: Array, fewer: Array) -> float:
    full, reduced = (values / np.linalg.norm(values, axis=1, keepdims=True) for values in (rows, fewer))
    return float((full @ reduced.T).max(axis=1).mean())


if __name__ == "__main__":
    main()
