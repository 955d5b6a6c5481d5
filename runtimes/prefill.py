"""A prompt into the language model's memory: text as tokens, pictures as embeddings.

Knows what stands where in a prompt; nothing about templates, files of images or answers.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from llava_edge import anyres, token_budget
from llava_edge.prompt import IMAGE_TOKEN_INDEX
from llava_edge.runtimes import CancelledError
from llava_edge.runtimes.jobs import Job
from llava_edge.runtimes.language import Key, LanguageModel
from llava_edge.runtimes.measured import Run, since
from llava_edge.runtimes.pictures import Budget, Picture
from llava_edge.runtimes.projector import Projector
from llava_edge.runtimes.vision import VisionEncoder


@dataclass(frozen=True)
class Segment:
    """Neighbouring positions of one kind. `keys` are what `LanguageModel` remembers of them; picture None is text."""

    picture: Picture | None
    keys: list[Key]


def segments(ids: Sequence[int], pictures: Sequence[Picture]) -> list[Segment]:
    """Token ids with `IMAGE_TOKEN_INDEX` for each picture -> what is evaluated, in order."""
    waiting = iter(pictures)
    parts: list[Segment] = []
    for token in ids:
        if token == IMAGE_TOKEN_INDEX:
            picture = next(waiting)
            parts.append(Segment(picture, [(picture.key, row) for row in range(len(picture.rows))]))
        elif parts and parts[-1].picture is None:
            parts[-1].keys.append(token)
        else:
            parts.append(Segment(None, [token]))
    return parts


class Embedder:
    """Pictures -> embeddings: CLIP, the token budget if there is one, projector, and the order of the crops."""

    def __init__(self, vision: VisionEncoder, projector: Projector) -> None:
        self._vision = vision
        self._projector = projector

    def embed(self, picture: Picture, run: Run, job: Job) -> np.ndarray[Any, Any]:
        """(positions, hidden size) float32. Crops go one by one: five at once take five times the working memory."""
        job.vision_run = job.vision_run or self._vision.new_run()
        if picture.budget is not None:
            return self._project(self._reduced(picture, picture.budget, job), run)
        embeddings = [self._project(self._vision.encode(crop, job.vision_run), run) for crop in _crops(picture, job)]
        return anyres.arrange(np.stack(embeddings), self._projector.newline, picture.rows)

    def _project(self, features: np.ndarray[Any, Any], run: Run) -> np.ndarray[Any, Any]:
        start = time.perf_counter()
        embeddings = self._projector.project(features)
        run.project_ms += since(start)
        return embeddings

    def _reduced(self, picture: Picture, budget: Budget, job: Job) -> np.ndarray[Any, Any]:
        """(positions, vision width) float32."""
        encoded = [self._vision.encode_attended(crop, job.vision_run) for crop in _crops(picture, job)]
        features, attention = (np.concatenate(outputs)[budget.rows] for outputs in zip(*encoded, strict=True))
        return token_budget.reduce(features, attention, len(picture.rows), budget.method, budget.seed)


def _crops(picture: Picture, job: Job) -> Iterator[np.ndarray[Any, Any]]:
    """The crops, until the job is cancelled: `CancelledError`."""
    for crop in picture.crops:
        if job.cancel.is_set():  # asked after the handle can be seen, so that no stop is lost
            raise CancelledError
        yield crop


def prefill(language: LanguageModel, embedder: Embedder, parts: Sequence[Segment], run: Run, job: Job) -> None:
    """Evaluate a prompt, except for a beginning that is still in memory from the last one."""
    skip = language.keep([key for part in parts for key in part.keys])
    for part in parts:
        done, skip = min(skip, len(part.keys)), max(0, skip - len(part.keys))
        keys = part.keys[done:]
        if not keys:
            continue
        start = time.perf_counter()
        if part.picture is None:
            language.evaluate_tokens([key for key in keys if isinstance(key, int)], job.cancel)
        else:
            embeddings = embedder.embed(part.picture, run, job)
            run.encode_ms += since(start)
            start = time.perf_counter()
            language.evaluate_embeddings(embeddings[done:], keys, job.cancel)
        run.prefill_ms += since(start)
