"""One measurement in its own process, so that memory and load time are those of a program that does nothing else.

The arguments are "limits" and a number of threads, or "answers" and a `Task` as JSON. One line of JSON is printed: a
`Roofline`, a `Sample`, or a `Failure`.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import asdict
from functools import cache
from pathlib import Path

from llava_edge.bench.messages import Answer, Failure, Sample, Task
from llava_edge.bundle import Bundle
from llava_edge.errors import LlavaEdgeError
from llava_edge.options import EngineOptions, Options, result_of
from llava_edge.prompt import IMAGE_TOKEN_INDEX, Message
from llava_edge.runtimes import machine, native, roofline
from llava_edge.runtimes.pictures import apply_token_budget, prepare
from llava_edge.runtimes.pipeline import Engine


def measure_answers(task: Task) -> Sample:
    """Open a bundle and answer the prompt about each picture."""
    process_start = machine.process_start()
    bundle = Bundle.open(Path(task.bundle))
    engine_options = EngineOptions(task.device, task.threads, task.context, task.preset, cache=Path(task.cache))
    options = Options(max_tokens=task.max_tokens, image_tokens=task.image_tokens)
    messages = [Message("user", task.prompt, 1)]
    open_start = time.monotonic()
    # As `llava-edge run` does: the first picture is read and encoded while the language model loads.
    first_name, *_ = pictures = {name: Path(path) for name, path in task.pictures.items()}
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
        rows = len(picture.rows) if picture.budget else len(picture.crops) * bundle.manifest.vision.image_tokens
        return Sample(
            start_ms=(open_start - process_start) * 1000,
            load_ms=engine.model.load_ms,
            cold_ms=cold,
            device=engine.model.device.name,
            crops=len(picture.crops),
            projected=rows,
            integer_projector=native.projector_library() is not None,
            integer_prefill=bundle.manifest.language.quantization != "f16" or _has_f16_kernel(),
            kv=engine.model.preset.kv,
            answers={
                name: Answer(result, text_positions if name != first_name else 0) for name, result in results.items()
            },
            memory=machine.memory_use(),
        )


def _has_f16_kernel() -> bool:
    """Whether our kernels multiply F16 weights, as integers or in bfloat16: faster than any float32 product."""
    return "F16" in {kind for kind, *_ in native.activate().many_rows}


def main() -> None:
    """Print what was found."""
    kind, task = sys.argv[1:]
    found: roofline.Roofline | Sample | Failure
    try:
        # Not built with checks: those of the options give the sentence that `llava-edge run` does.
        found = roofline.measure(int(task)) if kind == "limits" else measure_answers(Task(**json.loads(task)))
    except LlavaEdgeError as error:
        found = Failure(str(error), error.exit_code)
    sys.stdout.write(json.dumps(asdict(found)) + "\n")


if __name__ == "__main__":
    main()
