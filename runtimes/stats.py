"""Statistics of one request: timings, token counts and cache hits."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from llava_edge.options import CacheHit, FinishReason, Result, Timings, TokenChance
from llava_edge.runtimes import machine


@dataclass
class RequestStats:
    """Statistics of one request, filled in as it proceeds. Durations in milliseconds, instants of `time.monotonic`."""

    started: float
    seed: int | None = None
    preprocess_ms: float = 0.0
    image_ms: float = 0.0  # of preprocess_ms
    encode_ms: float = 0.0
    project_ms: float = 0.0  # of encode_ms
    encoded_pictures: int = 0  # by CLIP, for this request
    kv_cache_hit: bool = False  # whether the positions of all pictures were in the KV cache or restored to it
    cached_tokens: int = 0  # of the prompt, in the KV cache or restored to it
    prefill_ms: float = 0.0
    first_token: float = 0.0  # instant; 0 until there is one
    prompt_tokens: int = 0
    image_tokens: int = 0
    tokens: int = 0  # of the answer, without its end token
    end_token: bool = False  # whether one ended the answer, after a step of its own
    pending_tokens: int = 0  # of these, not yet in a chunk
    pending_chances: list[TokenChance] = field(default_factory=list)  # of the pending tokens, if requested
    text: str = ""
    drafted: int = 0  # draft tokens
    accepted: int = 0  # of these, in the answer

    @property
    def read_pictures(self) -> bool:
        """Whether pictures of the prompt had to be evaluated."""
        return self.image_tokens > 0 and not self.kv_cache_hit

    def _cache_hit(self) -> CacheHit:
        if self.kv_cache_hit:
            return "kv"
        return "embedding" if self.image_tokens and not self.encoded_pictures else "miss"

    def result(self, reason: FinishReason, model: str, device: str, load_ms: float) -> Result:
        """Return the result of the finished answer."""
        now = time.monotonic()
        decode = now - self.first_token if self.first_token else 0.0
        decoded = self.tokens + self.end_token - 1  # prefill gives the first
        timings = Timings(
            load_ms=load_ms,
            preprocess_ms=self.preprocess_ms,
            encode_ms=self.encode_ms,
            prefill_ms=self.prefill_ms,
            ttft_ms=(self.first_token - self.started) * 1000 if self.first_token else 0.0,
            decode_ms=decode * 1000,
            decode_tokens_per_s=decoded / decode if decode > 0 and decoded > 0 else 0.0,
            total_ms=(now - self.started) * 1000,
            image_ms=self.image_ms,
            project_ms=self.project_ms,
        )
        return Result(
            text=self.text,
            finish_reason=reason,
            model=model,
            device=device,
            image_tokens=self.image_tokens,
            prompt_tokens=self.prompt_tokens,
            completion_tokens=self.tokens,
            cache=self._cache_hit(),
            timings=timings,
            memory=machine.memory_use(),
            cached_tokens=self.cached_tokens,
            drafted_tokens=self.drafted,
            accepted_tokens=self.accepted,
            seed=self.seed,
        )


def elapsed_ms(start: float) -> float:
    """Return the milliseconds since a `time.perf_counter()` instant."""
    return (time.perf_counter() - start) * 1000
