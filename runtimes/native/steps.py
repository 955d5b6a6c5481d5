"""Which nodes of vision.onnx are one step of CLIP, which the exporter writes as a dozen (export/clip_onnx.py)."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass

import numpy as np

from llava_edge.runtimes.native.onnx_bytes import FLOAT, INT8, Constant, Graph, Node

WITH_GRAPHS = {"If", "Loop", "Scan", "SequenceMap"}  # of their own, which may use values of the whole one
QUICK_GELU = float(np.float32(1.702))
_NOTHING = Constant((), 0, ())


@dataclass(frozen=True)
class Layer:
    """x @ (weight * scale) + bias, by name. weight: (inner, columns) int8; scale, bias: (columns,) float32.

    bias is another value of x's shape where a layer's finer weights come in addition.
    """

    x: str
    weight: str
    scale: str
    bias: str

    @property
    def inputs(self) -> tuple[str, str, str, str]:
        return self.x, self.weight, self.scale, self.bias


class Steps:
    """What a graph computes, looked at backwards from each value."""

    def __init__(self, graph: Graph) -> None:
        self._nodes = graph.nodes
        self._constants = graph.constants
        self._made_by = {output: node for node in graph.nodes for output in node.outputs}

    def layers(self) -> dict[str, Layer]:
        """Outputs of linear layers in int8, but for finer weights."""
        return {node.outputs[0]: layer for node in self._nodes if (layer := self._layer(node))}

    def finer(self) -> dict[str, Layer]:
        """Outputs of those whose weights have a second part; its product is added to what `layers` has."""
        return {node.outputs[0]: layer for node in self._nodes if (layer := self._finer(node))}

    def attentions(self) -> dict[str, tuple[str, int, int]]:
        """Output of each attention -> queries, keys and values side by side; how many heads, and their width."""
        return {node.outputs[0]: found for node in self._nodes if (found := self._attention(node))}

    def quick_gelus(self) -> dict[str, str]:
        """Output of each x * sigmoid(1.702 x) -> x, if nothing else uses that."""
        found = {node.outputs[0]: x for node in self._nodes if (x := self._quick_gelu(node))}
        uses = Counter(name for node in self._nodes for name in node.inputs)
        return {output: x for output, x in found.items() if uses[x] == 2}

    def _quick_gelu(self, node: Node) -> str:
        if node.kind != "Mul":
            return ""
        gate = self._trace(node.inputs[1], "Sigmoid", "Mul")
        known = gate and gate[1].inputs[0] == node.inputs[0] and self._values(gate[1].inputs[1]) == (QUICK_GELU,)
        return node.inputs[0] if known else ""

    def _layer(self, node: Node) -> Layer | None:
        """If the node's sum is (product of the first term * scale + bias) + the second's."""
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
        columns = self._columns(weight, scale)
        biased = self._constant(bias)
        return Layer(x, weight, scale, bias) if columns and (biased.shape, biased.type) == ((columns,), FLOAT) else None

    def _finer(self, node: Node) -> Layer | None:
        """If the node adds the first term's product with other weights to a layer's output."""
        if node.kind != "Add" or (before := self._made_by.get(node.inputs[0])) is None:
            return None
        layer = self._layer(before)
        product = self._trace(node.inputs[1], "Mul", "Cast", "MatMulInteger", "QuantizeLinear")
        if layer is None or not product or product[3].inputs[0] != layer.x:
            return None
        scale, weight = self._scale(product[3], product[2], product[0]), product[2].inputs[1]
        if not scale or self._columns(weight, scale) != self._columns(layer.weight, layer.scale):
            return None
        return Layer(layer.x, weight, scale, node.inputs[0])

    def _columns(self, weight: str, scale: str) -> int:
        """How many outputs such weights make; 0 if they are others."""
        of, factors = self._constant(weight), self._constant(scale)
        columns = of.shape[1] if len(of.shape) == 2 and of.shape[0] and of.type == INT8 else 0
        return columns if (factors.shape, factors.type) == ((columns,), FLOAT) else 0

    def _scale(self, rounded: Node, product: Node, scaled: Node) -> str:
        """The weights' scale of one term, if it is (q - zero) @ weight * (step * scale), as q was rounded; or empty."""
        scales = self._made_by.get(scaled.inputs[1])
        if scales is None or scales.kind != "Mul" or (scales.inputs[0], *product.inputs[2:]) != rounded.inputs[1:]:
            return ""
        return scales.inputs[1]

    def _attention(self, node: Node) -> tuple[str, int, int] | None:
        steps = self._trace(node.outputs[0], "Reshape", "Transpose", "MatMul", "Softmax", "MatMul")
        if not steps:
            return None
        joined, turned, weighed, soft, product = steps
        q = self._trace(product.inputs[0], "Mul", "Gather", "Transpose", "Reshape")
        k = self._trace(product.inputs[1], "Transpose", "Gather", "Transpose")
        v = self._trace(weighed.inputs[1], "Gather", "Transpose")
        if not q or not k or not v:
            return None
        shape = self._values(q[3].inputs[1])
        if len(shape) != 5 or shape[:3] != (0, 0, 3):
            return None
        heads, width = int(shape[3]), int(shape[4])
        chosen = [self._values(item.inputs[1]) + item.attributes.get("axis", (0,)) for item in (q[1], k[1], v[0])]
        known = [
            q[2] is k[2] is v[1] and _order(q[2]) == (2, 0, 3, 1, 4),
            chosen == [(0, 0), (1, 0), (2, 0)],
            _order(k[0]) == (0, 1, 3, 2) and _order(turned) == (0, 2, 1, 3),
            soft.attributes.get("axis", (-1,)) == (-1,),
            self._values(joined.inputs[1]) == (0, 0, heads * width),
            heads > 0 and width > 0,
        ]
        if not all(known) or self._values(q[0].inputs[1]) != (float(np.float32(1 / math.sqrt(width))),):
            return None
        return q[3].inputs[0], heads, width

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

    def _constant(self, name: str) -> Constant:
        return self._constants.get(name, _NOTHING)

    def _values(self, name: str) -> tuple[float, ...]:
        return self._constant(name).values


def _order(transpose: Node) -> tuple[int, ...]:
    return transpose.attributes.get("perm", ())
