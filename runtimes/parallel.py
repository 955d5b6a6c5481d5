"""Several answers in parallel: each pass over the weights computes one token of every unfinished answer.

Prompts are evaluated one after the other, a part between two tokens of the others, and an answer joins them as soon as
there is room for it. Knows nothing about templates or image files.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from llava_edge.errors import UsageError
from llava_edge.options import FinishReason, Options
from llava_edge.runtimes import CancelledError
from llava_edge.runtimes.branches import Branches
from llava_edge.runtimes.decoding import Answer
from llava_edge.runtimes.language import LanguageModel
from llava_edge.runtimes.prefill import PictureError, Prefill, Segment
from llava_edge.runtimes.sampling import Sampler

Outcome = FinishReason | Exception  # of an answer; the error is one of this answer alone
OnFinish = Callable[[Answer, Outcome], None]


@dataclass(frozen=True)
class Request:
    """A prompt, and where its answer goes. reuse, save: see `Prefill.run`."""

    segments: list[Segment]
    answer: Answer
    options: Options
    reuse: bool = False
    save: bool = True

    @property
    def positions(self) -> int:
        """Length of the prompt."""
        return sum(len(segment.keys) for segment in self.segments)


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
    """Answers requests that are added, until no more fit into the context. Closing it frees their positions.

    on_finish: called as soon as an answer is complete, cancelled or has failed.
    """

    def __init__(self, language: LanguageModel, prefill: Prefill, on_finish: OnFinish) -> None:
        self._language = language
        self._prefill = prefill
        self._on_finish = on_finish
        self._branches = Branches(language)
        self._active: list[_Branch] = []
        self._used = 0  # positions of the KV cache, those of ended branches included
        self._in_place = language.context_size  # positions of the first prompt that are also those of the last one

    @property
    def busy(self) -> bool:
        """Whether there are unfinished answers."""
        return bool(self._active)

    def has_room(self, request: Request, alone: Answer | None = None) -> bool:
        """Whether a request can be added now, or after an answer that is being decoded alone was adopted."""
        answers = [branch.answer for branch in self._active] + ([alone] if alone else [])
        used = len(self._language.cached_keys) if alone else self._used
        needed = used + request.positions + request.answer.max_tokens
        needed += sum(answer.max_tokens - answer.stats.tokens for answer in answers)
        room = self._language.context_size
        return len(answers) < self._language.max_branches and (
            needed <= room or needed - self._prefill.kept(request.segments) <= room
        )

    def adopt(self, request: Request, sampler: Sampler, last_token: int) -> None:
        """Continue an answer that was decoded alone, as the first one. The KV cache holds all but its last token."""
        self._used = len(self._language.cached_keys)
        self._start(request, sampler, 0).last_token = last_token

    def add(self, request: Request) -> None:
        """Evaluate the prompt of another answer, and sample its first token. Raises `BundleError`."""
        try:
            kept = self._evaluate(request)
        except CancelledError:
            self._on_finish(request.answer, "cancelled")
            return
        except PictureError as error:
            self._on_finish(request.answer, error.reason)
            return
        self._used += request.positions - kept
        self._in_place = min(self._in_place, kept)
        self._sample(self._start(request, Sampler(self._language, request.options), kept), -1)

    def step(self) -> None:
        """Compute one more token of each unfinished answer. Raises `BundleError`."""
        for branch in [branch for branch in self._active if branch.answer.job.cancel.is_set()]:
            self._end(branch, "cancelled")
        active = list(self._active)
        if not active:
            return
        self._branches.step([branch.last_token for branch in active], [branch.number for branch in active])
        self._used += len(active)
        for row, branch in enumerate(active):
            self._sample(branch, row)

    def __enter__(self) -> ParallelDecoder:
        return self

    def __exit__(self, *_: object) -> None:
        for branch in self._active:
            branch.sampler.close()
        self._branches.close()
        if self._in_place < len(self._language.cached_keys):
            # Before the last prompt's positions are now free ones, which would be used for those after it.
            self._prefill.save_states()
            self._language.truncate(self._in_place)

    def _evaluate(self, request: Request) -> int:
        """Return how many positions were kept, all of which belong to other branches, too."""
        answer, used = request.answer, self._used
        try:
            return self._prefill.run(
                request.segments, answer.stats, answer.job, save=request.save, between=self.step if self.busy else None
            )
        except BaseException:
            if self._used > used:  # others' tokens lie behind it, and their next ones have to, too
                self._used += len(self._language.cached_keys)
                self._branches.keep_prompt()
            self._language.truncate(0)  # what `_used` does not count, nothing may keep
            raise

    def _start(self, request: Request, sampler: Sampler, shared: int) -> _Branch:
        branch = _Branch(self._branches.start(shared), request, sampler)
        self._active.append(branch)
        return branch

    def _sample(self, branch: _Branch, row: int) -> None:
        try:
            branch.last_token = branch.sampler.sample(row)
        except UsageError as error:
            self._end(branch, error)
            return
        reason = branch.answer.add_token(branch.last_token, row)
        if reason:
            self._end(branch, reason)

    def _end(self, branch: _Branch, outcome: Outcome) -> None:
        self._active.remove(branch)
        self._branches.end(branch.number)
        branch.sampler.close()
        self._on_finish(branch.answer, outcome)
