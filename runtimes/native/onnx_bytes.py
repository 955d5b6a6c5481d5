"""A graph of ONNX -> its nodes and constants, and back, without the package onnx, which the runtime does not need.

Only what our graphs have. Numbers of fields are those of onnx.proto.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from llava_edge import protobuf
from llava_edge.protobuf import encode

FLOAT, INT8, INT64 = 1, 3, 7  # of TensorProto

_GRAPH, _OPSETS = 7, 8  # of ModelProto
_NODE, _INITIALIZER, _OUTPUT = 1, 5, 12  # of GraphProto
_INT, _INTS = 2, 7  # types of AttributeProto
_MAX_VALUES = 16  # of a constant that is looked at


@dataclass(frozen=True)
class Node:
    """One step. Its bytes are kept to be written as they are."""

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    kind: str
    raw: bytes = field(repr=False)

    @cached_property
    def attributes(self) -> dict[str, tuple[int, ...]]:
        """Integers and lists of them; others are left out."""
        raw = [value for number, value in protobuf.fields(self.raw) if number == 5 and isinstance(value, bytes)]
        return {_text(value, 1): _attribute(value) for value in raw}

    @staticmethod
    def make(
        kind: str, domain: str, inputs: Iterable[str], output: str, attributes: Mapping[str, int] | None = None
    ) -> Node:
        """A new one with one output, after which it is named."""
        names = tuple(inputs)
        texts = [*((1, name) for name in names), (2, output), (3, output), (4, kind), (7, domain)]
        raw = b"".join(encode(number, text.encode()) for number, text in texts)
        for name, value in (attributes or {}).items():
            raw += encode(5, encode(1, name.encode()) + encode(3, value) + encode(20, _INT))
        return Node(names, (output,), kind, raw)


@dataclass(frozen=True)
class Constant:
    """type: of TensorProto. values: of a few int64 or float32 in the graph's own file; empty for others."""

    shape: tuple[int, ...]
    type: int
    values: tuple[float, ...]


@dataclass(frozen=True)
class Graph:
    """Raises `ValueError` or `IndexError`, when first asked, if the bytes are not an ONNX model."""

    model: bytes

    @cached_property
    def nodes(self) -> list[Node]:
        return [_node(value) for number, value in self._parts if number == _NODE and isinstance(value, bytes)]

    @cached_property
    def constants(self) -> dict[str, Constant]:
        """By name."""
        raw = [value for number, value in self._parts if number == _INITIALIZER and isinstance(value, bytes)]
        return {_text(value, 8): _constant(value) for value in raw}

    def with_nodes(self, nodes: Iterable[Node], domain: str = "") -> bytes:
        """The model with these nodes in place of its own, but for those and the constants that no output needs.

        domain: of operators that it may use besides the standard ones.
        """
        wanted = {_text(value, 1) for number, value in self._parts if number == _OUTPUT and isinstance(value, bytes)}
        kept: list[Node] = []
        for node in reversed(list(nodes)):
            if wanted & set(node.outputs):
                kept.append(node)
                wanted |= set(node.inputs)
        others = (
            encode(number, value)
            for number, value in self._parts
            if number != _NODE
            and not (number == _INITIALIZER and isinstance(value, bytes) and _text(value, 8) not in wanted)
        )
        body = b"".join([*(encode(_NODE, node.raw) for node in reversed(kept)), *others])
        head = b"".join(encode(number, value) for number, value in self._whole if number != _GRAPH)
        if domain:
            head += encode(_OPSETS, encode(1, domain.encode()) + encode(2, 1))
        return head + encode(_GRAPH, body)

    @cached_property
    def _whole(self) -> list[protobuf.Field]:
        return list(protobuf.fields(self.model))

    @cached_property
    def _parts(self) -> list[protobuf.Field]:
        found = [value for number, value in self._whole if number == _GRAPH and isinstance(value, bytes)]
        return list(protobuf.fields(found[0]))


def _node(raw: bytes) -> Node:
    inputs: list[str] = []
    outputs: list[str] = []
    kind = ""
    for number, value in protobuf.fields(raw):
        if number > 4 or not isinstance(value, bytes):
            continue
        if number == 1:
            inputs.append(value.decode())
        elif number == 2:
            outputs.append(value.decode())
        elif number == 4:
            kind = value.decode()
    return Node(tuple(inputs), tuple(outputs), kind, raw)


def _attribute(raw: bytes) -> tuple[int, ...]:
    """Its value, if that is an integer or a list of them."""
    fields = list(protobuf.fields(raw))
    kind = next((value for number, value in fields if number == 20), 0)
    return tuple(_integers(fields, {_INT: 3, _INTS: 8}.get(int(kind), 0)))


def _constant(raw: bytes) -> Constant:
    fields = list(protobuf.fields(raw))
    kind = next((value for number, value in fields if number == 2 and isinstance(value, int)), 0)
    data = next((value for number, value in fields if number == 9 and isinstance(value, bytes)), b"")
    read = {FLOAT: "<f4", INT64: "<i8"}.get(kind) if len(data) <= 8 * _MAX_VALUES else None
    values = tuple(np.frombuffer(data, read).tolist()) if read else ()
    return Constant(tuple(_integers(fields, 1)), kind, values)


def _integers(fields: Iterable[protobuf.Field], wanted: int) -> list[int]:
    """Of a field that repeats, or has them packed; those below zero come as two's complement of 64 bits."""
    found: list[int] = []
    for number, value in fields:
        if number == wanted:
            found += [value] if isinstance(value, int) else protobuf.varints(value)
    return [value - (1 << 64) if value >> 63 else value for value in found]


def _text(message: bytes, wanted: int) -> str:
    found = (value for number, value in protobuf.fields(message) if number == wanted and isinstance(value, bytes))
    return next(found, b"").decode()
