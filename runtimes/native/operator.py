"""vision.onnx with our operators; the shared library beside the kernels has them (src/operators.cpp).

The exporter writes a linear layer in int8 as two integer products and a dozen of steps around them, and attention as a
dozen more (export/clip_onnx.py). Here each becomes one node: `llava_edge.Linear` with x, weight, scale and bias, which
does quick-GELU as well where that follows, and `llava_edge.Attention` with queries, keys and values side by side. The
file stays as it is; what is loaded is a copy of the graph in memory, and weights are mapped from vision.onnx.data as
before.
"""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from llava_edge.runtimes.native.onnx_bytes import Graph, Node
from llava_edge.runtimes.native.steps import WITH_GRAPHS, Steps

DOMAIN = "llava_edge"
MULTIPLE, FLOATS = 16, 32  # of the inner dimension, for src/int16.cpp: with weights of 8 bits, and with floats
MAX_WIDTH = 256  # of a head (src/vision_attention.cpp)

Array = np.ndarray[Any, np.dtype[np.float32]]


def with_operators(model: bytes, threads: int) -> bytes | None:
    """The model with one node for each int8 linear layer and each attention; None if it has no such layer.

    Raises `ValueError` or `IndexError` if it is not an ONNX model.
    """
    graph = Graph(model)
    steps = Steps(graph)
    layers = {
        out: layer for out, layer in steps.layers().items() if graph.constants[layer.weight].shape[0] % MULTIPLE == 0
    }
    ours = {out: Node.make("Linear", DOMAIN, layer.inputs, out, {"threads": threads}) for out, layer in layers.items()}
    for out, before in steps.quick_gelus().items():
        if before in layers:
            inputs, attributes = layers[before].inputs, {"threads": threads, "quick_gelu": 1}
            ours[out] = Node.make("Linear", DOMAIN, inputs, out, attributes)
    if not ours or any(node.kind in WITH_GRAPHS for node in graph.nodes):
        return None
    for out, (qkv, heads, width) in steps.attentions().items():
        if width <= MAX_WIDTH and width % MULTIPLE == 0:
            ours[out] = Node.make("Attention", DOMAIN, [qkv], out, {"threads": threads, "heads": heads})
    return graph.with_nodes([ours.get(node.outputs[0], node) for node in graph.nodes], DOMAIN)


def linear(
    library: Path,
    x: Array,
    weight: np.ndarray[Any, np.dtype[np.int8]],
    scale: Array,
    bias: Array,
    threads: int = 1,
    quick_gelu: bool = False,
) -> Array:
    """(rows, inner) -> (rows, columns): (x @ weight) * scale + bias, and quick-GELU of it, as the operator computes it.

    Raises `OSError` if it cannot.
    """
    out = np.empty((len(x), weight.shape[1]), np.float32)
    _call(library, "linear", x, weight, scale, bias, quick_gelu, out, len(x), *weight.shape[::-1], threads)
    return out


def attention(library: Path, qkv: Array, heads: int, threads: int = 1) -> Array:
    """(batch, positions, 3 * heads * width) -> (batch, positions, heads * width), as the operator computes it.

    Raises `OSError` if it cannot.
    """
    batch, positions, all_three = qkv.shape
    out = np.empty((batch, positions, all_three // 3), np.float32)
    _call(library, "attend", qkv, out, batch, positions, heads, all_three // 3 // heads, threads)
    return out


def projects(weight: np.ndarray[Any, Any]) -> bool:
    """Whether `project` takes a layer's weights, (out, in), as they are mapped."""
    return weight.dtype in (np.float16, np.float32) and weight.flags.c_contiguous and weight.shape[1] % FLOATS == 0


def project(
    library: Path, x: Array, weight: np.ndarray[Any, Any], bias: Array, threads: int = 1, gelu: bool = False
) -> Array:
    """(rows, inner) -> (rows, out): x @ weight.T + bias, and GELU of it, by the operators' kernel.

    Raises `OSError` if it cannot.
    """
    out, halves = np.empty((len(x), len(weight)), np.float32), weight.dtype == np.float16
    x, bias = (np.ascontiguousarray(array, np.float32) for array in (x, bias))
    _call(library, "project", halves, x, weight, bias, gelu, out, len(x), *weight.shape, threads)
    return out


@cache
def _opened(library: Path) -> ctypes.CDLL:
    return ctypes.CDLL(str(library))


def _call(library: Path, name: str, *arguments: np.ndarray[Any, Any] | int) -> None:
    function = getattr(_opened(library), f"llava_edge_native_{name}")
    given = [item.ctypes.data_as(ctypes.c_void_p) if isinstance(item, np.ndarray) else int(item) for item in arguments]
    if not function(*given):
        raise OSError(f"the operators' library cannot {name}")
