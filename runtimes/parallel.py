"""Several answers in parallel: each pass over the weights computes one token of every unfinished answer.

Prompts are evaluated one after the other, and an answer joins the others as soon as there is room for it. Knows nothing
about templates or image files.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from llava_edge.options import FinishReason, Options
from llava_edge.runtimes.branches import Branches
from llava_edge.runtimes.decoding import Answer
from llava_edge.runtimes.language import LanguageModel
from llava_edge.runtimes.prefill import Prefill, Segment
from llava_edge.runtimes.sampling import Sampler


@dataclass(frozen=True)
class Request:
    """A prompt, and where its answer goes. `save`: whether a saved prefix of it may be used, and its own be saved."""

    segments: list[Segment]
    answer: Answer
    options: Options
    save: bool = True


@dataclass
class _Branch:
    """An unfinished answer after its first token."""

    number: int
    request: Request
    sampler: Sampler
    last_token: int


class ParallelDecoder:
    """Answers the requests that are added, until no more fit into the context. Closing it empties the context.

    on_finish: called as soon as an answer is complete, which then is not `unfinished` any more.
    """

    def __init__(
        self, language: LanguageModel, prefill: Prefill, on_finish: Callable[[Answer, FinishReason], None]
    ) -> None:
        self._language = language
        self._prefill = prefill
        self._on_finish = on_finish
        self._branches = Branches(language)
        self.unfinished: list[Answer] = []
        self._active: list[_Branch] = []  # of them, those that have their first token
        self._used = 0  # positions of the KV cache, those of ended branches included
        self._last_prompt: list[Segment] = []

    @property
    def busy(self) -> bool:
        """Whether there are unfinished answers."""
        return bool(self._active)

    def has_room(self, *requests: Request) -> bool:
        """Whether these requests can be added now."""
        needed = self._used + sum(_remaining(branch.request.answer) for branch in self._active)
        previous = self._last_prompt
        for request in requests:
            needed += _positions(request.segments) - _shared_positions(previous, request.segments)
            needed += request.answer.max_tokens
            previous = request.segments
        count = len(self._active) + len(requests)
        return count <= self._language.max_branches and needed <= self._language.context_size

    def add(self, request: Request) -> None:
        """Evaluate a prompt, and sample the first token of its answer. Raises `CancelledError` or `BundleError`."""
        answer, is_first = request.answer, not self._last_prompt
        self.unfinished.append(answer)
        save = request.save and is_first  # restoring a saved prefix would empty the KV cache
        cached = self._prefill.run(request.segments, answer.stats, answer.job, save=save)
        shared = 0 if is_first else cached
        self._last_prompt = request.segments
        self._used += _positions(request.segments) - shared
        branch = _Branch(self._branches.start(shared), request, Sampler(self._language, request.options), 0)
        self._active.append(branch)
        self._sample(branch, -1)

    def step(self, cancel: threading.Event) -> None:
        """Compute one more token of each unfinished answer. Raises `CancelledError` or `BundleError`."""
        active = list(self._active)
        if not active:
            return
        self._branches.step([branch.last_token for branch in active], [branch.number for branch in active], cancel)
        self._used += len(active)
        for row, branch in enumerate(active):
            self._sample(branch, row)

    def __enter__(self) -> ParallelDecoder:
        return self

    def __exit__(self, *_: object) -> None:
        for branch in self._active:
            branch.sampler.close()
        self._branches.close()

    def _sample(self, branch: _Branch, row: int) -> None:
        branch.last_token = branch.sampler.sample(row)
        answer = branch.request.answer
        reason = answer.add_token(branch.last_token, row)
        if reason:
            self._active.remove(branch)
            self._branches.end(branch.number)
            branch.sampler.close()
            self.unfinished.remove(answer)
            self._on_finish(answer, reason)


def _remaining(answer: Answer) -> int:
    return answer.max_tokens - answer.stats.tokens


def _positions(segments: Sequence[Segment]) -> int:
    return sum(len(segment.keys) for segment in segments)


def _shared_positions(previous: Sequence[Segment], segments: Sequence[Segment]) -> int:
    """Positions of the leading segments, except for the last, that two prompts have in common: see `Prefill.run`."""
    count = 0
    for one, other in zip(previous, segments[:-1], strict=False):
        if one != other:
            break
        count += len(one.keys)
    return count
