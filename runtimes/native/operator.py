"""vision.onnx with our operator for its linear layers; the shared library beside the kernels has it (src/linear.cpp).

The exporter writes a linear layer in int8 as two integer products and a dozen of steps around them
(export/clip_onnx.py). Here they become one node, `llava_edge.Linear`: x, weight, scale, bias. The file stays as it is;
what is loaded is a copy of the graph in memory, and weights are mapped from vision.onnx.data as before.

Reads and writes ONNX's protocol buffers without the package onnx, which the runtime does not need otherwise: of each
node inputs, outputs and operator, and the sizes of weights. Numbers of fields are those of onnx.proto.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

DOMAIN, NAME = "llava_edge", "Linear"
MULTIPLE = 16  # of the inner dimension, for src/int16.cpp

_GRAPH, _OPSETS = 7, 8  # of ModelProto
_NODE, _INITIALIZER, _OUTPUT = 1, 5, 12  # of GraphProto
_FLOAT, _INT8 = 1, 3  # of TensorProto
_BYTES = 2  # wire type
_WITH_GRAPHS = {"If", "Loop", "Scan", "SequenceMap"}  # of their own, which may use values of the whole one


@dataclass(frozen=True)
class _Node:
    raw: bytes
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    kind: str


def with_linear(model: bytes, threads: int) -> bytes | None:
    """The model with one node for each int8 linear layer; None if it has none that we know.

    Raises `ValueError` or `IndexError` if it is not an ONNX model.
    """
    fields = list(_fields(model))
    graph = next(value for number, value in fields if number == _GRAPH and isinstance(value, bytes))
    parts = list(_fields(graph))
    nodes = [_node(value) for number, value in parts if number == _NODE and isinstance(value, bytes)]
    layers = _layers(nodes, _shapes(parts))
    if not layers or any(node.kind in _WITH_GRAPHS for node in nodes):
        return None
    changed = [
        _linear(layers[node.outputs[0]], node.outputs[0], threads) if node.outputs[0] in layers else node
        for node in nodes
    ]
    wanted = {_text(value, 1) for number, value in parts if number == _OUTPUT and isinstance(value, bytes)}
    kept: list[_Node] = []
    for node in reversed(changed):
        if wanted & set(node.outputs):
            kept.append(node)
            wanted |= set(node.inputs)
    others = b"".join(
        _field(number, value)
        for number, value in parts
        if number != _NODE
        and not (number == _INITIALIZER and isinstance(value, bytes) and _text(value, 8) not in wanted)
    )
    body = b"".join(_field(_NODE, node.raw) for node in reversed(kept)) + others
    head = b"".join(_field(number, value) for number, value in fields if number != _GRAPH)
    return head + _field(_OPSETS, _field(1, DOMAIN.encode()) + _field(2, 1)) + _field(_GRAPH, body)


def linear(
    library: Path,
    x: np.ndarray[tuple[int, int], np.dtype[np.float32]],
    weight: np.ndarray[tuple[int, int], np.dtype[np.int8]],
    scale: np.ndarray[tuple[int], np.dtype[np.float32]],
    bias: np.ndarray[tuple[int], np.dtype[np.float32]],
    threads: int = 1,
) -> np.ndarray[tuple[int, int], np.dtype[np.float32]]:
    """(x @ weight) * scale + bias, as the operator computes it. Raises `OSError` if it cannot."""
    out = np.empty((len(x), weight.shape[1]), np.float32)
    pointers = [array.ctypes.data_as(ctypes.c_void_p) for array in (x, weight, scale, bias, out)]
    if not ctypes.CDLL(str(library)).llava_edge_native_linear(*pointers, len(x), *weight.shape[::-1], threads):
        raise OSError("the operator cannot compute")
    return out


def _layers(nodes: list[_Node], shapes: dict[str, tuple[int, ...]]) -> dict[str, tuple[str, ...]]:
    """Output of each linear layer -> x, weight, scale, bias."""
    made_by = {output: node for node in nodes for output in node.outputs}

    def trace(name: str, *kinds: str) -> list[_Node]:
        """The nodes that make a value, following first inputs; as many as there are of these kinds."""
        found: list[_Node] = []
        for kind in kinds:
            node = made_by.get(name)
            if node is None or node.kind != kind:
                break
            found.append(node)
            name = node.inputs[0]
        return found

    layers: dict[str, tuple[str, ...]] = {}
    for node in nodes:
        if node.kind != "Add":
            continue
        # total = (product of the first term * scale + bias) + product of the second term * scale
        first = trace(node.inputs[0], "Add", "Mul", "Cast", "MatMulInteger", "QuantizeLinear")
        second = trace(node.inputs[1], "Mul", "Cast", "MatMulInteger", "QuantizeLinear", "Sub")
        if len(first) < 5 or len(second) < 5:
            continue
        x, weight, bias, rest = first[4].inputs[0], first[3].inputs[1], first[0].inputs[1], second[4]
        # Of the second: what rounding x left over, times the same weights.
        again = made_by.get(rest.inputs[1])
        if again is None or again.kind != "DequantizeLinear" or rest.inputs[0] != x or second[2].inputs[1] != weight:
            continue
        if again.inputs != (first[4].outputs[0], *first[4].inputs[1:]):
            continue
        scale = _scale(first[4], first[3], made_by.get(first[1].inputs[1]))
        if not scale or scale != _scale(second[3], second[2], made_by.get(second[0].inputs[1])):
            continue
        inner, columns = (shapes.get(weight) or (0, 0))[:2]
        fits = shapes.get(weight) == (inner, columns, _INT8) and inner % MULTIPLE == 0 and inner > 0
        if fits and shapes.get(scale) == shapes.get(bias) == (columns, _FLOAT):
            layers[node.outputs[0]] = (x, weight, scale, bias)
    return layers


def _scale(rounded: _Node, product: _Node, scales: _Node | None) -> str:
    """The weights' scale of one term, if it is (q - zero) @ weight * (step * scale), as q was rounded; or empty."""
    if scales is None or scales.kind != "Mul" or (scales.inputs[0], *product.inputs[2:]) != rounded.inputs[1:]:
        return ""
    return scales.inputs[1]


