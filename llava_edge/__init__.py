"""On-device LLaVA: an image and a question in, an answer out.

    from llava_edge import Llava
    with Llava.load() as llava:
        print(llava.ask("What is this?", images="photo.jpg").text)

Names are imported on first use, so importing this package loads no engine.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

# ONNX Runtime 1.32 sends telemetry unless this is set when it is loaded.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
# numpy's OpenBLAS threads spin for up to 100 ms after a product, on the cores that llama.cpp needs next: prefill of the
# default model took 0.18 instead of 0.11 s. Read when numpy is loaded; the minimum, 4, is 2^4 processor cycles.
os.environ.setdefault("OPENBLAS_THREAD_TIMEOUT", "4")

__version__ = "0.1.0"

if TYPE_CHECKING:
    from llava_edge.api import Llava
    from llava_edge.conversation import Chat
    from llava_edge.errors import LlavaEdgeError
    from llava_edge.json_schema.grammar import from_schema
    from llava_edge.options import Chunk, EngineOptions, Options, Result, TokenChance
    from llava_edge.prompt import Message

__all__ = [
    "Chat",
    "Chunk",
    "EngineOptions",
    "Llava",
    "LlavaEdgeError",
    "Message",
    "Options",
    "Result",
    "TokenChance",
    "__version__",
    "from_schema",
]

_MODULES = {
    "Chat": "llava_edge.conversation",
    "Llava": "llava_edge.api",
    "LlavaEdgeError": "llava_edge.errors",
    "from_schema": "llava_edge.json_schema.grammar",
    "Chunk": "llava_edge.options",
    "EngineOptions": "llava_edge.options",
    "Options": "llava_edge.options",
    "Result": "llava_edge.options",
    "TokenChance": "llava_edge.options",
    "Message": "llava_edge.prompt",
}


def __dir__() -> list[str]:
    return __all__


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_MODULES[name]), name)
