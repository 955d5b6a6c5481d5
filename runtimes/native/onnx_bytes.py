"""Read and write the nodes and constants of an ONNX graph without the package onnx, which the runtime does not need.

Supports only what our graphs use. Field numbers are those of onnx.proto.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from llava_edge import protobuf
from llava_edge.protobuf import encode

FLOAT, INT8, INT64 = 1, 3, 7  # of TensorProto

_GRAPH, _OPSETS = 7, 8  # of ModelProto
_NODE, _INITIALIZER, _OUTPUT = 1, 5, 12  # of GraphProto
_INT, _INTS = 2, 7  # types of AttributeProto
_MAX_VALUES = 16  # of a constant whose values are read


@dataclass(frozen=True)
class Node:
    """A NodeProto. `raw`: its bytes, which are written back unchanged."""

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    op_type: str
    raw: bytes = field(repr=False)

    @cached_property
    def attributes(self) -> dict[str, tuple[int, ...]]:
        """Attributes of the types INT and INTS."""
        return {_text(value, 1): _attribute(value) for value in _messages(protobuf.fields(self.raw), 5)}

    @staticmethod
    def make(
        op_type: str, domain: str, inputs: Iterable[str], output: str, attributes: Mapping[str, int] | None = None
    ) -> Node:
        """Create a node with one output, which is also its name."""
        names = tuple(inputs)
        strings = [*((1, name) for name in names), (2, output), (3, output), (4, op_type), (7, domain)]
        raw = b"".join(encode(number, text.encode()) for number, text in strings)
        for name, value in (attributes or {}).items():
            raw += encode(5, encode(1, name.encode()) + encode(3, value) + encode(20, _INT))
        return Node(names, (output,), op_type, raw)


@dataclass(frozen=True)
class Constant:
    """An initializer. type: of TensorProto. values: of a few int64 or float32, if stored inline; empty for others."""

    shape: tuple[int, ...]
    type: int
    values: tuple[float, ...]


@dataclass(frozen=True)
class Graph:
    """The graph of a serialized model. Its properties raise `ValueError` or `IndexError` if it is not an ONNX model."""

    model: bytes

    @cached_property
    def nodes(self) -> list[Node]:
        return [_node(value) for value in _messages(self._graph_fields, _NODE)]

    @cached_property
    def constants(self) -> dict[str, Constant]:
        """By name."""
        return {_text(value, 8): _constant(value) for value in _messages(self._graph_fields, _INITIALIZER)}

    def replace_nodes(self, nodes: Iterable[Node], domain: str = "") -> bytes:
        """Serialize the model with these nodes, in any order, but without nodes and constants that no output needs.

        domain: of custom operators that it may use.
        """
        nodes = list(nodes)
        needed = self._needed_names(nodes)
        fields = (
            encode(number, value)
            for number, value in self._graph_fields
            if number != _NODE
            and not (number == _INITIALIZER and isinstance(value, bytes) and _text(value, 8) not in needed)
        )
        body = b"".join([*(encode(_NODE, node.raw) for node in nodes if needed & set(node.outputs)), *fields])
        head = b"".join(encode(number, value) for number, value in self._model_fields if number != _GRAPH)
        if domain:
            head += encode(_OPSETS, encode(1, domain.encode()) + encode(2, 1))
        return head + encode(_GRAPH, body)

    def _needed_names(self, nodes: list[Node]) -> set[str]:
        """The graph's outputs and everything that they are computed from."""
        producers = {output: node for node in nodes for output in node.outputs}
        pending = [_text(value, 1) for value in _messages(self._graph_fields, _OUTPUT)]
        needed: set[str] = set()
        while pending:
            name = pending.pop()
            if name and name not in needed:  # an omitted optional input has no name
                needed.add(name)
                pending += producers[name].inputs if name in producers else ()
        return needed

    @cached_property
    def _model_fields(self) -> list[protobuf.Field]:
        return list(protobuf.fields(self.model))

    @cached_property
    def _graph_fields(self) -> list[protobuf.Field]:
        graph, *_ = _messages(self._model_fields, _GRAPH)
        return list(protobuf.fields(graph))


def _node(raw: bytes) -> Node:
    fields = list(protobuf.fields(raw))
    inputs, outputs, op_types = (tuple(map(bytes.decode, _messages(fields, number))) for number in (1, 2, 4))
    return Node(inputs, outputs, op_types[-1] if op_types else "", raw)


def _attribute(raw: bytes) -> tuple[int, ...]:
    """The value of an INT or INTS attribute; empty for others."""
    fields = list(protobuf.fields(raw))
    kind = next((value for number, value in fields if number == 20), 0)
    return tuple(_integers(fields, {_INT: 3, _INTS: 8}.get(int(kind), 0)))


def _constant(raw: bytes) -> Constant:
    fields = list(protobuf.fields(raw))
    kind = next((value for number, value in fields if number == 2 and isinstance(value, int)), 0)
    data = next(_messages(fields, 9), b"")
    dtype = {FLOAT: "<f4", INT64: "<i8"}.get(kind) if len(data) <= 8 * _MAX_VALUES else None
    values = tuple(np.frombuffer(data, dtype).tolist()) if dtype else ()
    return Constant(tuple(_integers(fields, 1)), kind, values)


def _integers(fields: Iterable[protobuf.Field], field: int) -> list[int]:
    """Values of a repeated int64 field, packed or not; negative ones are encoded as two's complement."""
    values: list[int] = []
    for number, value in fields:
        if number == field:
            values += [value] if isinstance(value, int) else protobuf.varints(value)
    return [value - (1 << 64) if value >> 63 else value for value in values]


def _text(message: bytes, field: int) -> str:
    """The first value of a string field; empty without one."""
    return next(_messages(protobuf.fields(message), field), b"").decode()


def _messages(fields: Iterable[protobuf.Field], field: int) -> Iterator[bytes]:
    """The values of a field of messages, strings or bytes."""
    return (value for number, value in fields if number == field and isinstance(value, bytes))
