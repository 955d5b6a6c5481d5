"""Results of a measurement, as frozen dataclasses and one JSON object.

The JSON schema is these classes, field by field; `SCHEMA` increases when a field changes its meaning or is removed.
Times are in milliseconds. Knows nothing about how anything is measured or shown.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any, Literal

from llava_edge.errors import DataError, MissingError
from llava_edge.options import PresetName
from llava_edge.typed import build

SCHEMA = 3

# Stages of a process: Python and imports; opening the bundle; process start to the first token of the first answer
# (whose picture is encoded while the language model loads).
START, LOAD, COLD = "start", "load", "cold_first_token"
# Stages of a question, in order. `first_token` is from question to first token, `decode` is per token after that,
# including the one that ends the answer.
IMAGE, PREPROCESS, ENCODE, PROJECT, PREFILL = "image", "preprocess", "encode", "project", "prefill"
FIRST_TOKEN, DECODE, TOTAL = "first_token", "decode", "total"
PARTS = (IMAGE, PREPROCESS, ENCODE, PROJECT, PREFILL)  # consecutive within `first_token`, except during LOAD
# `first`: the first of its process; `warm`: a new picture, only the text before it cached; `again`: the same picture;
# `known`: the first of a process, about a picture that an earlier process cached.
FIRST, WARM, AGAIN, KNOWN = "first", "warm", "again", "known"
QUESTIONS = (FIRST, WARM, AGAIN, KNOWN)

Limit = Literal["", "int8_ops", "fp32_ops", "read_bytes"]


@dataclass(frozen=True)
class Stage:
    """Milliseconds of one stage, one sample per repeat.

    share: fraction reached of the machine's limit named `limit`: the stage's minimum work, divided by its median and by
    the limit. None where no limit is known, or nothing was computed.
    """

    samples: tuple[float, ...]
    median: float
    low: float
    high: float
    share: float | None = None
    limit: Limit = ""


@dataclass(frozen=True)
class Question:
    """One kind of question. cache: `Result.cache` of each repeat."""

    cache: tuple[str, ...]
    image_tokens: int
    prompt_tokens: int
    completion_tokens: int
    stages: dict[str, Stage]


@dataclass(frozen=True)
class Configuration:
    """What is measured. model: name in the manifest, or as given where it does not tell the bundles of a sweep apart.
    identity: hash over the bundle's parts. context: positions, 0 is the model's default.

    image_tokens: positions per picture, 0 is all. preset: as in `EngineOptions`.
    """

    model: str
    identity: str
    quantization: str
    vision: str
    device: str
    threads: int
    context: int
    image_tokens: int = 0
    preset: PresetName = "auto"

    @property
    def settings(self) -> tuple[object, ...]:
        """Everything but the bundle's content, in the order of a CSV's columns."""
        bundle = (self.model, self.quantization, self.vision)
        return (*bundle, self.device, self.threads, self.context, self.image_tokens, self.preset)

    @property
    def label(self) -> str:
        """Human-readable name; differs between the configurations of one sweep."""
        context = f", context {self.context}" if self.context else ""
        context += f", {self.image_tokens} image tokens" if self.image_tokens else ""
        context += f", preset {self.preset}" if self.preset != "auto" else ""
        threads = f"{self.threads} thread" + "s" * (self.threads != 1)
        return f"{self.model} {self.quantization} + {self.vision}, {threads}{context}"


@dataclass(frozen=True)
class Run:
    """Results of one configuration. error: why there are none, else empty. exit_code: that of `llava-edge run` then.

    memory: bytes, medians over the repeats, at the end of all questions: "peak_rss", "private", "file".
    """

    configuration: Configuration
    error: str = ""
    process: dict[str, Stage] = field(default_factory=dict)
    questions: dict[str, Question] = field(default_factory=dict)
    memory: dict[str, int] = field(default_factory=dict)
    exit_code: int = 0


@dataclass(frozen=True)
class Report:
    """One run of `llava-edge bench`. limits: by number of threads, the best reached in this run.

    limits_errors: why limits are None, by number of threads.
    """

    schema: int
    created: str
    machine: dict[str, Any]
    versions: dict[str, str]
    settings: dict[str, Any]
    limits: dict[str, dict[str, float] | None]
    runs: tuple[Run, ...]
    limits_errors: dict[str, str] = field(default_factory=dict)

    def to_json(self) -> str:
        """The report as one line of JSON."""
        return json.dumps(asdict(self), allow_nan=False)


def summarize(samples: list[float], share: float | None = None, limit: Limit = "") -> Stage:
    """Summarize at least one sample as median and extremes."""
    kept = tuple(round(sample, 3) for sample in samples)
    return Stage(kept, round(median(kept), 3), min(kept), max(kept), share, limit)


def read_report(path: Path) -> Report:
    """Read the last line of a file that `llava-edge bench` wrote. Raises `MissingError` or `DataError`."""
    try:
        raw = json.loads(path.read_text("utf-8").strip().splitlines()[-1])
        if raw["schema"] != SCHEMA:
            raise DataError(f"{path} has schema {raw['schema']!r}; this program reads {SCHEMA}. Measure it again.")
        report = build(Report, raw)
        if not all(_is_complete(run) for run in report.runs):
            raise ValueError("a run without an error lacks questions or stages")
        return report
    except FileNotFoundError as error:
        raise MissingError(f"{path} does not exist; expected the JSON line of 'llava-edge bench'.") from error
    except OSError as error:
        raise MissingError(
            f"{path} cannot be read ({error.strerror}); expected a file with the JSON line of 'llava-edge bench'."
        ) from error
    except (ValueError, IndexError, KeyError, TypeError, RecursionError) as error:
        raise DataError(
            f"{path} does not end with the JSON line of 'llava-edge bench'; 'llava-edge bench > FILE' writes one."
        ) from error


def _is_complete(run: Run) -> bool:
    """Whether a run has an error, or every question with all stages but `decode`, which a short answer lacks."""
    required = {*PARTS, FIRST_TOKEN, TOTAL}
    asked = {name for name, question in run.questions.items() if required <= question.stages.keys()}
    return bool(run.error) or asked == {*QUESTIONS}
