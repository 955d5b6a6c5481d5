"""The decode loops: sample an answer token by token, or several at a time with drafts. Knows nothing about prompts."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from llava_edge.options import Chunk, FinishReason, Options
from llava_edge.runtimes.jobs import Job
from llava_edge.runtimes.kv_cache import Array
from llava_edge.runtimes.language import LanguageModel
from llava_edge.runtimes.sampling import Sampler, takes_likeliest, token_chance
from llava_edge.runtimes.speculation import Speculation, SpeculativeDecoder
from llava_edge.runtimes.stats import RequestStats
from llava_edge.runtimes.text import TextStream

MAX_PENDING_CHANCES = 64  # tokens without text before a chunk: leading white space has none, however long it is


@dataclass(frozen=True)
class Answer:
    """An answer being decoded: what ends it, and where its chunks go."""

    language: LanguageModel
    end_tokens: set[int]
    stream: TextStream
    max_tokens: int
    stats: RequestStats
    job: Job
    top_logprobs: int | None = None

    def add_token(self, token: int, row: int = -1) -> FinishReason | None:
        """Add a token sampled from a row of logits; return why it is complete, or None. Chunks go to `job.output`."""
        stats = self.stats
        stats.first_token = stats.first_token or time.monotonic()
        if token in self.end_tokens or self.language.vocabulary.is_end_token(token):
            stats.end_token = True
            return "stop"
        stats.tokens += 1
        stats.pending_tokens += 1
        if self.top_logprobs is not None:
            stats.pending_chances.append(token_chance(self.language, token, self.top_logprobs, row))
        text = self.stream.feed(self.language.vocabulary.piece(token))
        if text or len(stats.pending_chances) >= MAX_PENDING_CHANCES:
            stats.text += text
            self.job.output.put(Chunk(text, stats.pending_tokens, chances=tuple(stats.pending_chances)))
            stats.pending_tokens = 0
            stats.pending_chances.clear()
        if self.stream.stopped:
            return "stop"
        return "length" if stats.tokens >= self.max_tokens else None


def decode(
    answer: Answer, options: Options, sampler: Sampler, speculation: Speculation, pause: Callable[[], bool]
) -> FinishReason | int:
    """Sample until an end token, a stop sequence or the token limit. Raises `CancelledError`.

    When `pause` returns True, returns the last token, which is not evaluated yet: `sampler` can go on from there.
    """
    if _can_speculate(options) and (speculation.auto or options.speculate == "ngram"):
        return _decode_speculatively(answer, sampler, speculation, pause, always=options.speculate == "ngram")
    while True:
        token = sampler.sample()
        reason = answer.add_token(token)
        if reason or pause():
            return reason or token
        answer.language.evaluate_tokens([token], answer.job.cancel)


def _can_speculate(options: Options) -> bool:
    """Whether drafts can be compared with what is sampled, and no log probabilities are requested."""
    return takes_likeliest(options) and options.top_logprobs is None and options.speculate != "off"


def _decode_speculatively(
    answer: Answer, sampler: Sampler, speculation: Speculation, pause: Callable[[], bool], *, always: bool
) -> FinishReason | int:
    reason: FinishReason | None = None

    def take(logits: Array) -> tuple[int, bool]:
        nonlocal reason
        token = sampler.likeliest(logits)
        reason = answer.add_token(token)
        return token, reason is not None

    decoder = SpeculativeDecoder(speculation, take, always=always)
    token, _ = take(answer.language.logits())
    while not reason and not pause():
        token = decoder.advance(token, answer.job.cancel)
    answer.stats.drafted, answer.stats.accepted = decoder.drafted, decoder.accepted
    return reason or token