def _linear(inputs: tuple[str, ...], output: str, threads: int) -> _Node:
    attribute = _field(1, b"threads") + _field(3, threads) + _field(20, 2)  # 2: an integer
    texts = [(1, name) for name in inputs] + [(2, output), (3, output), (4, NAME)]
    raw = b"".join(_field(number, text.encode()) for number, text in texts)
    return _Node(raw + _field(5, attribute) + _field(7, DOMAIN.encode()), inputs, (output,), NAME)


def _shapes(parts: list[tuple[int, bytes | int]]) -> dict[str, tuple[int, ...]]:
    """Dimensions of each initializer, and the number of its type behind them."""
    found = {}
    for number, value in parts:
        if number != _INITIALIZER or not isinstance(value, bytes):
            continue
        dimensions: list[int] = []
        kind = 0
        for field, item in _fields(value):
            if field == 1:
                dimensions += [item] if isinstance(item, int) else _varints(item)  # one by one, or packed
            elif field == 2 and isinstance(item, int):
                kind = item
        found[_text(value, 8)] = (*dimensions, kind)
    return found


def _node(raw: bytes) -> _Node:
    inputs: list[str] = []
    outputs: list[str] = []
    kind = ""
    for number, value in _fields(raw):
        if isinstance(value, bytes) and number in (1, 2, 4):
            text = value.decode()
            if number == 4:
                kind = text
            else:
                (inputs if number == 1 else outputs).append(text)
    return _Node(raw, tuple(inputs), tuple(outputs), kind)


def _text(message: bytes, field: int) -> str:
    return next(
        (value.decode() for number, value in _fields(message) if number == field and isinstance(value, bytes)), ""
    )


def _fields(message: bytes) -> Iterator[tuple[int, bytes | int]]:
    """Number and value of each field: an integer, or bytes."""
    at = 0
    while at < len(message):
        key, at = _varint(message, at)
        number, wire = key >> 3, key & 7
        if wire == 0:
            value, at = _varint(message, at)
            yield number, value
        elif wire == _BYTES:
            size, at = _varint(message, at)
            if at + size > len(message):
                raise ValueError("a field ends behind its message")
            yield number, message[at : at + size]
            at += size
        else:
            raise ValueError(f"wire type {wire} is not one that graphs have")


def _varints(message: bytes) -> list[int]:
    found, at = [], 0
    while at < len(message):
        value, at = _varint(message, at)
        found.append(value)
    return found


def _varint(message: bytes, at: int) -> tuple[int, int]:
    if message[at] < 128:  # most are
        return message[at], at + 1
    value = shift = 0
    while True:
        byte = message[at]
        value |= (byte & 127) << shift
        shift, at = shift + 7, at + 1
        if byte < 128:
            return value, at


def _field(number: int, value: bytes | int) -> bytes:
    if isinstance(value, int):
        return _encoded(number << 3) + _encoded(value)
    return _encoded(number << 3 | _BYTES) + _encoded(len(value)) + value


def _encoded(value: int) -> bytes:
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])
