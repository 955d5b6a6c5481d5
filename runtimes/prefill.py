"""A prompt into the language model's memory: text as tokens, pictures as embeddings.

Nothing is computed twice that was computed for the same beginning before: by the last prompt, or by one that ended in
the same picture, in another process too. Knows nothing about templates, files of images or answers.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

from llava_edge.bundle import ADAPTER, LANGUAGE, Bundle
from llava_edge.prompt import IMAGE_TOKEN_INDEX
from llava_edge.runtimes.embedder import Embedder
from llava_edge.runtimes.jobs import Job
from llava_edge.runtimes.language import Key, LanguageModel
from llava_edge.runtimes.measured import Run, since
from llava_edge.runtimes.picture_cache import PictureCache, digest, identity
from llava_edge.runtimes.pictures import Picture


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


class Prefill:
    """One for an open engine. `language` is made from files of `bundle`."""

    def __init__(self, bundle: Bundle, language: LanguageModel, embedder: Embedder, cache: PictureCache) -> None:
        self._language = language
        self._embedder = embedder
        self._cache = cache
        self._name = bundle.manifest.name
        files = [name for name in (LANGUAGE, ADAPTER) if name in bundle.manifest.files]
        self._identity = [identity(bundle, *files), language.identity]
        self._exact = 0  # leading positions of memory that were evaluated segment by segment, as in an empty memory

    def run(self, parts: Sequence[Segment], run: Run, job: Job, *, reuse: bool) -> None:
        """Evaluate a prompt, except for a beginning that is known.

        Without `reuse` only exact beginnings up to a picture count: the answer is, bit for bit, the one that follows
        if everything is computed. With it also what this prompt has in common with the last one and its answer, which
        is more, but was computed by other kernels and so rounded differently. Raises `CancelledError`, `BundleError`.
        """
        keys = [key for part in parts for key in part.keys]
        ends = _picture_ends(parts)
        start = time.perf_counter()
        done = self._recall(keys, ends, reuse=reuse)
        run.prefill_ms += since(start)
        exact = done <= self._exact and done in (0, *ends)
        self._exact = len(keys) if exact else min(done, self._exact)
        run.known = bool(ends) and done >= ends[0]
        position = 0
        for part in parts:
            end = position + len(part.keys)
            if end > done:
                self._evaluate(part, max(done - position, 0), run, job)
                if exact and ends and end == ends[0]:
                    self._keep(keys[:end])
            position = end

    def _recall(self, keys: list[Key], ends: list[int], *, reuse: bool) -> int:
        """Have memory hold a known beginning of `keys` and nothing else; its length, always below `len(keys)`."""
        language = self._language
        same = language.common(keys)
        if not reuse:
            same = max((end for end in ends if end <= min(same, self._exact)), default=0)
        for end in ends:
            if end <= same:
                break
            state = self._cache.get(self._key(keys[:end]))
            if state is None:
                continue
            if language.restore(state, keys[:end]):
                self._exact = end
                return end
            same = 0  # an attempt that failed leaves nothing in memory
        language.forget(same)
        return same

    def _evaluate(self, part: Segment, done: int, run: Run, job: Job) -> None:
        """All of a segment but its first `done` positions."""
        keys = part.keys[done:]
        if part.picture is None:
            start = time.perf_counter()
            self._language.evaluate_tokens([key for key in keys if isinstance(key, int)], job.cancel)
        else:
            rows = self._embedder.start(part.picture, run, job).result()
            start = time.perf_counter()
            self._language.evaluate_embeddings(rows[done:], keys, job.cancel)
        run.prefill_ms += since(start)

    def _keep(self, keys: list[Key]) -> None:
        about = {"model": self._name, "kind": "state", "positions": str(len(keys))}
        self._cache.put(self._key(keys), about, self._language.save())

    def _key(self, keys: list[Key]) -> str:
        """What decides about the language model's memory of a prompt that begins with `keys`."""
        pictures = sorted({key[0] for key in keys if not isinstance(key, int)})
        return digest("state", self._identity, keys, [self._embedder.key(name) for name in pictures])


def _picture_ends(parts: Sequence[Segment]) -> list[int]:
    """Positions behind each picture, the last one first; without one that ends the prompt."""
    ends, position = [], 0
    for part in parts[:-1]:
        position += len(part.keys)
        if part.picture is not None:
            ends.append(position)
    return ends[::-1]
