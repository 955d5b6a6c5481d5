"""A prompt into the language model's memory: text as tokens, pictures as embeddings.

Nothing is computed twice that was computed for the same beginning before: by the last prompt, or by one that ended in
the same picture, or in the same text before another one, in another process too. Knows nothing about templates, files
of images or answers.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import accumulate

from llava_edge.bundle import ADAPTER, LANGUAGE, Bundle
from llava_edge.prompt import IMAGE_TOKEN_INDEX
from llava_edge.runtimes.embedder import Embedder
from llava_edge.runtimes.jobs import Job
from llava_edge.runtimes.language import Key, LanguageModel
from llava_edge.runtimes.picture_cache import PictureCache, digest, identity
from llava_edge.runtimes.pictures import Picture
from llava_edge.runtimes.stats import RequestStats, elapsed_ms

LEAST_TEXT = 16  # positions before a picture that are worth a file


@dataclass(frozen=True)
class Segment:
    """Neighbouring positions of one kind. `keys` are what `LanguageModel` remembers of them; picture None is text.

    Segments with the same keys are equal.
    """

    picture: Picture | None = field(compare=False)
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
        self._exact = {0}  # where a segment ended, if all up to there was evaluated segment by segment
        self._new: list[list[Key]] = []  # beginnings that memory holds and `keep` saves

    def run(
        self, parts: Sequence[Segment], stats: RequestStats, job: Job, *, reuse: bool = False, count: int | None = None
    ) -> None:
        """Evaluate a prompt, or only its first `count` segments, except for a beginning that is known.

        Without `reuse` only whole segments count, evaluated one by one: the answer is, bit for bit, the one that
        follows if everything is computed. With it also what this prompt has in common with the last one and its answer,
        which is more, but was computed by other kernels and so rounded differently.
        What the last prompts computed is kept first, if this one would overwrite it.
        Raises `CancelledError` or `BundleError`.
        """
        keys = [key for part in parts for key in part.keys]
        if any(keys[: len(new)] != new for new in self._new):
            self.keep()
        ends = list(accumulate(len(part.keys) for part in parts))
        pictures = [end for part, end in zip(parts[:-1], ends, strict=False) if part.picture is not None]
        last = max(pictures, default=0)
        text = ends[0] if pictures and parts[0].picture is None and ends[0] >= LEAST_TEXT else 0
        start = time.perf_counter()
        done = self._recall(keys, ends, [text, *pictures], reuse=reuse)
        stats.prefill_ms += elapsed_ms(start)
        stats.kv_cache_hit = done >= last > 0
        exact = done in self._exact and done in (0, *ends)
        self._exact = {end for end in self._exact if end <= done}
        self._new = [new for new in self._new if len(new) <= done]
        for part, end in list(zip(parts, ends, strict=True))[:count]:
            if end <= done:
                continue
            self._evaluate(part, max(done - end + len(part.keys), 0), stats, job)
            if exact:
                self._exact.add(end)
            if exact and end in (text, last):
                self._new.append(keys[:end])

    def keep(self) -> None:
        """Save what the last prompts computed, for others. Not before nobody asks any more, or memory is needed:
        a question more about the same picture needs no copy, and would share the processor with its making.
        """
        with suppress(MemoryError):
            for keys in self._new:
                room = self._cache.room
                if not room or self._language.cached_keys[: len(keys)] != keys:
                    continue
                if state := self._language.save_state(len(keys), max_bytes=room):
                    about = {"model": self._name, "kind": "state", "positions": str(len(keys))}
                    self._cache.put(self._key(keys), about, state)
        self._new.clear()

    def _recall(self, keys: list[Key], ends: list[int], kept: list[int], *, reuse: bool) -> int:
        """Have memory hold a known beginning of `keys` and nothing else; its length, always below `len(keys)`."""
        language = self._language
        same = language.common_prefix(keys)
        if not reuse:
            same = max(end for end in (0, *ends) if end <= same and end in self._exact)
        for end in reversed(kept):
            state = self._cache.get(self._key(keys[:end])) if end > same else None
            if state is None:
                continue
            if language.restore_state(state, keys[:end]):
                self._exact = {0, end}
                return end
            same = 0  # an attempt that failed leaves nothing in memory
        language.truncate(same)
        return same

    def _evaluate(self, part: Segment, done: int, stats: RequestStats, job: Job) -> None:
        """All of a segment but its first `done` positions."""
        keys = part.keys[done:]
        if part.picture is None:
            start = time.perf_counter()
            self._language.evaluate_tokens([key for key in keys if isinstance(key, int)], job.cancel)
        else:
            rows = self._embedder.start(part.picture, stats, job).result()
            start = time.perf_counter()
            self._language.evaluate_embeddings(rows[done:], keys, job.cancel)
        stats.prefill_ms += elapsed_ms(start)

    def _key(self, keys: list[Key]) -> str:
        """What decides about the language model's memory of a prompt that begins with `keys`."""
        pictures = sorted({key[0] for key in keys if not isinstance(key, int)})
        return digest("state", self._identity, keys, [self._embedder.key(name) for name in pictures])
