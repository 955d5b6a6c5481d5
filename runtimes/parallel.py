"""Several answers in parallel: each pass over the weights computes one token of every unfinished answer.

Prompts are evaluated one after the other, and an answer joins the others as soon as there is room for it. Knows nothing
about templates or image files.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from llava_edge.options import FinishReason, Options
from llava_edge.runtimes import CancelledError
from llava_edge.runtimes.branches import Branches
from llava_edge.runtimes.decoding import Answer
from llava_edge.runtimes.language import LanguageModel
from llava_edge.runtimes.prefill import Prefill, Segment
from llava_edge.runtimes.sampling import Sampler

_NEVER = threading.Event()


@dataclass(frozen=True)
class Request:
    """A prompt, and where its answer goes. reuse, save: see `Prefill.run`."""

    segments: list[Segment]
    answer: Answer
    options: Options
    reuse: bool = False
    save: bool = True


@dataclass
class _Branch:
    """An unfinished answer. `last_token` is not evaluated yet."""

    number: int
    request: Request
    sampler: Sampler
    last_token: int = -1

    @property
    def answer(self) -> Answer:
        return self.request.answer


class ParallelDecoder:
    """Answers the requests that are added, until no more fit into the context. Closing it frees their positions.

    on_finish: called as soon as an answer is complete or cancelled.
    """

    def __init__(
        self, language: LanguageModel, prefill: Prefill, on_finish: Callable[[Answer, FinishReason], None]
    ) -> None:
        self._language = language
        self._prefill = prefill
        self._on_finish = on_finish
        self._branches = Branches(language)
        self._active: list[_Branch] = []
        self._used = 0  # positions of the KV cache, those of ended branches included
        self._last_prompt: list[Segment] = []

    @property
    def busy(self) -> bool:
        """Whether there are unfinished answers."""
        return bool(self._active)

    def has_room(self, *requests: Request) -> bool:
        """Whether these requests can be added now."""
        needed = self._used + sum(branch.answer.max_tokens - branch.answer.stats.tokens for branch in self._active)
        previous = self._last_prompt
        for request in requests:
            needed += _positions(request.segments) - _shared_positions(previous, request.segments)
            needed += request.answer.max_tokens
            previous = request.segments
        count = len(self._active) + len(requests)
        return count <= self._language.max_branches and needed <= self._language.context_size

    def add(self, request: Request) -> None:
        """Evaluate a prompt, and sample the first token of its answer. Raises `BundleError`."""
        answer, is_first = request.answer, not self._last_prompt
        reuse = request.reuse and is_first
        try:
            kept = self._prefill.run(request.segments, answer.stats, answer.job, reuse=reuse, save=request.save)
        except CancelledError:
            self._on_finish(answer, "cancelled")
            return
        shared = 0 if is_first else kept
        self._used += _positions(request.segments) - shared
        branch = self._start(request, Sampler(self._language, request.options), shared)
        self._sample(branch, -1)

    def adopt(self, request: Request, sampler: Sampler, last_token: int) -> None:
        """Continue an answer that was decoded alone, as the first one. The KV cache holds all but its last token."""
        self._used = len(self._language.cached_keys)
        self._start(request, sampler, 0).last_token = last_token

    def step(self) -> None:
        """Compute one more token of each unfinished answer. Raises `BundleError`."""
        for branch in [branch for branch in self._active if branch.answer.job.cancel.is_set()]:
            self._end(branch, "cancelled")
        active = list(self._active)
        if not active:
            return
        self._branches.step([branch.last_token for branch in active], [branch.number for branch in active], _NEVER)
        self._used += len(active)
        for row, branch in enumerate(active):
            self._sample(branch, row)

    def __enter__(self) -> ParallelDecoder:
        return self

    def __exit__(self, *_: object) -> None:
        for branch in self._active:
            branch.sampler.close()
        self._branches.close()

    def _start(self, request: Request, sampler: Sampler, shared: int) -> _Branch:
        branch = _Branch(self._branches.start(shared), request, sampler)
        self._active.append(branch)
        self._last_prompt = request.segments
        return branch

    def _sample(self, branch: _Branch, row: int) -> None:
        branch.last_token = branch.sampler.sample(row)
        reason = branch.answer.add_token(branch.last_token, row)
        if reason:
            self._end(branch, reason)

    def _end(self, branch: _Branch, reason: FinishReason) -> None:
        self._active.remove(branch)
        self._branches.end(branch.number)
        branch.sampler.close()
        self._on_finish(branch.answer, reason)


def _positions(segments: Sequence[Segment]) -> int:
    return sum(len(segment.keys) for segment in segments)


def _shared_positions(previous: Sequence[Segment], segments: Sequence[Segment]) -> int:
    """Positions of leading segments that the last prompt has, too, and that `Prefill.run` will keep.

    0 if there is a new picture after them: a saved prefix may then be restored to other places.
    """
    shared = 0
    while shared < min(len(previous), len(segments) - 1) and previous[shared] == segments[shared]:
        shared += 1
    if any(segment.picture is not None for segment in segments[shared:]):
        return 0
    return _positions(segments[:shared])
