"""One measurement in a process of its own, so that memory and loading are those of a program that does just this.

The task comes as JSON in the first argument, the numbers go as one line of JSON to stdout.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

from llava_edge.bundle import Bundle
from llava_edge.errors import LlavaEdgeError
from llava_edge.options import EngineOptions, Options, result_of
from llava_edge.prompt import IMAGE_TOKEN_INDEX, Message
from llava_edge.runtimes import devices, limits, native
from llava_edge.runtimes.pictures import limited, prepare
from llava_edge.runtimes.pipeline import Engine


def answer(task: dict[str, Any]) -> dict[str, Any]:
    """Open a bundle and ask about pictures.

    task: bundle, cache (folder), threads, context, device, prompt, max_tokens, image_tokens, preset, and pictures: the
    path of one for each name of a question.
    """
    born = devices.process_start()
    bundle = Bundle.open(Path(task["bundle"]))
    device, threads, context, preset = (task[name] for name in ("device", "threads", "context", "preset"))
    options = EngineOptions(device, threads, context, preset, cache=Path(task["cache"]))
    wanted = Options(max_tokens=task["max_tokens"], image_tokens=task["image_tokens"])
    asked = [Message("user", task["prompt"], 1)]
    begun = time.monotonic()
    # As `llava-edge run` does: the first picture is read and encoded while the language model loads.
    first, *_ = pictures = {name: Path(path) for name, path in task["pictures"].items()}
    prepared = cache(lambda: limited(prepare(pictures[first], bundle.manifest), wanted, bundle.manifest))
    with Engine.open(bundle, options, pictures=[prepared]) as engine:
        loaded = time.monotonic()
        shown = prepared()
        found = {first: result_of(engine.generate(asked, [shown], wanted))}
        cold = (loaded - born) * 1000 + found[first].timings.ttft_ms
        for name in list(pictures)[1:]:
            found[name] = result_of(engine.generate(asked, [pictures[name]], wanted))
        # Text before the picture stays in memory from one question to the next, which no result says.
        text = engine.encode_prompt(asked).index(IMAGE_TOKEN_INDEX)
        return {
            "start_ms": (begun - born) * 1000,
            "load_ms": engine.load_ms,
            "cold_ms": cold,
            "device": engine.choice.name,
            "crops": len(shown.crops),
            "projected": len(shown.rows) if shown.budget else len(shown.crops) * bundle.manifest.vision.image_tokens,
            "integer_projector": native.projector_library() is not None,
            "kv": engine.preset.kv,
            "questions": {
                name: {**asdict(result), "text_known": text if name != first else 0} for name, result in found.items()
            },
            "memory": asdict(devices.memory_use()),
        }


def main() -> None:
    """Print the numbers, or {"error": sentence, "exit_code": what `llava-edge run` would end with}."""
    task = json.loads(sys.argv[1])
    try:
        found = asdict(limits.measure(task["threads"])) if task["kind"] == "limits" else answer(task)
    except LlavaEdgeError as error:
        found = {"error": str(error), "exit_code": error.exit_code}
    sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
