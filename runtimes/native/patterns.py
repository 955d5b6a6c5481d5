"""Find the node patterns in vision.onnx that form one operation, which the exporter writes as a dozen nodes
(export/clip_onnx.py)."""

from __future__ import annotations

import math
from collections import Counter
from typing import NamedTuple

import numpy as np

from llava_edge.runtimes.native.onnx_bytes import FLOAT, INT8, Constant, Graph, Node

CONTROL_FLOW_OPS = {"If", "Loop", "Scan", "SequenceMap"}  # their subgraphs may use values of the outer graph
QUICK_GELU = float(np.float32(1.702))
_NO_CONSTANT = Constant((), 0, ())


class Layer(NamedTuple):
    """Inputs of x @ (weight * scale) + bias, by name. weight: (inner, columns) int8; scale, bias: (columns,) float32.

    In a correction layer, bias is the output of the layer that it corrects.
    """

    x: str
    weight: str
    scale: str
    bias: str


class Patterns:
    """Matches patterns from their last node backwards."""

    def __init__(self, graph: Graph) -> None:
        self._nodes = graph.nodes
        self._constants = graph.constants
        self._producers = {output: node for node in graph.nodes for output in node.outputs}

    def linear_layers(self) -> dict[str, Layer]:
        """int8 linear layers by output, without their corrections."""
        return {node.outputs[0]: layer for node in self._nodes if (layer := self._layer(node))}

    def correction_layers(self) -> dict[str, Layer]:
        """Layers by output that add a product with the weights' residual, also in int8, to a linear layer's output."""
        return {node.outputs[0]: layer for node in self._nodes if (layer := self._correction_layer(node))}

    def attentions(self) -> dict[str, tuple[str, int, int]]:
        """Attentions by output: name of the concatenated queries, keys and values, number of heads, and their width."""
        return {node.outputs[0]: match for node in self._nodes if (match := self._attention(node))}

    def quick_gelus(self) -> dict[str, str]:
        """x of each x * sigmoid(1.702 x) by output, if x is not used elsewhere."""
        matches = {node.outputs[0]: x for node in self._nodes if (x := self._quick_gelu(node))}
        uses = Counter(name for node in self._nodes for name in node.inputs)
        return {output: x for output, x in matches.items() if uses[x] == 2}

    def _quick_gelu(self, node: Node) -> str:
        if node.op_type != "Mul":
            return ""
        gate = self._trace(node.inputs[1], "Sigmoid", "Mul")
        matches = gate and gate[1].inputs[0] == node.inputs[0] and self._values(gate[1].inputs[1]) == (QUICK_GELU,)
        return node.inputs[0] if matches else ""

    def _layer(self, node: Node) -> Layer | None:
        """Match (quantized x @ weight * scale + bias) + (quantized rounding error of x) @ weight * scale."""
        if node.op_type != "Add":
            return None
        first = self._trace(node.inputs[0], "Add", "Mul", "Cast", "MatMulInteger", "QuantizeLinear")
        second = self._trace(node.inputs[1], "Mul", "Cast", "MatMulInteger", "QuantizeLinear", "Sub")
        if not first or not second:
            return None
        x, weight, bias, error = first[4].inputs[0], first[3].inputs[1], first[0].inputs[1], second[4]
        # error = x - dequantized x; it is multiplied by the same weights.
        rounded = self._producers.get(error.inputs[1])
        if rounded is None or rounded.op_type != "DequantizeLinear":
            return None
        if error.inputs[0] != x or second[2].inputs[1] != weight:
            return None
        if rounded.inputs != (first[4].outputs[0], *first[4].inputs[1:]):
            return None
        scale = self._scale(first[4], first[3], first[1])
        if not scale or scale != self._scale(second[3], second[2], second[0]):
            return None
        columns = self._columns(weight, scale)
        constant = self._constant(bias)
        matches = columns and (constant.shape, constant.type) == ((columns,), FLOAT)
        return Layer(x, weight, scale, bias) if matches else None

    def _correction_layer(self, node: Node) -> Layer | None:
        """Match a linear layer's output + the product of its quantized x with other weights."""
        if node.op_type != "Add" or (corrected := self._producers.get(node.inputs[0])) is None:
            return None
        layer = self._layer(corrected)
        product = self._trace(node.inputs[1], "Mul", "Cast", "MatMulInteger", "QuantizeLinear")
        if layer is None or not product or product[3].inputs[0] != layer.x:
            return None
        scale, weight = self._scale(product[3], product[2], product[0]), product[2].inputs[1]
        if not scale or self._columns(weight, scale) != self._columns(layer.weight, layer.scale):
            return None
        return Layer(layer.x, weight, scale, node.inputs[0])

    def _columns(self, weight: str, scale: str) -> int:
        """Number of columns of int8 weights with a scale per column; 0 for others."""
        matrix, factors = self._constant(weight), self._constant(scale)
        columns = matrix.shape[1] if len(matrix.shape) == 2 and matrix.shape[0] and matrix.type == INT8 else 0
        return columns if (factors.shape, factors.type) == ((columns,), FLOAT) else 0

    def _scale(self, quantize: Node, product: Node, multiply: Node) -> str:
        """The weights' scale in (q - zero point) @ weight * (scale of q * scale); empty if these do not match."""
        scales = self._producers.get(multiply.inputs[1])
        if scales is None or scales.op_type != "Mul" or (scales.inputs[0], *product.inputs[2:]) != quantize.inputs[1:]:
            return ""
        return scales.inputs[1]

    def _attention(self, node: Node) -> tuple[str, int, int] | None:
        nodes = self._trace(node.outputs[0], "Reshape", "Transpose", "MatMul", "Softmax", "MatMul")
        if not nodes:
            return None
        reshape, transpose, weighted, softmax, scores = nodes
        q = self._trace(scores.inputs[0], "Mul", "Gather", "Transpose", "Reshape")
        k = self._trace(scores.inputs[1], "Transpose", "Gather", "Transpose")
        v = self._trace(weighted.inputs[1], "Gather", "Transpose")
        if not q or not k or not v:
            return None
        shape = self._values(q[3].inputs[1])
        if len(shape) != 5 or shape[:3] != (0, 0, 3):
            return None
        heads, width = int(shape[3]), int(shape[4])
        gathers = [self._values(item.inputs[1]) + item.attributes.get("axis", (0,)) for item in (q[1], k[1], v[0])]
        conditions = [
            q[2] is k[2] is v[1] and _permutation(q[2]) == (2, 0, 3, 1, 4),
            gathers == [(0, 0), (1, 0), (2, 0)],  # index, axis
            _permutation(k[0]) == (0, 1, 3, 2) and _permutation(transpose) == (0, 2, 1, 3),
            softmax.attributes.get("axis", (-1,)) == (-1,),
            self._values(reshape.inputs[1]) == (0, 0, heads * width),
            heads > 0 and width > 0,
        ]
        if not all(conditions) or self._values(q[0].inputs[1]) != (float(np.float32(1 / math.sqrt(width))),):
            return None
        return q[3].inputs[0], heads, width

    def _trace(self, name: str, *op_types: str) -> list[Node]:
        """Follow first inputs back from a value through nodes of these types; empty if they do not match."""
        nodes: list[Node] = []
        for op_type in op_types:
            node = self._producers.get(name)
            if node is None or node.op_type != op_type:
                return []
            nodes.append(node)
            name = node.inputs[0]
        return nodes

    def _constant(self, name: str) -> Constant:
        return self._constants.get(name, _NO_CONSTANT)

    def _values(self, name: str) -> tuple[float, ...]:
        return self._constant(name).values


def _permutation(transpose: Node) -> tuple[int, ...]:
    return transpose.attributes.get("perm", ())
