"""Fuse nodes of vision.onnx into our operators, which are in a shared library of their own (src/operators.cpp).

The exporter writes an int8 linear layer as two integer products and a dozen nodes around them, and attention as a dozen
more (export/clip_onnx.py). Here each becomes one node: `llava_edge.Linear` with x, weight, scale and bias, including a
quick-GELU that follows, and `llava_edge.Attention` with concatenated queries, keys and values. The file is not changed:
a copy of the graph in memory is loaded, and weights are mapped from vision.onnx.data as before.
"""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from llava_edge.runtimes.native.onnx_bytes import Graph, Node
from llava_edge.runtimes.native.patterns import CONTROL_FLOW_OPS, Patterns

DOMAIN = "llava_edge"
INT8_MULTIPLE, FLOAT_MULTIPLE = 16, 32  # src/linear.cpp needs such inner dimensions, for int8 and for float weights
MAX_WIDTH = 256  # of a head (src/vision_attention.cpp)

Array = np.ndarray[Any, np.dtype[np.float32]]


def fuse_operators(model: bytes, threads: int) -> bytes | None:
    """Replace each int8 linear layer and each attention by one node; None if the model has no such layer.

    Raises `ValueError` or `IndexError` if it is not an ONNX model.
    """
    graph = Graph(model)
    patterns = Patterns(graph)
    layers = {
        out: layer
        for out, layer in patterns.linear_layers().items()
        if graph.constants[layer.weight].shape[0] % INT8_MULTIPLE == 0
    }
    fused = {out: Node.make("Linear", DOMAIN, layer, out, {"threads": threads}) for out, layer in layers.items()}
    for out, x in patterns.quick_gelus().items():
        if x in layers:
            fused[out] = Node.make("Linear", DOMAIN, layers[x], out, {"threads": threads, "quick_gelu": 1})
    if not fused or any(node.op_type in CONTROL_FLOW_OPS for node in graph.nodes):
        return None
    for out, (qkv, heads, width) in patterns.attentions().items():
        if width <= MAX_WIDTH and width % INT8_MULTIPLE == 0:
            fused[out] = Node.make("Attention", DOMAIN, [qkv], out, {"threads": threads, "heads": heads})
    return graph.replace_nodes([fused.get(node.outputs[0], node) for node in graph.nodes], DOMAIN)


def linear(
    library: Path,
    x: Array,
    weight: np.ndarray[Any, np.dtype[np.int8]],
    scale: Array,
    bias: Array,
    threads: int = 1,
    quick_gelu: bool = False,
) -> Array:
    """Run the operator: (rows, inner) -> (rows, columns), (x @ weight) * scale + bias, with quick-GELU on request.

    Raises `OSError` if it does not support the shape.
    """
    out = np.empty((len(x), weight.shape[1]), np.float32)
    if not _call(library, "linear", x, weight, scale, bias, quick_gelu, out, len(x), *weight.shape[::-1], threads):
        raise OSError(f"linear of {library.name} does not support these shapes")
    return out


def attention(library: Path, qkv: Array, heads: int, threads: int = 1) -> Array:
    """Run the operator: (batch, positions, 3 * heads * width) -> (batch, positions, heads * width).

    Raises `OSError` if it does not support the shape.
    """
    batch, positions, columns = qkv.shape
    out = np.empty((batch, positions, columns // 3), np.float32)
    if not _call(library, "attend", qkv, out, batch, positions, heads, columns // 3 // heads, threads):
        raise OSError(f"attend of {library.name} does not support these shapes")
    return out


def supports_projection(weight: np.ndarray[Any, Any]) -> bool:
    """Whether `project` supports a layer's mapped weights, (out, in)."""
    return (
        weight.dtype in (np.float16, np.float32) and weight.flags.c_contiguous and weight.shape[1] % FLOAT_MULTIPLE == 0
    )


def project(
    library: Path, x: Array, weight: np.ndarray[Any, Any], bias: Array, threads: int = 1, gelu: bool = False
) -> Array:
    """Run the projector's kernel: (rows, inner) -> (rows, out), x @ weight.T + bias, with GELU on request.

    For layers that `supports_projection` admits. Raises `MemoryError`, or `OSError` if the library cannot be loaded.
    """
    out, is_half = np.empty((len(x), len(weight)), np.float32), weight.dtype == np.float16
    x, bias = (np.ascontiguousarray(array, np.float32) for array in (x, bias))
    if not _call(library, "project", is_half, x, weight, bias, gelu, out, len(x), *weight.shape, threads):
        raise MemoryError
    return out


@cache
def _open_library(library: Path) -> ctypes.CDLL:
    return ctypes.CDLL(str(library))


def _call(library: Path, name: str, *arguments: np.ndarray[Any, Any] | int) -> bool:
    """Whether it has done its work: not if it does not support the shapes, or memory is lacking."""
    function = getattr(_open_library(library), f"llava_edge_native_{name}")
    values = [item.ctypes.data_as(ctypes.c_void_p) if isinstance(item, np.ndarray) else int(item) for item in arguments]
    return bool(function(*values))
