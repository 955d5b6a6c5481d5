"""Decides which requests are answered together: one alone, with drafts, or several in parallel.

Knows nothing about queues, templates or image files.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack

from llava_edge.errors import UsageError
from llava_edge.runtimes import CancelledError
from llava_edge.runtimes.decoding import decode
from llava_edge.runtimes.language import LanguageModel
from llava_edge.runtimes.parallel import OnFinish, Outcome, ParallelDecoder, Request
from llava_edge.runtimes.prefill import PictureError, Prefill
from llava_edge.runtimes.sampling import Sampler
from llava_edge.runtimes.speculation import Speculation


class _Requests:
    """The requests that `take` returns until it has none, of which the next one may wait for room, or be cancelled."""

    def __init__(self, take: Callable[[], Request | None], on_finish: OnFinish) -> None:
        self._take = take
        self._on_finish = on_finish
        self._next: Request | None = None

    def peek(self) -> Request | None:
        """Return the next request, which stays the next one; end those that were cancelled."""
        while True:
            self._next = self._next or self._take()
            if self._next is None or not self._next.answer.job.cancel.is_set():
                return self._next
            if (cancelled := self.pop()) is not None:
                self._on_finish(cancelled.answer, "cancelled")

    def pop(self) -> Request | None:
        """Remove and return what `peek` has returned; None if its caller was faster in withdrawing it."""
        request, self._next = self._next, None
        return request if request and request.answer.job.claim.start() else None


class Scheduler:
    """Answers requests with a language model."""

    def __init__(self, language: LanguageModel, prefill: Prefill, speculation: Speculation) -> None:
        self._language = language
        self._prefill = prefill
        self._speculation = speculation

    def answer_all(self, take: Callable[[], Request | None], on_finish: OnFinish) -> None:
        """Answer the requests that `take` returns until it has none: in parallel, as many as fit into the context.

        on_finish: called as soon as an answer is complete, cancelled or has failed.
        """
        requests = _Requests(take, on_finish)
        while requests.peek() is not None:
            first = requests.pop()
            if first is None:
                continue
            with ParallelDecoder(self._language, self._prefill, on_finish) as decoder:
                outcome = self._answer_alone(first, decoder, requests)
                if outcome is not None:
                    on_finish(first.answer, outcome)
                while decoder.busy:
                    while (waiting := requests.peek()) is not None and decoder.has_room(waiting):
                        if requests.pop() is not None:
                            decoder.add(waiting)
                        if waiting.answer.stats.read_pictures:
                            break  # the others have waited long enough for a token
                    decoder.step()

    def _answer_alone(self, request: Request, decoder: ParallelDecoder, others: _Requests) -> Outcome | None:
        """Answer a request, with drafts. As soon as there is room for another one, let `decoder` go on; return None."""
        answer, sampler = request.answer, Sampler(self._language, request.options)

        def pause() -> bool:
            waiting = others.peek()
            return waiting is not None and decoder.has_room(waiting, answer)

        with ExitStack() as stack:
            stack.callback(sampler.close)
            try:
                self._prefill.run(request.segments, answer.stats, answer.job, reuse=request.reuse, save=request.save)
                outcome = decode(answer, request.options, sampler, self._speculation, pause)
            except CancelledError:
                return "cancelled"
            except PictureError as error:
                return error.reason
            except UsageError as error:
                return error
            if not isinstance(outcome, int):
                return outcome
            stack.pop_all()
            decoder.adopt(request, sampler, outcome)
        return None
