"""A graph of ONNX -> its nodes and constants, and back, without the package onnx, which the runtime does not need.

Of protocol buffers only what our graphs have. Numbers of fields are those of onnx.proto.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

FLOAT, INT8, INT64 = 1, 3, 7  # of TensorProto

_GRAPH, _OPSETS = 7, 8  # of ModelProto
_NODE, _INITIALIZER, _OUTPUT = 1, 5, 12  # of GraphProto
_INT, _INTS = 2, 7  # types of AttributeProto
_BYTES = 2  # wire type
_MAX_VALUES = 16  # of a constant that is looked at

Field = tuple[int, bytes | int]  # number and value


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
        raw = [value for number, value in _fields(self.raw) if number == 5 and isinstance(value, bytes)]
        return {_text(value, 1): _attribute(value) for value in raw}

    @staticmethod
    def make(
        kind: str, domain: str, inputs: Iterable[str], output: str, attributes: Mapping[str, int] | None = None
    ) -> Node:
        """A new one with one output, after which it is named."""
        names = tuple(inputs)
        texts = [*((1, name) for name in names), (2, output), (3, output), (4, kind), (7, domain)]
        raw = b"".join(_field(number, text.encode()) for number, text in texts)
        for name, value in (attributes or {}).items():
            raw += _field(5, _field(1, name.encode()) + _field(3, value) + _field(20, _INT))
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

    def with_nodes(self, nodes: Iterable[Node], domain: str) -> bytes:
        """The model with these nodes in place of its own, but for those and the constants that no output needs.

        domain: of operators that it may use besides its own.
        """
        wanted = {_text(value, 1) for number, value in self._parts if number == _OUTPUT and isinstance(value, bytes)}
        kept: list[Node] = []
        for node in reversed(list(nodes)):
            if wanted & set(node.outputs):
                kept.append(node)
                wanted |= set(node.inputs)
        others = (
            _field(number, value)
            for number, value in self._parts
            if number != _NODE
            and not (number == _INITIALIZER and isinstance(value, bytes) and _text(value, 8) not in wanted)
        )
        body = b"".join([*(_field(_NODE, node.raw) for node in reversed(kept)), *others])
        head = b"".join(_field(number, value) for number, value in self._fields if number != _GRAPH)
        return head + _field(_OPSETS, _field(1, domain.encode()) + _field(2, 1)) + _field(_GRAPH, body)

    @cached_property
    def _fields(self) -> list[Field]:
        return list(_fields(self.model))

    @cached_property
    def _parts(self) -> list[Field]:
        found = [value for number, value in self._fields if number == _GRAPH and isinstance(value, bytes)]
        return list(_fields(found[0]))


def _node(raw: bytes) -> Node:
    inputs: list[str] = []
    outputs: list[str] = []
    kind = ""
    for number, value in _fields(raw):
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
    fields = list(_fields(raw))
    kind = next((value for number, value in fields if number == 20), 0)
    return tuple(_integers(fields, {_INT: 3, _INTS: 8}.get(int(kind), 0)))


def _constant(raw: bytes) -> Constant:
    fields = list(_fields(raw))
    kind = next((value for number, value in fields if number == 2 and isinstance(value, int)), 0)
    data = next((value for number, value in fields if number == 9 and isinstance(value, bytes)), b"")
    read = {FLOAT: "<f4", INT64: "<i8"}.get(kind) if len(data) <= 8 * _MAX_VALUES else None
    values = tuple(np.frombuffer(data, read).tolist()) if read else ()
    return Constant(tuple(_integers(fields, 1)), kind, values)


def _integers(fields: Iterable[Field], wanted: int) -> list[int]:
    """Of a field that repeats, or has them packed; those below zero come as two's complement of 64 bits."""
    found: list[int] = []
    for number, value in fields:
        if number == wanted:
            found += [value] if isinstance(value, int) else _varints(value)
    return [value - (1 << 64) if value >> 63 else value for value in found]


def _text(message: bytes, field: int) -> str:
    return next(
        (value.decode() for number, value in _fields(message) if number == field and isinstance(value, bytes)), ""
    )


def _fields(message: bytes) -> Iterator[Field]:
    at, end = 0, len(message)
    while at < end:
        key, at = _varint(message, at) if message[at] > 127 else (message[at], at + 1)  # most have one byte
        number, wire = key >> 3, key & 7
        if wire == 0:
            value, at = _varint(message, at)
            yield number, value
        elif wire == _BYTES:
            size, at = _varint(message, at) if message[at] > 127 else (message[at], at + 1)
            if at + size > end:
                raise ValueError("a field ends behind its message")
            yield number, message[at : at + size]
            at += size
        elif wire == 5 and at + 4 <= end:  # a float32, which nobody asks for
            yield number, message[at : at + 4]
            at += 4
        else:
            raise ValueError(f"wire type {wire} is not one that graphs have")


def _varints(message: bytes) -> list[int]:
    found, at = [], 0
    while at < len(message):
        value, at = _varint(message, at)
        found.append(value)
    return found


def _varint(message: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = message[at]
        value |= (byte & 127) << shift
        shift, at = shift + 7, at + 1
        if byte < 128:
            return value, at
        if shift > 63:
            raise ValueError("a number has more than 64 bits")


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
