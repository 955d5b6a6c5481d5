"""vision.onnx with our operators; the shared library beside the kernels has them (src/operators.cpp).

The exporter writes a linear layer in int8 as two integer products and a dozen of steps around them, and attention as a
dozen more (export/clip_onnx.py). Here each becomes one node: `llava_edge.Linear` with x, weight, scale and bias, and
`llava_edge.Attention` with queries, keys and values side by side. The file stays as it is; what is loaded is a copy of
the graph in memory, and weights are mapped from vision.onnx.data as before.
"""

from __future__ import annotations

import ctypes
import math
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from llava_edge.runtimes.native.onnx_bytes import FLOAT, INT8, Constant, Graph, Node

DOMAIN = "llava_edge"
MULTIPLE, FLOATS = 16, 32  # of the inner dimension, for src/int16.cpp: with weights of 8 bits, and with floats
MAX_WIDTH = 256  # of a head (src/vision_attention.cpp)
_WITH_GRAPHS = {"If", "Loop", "Scan", "SequenceMap"}  # of their own, which may use values of the whole one
_NOTHING = Constant((), 0, ())

Array = np.ndarray[Any, np.dtype[np.float32]]


def with_operators(model: bytes, threads: int) -> bytes | None:
    """The model with one node for each int8 linear layer and each attention; None if it has no such layer.

    Raises `ValueError` or `IndexError` if it is not an ONNX model.
    """
    graph = Graph(model)
    steps = _Steps(graph)
    layers = steps.layers(threads)
    if not layers or any(node.kind in _WITH_GRAPHS for node in graph.nodes):
        return None
    ours = layers | steps.attentions(threads)
    return graph.with_nodes([ours.get(node.outputs[0], node) for node in graph.nodes], DOMAIN)


def linear(
    library: Path,
    x: Array,
    weight: np.ndarray[Any, np.dtype[np.int8]],
    scale: Array,
    bias: Array,
    threads: int = 1,
) -> Array:
    """(rows, inner) -> (rows, columns): (x @ weight) * scale + bias, as the operator computes it.

    Raises `OSError` if it cannot.
    """
    out = np.empty((len(x), weight.shape[1]), np.float32)
    _call(library, "linear", x, weight, scale, bias, out, len(x), *weight.shape[::-1], threads)
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


def project(library: Path, x: Array, weight: np.ndarray[Any, Any], bias: Array, threads: int = 1) -> Array:
    """(rows, inner) -> (rows, out): x @ weight.T + bias by the operators' kernel. Raises `OSError` if it cannot."""
    out, halves = np.empty((len(x), len(weight)), np.float32), weight.dtype == np.float16
    x, bias = (np.ascontiguousarray(array, np.float32) for array in (x, bias))
    _call(library, "project", halves, x, weight, bias, out, len(x), *weight.shape, threads)
    return out


@cache
def _opened(library: Path) -> ctypes.CDLL:
    return ctypes.CDLL(str(library))


def _call(library: Path, name: str, *arguments: np.ndarray[Any, Any] | int) -> None:
    function = getattr(_opened(library), f"llava_edge_native_{name}")
    given = [item.ctypes.data_as(ctypes.c_void_p) if isinstance(item, np.ndarray) else int(item) for item in arguments]
    if not function(*given):
        raise OSError(f"the operators' library cannot {name}")


