"""An answer, token by token, from what the language model was shown. Knows nothing about prompts and pictures."""

from __future__ import annotations

import time

from llava_edge.options import Chunk, FinishReason, Options
from llava_edge.runtimes.jobs import Job
from llava_edge.runtimes.language import LanguageModel
from llava_edge.runtimes.measured import Run
from llava_edge.runtimes.sampling import Sampler, chance
from llava_edge.runtimes.text import TextStream


def decode(
    language: LanguageModel, ends: set[int], stream: TextStream, options: Options, limit: int, run: Run, job: Job
) -> FinishReason:
    """Sample until a token of `ends`, a stop text or `limit` tokens; chunks go to `job.output`.

    Raises `CancelledError`.
    """
    sampler = Sampler(language, options)
    try:
        while True:
            language.logits()  # refuses what is not finite
            token = sampler.sample(language.context)
            run.first_token = run.first_token or time.monotonic()
            if token in ends or language.ends(token):
                return "stop"
            run.tokens += 1
            run.unseen += 1
            if options.top_logprobs is not None:
                run.chances.append(chance(language, token, options.top_logprobs))
            text = stream.feed(language.piece(token))
            if text:
                run.text += text
                job.output.put(Chunk(text, run.unseen, chances=tuple(run.chances)))
                run.unseen = 0
                run.chances.clear()
            if stream.stopped:
                return "stop"
            if run.tokens >= limit:
                return "length"
            language.evaluate_tokens([token], job.cancel)
    finally:
        sampler.close()
