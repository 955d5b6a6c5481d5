"""One measurement in a process of its own, so that memory and loading are those of a program that does just this.

The task comes as JSON in the first argument, the numbers go as one line of JSON to stdout.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from llava_edge.bench.records import QUESTIONS
from llava_edge.bundle import Bundle
from llava_edge.errors import LlavaEdgeError
from llava_edge.options import EngineOptions, Options, Result
from llava_edge.prompt import Message
from llava_edge.runtimes import devices, limits
from llava_edge.runtimes.pictures import prepare
from llava_edge.runtimes.pipeline import Engine


def answer(task: dict[str, Any]) -> dict[str, Any]:
    """Open a bundle and ask the three questions of `records.QUESTIONS` about the task's two pictures.

    task: bundle, threads, context, device, prompt, max_tokens, image_tokens, pictures (two paths).
    """
    born = devices.process_start()
    bundle = Bundle.open(Path(task["bundle"]))
    begun = time.monotonic()
    with Engine.open(bundle, EngineOptions(task["device"], task["threads"], task["context"])) as engine:
        loaded = time.monotonic()
        first, other = task["pictures"]
        questions = {}
        for name, picture in zip(QUESTIONS, (first, other, other), strict=True):
            questions[name] = _ask(engine, picture, task)
        memory = devices.memory_use()
        crops = len(prepare(Path(first), bundle.manifest).crops)
        return {
            "start_ms": (begun - born) * 1000,
            "load_ms": (loaded - begun) * 1000,
            "device": engine.choice.name,
            "crops": crops,
            "questions": {name: asdict(result) for name, result in questions.items()},
            "memory": asdict(memory),
        }


def _ask(engine: Engine, picture: str, task: dict[str, Any]) -> Result:
    options = Options(max_tokens=task["max_tokens"], image_tokens=task["image_tokens"])
    for chunk in engine.generate([Message("user", task["prompt"], 1)], [Path(picture)], options):
        if chunk.final is not None:
            return chunk.final
    raise RuntimeError("the stream ended without a result")


def main() -> None:
    """Print the numbers, or {"error": sentence}."""
    task = json.loads(sys.argv[1])
    try:
        found = asdict(limits.measure(task["threads"])) if task["kind"] == "limits" else answer(task)
    except LlavaEdgeError as error:
        found = {"error": str(error)}
    sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
