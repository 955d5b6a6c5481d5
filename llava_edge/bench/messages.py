"""What a measurement and its processes tell each other, as JSON: its task and what it found."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from llava_edge.options import Device, Memory, PresetName, Result


@dataclass(frozen=True)
class Task:
    """Open a bundle and answer the prompt about each picture. bundle, cache: folders; otherwise as in the options.

    pictures: name of the question -> path.
    """

    bundle: str
    cache: str
    threads: int
    context: int
    device: Device
    preset: PresetName
    prompt: str
    max_tokens: int
    image_tokens: int
    pictures: dict[str, str]


@dataclass(frozen=True)
class Answer:
    """text_known: positions of text before the picture that were in the KV cache, which no result reports."""

    result: Result
    text_known: int


@dataclass(frozen=True)
class Sample:
    """What one process measured.

    cold_ms: from process start to the first token. crops, projected: of the first picture; rows that were projected.
    integer_projector, integer_prefill: whether products are of integers, or as fast as those.
    """

    start_ms: float
    load_ms: float
    cold_ms: float
    device: str
    crops: int
    projected: int
    integer_projector: bool
    integer_prefill: bool
    kv: Literal["f16", "q8_0"]
    answers: dict[str, Answer]
    memory: Memory


@dataclass(frozen=True)
class Failure:
    """A sentence, and the exit code of `llava-edge run`."""

    error: str
    exit_code: int
