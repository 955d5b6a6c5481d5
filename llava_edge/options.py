"""What goes into a generation and what comes out: plain frozen records, shared by API, command line and chat.

Knows nothing about engines, bundles or images.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from numbers import Integral, Real
from pathlib import Path
from typing import Literal, get_args

from llava_edge.errors import UsageError

Device = Literal["auto", "cpu", "metal", "cuda"]
FinishReason = Literal["stop", "length", "cancelled"]
Speculate = Literal["auto", "off", "ngram"]
TokenMethod = Literal["cls", "pool", "random"]
Preset = Literal["auto", "latency", "memory"]
KV = Literal["auto", "f16", "q8_0"]
CacheHit = Literal["miss", "embedding", "kv"]

DEFAULT_PROMPT = "Describe this image in one sentence."

DEVICES: tuple[Device, ...] = get_args(Device)
PRESETS: tuple[Preset, ...] = get_args(Preset)
KVS: tuple[KV, ...] = get_args(KV)
SPECULATE: tuple[Speculate, ...] = get_args(Speculate)
TOKEN_METHODS: tuple[TokenMethod, ...] = get_args(TokenMethod)
MAX_TOKENS = 1 << 20  # of an answer: more than any context has
LEAST_TEMPERATURE = 1e-6  # below it a draw is the likeliest token, and logits over it leave float32 at last
MAX_STOPS = 16
MAX_STOP_BYTES = 256
MAX_GRAMMAR = 1 << 18


@dataclass(frozen=True)
class Options:
    """How an answer is sampled, and from how much of a picture. The default is greedy: always the most likely token.

    max_tokens: longest answer in tokens; the end of the context may end it earlier.
    temperature: 0, or less than 1e-6, is greedy; otherwise logits are divided by it before drawing.
    top_p, top_k, min_p: keep the smallest set of tokens with this total probability (0 = the likeliest) / this many of
        them (0 = all) / tokens at least this likely relative to the best one. They matter only when temperature > 0.
    seed: of the random draw; the same seed gives the same answer on the same machine. None: another one each time,
        which `Result.seed` tells.
    stop: texts that end the answer; the answer is cut at the earliest match and does not contain it.
    speculate: guess tokens from what was said before and check several in one pass. Greedy answers are the same with
        and without (docs/gpu.md), and only those use it. "auto" stops where it does not pay, and guesses nothing on a
        GPU unless a draft model is given; "ngram" never stops.
    grammar: the only form an answer may have, in llama.cpp's GBNF; `llava_edge.from_schema` writes one. Empty: any.
    top_logprobs: report how likely each token was, and this many of the likeliest in its place. None: do not.
    image_tokens: positions that a picture may take; 0 is all of them. Fewer are faster and show less.
    image_token_method: how so many are made, see `llava_edge.token_budget`; all but "cls" are there to compare with.
    repeat_penalty: make the last 64 tokens of the answer less likely: positive logits are divided by it, others
        multiplied. 1 is none; 1.1 is usual against loops. The prompt does not count: its words may be the answer.
    frequency_penalty, presence_penalty: subtract this from the logits of those tokens, for each time, and once.
    Raises `UsageError` naming the field when a value is out of range.
    """

    max_tokens: int = 512
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    speculate: Speculate = "auto"
    grammar: str = ""
    top_logprobs: int | None = None
    image_tokens: int = 0
    image_token_method: TokenMethod = "cls"
    repeat_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0

    def __post_init__(self) -> None:
        _plain(self)
        if self.speculate not in SPECULATE:
            raise UsageError(f"speculate is {_shown(self.speculate)}; one of {', '.join(SPECULATE)} was expected.")
        _whole("max_tokens", self.max_tokens, 1, MAX_TOKENS)
        _real("temperature", self.temperature, 0.0, 100.0)
        _real("top_p", self.top_p, 0.0, 1.0)
        _whole("top_k", self.top_k, 0, 1 << 24)
        _real("min_p", self.min_p, 0.0, 1.0)
        if self.seed is not None:
            _whole("seed", self.seed, 0, (1 << 32) - 1)
        if self.top_logprobs is not None:
            _whole("top_logprobs", self.top_logprobs, 0, 20)
        if not isinstance(self.grammar, str) or len(self.grammar) > MAX_GRAMMAR:
            raise UsageError(f"grammar must be a text of at most {MAX_GRAMMAR} characters.")
        _whole("image_tokens", self.image_tokens, 0, 1 << 20)
        if self.image_token_method not in TOKEN_METHODS:
            raise UsageError(
                f"image_token_method is {_shown(self.image_token_method)}; {', '.join(TOKEN_METHODS)} are possible."
            )
        _real("repeat_penalty", self.repeat_penalty, 0.1, 10.0)
        _real("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        _real("presence_penalty", self.presence_penalty, -2.0, 2.0)
        if not isinstance(self.stop, tuple) or not all(isinstance(text, str) for text in self.stop):
            raise UsageError("stop must be a tuple of texts.")
        if len(self.stop) > MAX_STOPS:
            raise UsageError(f"There are {len(self.stop)} stop texts; at most {MAX_STOPS} are allowed.")
        for text in self.stop:
            if not 1 <= len(text.encode("utf-8", "replace")) <= MAX_STOP_BYTES:
                raise UsageError(f"A stop text must have 1 to {MAX_STOP_BYTES} bytes; {text[:20]!r} does not.")

    @property
    def greedy(self) -> bool:
        """Whether nothing is drawn."""
        return self.temperature < LEAST_TEMPERATURE


@dataclass(frozen=True)
class EngineOptions:
    """How the engines are opened.

    device: "auto" takes the best one that works.
    threads: 0 means one for each physical core this process may use.
    context: positions for prompt and answer together; 0 means what the model was trained for, at most 4096.
    cache: find what pictures became before, in this process or another, and keep it for the next time, on this disk too
        (`llava_edge.cache`; a path is the folder to keep it in, "memory" keeps it in this process alone). Answers are
        the same without.
    preset: "latency" lets the engines keep weights re-ordered for this processor, a private copy, where that pays; with
        "memory" all are only mapped, the context has 2048 positions (not for tiles) and "q8_0" unless told otherwise.
        "auto" is as "latency", but copies nothing that would leave less than half of the free memory.
    kv: numbers that the context is kept in; "q8_0" is half as large as "f16" and rounds a little more.
    verbose: show llama.cpp's log on stderr. It is one for all models of a process: the one loaded last decides.
    draft: GGUF file of a small language model with the same vocabulary, which guesses tokens of greedy answers; answers
        stay the same.
    """

    device: Device = "auto"
    threads: int = 0
    context: int = 0
    preset: Preset = "auto"
    kv: KV = "auto"
    verbose: bool = False
    cache: bool | Path | Literal["memory"] = True
    draft: str | Path | None = None

    def __post_init__(self) -> None:
        _plain(self)
        if self.device not in DEVICES:
            raise UsageError(f"Device {self.device!r} is not known; choose one of {', '.join(DEVICES)}.")
        for name, value, allowed in (("preset", self.preset, PRESETS), ("kv", self.kv, KVS)):
            if value not in allowed:
                raise UsageError(f"{name} is {_shown(value)}; one of {', '.join(allowed)} was expected.")
        _whole("threads", self.threads, 0, 512)
        _whole("context", self.context, 0, 1 << 20)
        if not isinstance(self.cache, bool | Path) and self.cache != "memory":
            raise UsageError(f'cache is {_shown(self.cache)}; True, False, "memory" or a Path was expected.')
        if self.draft is not None and not (isinstance(self.draft, str | Path) and str(self.draft).strip()):
            raise UsageError(f"draft is {_shown(self.draft)}; the path of a GGUF file was expected.")


@dataclass(frozen=True)
class Timings:
    """Milliseconds of wall time for each stage of one answer.

    `ttft_ms` and `total_ms` count from the start of the process (command line) or of the call (library).
    `decode_ms` is the time for all answer tokens after the first; the rate is over those. Of `preprocess_ms`,
    `image_ms` went into decoding picture files; of `encode_ms`, `project_ms` into the projector. Of questions that are
    asked in one go each has the times of what was done once for all.
    """

    load_ms: float
    preprocess_ms: float
    encode_ms: float
    prefill_ms: float
    ttft_ms: float
    decode_ms: float
    decode_tokens_per_s: float
    total_ms: float
    image_ms: float = 0.0
    project_ms: float = 0.0


@dataclass(frozen=True)
class Memory:
    """Of this process. `private_bytes` leaves out mapped files, `file_bytes` is these; None where it is not told."""

    peak_rss_bytes: int | None
    private_bytes: int | None
    file_bytes: int | None = None


@dataclass(frozen=True)
class Result:
    """A finished answer. `prompt_tokens` counts every position of the prompt, `image_tokens` those of images.

    cache: "kv" if the prompt was known up to its last image, "embedding" if only what CLIP makes of the images was.

    drafted_tokens, accepted_tokens: what was guessed of the answer, and how much of that was right and used.
    seed: what the answer can be drawn again with; None if it is greedy.
    """

    text: str
    finish_reason: FinishReason
    model: str
    device: str
    image_tokens: int
    prompt_tokens: int
    completion_tokens: int
    cache: CacheHit
    timings: Timings
    memory: Memory
    drafted_tokens: int = 0
    accepted_tokens: int = 0
    seed: int | None = None


@dataclass(frozen=True)
class TokenChance:
    """How likely a token of the answer was: its bytes, the natural logarithm of its probability at temperature 1 and
    before any penalty, limit or grammar, and the same of the likeliest tokens in its place, best first."""

    token: bytes
    logprob: float
    top: tuple[tuple[bytes, float], ...]


@dataclass(frozen=True)
class Chunk:
    """A piece of a streamed answer.

    token_count: answer tokens since the chunk before. The last chunk, and only that, has `finish_reason` and `final`.
    chances: of these tokens, if `Options.top_logprobs` asked for them.
    """

    text: str
    token_count: int = 0
    finish_reason: FinishReason | None = None
    final: Result | None = None
    chances: tuple[TokenChance, ...] = ()


def result_of(chunks: Iterable[Chunk]) -> Result:
    """Read a stream to its end; its last chunk has the result."""
    *_, last = chunks
    assert last.final is not None
    return last.final


def _plain(options: object) -> None:
    """Make numpy's numbers Python's, the only ones that C functions and JSON take."""
    for name, value in list(vars(options).items()):
        if isinstance(value, Real) and not isinstance(value, int | float):
            object.__setattr__(options, name, int(value) if isinstance(value, Integral) else float(value))


def _whole(name: str, value: object, low: int, high: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise UsageError(f"{name} is {_shown(value)}; a whole number from {low} to {high} was expected.")


def _real(name: str, value: object, low: float, high: float) -> None:
    if not isinstance(value, int | float) or isinstance(value, bool) or not low <= value <= high:  # NaN is in no range
        raise UsageError(f"{name} is {_shown(value)}; a number from {low:g} to {high:g} was expected.")


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 40 else text[:37] + "..."
