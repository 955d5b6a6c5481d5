"""Converts an int8 vision.onnx to float32 products, for GPUs.

ONNX Runtime's CUDA provider runs MatMulInteger on the CPU, with a copy there and back each time. So every linear layer
becomes one product with weights that are dequantized at use; the file, a quarter of the size, stays as it is.
"""

from __future__ import annotations

from llava_edge.runtimes.native.onnx_bytes import Graph, Node
from llava_edge.runtimes.native.patterns import CONTROL_FLOW_OPS, Layer, Patterns


def to_float(model: bytes) -> bytes | None:
    """Return the model with float32 products in place of int8 ones; None if it has none.

    Raises `ValueError` or `IndexError` if it is not an ONNX model.
    """
    graph = Graph(model)
    patterns = Patterns(graph)
    layers = patterns.linear_layers() | patterns.correction_layers()
    if not layers or any(node.op_type in CONTROL_FLOW_OPS for node in graph.nodes):
        return None
    nodes: list[Node] = []
    for node in graph.nodes:
        layer = layers.get(node.outputs[0])
        nodes += [node] if layer is None else _float_layer(layer, node.outputs[0])
    return graph.replace_nodes(nodes)


def _float_layer(layer: Layer, out: str) -> list[Node]:
    weight, product = f"{out}/weight", f"{out}/product"
    return [
        Node.make("DequantizeLinear", "", [layer.weight, layer.scale], weight, {"axis": 1}),
        Node.make("MatMul", "", [layer.x, weight], product),
        Node.make("Add", "", [product, layer.bias], out),
    ]
