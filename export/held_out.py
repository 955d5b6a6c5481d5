"""Conversations about pictures, laid out for llama.cpp, and what it predicts for their answers.

The answers are given; each of their tokens is predicted from what stands before it, as in training. So files that
hold one model in several precisions are compared on exactly the same tokens.

Needs torch only to read conversation files.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from llava_edge import anyres, prompt
from llava_edge.bundle import Bundle
from llava_edge.errors import DataError
from llava_edge.export import samples
from llava_edge.image import load_image
from llava_edge.prompt import IGNORE_INDEX, IMAGE_TOKEN_INDEX, Message
from llava_edge.runtimes import tokenization
from llava_edge.runtimes.language import Key, LanguageModel
from llava_edge.runtimes.pictures import prepare
from llava_edge.runtimes.projector import Projector
from llava_edge.runtimes.vision import VisionEncoder

Array = np.ndarray[Any, Any]

POSITIONS = 50_000  # read at most; records of a larger file are drawn by a fixed seed
QUESTIONS = ("Describe the picture.", "What colours do you see?", "Is there a person in the picture?")
OWN_TOKENS = 32  # at most, of the model's own answers to these


def scratch_bytes(hidden_size: int, vocab_size: int) -> int:
    """Disk space for embeddings of pictures, and for logits if at most every tenth position is an answer's."""
    return POSITIONS * 4 * (hidden_size + vocab_size // 10)


class Pictures:
    """Image embeddings by a picture's name, through the bundle's vision and projector; kept in `folder` once made."""

    def __init__(self, bundle: Bundle, folder: Path, load: Callable[[str], Image.Image]) -> None:
        self._manifest = bundle.manifest
        self._encoder = VisionEncoder(bundle)
        self._projector = Projector(bundle)
        self._folder, self._load = folder, load
        self._numbers: dict[str, int] = {}

    def __getitem__(self, name: str) -> Array:
        """(positions, hidden size) float32, mapped."""
        path = self._folder / f"picture-{self._numbers.setdefault(name, len(self._numbers))}.npy"
        if not path.exists():
            picture = prepare(self._load(name), self._manifest)
            embeds = [self._projector.project(self._encoder.encode(crop)) for crop in picture.crops]
            np.save(path, anyres.arrange(np.stack(embeds), self._projector.newline, picture.rows))
        kept: Array = np.load(path, mmap_mode="r")
        return kept


@dataclass(frozen=True)
class Sample:
    """A conversation about one picture. keys: what each position holds; answers: the positions of answer tokens."""

    image: str
    keys: tuple[Key, ...]
    answers: tuple[int, ...]

    @property
    def targets(self) -> list[int]:
        """The answer tokens."""
        return [key for key in map(self.keys.__getitem__, self.answers) if isinstance(key, int)]


def lay_out(ids: Sequence[int], labels: Sequence[int], image: str, rows: int) -> Sample:
    """ids, labels: of `prompt.encode_with_labels`, with one picture, which takes `rows` positions."""
    at = list(ids).index(IMAGE_TOKEN_INDEX)
    keys: list[Key] = [*ids[:at], *((image, row) for row in range(rows)), *ids[at + 1 :]]
    wide = [*labels[:at], *[IGNORE_INDEX] * rows, *labels[at + 1 :]]
    return Sample(image, tuple(keys), tuple(i for i, label in enumerate(wide) if label != IGNORE_INDEX))


def check(data: Path, image_tokens: int) -> None:
    """Raises what `conversations` would, when everything else is done: `MissingError`, `DataError` or `ImageError`."""
    from llava_edge.models.data import to_messages

    for record in _drawn(data)[: POSITIONS // image_tokens]:  # as many as are read, unless some are too long
        to_messages(record)
        load_image(data.parent / record["image"])


def _drawn(data: Path) -> list[dict[str, Any]]:
    """The records of a LLaVA JSON array that have a picture, in the order in which they are read."""
    from llava_edge.models.data import read_records

    found = [record for record in read_records(data) if "image" in record]
    if not found:
        raise DataError(f"{data} holds no conversation about a picture.")
    random.Random(0).shuffle(found)
    return found


def conversations(data: Path, bundle: Bundle, float16: Path, scratch: Path) -> tuple[list[Sample], Pictures]:
    """Up to `POSITIONS` of a LLaVA JSON array with pictures relative to its folder.

    Raises `MissingError` or `DataError` for the file, `ImageError` for a picture.
    """
    from llava_edge.models.data import to_messages

    manifest, context = bundle.manifest, bundle.manifest.language.context_length
    pictures = Pictures(bundle, scratch, lambda name: load_image(data.parent / name))
    chosen: list[Sample] = []
    room = POSITIONS
    with LanguageModel(float16, context=1) as engine:
        behind = tokenization.after_control_encoder(engine, manifest.after_control)
        for record in _drawn(data):
            pieces = prompt.render(manifest.template, to_messages(record), manifest.image_markers)
            ids, labels = prompt.encode_with_labels(pieces, engine.tokenize, engine.control_id, behind)
            sample = lay_out(ids, labels, record["image"], len(pictures[record["image"]]))
            if sample.answers and len(sample.keys) <= min(context, room):
                chosen.append(sample)
                room -= len(sample.keys)
            if room < POSITIONS // 100:
                break
    if not chosen:
        raise DataError(f"{data} holds no conversation with an answer that fits into {context} positions.")
    return sorted(chosen, key=lambda sample: sample.image), pictures


def drawings(bundle: Bundle, float16: Path, scratch: Path) -> tuple[list[Sample], Pictures]:
    """Sample pictures that nothing was calibrated on, with the float16 model's own greedy answers."""
    manifest = bundle.manifest
    drawn = {f"drawing {n}": image for n, image in enumerate(samples.held_out())}
    pictures = Pictures(bundle, scratch, drawn.__getitem__)
    found = []
    for name in drawn:
        with LanguageModel(float16, context=len(pictures[name]) + 512) as engine:
            encode_prompt = tokenization.prompt_encoder(engine, manifest)
            for question in QUESTIONS:
                ids = encode_prompt([Message("user", question, 1)])
                asked = lay_out(ids, [IGNORE_INDEX] * len(ids), name, len(pictures[name]))
                answer = _greedy(engine, asked, pictures)
                positions = range(len(asked.keys), len(asked.keys) + len(answer))
                found.append(Sample(name, (*asked.keys, *answer), tuple(positions)))
    return found, pictures


def predictions(engine: LanguageModel, sample: Sample, pictures: Pictures) -> Iterator[Array]:
    """Logits (vocab,) for each answer token in turn, from all that stands before it. Views: see `logits`."""
    done = engine.keep(sample.keys[: sample.answers[0]])
    for position in sample.answers:
        _feed(engine, sample.keys[done:position], pictures)
        done = position
        yield engine.logits()


def _greedy(engine: LanguageModel, asked: Sample, pictures: Pictures) -> list[int]:
    """At least one token; the one that ends the answer belongs to it, as in training."""
    _feed(engine, asked.keys[engine.keep(asked.keys) :], pictures)
    answer: list[int] = []
    while len(answer) < OWN_TOKENS and not (answer and engine.ends(answer[-1])):
        answer.append(int(engine.logits().argmax()))
        _feed(engine, answer[-1:], pictures)
    return answer


def _feed(engine: LanguageModel, keys: Sequence[Key], pictures: Pictures) -> None:
    never = threading.Event()
    for image, group in groupby(keys, lambda key: None if isinstance(key, int) else key[0]):
        run = list(group)
        if image is None:
            engine.evaluate_tokens([key for key in run if isinstance(key, int)], never)
        else:
            rows = [key[1] for key in run if isinstance(key, tuple)]
            engine.evaluate_embeddings(pictures[image][rows], run, never)
