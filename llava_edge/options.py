"""Options of a generation and its result, as frozen dataclasses shared by API, command line, server and chat.

Knows nothing about engines, bundles or images.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from numbers import Integral, Real
from pathlib import Path
from typing import Literal, get_args

from llava_edge.errors import OptionError

Device = Literal["auto", "cpu", "metal", "cuda"]
FinishReason = Literal["stop", "length", "cancelled"]
Speculate = Literal["auto", "off", "ngram"]
TokenMethod = Literal["cls", "pool", "random"]
PresetName = Literal["auto", "latency", "memory"]
KV = Literal["auto", "f16", "q8_0"]
CacheHit = Literal["miss", "embedding", "kv"]

DEFAULT_PROMPT = "Describe this image in one sentence."

DEVICES: tuple[Device, ...] = get_args(Device)
PRESETS: tuple[PresetName, ...] = get_args(PresetName)
KV_TYPES: tuple[KV, ...] = get_args(KV)
SPECULATE: tuple[Speculate, ...] = get_args(Speculate)
TOKEN_METHODS: tuple[TokenMethod, ...] = get_args(TokenMethod)
MAX_THREADS = 512
MAX_TOKENS = 1 << 20  # per answer; more than any context length
MIN_TEMPERATURE = 1e-6  # below, sampling always picks the likeliest token, and logits / temperature overflow float32
MAX_STOP_SEQUENCES = 16
MAX_STOP_BYTES = 256
MAX_GRAMMAR_CHARACTERS = 1 << 18
LARK_MARK = "%llguidance"  # begins a grammar that is not GBNF, as llama.cpp has it


@dataclass(frozen=True)
class Options:
    """How an answer is sampled, and how many tokens an image gets. The default is greedy decoding.

    max_tokens: maximum length of the answer in tokens; a full context ends it earlier.
    temperature: 0, or less than 1e-6, is greedy; otherwise logits are divided by it before sampling.
    top_p, top_k, min_p: sample from the smallest set of tokens with this total probability (0: the likeliest) / from
        this many of the likeliest (0: all) / from tokens at least this likely relative to the likeliest. They matter
        only when temperature > 0.
    seed: random seed, below 2^32; the same seed gives the same answer on the same machine. None: a new one each time,
        reported in `Result.seed`.
    stop: stop sequences, at most 16 of 256 bytes; the answer is cut before the earliest match.
    speculate: speculative decoding: propose tokens from earlier text and verify several in one pass. It is used for
        greedy answers only and does not change them (docs/gpu.md). "auto" stops where it does not pay, and on a GPU
        does not start without a draft model; "ngram" never stops.
    grammar: what the answer must follow: GBNF as llama.cpp's, or Lark as LLGuidance's if it begins with `%llguidance`,
        which is what `llava_edge.from_schema` writes. Empty: none.
    top_logprobs: report the log probability of each token and of this many likeliest alternatives, at most 20. None:
        do not.
    image_tokens: maximum number of positions per image; 0 is all. Fewer are faster and show less detail.
    image_token_method: how they are reduced, see `llava_edge.token_budget`; all but "cls" are baselines.
    repeat_penalty: make the last 64 tokens of the answer less likely: positive logits are divided by it, others
        multiplied. 1 is none; 1.1 is usual against loops. Prompt tokens do not count, as they may be the answer.
    frequency_penalty, presence_penalty: subtracted from the logits of those tokens, per occurrence and once.
    Raises `OptionError` when a value is out of range.
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
        _convert_numpy_numbers(self)
        _check_choice("speculate", self.speculate, SPECULATE)
        _check_integer("max_tokens", self.max_tokens, 1, MAX_TOKENS)
        _check_number("temperature", self.temperature, 0.0, 100.0)
        _check_number("top_p", self.top_p, 0.0, 1.0)
        _check_integer("top_k", self.top_k, 0, 1 << 24)
        _check_number("min_p", self.min_p, 0.0, 1.0)
        if self.seed is not None:
            _check_integer("seed", self.seed, 0, (1 << 32) - 1)
        if self.top_logprobs is not None:
            _check_integer("top_logprobs", self.top_logprobs, 0, 20)
        if not isinstance(self.grammar, str) or len(self.grammar) > MAX_GRAMMAR_CHARACTERS:
            raise OptionError("grammar", f"must be a string of at most {MAX_GRAMMAR_CHARACTERS} characters.")
        _check_integer("image_tokens", self.image_tokens, 0, 1 << 20)
        _check_choice("image_token_method", self.image_token_method, TOKEN_METHODS)
        _check_number("repeat_penalty", self.repeat_penalty, 0.1, 10.0)
        _check_number("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        _check_number("presence_penalty", self.presence_penalty, -2.0, 2.0)
        if not isinstance(self.stop, tuple) or not all(isinstance(text, str) for text in self.stop):
            raise OptionError("stop", "must be a tuple of strings.")
        if len(self.stop) > MAX_STOP_SEQUENCES:
            raise OptionError("stop", f"has {len(self.stop)} sequences; expected at most {MAX_STOP_SEQUENCES}.")
        for text in self.stop:
            if not 1 <= len(text.encode("utf-8", "replace")) <= MAX_STOP_BYTES:
                raise OptionError(
                    "stop", f"has {_abbreviate(text)}; expected sequences of 1 to {MAX_STOP_BYTES} bytes."
                )

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is always taken, without sampling."""
        return self.temperature < MIN_TEMPERATURE


@dataclass(frozen=True)
class EngineOptions:
    """How a model is loaded.

    device: "auto" takes the best one that works.
    threads: 0 means one per physical core this process may use.
    context: context length, positions for prompt and answer together; 0 means the model's, at most 4096.
    cache: reuse what was computed from an image, in this process and on disk (`llava_edge.cache`). A path is the folder
        to use, "memory" keeps it in this process only. Answers are the same without it.
    preset: "latency" lets the engines copy weights into a faster layout for this processor where that pays; "memory"
        only memory-maps them and defaults to a context of 2048 (except with tiles) and `kv` "q8_0". "auto" is "latency"
        without copies that would leave less than half of the free memory.
    kv: type of the KV cache; "q8_0" takes half the memory of "f16" and rounds a little more.
    verbose: show llama.cpp's log on stderr. All models of a process share it: the one loaded last decides.
    draft: GGUF file of a draft model for speculative decoding: a small language model with the same vocabulary.
        Answers stay the same.
    """

    device: Device = "auto"
    threads: int = 0
    context: int = 0
    preset: PresetName = "auto"
    kv: KV = "auto"
    verbose: bool = False
    cache: bool | Path | Literal["memory"] = True
    draft: str | Path | None = None

    def __post_init__(self) -> None:
        _convert_numpy_numbers(self)
        _check_choice("device", self.device, DEVICES)
        _check_choice("preset", self.preset, PRESETS)
        _check_choice("kv", self.kv, KV_TYPES)
        _check_integer("threads", self.threads, 0, MAX_THREADS)
        _check_integer("context", self.context, 0, 1 << 20)
        if not isinstance(self.cache, bool | Path) and self.cache != "memory":
            raise OptionError("cache", f'is {_abbreviate(self.cache)}; expected True, False, "memory" or a Path.')
        if self.draft is not None and not (isinstance(self.draft, str | Path) and str(self.draft).strip()):
            raise OptionError("draft", f"is {_abbreviate(self.draft)}; expected the path of a GGUF file.")


@dataclass(frozen=True)
class Timings:
    """Wall time in milliseconds of each stage of one answer.

    `ttft_ms` (time to first token) and `total_ms` count from the start of the process (command line) or of the call
    (library). `decode_ms` and the rate are for all tokens after the first, including the one that ends the answer.
    `preprocess_ms` includes `image_ms`, decoding image files; `encode_ms` includes `project_ms`, the projector. With
    several questions at once, each reports the stages they shared.
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
    """Memory of this process. `private_bytes` excludes mapped files, `file_bytes` counts them; None if unknown."""

    peak_rss_bytes: int | None
    private_bytes: int | None
    file_bytes: int | None = None


@dataclass(frozen=True)
class Result:
    """A finished answer. `prompt_tokens` counts every position of the prompt, `image_tokens` those of images.

    cache: "kv" if the prompt up to its last image was in the KV cache, "embedding" if only image embeddings were known.
    cached_tokens: of the prompt, those that were in the KV cache or restored to it.
    drafted_tokens, accepted_tokens: draft tokens of speculative decoding, and those accepted.
    seed: repeats the answer when passed as `Options.seed`; None if it is greedy.
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
    cached_tokens: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0
    seed: int | None = None


@dataclass(frozen=True)
class TokenChance:
    """How likely a token of the answer was: its bytes, the natural logarithm of its probability at temperature 1 and
    before any penalty, limit or grammar, and the same for the likeliest alternatives, best first."""

    token: bytes
    logprob: float
    top: tuple[tuple[bytes, float], ...]


@dataclass(frozen=True)
class Chunk:
    """A piece of a streamed answer.

    token_count: answer tokens since the previous chunk. Only the last chunk has `finish_reason` and `final`.
    chances: of these tokens, if `Options.top_logprobs` is set.
    """

    text: str
    token_count: int = 0
    finish_reason: FinishReason | None = None
    final: Result | None = None
    chances: tuple[TokenChance, ...] = ()


def result_of(chunks: Iterable[Chunk]) -> Result:
    """Read a stream to its end and return the result in its last chunk."""
    *_, last = chunks
    assert last.final is not None
    return last.final


def _convert_numpy_numbers(options: object) -> None:
    """Convert numpy numbers to Python's, which ctypes and JSON require."""
    for name, value in list(vars(options).items()):
        if isinstance(value, Real) and not isinstance(value, int | float):
            object.__setattr__(options, name, int(value) if isinstance(value, Integral) else float(value))


def _check_integer(name: str, value: object, low: int, high: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise OptionError(name, f"is {_abbreviate(value)}; expected an integer from {low} to {high}.")


def _check_number(name: str, value: object, low: float, high: float) -> None:
    if not isinstance(value, int | float) or isinstance(value, bool) or not low <= value <= high:  # NaN is in no range
        raise OptionError(name, f"is {_abbreviate(value)}; expected a number from {low:g} to {high:g}.")


def _check_choice(name: str, value: object, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise OptionError(name, f"is {_abbreviate(value)}; expected one of {', '.join(allowed)}.")


def _abbreviate(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 40 else text[:37] + "..."
