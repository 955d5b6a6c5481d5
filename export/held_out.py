"""Held-out conversations about pictures, and llama.cpp's predictions for the tokens of their answers.

The answers are given (teacher forcing): each token is predicted from everything before it, as in training. So several
precisions of one model are compared on exactly the same tokens.

Needs torch only to read conversation files.
"""

from __future__ import annotations

import random
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
from llava_edge.runtimes.kv_cache import Key
from llava_edge.runtimes.language import LanguageModel
from llava_edge.runtimes.pictures import prepare
from llava_edge.runtimes.projector import Projector
from llava_edge.runtimes.vision import VisionEncoder

Array = np.ndarray[Any, Any]

MAX_POSITIONS = 50_000  # at most; records of a larger file are sampled with a fixed seed
QUESTIONS = ("Describe the picture.", "What colours do you see?", "Is there a person in the picture?")
MAX_OWN_TOKENS = 32  # at most, of the model's own answers to `QUESTIONS`


def scratch_bytes(hidden_size: int, vocab_size: int) -> int:
    """Disk space for image embeddings, and for logits, assuming that a tenth of the positions are answer tokens."""
    return MAX_POSITIONS * 4 * (hidden_size + vocab_size // 10)


class Pictures:
    """Image embeddings by picture name, computed by the bundle's vision and projector and cached in `folder`."""

    def __init__(self, bundle: Bundle, folder: Path, load: Callable[[str], Image.Image]) -> None:
        self._manifest = bundle.manifest
        self._encoder = VisionEncoder(bundle)
        self._projector = Projector(bundle)
        self._folder, self._load = folder, load
        self._numbers: dict[str, int] = {}

    def __getitem__(self, name: str) -> Array:
        """(positions, hidden size) float32, memory-mapped."""
        path = self._folder / f"picture-{self._numbers.setdefault(name, len(self._numbers))}.npy"
        if not path.exists():
            picture = prepare(self._load(name), self._manifest)
            embeds = [self._projector.project(self._encoder.encode(crop)) for crop in picture.crops]
            np.save(path, anyres.arrange(np.stack(embeds), self._projector.newline, picture.rows))
        embeddings: Array = np.load(path, mmap_mode="r")
        return embeddings


@dataclass(frozen=True)
class Sample:
    """A conversation about one picture. keys: the content of each position; answers: the positions of answer tokens."""

    image: str
    keys: tuple[Key, ...]
    answers: tuple[int, ...]

    @property
    def targets(self) -> list[int]:
        """The answer tokens."""
        return [key for key in map(self.keys.__getitem__, self.answers) if isinstance(key, int)]


def expand_image(ids: Sequence[int], labels: Sequence[int], image: str, rows: int) -> Sample:
    """Expand the one picture in `ids` and `labels` (of `prompt.encode_with_labels`) to `rows` positions."""
    image_at = list(ids).index(IMAGE_TOKEN_INDEX)
    keys: list[Key] = [*ids[:image_at], *((image, row) for row in range(rows)), *ids[image_at + 1 :]]
    all_labels = [*labels[:image_at], *[IGNORE_INDEX] * rows, *labels[image_at + 1 :]]
    return Sample(image, tuple(keys), tuple(i for i, label in enumerate(all_labels) if label != IGNORE_INDEX))


def check_data(data: Path, image_tokens: int) -> None:
    """Raise early what `read_conversations` would: `MissingError`, `DataError` or `ImageError`."""
    from llava_edge.models.data import to_messages

    limit = MAX_POSITIONS // image_tokens  # as many as are used, unless some are too long
    for record in _shuffled_records(data)[:limit]:
        to_messages(record)
        load_image(data.parent / record["image"])


def _shuffled_records(data: Path) -> list[dict[str, Any]]:
    """The records of a LLaVA JSON array that have a picture, shuffled with a fixed seed."""
    from llava_edge.models.data import read_records

    records = [record for record in read_records(data) if "image" in record]
    if not records:
        raise DataError(f"{data} holds no conversation about a picture.")
    random.Random(0).shuffle(records)
    return records


def read_conversations(data: Path, bundle: Bundle, float16: Path, scratch: Path) -> tuple[list[Sample], Pictures]:
    """Up to `MAX_POSITIONS` positions of a LLaVA JSON array, whose picture paths are relative to its folder.

    Raises `MissingError` or `DataError` for the file, `ImageError` for a picture.
    """
    from llava_edge.models.data import to_messages

    manifest, context = bundle.manifest, bundle.manifest.language.context_length
    pictures = Pictures(bundle, scratch, lambda name: load_image(data.parent / name))
    selected: list[Sample] = []
    positions_left = MAX_POSITIONS
    with LanguageModel(float16, context=1) as engine:
        encode_after_control = tokenization.after_control_encoder(engine.vocabulary, manifest.after_control)
        for record in _shuffled_records(data):
            pieces = prompt.render(manifest.template, to_messages(record), manifest.image_markers)
            ids, labels = prompt.encode_with_labels(
                pieces, engine.vocabulary.tokenize, engine.vocabulary.control_id, encode_after_control
            )
            sample = expand_image(ids, labels, record["image"], len(pictures[record["image"]]))
            if sample.answers and len(sample.keys) <= min(context, positions_left):
                selected.append(sample)
                positions_left -= len(sample.keys)
            if positions_left < MAX_POSITIONS // 100:
                break
    if not selected:
        raise DataError(f"{data} holds no conversation with an answer that fits into {context} positions.")
    return sorted(selected, key=lambda sample: sample.image), pictures


def sample_conversations(bundle: Bundle, float16: Path, scratch: Path) -> tuple[list[Sample], Pictures]:
    """Sample pictures that were not used for calibration, with the float16 model's own greedy answers."""
    manifest = bundle.manifest
    images = {f"drawing {n}": image for n, image in enumerate(samples.held_out())}
    pictures = Pictures(bundle, scratch, images.__getitem__)
    records = []
    for name in images:
        with LanguageModel(float16, context=len(pictures[name]) + 512) as engine:
            encode_prompt = tokenization.prompt_encoder(engine.vocabulary, manifest)
            for text in QUESTIONS:
                ids = encode_prompt([Message("user", text, 1)])
                question = expand_image(ids, [IGNORE_INDEX] * len(ids), name, len(pictures[name]))
                answer = greedy_answer(engine, question, pictures)
                positions = range(len(question.keys), len(question.keys) + len(answer))
                records.append(Sample(name, (*question.keys, *answer), tuple(positions)))
    return records, pictures


def predictions(engine: LanguageModel, sample: Sample, pictures: Pictures) -> Iterator[Array]:
    """Logits (vocab,) for each answer token in turn, given everything before it. Views: see `logits`."""
    evaluated = engine.keep_common_prefix(sample.keys[: sample.answers[0]])
    for position in sample.answers:
        _evaluate(engine, sample.keys[evaluated:position], pictures)
        evaluated = position
        yield engine.logits()


def greedy_answer(engine: LanguageModel, question: Sample, pictures: Pictures) -> list[int]:
    """A greedy answer of at least one token; it includes the end-of-answer token, as in training."""
    _evaluate(engine, question.keys[engine.keep_common_prefix(question.keys) :], pictures)
    answer: list[int] = []
    while len(answer) < MAX_OWN_TOKENS and not (answer and engine.vocabulary.is_end_token(answer[-1])):
        answer.append(int(engine.logits().argmax()))
        _evaluate(engine, answer[-1:], pictures)
    return answer


def _evaluate(engine: LanguageModel, keys: Sequence[Key], pictures: Pictures) -> None:
    for image, group in groupby(keys, lambda key: None if isinstance(key, int) else key[0]):
        run = list(group)
        if image is None:
            engine.evaluate_tokens([key for key in run if isinstance(key, int)])
        else:
            rows = [key[1] for key in run if isinstance(key, tuple)]
            engine.evaluate_embeddings(pictures[image][rows], run)
