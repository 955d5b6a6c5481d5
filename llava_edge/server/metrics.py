"""Counters of the server in Prometheus' text format. Labels have a fixed set of values, so nobody can grow it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_HELP = {
    "requests_total": ("counter", "Requests by route and status."),
    "answers_total": ("counter", "Answers by why they ended."),
    "tokens_total": ("counter", "Tokens: of prompts (images included), of images alone, of answers."),
    "stage_seconds_total": ("counter", "Time of all answers, by stage."),
    "crashes_total": ("counter", "Deaths of the model's process."),
    "starts_total": ("counter", "Starts of the model's process."),
    "up": ("gauge", "Whether the model is loaded."),
    "queue_length": ("gauge", "Requests that wait for the model."),
    "requests_in_work": ("gauge", "Requests in work of any kind."),
}
_STAGES = ("preprocess", "encode", "prefill", "ttft", "decode", "total")


class Metrics:
    """What was counted since the server started."""

    def __init__(self) -> None:
        self._counts: Counter[tuple[str, tuple[tuple[str, str], ...]]] = Counter()

    def request(self, route: str, status: int) -> None:
        """A request was answered."""
        self._add("requests_total", 1, route=route, status=str(status))

    def answer(self, result: Mapping[str, Any]) -> None:
        """The model answered; `result` is the child's."""
        self._add("answers_total", 1, reason=result["finish_reason"])
        for kind, name in (("prompt", "prompt_tokens"), ("image", "image_tokens"), ("answer", "completion_tokens")):
            self._add("tokens_total", result[name], kind=kind)
        for stage in _STAGES:
            self._add("stage_seconds_total", result["timings"][f"{stage}_ms"] / 1000, stage=stage)

    def text(self, **now: float) -> str:
        """All of it; `now` are the values that are looked up instead of counted."""
        values: dict[tuple[str, tuple[tuple[str, str], ...]], float] = dict(self._counts)
        values.update({(name, ()): value for name, value in now.items()})
        lines = []
        for name, (kind, about) in _HELP.items():
            lines += [f"# HELP llava_edge_{name} {about}", f"# TYPE llava_edge_{name} {kind}"]
            for (key, labels), value in sorted(values.items()):
                if key == name:
                    inside = ",".join(f'{label}="{text}"' for label, text in labels)
                    # All digits: of a rounded counter, what it grew by since a minute ago would be rounded to nothing.
                    lines.append(f"llava_edge_{name}{{{inside}}} {value}" if inside else f"llava_edge_{name} {value}")
        return "\n".join(lines) + "\n"

    def _add(self, name: str, amount: Any, **labels: str) -> None:
        self._counts[name, tuple(sorted(labels.items()))] += amount
