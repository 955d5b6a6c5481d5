"""Prefill: evaluates a prompt, text as tokens and pictures as embeddings, into the language model's KV cache.

A prefix is not computed twice if the KV cache still holds it from the last prompt, or if a prompt that shares it up to
its text or its last picture was saved, by another process too. Knows nothing about templates, image files or answers.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import accumulate

from llava_edge.bundle import ADAPTER, LANGUAGE, Bundle
from llava_edge.prompt import IMAGE_TOKEN_INDEX
from llava_edge.runtimes import CancelledError
from llava_edge.runtimes.embedder import Embedder
from llava_edge.runtimes.jobs import Job
from llava_edge.runtimes.kv_cache import Array, Key
from llava_edge.runtimes.language import LanguageModel
from llava_edge.runtimes.picture_cache import PictureCache, digest, file_identity
from llava_edge.runtimes.pictures import Picture
from llava_edge.runtimes.stats import RequestStats, elapsed_ms

MIN_TEXT_PREFIX = 16  # positions of text before the first picture that are worth saving


class PictureError(Exception):
    """A picture cannot be embedded, for a reason that concerns no other prompt. Never leaves this package."""

    def __init__(self, reason: Exception) -> None:
        super().__init__(str(reason))
        self.reason = reason


@dataclass(frozen=True)
class Segment:
    """Consecutive positions of a picture, or of text if `picture` is None. `keys`: see `kv_cache.Key`.

    Segments with the same keys are equal.
    """

    picture: Picture | None = field(compare=False)
    keys: list[Key]


def split_segments(ids: Sequence[int], pictures: Sequence[Picture]) -> list[Segment]:
    """Split token ids, in which `IMAGE_TOKEN_INDEX` stands for each picture, into segments."""
    remaining = iter(pictures)
    segments: list[Segment] = []
    for token in ids:
        if token == IMAGE_TOKEN_INDEX:
            picture = next(remaining)
            segments.append(Segment(picture, [(picture.key, row) for row in range(len(picture.rows))]))
        elif segments and segments[-1].picture is None:
            segments[-1].keys.append(token)
        else:
            segments.append(Segment(None, [token]))
    return segments


class Prefill:
    """Evaluates the prompts of an open engine. `language` is loaded from files of `bundle`."""

    def __init__(self, bundle: Bundle, language: LanguageModel, embedder: Embedder, cache: PictureCache) -> None:
        self._language = language
        self._embedder = embedder
        self._cache = cache
        self._name = bundle.manifest.name
        files = [name for name in (LANGUAGE, ADAPTER) if name in bundle.manifest.files]
        self._identity = [file_identity(bundle, *files), language.identity]
        self._exact_ends = {0}  # segment ends up to which the KV cache was evaluated segment by segment
        self._unsaved: list[list[Key]] = []  # prefixes in the KV cache that `save_states` has to save

    def run(
        self,
        segments: Sequence[Segment],
        stats: RequestStats,
        job: Job,
        *,
        reuse: bool = False,
        save: bool = True,
        between: Callable[[], None] | None = None,
    ) -> int:
        """Evaluate a prompt except for a prefix that is in the KV cache, or saved.

        Returns the length of the prefix that stayed in its place in the KV cache; 0 if a saved one was restored.

        Without `reuse`, a cached prefix consists of whole segments that were evaluated one by one: the answer is
        bit-identical to one computed from scratch. With it, the prefix is all that this prompt has in common with the
        last one and its answer: longer, but computed by other kernels and so rounded differently.
        save: whether new prefixes are saved.
        between: see `LanguageModel.evaluate_tokens`.
        If this prompt would overwrite unsaved prefixes in the KV cache, they are saved first.
        Raises `CancelledError`, `PictureError`, or the `BundleError` or `MemoryLimitError` of the language model.
        """
        keys, ends = _keys_and_ends(segments)
        if any(keys[: len(prefix)] != prefix for prefix in self._unsaved):
            self.save_states()
        picture_ends = [end for item, end in zip(segments[:-1], ends, strict=False) if item.picture is not None]
        last_picture = max(picture_ends, default=0)
        text = ends[0] if picture_ends and segments[0].picture is None and ends[0] >= MIN_TEXT_PREFIX else 0
        start = time.perf_counter()
        kept, cached = self._reuse_prefix(keys, ends, [text, *picture_ends], reuse=reuse)
        stats.prefill_ms += elapsed_ms(start)
        stats.cached_tokens = cached
        stats.kv_cache_hit = cached >= last_picture > 0
        exact = cached in self._exact_ends and cached in (0, *ends)
        self._exact_ends = {end for end in self._exact_ends if end <= cached}
        self._unsaved = [prefix for prefix in self._unsaved if len(prefix) <= cached]
        for segment, end in zip(segments, ends, strict=True):
            if end <= cached:
                continue
            self._evaluate(segment, max(cached - end + len(segment.keys), 0), stats, job, between)
            if exact:
                self._exact_ends.add(end)
            if save and exact and end in (text, last_picture):
                self._unsaved.append(keys[:end])
        return kept

    def kept(self, segments: Sequence[Segment]) -> int:
        """Return how many positions of the KV cache `run` would keep for a prompt, without `reuse`.

        0 if a picture comes after them: then a saved prefix may take their place.
        """
        keys, ends = _keys_and_ends(segments)
        cached = self._exact_prefix(keys, ends)
        pictures = [end for item, end in zip(segments, ends, strict=True) if item.picture is not None]
        return cached if cached >= max(pictures, default=0) else 0

    def save_states(self) -> None:
        """Save the prefixes that the last prompts computed. Called when the engine is idle, or will overwrite them: the
        next question about the same picture needs no copy, and would share the processor with making one.
        """
        with suppress(MemoryError):
            for keys in self._unsaved:
                max_bytes = self._cache.max_payload
                if not max_bytes or self._language.cached_keys[: len(keys)] != keys:
                    continue
                if state := self._language.save_state(len(keys), max_bytes):
                    about = {"model": self._name, "kind": "state", "positions": str(len(keys))}
                    self._cache.put(self._cache_key(keys), about, state)
        self._unsaved.clear()

    def _reuse_prefix(self, keys: list[Key], ends: list[int], saved_ends: list[int], *, reuse: bool) -> tuple[int, int]:
        """Reduce the KV cache to a prefix of `keys`, restored from a file if that is longer.

        Returns how much of it was kept, all or nothing, and its length, which is always below `len(keys)`.
        saved_ends: where the prefixes end that may have been saved.
        """
        language = self._language
        cached = language.common_prefix(keys) if reuse else self._exact_prefix(keys, ends)
        for end in reversed(saved_ends):
            state = self._cache.get(self._cache_key(keys[:end])) if end > cached else None
            if state is None:
                continue
            if language.restore_state(state, keys[:end]):
                self._exact_ends = {0, end}
                return 0, end
            cached = 0  # a failed attempt leaves the KV cache empty
        language.truncate(cached)
        return cached, cached

    def _exact_prefix(self, keys: list[Key], ends: list[int]) -> int:
        """Return the length of the longest cached prefix that consists of segments that were evaluated one by one."""
        cached = self._language.common_prefix(keys)
        return max(end for end in (0, *ends) if end <= cached and end in self._exact_ends)

    def _evaluate(
        self, segment: Segment, skip: int, stats: RequestStats, job: Job, between: Callable[[], None] | None
    ) -> None:
        """Evaluate a segment except for its first `skip` positions."""
        keys = segment.keys[skip:]
        if segment.picture is None:
            start = time.perf_counter()
            self._language.evaluate_tokens([key for key in keys if isinstance(key, int)], job.cancel, between)
        else:
            rows = self._embed(segment.picture, stats, job)
            start = time.perf_counter()
            self._language.evaluate_embeddings(rows[skip:], keys, job.cancel, between)
        stats.prefill_ms += elapsed_ms(start)

    def _embed(self, picture: Picture, stats: RequestStats, job: Job) -> Array:
        try:
            return self._embedder.submit(picture, stats, job).result()
        except CancelledError:
            raise
        except Exception as error:
            raise PictureError(error) from error

    def _cache_key(self, keys: list[Key]) -> str:
        """Hash everything that the KV cache of a prompt prefix depends on."""
        pictures = sorted({key[0] for key in keys if not isinstance(key, int)})
        return digest("state", self._identity, keys, [self._embedder.cache_key(name) for name in pictures])


def _keys_and_ends(segments: Sequence[Segment]) -> tuple[list[Key], list[int]]:
    """Return the keys of all positions, and where each segment ends."""
    keys = [key for segment in segments for key in segment.keys]
    return keys, list(accumulate(len(segment.keys) for segment in segments))
