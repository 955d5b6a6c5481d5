"""One measurement in its own process, so that memory and load time are those of a program that does nothing else.

The task is JSON in the first argument; the results are printed as one line of JSON.
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
from llava_edge.runtimes import machine, native, roofline
from llava_edge.runtimes.pictures import apply_token_budget, prepare
from llava_edge.runtimes.pipeline import Engine


def measure_answers(task: dict[str, Any]) -> dict[str, Any]:
    """Open a bundle and answer the prompt about each picture.

    task: bundle, cache (folder), threads, context, device, prompt, max_tokens, image_tokens, preset, and pictures: name
    of the question -> path.
    """
    process_start = machine.process_start()
    bundle = Bundle.open(Path(task["bundle"]))
    device, threads, context, preset = (task[name] for name in ("device", "threads", "context", "preset"))
    engine_options = EngineOptions(device, threads, context, preset, cache=Path(task["cache"]))
    options = Options(max_tokens=task["max_tokens"], image_tokens=task["image_tokens"])
    messages = [Message("user", task["prompt"], 1)]
    open_start = time.monotonic()
    # As `llava-edge run` does: the first picture is read and encoded while the language model loads.
    first_name, *_ = pictures = {name: Path(path) for name, path in task["pictures"].items()}
    prepared = cache(
        lambda: apply_token_budget(prepare(pictures[first_name], bundle.manifest), options, bundle.manifest)
    )
    with Engine.open(bundle, engine_options, pictures=[prepared]) as engine:
        open_end = time.monotonic()
        picture = prepared()
        results = {first_name: result_of(engine.generate(messages, [picture], options))}
        cold = (open_end - process_start) * 1000 + results[first_name].timings.ttft_ms
        for name in list(pictures)[1:]:
            results[name] = result_of(engine.generate(messages, [pictures[name]], options))
        # Text before the picture stays in the KV cache from one question to the next, which no result reports.
        text_positions = engine.encode_prompt(messages).index(IMAGE_TOKEN_INDEX)
        return {
            "start_ms": (open_start - process_start) * 1000,
            "load_ms": engine.model.load_ms,
            "cold_ms": cold,
            "device": engine.model.device.name,
            "crops": len(picture.crops),
            "projected": len(picture.rows)
            if picture.budget
            else len(picture.crops) * bundle.manifest.vision.image_tokens,
            "integer_projector": native.projector_library() is not None,
            "integer_prefill": bundle.manifest.language.quantization != "f16" or _has_f16_kernel(),
            "kv": engine.model.preset.kv,
            "questions": {
                name: {**asdict(result), "text_known": text_positions if name != first_name else 0}
                for name, result in results.items()
            },
            "memory": asdict(machine.memory_use()),
        }


def _has_f16_kernel() -> bool:
    """Whether our kernels multiply F16 weights, as integers or in bfloat16: faster than any float32 product."""
    return "F16" in {kind for kind, *_ in native.activate().many_rows}


def main() -> None:
    """Print the results, or {"error": sentence, "exit_code": that of `llava-edge run`}."""
    task = json.loads(sys.argv[1])
    try:
        results = asdict(roofline.measure(task["threads"])) if task["kind"] == "limits" else measure_answers(task)
    except LlavaEdgeError as error:
        results = {"error": str(error), "exit_code": error.exit_code}
    sys.stdout.write(json.dumps(results) + "\n")


if __name__ == "__main__":
    main()
