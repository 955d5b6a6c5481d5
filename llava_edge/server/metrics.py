"""Counters in Prometheus' text format. Labels take a fixed set of values, so clients cannot make it grow."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_METRICS = {
    "requests_total": ("counter", "Requests by route and status."),
    "answers_total": ("counter", "Answers by finish reason."),
    "tokens_total": ("counter", "Tokens of prompts (images included), of images alone, and of answers."),
    "stage_seconds_total": ("counter", "Time of all answers, by stage."),
    "crashes_total": ("counter", "Crashes of the model's process."),
    "starts_total": ("counter", "Starts of the model's process."),
    "up": ("gauge", "Whether the model is loaded."),
    "requests_running": ("gauge", "Requests that the model's process answers."),
    "queue_length": ("gauge", "Requests waiting for the model."),
    "requests_in_work": ("gauge", "Requests being handled, of any kind."),
}
_STAGES = ("preprocess", "encode", "prefill", "ttft", "decode", "total")


class Metrics:
    """Counters since the server started."""

    def __init__(self) -> None:
        self._counts: Counter[tuple[str, tuple[tuple[str, str], ...]]] = Counter()

    def count_request(self, route: str, status: int) -> None:
        """Count a response."""
        self._add("requests_total", 1, route=route, status=str(status))

    def count_answer(self, result: Mapping[str, Any]) -> None:
        """Count an answer of the model; `result` is the child's."""
        self._add("answers_total", 1, reason=result["finish_reason"])
        for kind, name in (("prompt", "prompt_tokens"), ("image", "image_tokens"), ("answer", "completion_tokens")):
            self._add("tokens_total", result[name], kind=kind)
        for stage in _STAGES:
            self._add("stage_seconds_total", result["timings"][f"{stage}_ms"] / 1000, stage=stage)

    def render(self, **current: float) -> str:
        """All metrics as text; `current` are the values that are looked up instead of counted."""
        values: dict[tuple[str, tuple[tuple[str, str], ...]], float] = dict(self._counts)
        values.update({(name, ()): value for name, value in current.items()})
        lines = []
        for name, (kind, description) in _METRICS.items():
            lines += [f"# HELP llava_edge_{name} {description}", f"# TYPE llava_edge_{name} {kind}"]
            for (key, labels), value in sorted(values.items()):
                if key == name:
                    pairs = ",".join(f'{label}="{text}"' for label, text in labels)
                    # All digits: the increments of a rounded counter would be lost.
                    lines.append(f"llava_edge_{name}{{{pairs}}} {value}" if pairs else f"llava_edge_{name} {value}")
        return "\n".join(lines) + "\n"

    def _add(self, name: str, amount: Any, **labels: str) -> None:
        self._counts[name, tuple(sorted(labels.items()))] += amount