class _Steps:
    """What a graph computes, looked at backwards from each value."""

    def __init__(self, graph: Graph) -> None:
        self._nodes = graph.nodes
        self._constants = graph.constants
        self._made_by = {output: node for node in graph.nodes for output in node.outputs}

    def layers(self, threads: int) -> dict[str, Node]:
        """Output of each linear layer -> the node that computes it at once."""
        found = {}
        for node in self._nodes:
            inputs = self._layer(node)
            if inputs is not None:
                found[node.outputs[0]] = Node.make("Linear", DOMAIN, inputs, node.outputs[0], {"threads": threads})
        return found

    def attentions(self, threads: int) -> dict[str, Node]:
        """The same for attention."""
        found = {}
        for node in self._nodes:
            qkv, heads = self._attention(node)
            if qkv:
                given = {"threads": threads, "heads": heads}
                found[node.outputs[0]] = Node.make("Attention", DOMAIN, [qkv], node.outputs[0], given)
        return found

    def _layer(self, node: Node) -> tuple[str, str, str, str] | None:
        """x, weight, scale and bias, if the node's sum is (product of the first term * scale + bias) + the second's."""
        if node.kind != "Add":
            return None
        first = self._trace(node.inputs[0], "Add", "Mul", "Cast", "MatMulInteger", "QuantizeLinear")
        second = self._trace(node.inputs[1], "Mul", "Cast", "MatMulInteger", "QuantizeLinear", "Sub")
        if not first or not second:
            return None
        x, weight, bias, rest = first[4].inputs[0], first[3].inputs[1], first[0].inputs[1], second[4]
        # Of the second: what rounding x left over, times the same weights.
        again = self._made_by.get(rest.inputs[1])
        if again is None or again.kind != "DequantizeLinear" or rest.inputs[0] != x or second[2].inputs[1] != weight:
            return None
        if again.inputs != (first[4].outputs[0], *first[4].inputs[1:]):
            return None
        scale = self._scale(first[4], first[3], first[1])
        if not scale or scale != self._scale(second[3], second[2], second[0]):
            return None
        of = [self._constants.get(name, _NOTHING) for name in (weight, scale, bias)]
        inner, columns = of[0].shape if len(of[0].shape) == 2 else (0, 0)
        fits = of[0].type == INT8 and inner % MULTIPLE == 0 and inner > 0
        if not fits or [(item.shape, item.type) for item in of[1:]] != 2 * [((columns,), FLOAT)]:
            return None
        return x, weight, scale, bias

    def _scale(self, rounded: Node, product: Node, scaled: Node) -> str:
        """The weights' scale of one term, if it is (q - zero) @ weight * (step * scale), as q was rounded; or empty."""
        scales = self._made_by.get(scaled.inputs[1])
        if scales is None or scales.kind != "Mul" or (scales.inputs[0], *product.inputs[2:]) != rounded.inputs[1:]:
            return ""
        return scales.inputs[1]

    def _attention(self, node: Node) -> tuple[str, int]:
        """Queries, keys and values side by side, and how many heads, if the node's value is their attention."""
        steps = self._trace(node.outputs[0], "Reshape", "Transpose", "MatMul", "Softmax", "MatMul")
        if not steps:
            return "", 0
        joined, turned, weighed, soft, product = steps
        q = self._trace(product.inputs[0], "Mul", "Gather", "Transpose", "Reshape")
        k = self._trace(product.inputs[1], "Transpose", "Gather", "Transpose")
        v = self._trace(weighed.inputs[1], "Gather", "Transpose")
        if not q or not k or not v:
            return "", 0
        shape = self._values(q[3].inputs[1])
        if len(shape) != 5 or shape[:3] != (0, 0, 3):
            return "", 0
        heads, width = int(shape[3]), int(shape[4])
        chosen = [self._values(item.inputs[1]) + item.attributes.get("axis", (0,)) for item in (q[1], k[1], v[0])]
        known = [
            q[2] is k[2] is v[1] and _order(q[2]) == (2, 0, 3, 1, 4),
            chosen == [(0, 0), (1, 0), (2, 0)],
            _order(k[0]) == (0, 1, 3, 2) and _order(turned) == (0, 2, 1, 3),
            soft.attributes.get("axis", (-1,)) == (-1,),
            self._values(joined.inputs[1]) == (0, 0, heads * width),
            heads > 0 and 0 < width <= MAX_WIDTH and width % MULTIPLE == 0,
        ]
        if not all(known) or self._values(q[0].inputs[1]) != (float(np.float32(1 / math.sqrt(width))),):
            return "", 0
        return q[3].inputs[0], heads

    def _trace(self, name: str, *kinds: str) -> list[Node]:
        """The nodes of these kinds that make a value, following first inputs; none if they are of others."""
        found: list[Node] = []
        for kind in kinds:
            node = self._made_by.get(name)
            if node is None or node.kind != kind:
                return []
            found.append(node)
            name = node.inputs[0]
        return found

    def _values(self, name: str) -> tuple[float, ...]:
        return self._constants.get(name, _NOTHING).values


def _order(transpose: Node) -> tuple[int, ...]:
    return transpose.attributes.get("perm", ())
