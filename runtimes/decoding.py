"""An answer, token by token, from what the language model was shown. Knows nothing about prompts and pictures."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass

from llava_edge.options import Chunk, FinishReason, Options
from llava_edge.runtimes.branches import Branches
from llava_edge.runtimes.jobs import Job
from llava_edge.runtimes.language import LanguageModel
from llava_edge.runtimes.sampling import Sampler, chance, penalizes
from llava_edge.runtimes.speculation import Guessing, Speculation
from llava_edge.runtimes.stats import RequestStats, elapsed_ms
from llava_edge.runtimes.text import TextStream

MOST_CHANCES = 64  # of tokens that wait for text: white space that begins an answer has none, however long it is


@dataclass(frozen=True)
class Answer:
    """One that is being made: what ends it, and where it goes. `limit` is its most tokens."""

    language: LanguageModel
    ends: set[int]
    stream: TextStream
    limit: int
    stats: RequestStats
    job: Job
    top_logprobs: int | None = None

    def take(self, token: int, row: int = -1) -> FinishReason | None:
        """Add a token sampled from a row of logits; why the answer is complete, or None. Chunks go to `job.output`."""
        stats = self.stats
        stats.first_token = stats.first_token or time.monotonic()
        if token in self.ends or self.language.ends(token):
            return "stop"
        stats.tokens += 1
        stats.pending_tokens += 1
        if self.top_logprobs is not None:
            stats.pending_chances.append(chance(self.language, token, self.top_logprobs, row))
        text = self.stream.feed(self.language.piece(token))
        if text or len(stats.pending_chances) >= MOST_CHANCES:
            stats.text += text
            self.job.output.put(Chunk(text, stats.pending_tokens, chances=tuple(stats.pending_chances)))
            stats.pending_tokens = 0
            stats.pending_chances.clear()
        if self.stream.stopped:
            return "stop"
        return "length" if stats.tokens >= self.limit else None


def decode(answer: Answer, options: Options, speculation: Speculation) -> FinishReason:
    """Sample until a token of `ends`, a stop text or `limit` tokens. Raises `CancelledError`."""
    if _guessable(options) and (speculation.unasked or options.speculate == "ngram"):
        return _guessed(answer, speculation, always=options.speculate == "ngram")
    language = answer.language
    with closing(Sampler(language, options)) as sampler:
        while True:
            token = sampler.sample()
            reason = answer.take(token)
            if reason:
                return reason
            language.evaluate_tokens([token], answer.job.cancel)


def _guessable(options: Options) -> bool:
    """Whether a token depends on nothing but its logits, which nobody wants to see."""
    alone = options.greedy and not options.grammar and not penalizes(options)
    return alone and options.top_logprobs is None and options.speculate != "off"


def decode_together(
    answers: Sequence[Answer],
    tails: Sequence[Sequence[int]],
    options: Sequence[Options],
    done: Callable[[Answer, FinishReason], None],
) -> None:
    """Answer prompts that begin with what memory holds and end with `tails`: one token of each answer in a pass.

    options: of each. `done` is called as soon as an answer is complete. Raises `CancelledError` when the first one's
    job is cancelled.
    """
    language, cancel = answers[0].language, answers[0].job.cancel
    samplers: list[Sampler] = []
    last: dict[int, int] = {}  # token of each answer that is not complete

    def sample(number: int, row: int) -> None:
        token = samplers[number].sample(row)
        reason = answers[number].take(token, row)
        if reason:
            last.pop(number, None)
            done(answers[number], reason)
        else:
            last[number] = token

    try:
        with Branches(language, len(answers)) as branches:
            for number, (tail, its) in enumerate(zip(tails, options, strict=True)):
                samplers.append(Sampler(language, its))
                start = time.perf_counter()
                branches.extend(number + 1, tail, cancel)
                answers[number].stats.prefill_ms += elapsed_ms(start)
                sample(number, -1)
            while last:
                open_ones = list(last)
                branches.step([last[i] for i in open_ones], [i + 1 for i in open_ones], cancel)
                for row, number in enumerate(open_ones):
                    sample(number, row)
    finally:
        for sampler in samplers:
            sampler.close()


def _guessed(answer: Answer, speculation: Speculation, *, always: bool) -> FinishReason:
    guessing = Guessing(speculation, always=always)
    tokens, before = [answer.language.best()], 0
    while True:
        taken, right = answer.stats.tokens, guessing.accepted - before
        for token in tokens:
            reason = answer.take(token)
            if reason:  # of the last pass only what is in the answer counts
                answer.stats.drafted = guessing.drafted
                answer.stats.accepted = before + min(right, answer.stats.tokens - taken)
                return reason
        before = guessing.accepted
        tokens = guessing.next(tokens[-1], answer.job.cancel)
