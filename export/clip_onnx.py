"""CLIP's vision tower -> vision.onnx (+ vision.onnx.data), up to the hidden state that LLaVA reads.

    pixels (batch, 3, S, S) float32 -> features  (batch, image_tokens, width) float32
                                       attention (batch, image_tokens) float32

`attention` is the class token's attention to each of them in the block that gives the features, mean over the heads;
a tower of no blocks has none. Its few nodes branch off a product that the block computes anyway, so that `features` are
bit-identical with and without it.

The graph is built node by node with `onnx.helper`, not traced from PyTorch: this needs no torch, the graph has only the
blocks that are run, only operators of the standard domain and no local functions, and we control where weights are
stored: all large ones in one data file, aligned for memory mapping. Reads tensors under classic Hugging Face names;
knows nothing about checkpoints or bundles.

Precisions: `fp32`; `fp16` stores weights as float16 and computes in float32 (relative weight error 2^-11);
`int8` stores weights as int8 with one scale per output channel and multiplies only integers:

    x = s (q0 - z) + s/127 (q1 - 64)       two terms of 7 bits, the second quantizes the first one's error
    x @ W = s w (q0 - z) @ W8 + s/127 w (q1 - 64) @ W8

The first `fine_blocks` blocks also store the rounding error of the weights, again as int8: one more product.

Why two terms: one (`quantize_dynamic`) has a single scale per tensor, and CLIP's activations have a few channels and
tokens that are 10 to 50 times larger than the rest. Noise in the early blocks then decides which patch the tower later
uses as a high-norm "register". Measured on CLIP ViT-B/16 with 12 photographs, mean relative error of the features: 0.22
with one term, 0.14 with a scale per token, 0.10 when channels are smoothed as well (SmoothQuant, arXiv 2211.10438),
0.05 with scales for every 32 values, 0.004 with two terms. Calibration does not rescue a single term: a scale per
token, the 64 largest channels of 8 other photographs in float32 and the first 6 of 11 blocks unquantized still gave
0.031 (8 photographs). And onnxruntime has matrix instructions for integer products (AMX, VNNI, i8mm): on 577 x 1024 x
3072 and two AMX cores two terms took 4.1 ms, three products 5.8 ms, scales for every 32 values 11.8 ms, float32 10.5
ms.

Why 7 bits: a processor without VNNI adds two u8 x s8 products in 16 bits. 2 * 127 * 127 fits there, 2 * 255 * 127 does
not; onnxruntime must then be told to widen everything, which needs a copy of all weights. CLIP-L/336 on two Zen 4
cores with AVX2 alone: 6.3 instead of 8.5 s of one thread, loaded in 0.4 instead of 3.8 s, 615 MB less private memory.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np

from llava_edge.bundle import VISION, VISION_DATA
from llava_edge.export.tensors import to_float16
from llava_edge.models.config import LlavaConfig
from llava_edge.models.shapes import VISION_PREFIX

Precision = Literal["fp32", "fp16", "int8"]

OPSET = 21  # the first with DequantizeLinear in blocks; onnxruntime 1.20 and later run it
IR_VERSION = 10  # goes with opset 21
INLINE_BYTES = 1024  # smaller tensors stay in the graph file
MAP_ALIGNMENT = 4096  # page size: a mapped tensor has to start on a page of its own
MAP_FROM_BYTES = 1 << 20  # onnxruntime's own writer aligns tensors of at least this size
ACTIVATION_BITS: Literal[7] = 7  # of each term
LEVELS = 127  # steps between the smallest and the largest value of a term
_TINY = 1e-30  # so that no range is empty
_FLOAT32 = 1  # onnx.TensorProto.FLOAT


def write_clip(
    config: LlavaConfig, tensors: Mapping[str, np.ndarray], folder: Path, precision: Precision, fine_blocks: int = 0
) -> None:
    """Write `vision.onnx` and `vision.onnx.data` into `folder`.

    fine_blocks: with int8, the number of transformer blocks, from the front, whose weights have two int8 parts.
    An int8 graph takes one picture at a time: a scale shared by a batch would let pictures affect each other.
    """
    from onnx import helper

    with (folder / VISION_DATA).open("wb") as data:
        graph = _Graph(data, tensors)
        outputs = _tower(graph, config, precision, fine_blocks)
        for name, value in outputs.items():
            graph.nodes.append(helper.make_node("Identity", [value], [name], name=name))
    size = config.vision.image_size
    batch: str | int = 1 if precision == "int8" else "batch"
    shapes: dict[str, list[str | int]] = {
        "features": [batch, config.image_tokens, config.vision.hidden_size],
        "attention": [batch, config.image_tokens],
    }
    model = helper.make_model(
        helper.make_graph(
            graph.nodes,
            "clip-vision",
            [helper.make_tensor_value_info("pixels", _FLOAT32, [batch, 3, size, size])],
            [helper.make_tensor_value_info(name, _FLOAT32, shapes[name]) for name in outputs],
            list(graph.initializers.values()),
        ),
        opset_imports=[helper.make_opsetid("", OPSET)],
        ir_version=IR_VERSION,
        producer_name="llava-edge",
    )
    (folder / VISION).write_bytes(model.SerializeToString(deterministic=True))


def _tower(graph: _Graph, config: LlavaConfig, precision: Precision, fine_blocks: int) -> dict[str, str]:
    """Embeddings, blocks, token selection, pooling. Returns the graph's outputs."""
    x = _layer_norm(graph, config, "pre_layrnorm", _embed(graph, config))
    qkv = ""
    for layer in range(config.vision_blocks):
        graph.precision, graph.fine = precision, layer < fine_blocks
        x, qkv = _block(graph, config, f"encoder.layers.{layer}", x)
    outputs = {"features": _select_tokens(graph, config, x, config.vision.hidden_size)}
    if qkv:
        attention = _select_tokens(graph, config, _class_attention(graph, config, qkv), 1)
        outputs["attention"] = graph.node("Reshape", attention, graph.ints(0, config.image_tokens))
    return outputs


def _embed(graph: _Graph, config: LlavaConfig) -> str:
    c = config.vision
    kernel = graph.tower_tensor("embeddings.patch_embedding.weight")
    sides = [c.patch_size, c.patch_size]
    patches = graph.node("Conv", "pixels", kernel, kernel_shape=sides, strides=sides)  # (B, D, grid, grid)
    patches = graph.node("Reshape", patches, graph.ints(0, 0, c.grid**2))
    patches = graph.node("Transpose", patches, perm=[0, 2, 1])  # (B, grid * grid, D), row-major
    batch = graph.node("Shape", "pixels", start=0, end=1)
    shape = graph.node("Concat", batch, graph.ints(1, c.hidden_size), axis=0)
    row = graph.tensors[f"{VISION_PREFIX}embeddings.class_embedding"].reshape(1, 1, -1)
    cls = graph.node("Expand", graph.weight("embeddings.class_embedding", row), shape)
    x = graph.node("Concat", cls, patches, axis=1)
    positions = graph.tower_tensor("embeddings.position_embedding.weight")  # row 0 is the class token's
    return graph.node("Add", x, positions)


def _block(graph: _Graph, config: LlavaConfig, name: str, x: str) -> tuple[str, str]:
    """Pre-norm: x += attention(ln1(x)); x += fc2(quick_gelu(fc1(ln2(x)))). Returns x and the attention's qkv."""
    normed = _layer_norm(graph, config, f"{name}.layer_norm1", x)
    qkv = _qkv(graph, config, f"{name}.self_attn", normed)
    x = graph.node("Add", x, _attention(graph, config, f"{name}.self_attn", qkv))
    normed = _layer_norm(graph, config, f"{name}.layer_norm2", x)
    inner = _linear(graph, normed, f"{name}.mlp.fc1")
    gate = graph.node("Sigmoid", graph.node("Mul", inner, graph.scalar(1.702)))
    inner = graph.node("Mul", inner, gate)  # quick-GELU, x * sigmoid(1.702 x)
    return graph.node("Add", x, _linear(graph, inner, f"{name}.mlp.fc2")), qkv


def _qkv(graph: _Graph, config: LlavaConfig, name: str, x: str) -> str:
    """(B, T, D) -> (B, T, 3, heads, head_dim): one product instead of three."""
    c = config.vision
    qkv = _linear(graph, x, f"{name}.qkv_proj", *(f"{name}.{kind}_proj" for kind in "qkv"))
    return graph.node(
        "Reshape", qkv, graph.ints(0, 0, 3, c.num_attention_heads, c.hidden_size // c.num_attention_heads)
    )


def _attention(graph: _Graph, config: LlavaConfig, name: str, qkv: str) -> str:
    c = config.vision
    head_dim = c.hidden_size // c.num_attention_heads
    qkv = graph.node("Transpose", qkv, perm=[2, 0, 3, 1, 4])  # (3, B, heads, T, head_dim)
    q, k, v = (graph.node("Gather", qkv, graph.index(i), axis=0) for i in range(3))
    q = graph.node("Mul", q, graph.scalar(head_dim**-0.5))
    scores = graph.node("MatMul", q, graph.node("Transpose", k, perm=[0, 1, 3, 2]))
    out = graph.node("MatMul", graph.node("Softmax", scores, axis=-1), v)
    out = graph.node("Transpose", out, perm=[0, 2, 1, 3])
    out = graph.node("Reshape", out, graph.ints(0, 0, c.hidden_size))
    return _linear(graph, out, f"{name}.out_proj")


def _class_attention(graph: _Graph, config: LlavaConfig, qkv: str) -> str:
    """(B, T, 3, heads, head_dim) -> (B, T, 1): the class token's row of the attention, mean over the heads.

    Separate from `_attention`, which onnxruntime can then still fuse: only one row of its (T, T) scores is needed.
    """
    c = config.vision
    q = graph.node("Gather", qkv, graph.index(0), axis=1)  # the class token comes first
    q = graph.node("Gather", q, graph.index(0), axis=1)  # (B, heads, head_dim)
    q = graph.node("Unsqueeze", q, graph.ints(3))
    k = graph.node("Gather", qkv, graph.index(1), axis=2)
    k = graph.node("Transpose", k, perm=[0, 2, 1, 3])  # (B, heads, T, head_dim)
    scores = graph.node("MatMul", k, q)
    scores = graph.node("Mul", scores, graph.scalar((c.hidden_size // c.num_attention_heads) ** -0.5))
    return graph.node("ReduceMean", graph.node("Softmax", scores, axis=2), graph.ints(1), keepdims=0)


def _layer_norm(graph: _Graph, config: LlavaConfig, name: str, x: str) -> str:
    weight, bias = graph.tower_tensor(f"{name}.weight"), graph.tower_tensor(f"{name}.bias")
    return graph.node("LayerNormalization", x, weight, bias, axis=-1, epsilon=config.vision.layer_norm_eps)


def _linear(graph: _Graph, x: str, name: str, *parts: str) -> str:
    """x @ W + b, where W (in, out) joins the weights of `parts` side by side; without any, of `name`."""
    layers = [f"{VISION_PREFIX}{part}" for part in parts or (name,)]
    weight = np.concatenate([graph.tensors[f"{layer}.weight"] for layer in layers]).T
    bias = np.concatenate([graph.tensors[f"{layer}.bias"] for layer in layers])
    return graph.linear(name, x, weight, bias)


def _select_tokens(graph: _Graph, config: LlavaConfig, x: str, width: int) -> str:
    """(B, T, width) of all tokens -> (B, image_tokens, width) of those that LLaVA uses."""
    if config.feature == "patch":  # drop the class token, which comes first
        x = graph.node("Slice", x, graph.ints(1), graph.ints(np.iinfo(np.int64).max), graph.ints(1))
    if config.image_pool == 1:
        return x
    # Mean over image_pool x image_pool neighbouring patches, row-major before and after.
    side = config.vision.grid // config.image_pool
    x = graph.node("Reshape", x, graph.ints(0, side, config.image_pool, side, config.image_pool, width))
    x = graph.node("ReduceMean", x, graph.ints(2, 4), keepdims=0)
    return graph.node("Reshape", x, graph.ints(0, side * side, width))


def quantize_columns(weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(in, out) float -> int8 (in, out), float32 scales (out,); symmetric, largest magnitude 127."""
    scale = np.abs(weight).max(axis=0).astype(np.float32) / np.float32(127)
    scale[scale == 0] = 1
    return np.rint(weight / scale).astype(np.int8), scale


class _Graph:
    """Nodes and initializers; large weights are appended to the data file right away."""

    def __init__(self, data: BinaryIO, tensors: Mapping[str, np.ndarray]) -> None:
        self.data = data
        self.tensors = tensors  # of the checkpoint
        self.precision: Precision = "fp32"
        self.fine = False
        self.nodes: list[Any] = []
        self.initializers: dict[str, Any] = {}

    def node(self, op: str, *inputs: str, **attributes: Any) -> str:
        """Append a node with one output; returns the output's name."""
        from onnx import helper

        name = f"{op}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, list(inputs), [name], name=name, **attributes))
        return name

    def linear(self, name: str, x: str, weight: np.ndarray, bias: np.ndarray) -> str:
        """x @ weight + bias in the current precision; `weight` is (in, out)."""
        constant = self.weight(f"{name}.bias", bias)
        if self.precision == "fp32":
            return self.node("Add", self.node("MatMul", x, self.weight(f"{name}.weight", weight)), constant)
        if self.precision == "fp16":
            stored = self.node("Cast", self.weight(f"{name}.weight", to_float16(f"{name}.weight", weight)), to=_FLOAT32)
            return self.node("Add", self.node("MatMul", x, stored), constant)
        values, scale = quantize_columns(weight)
        stored, scales = self.weight(f"{name}.weight", values), self.weight(f"{name}.scale", scale)
        step, zero = self.scale_and_zero_point(x)
        fine_step = self.node("Mul", step, self.scalar(1 / LEVELS))
        middle = self.weight("middle", np.array((LEVELS + 1) // 2, np.uint8))  # the second term is symmetric around 0
        first = self.node("QuantizeLinear", x, step, zero)
        rest = self.node("Sub", x, self.node("DequantizeLinear", first, step, zero))
        second = self.node("QuantizeLinear", rest, fine_step, middle)
        total = self.node("Add", self.integer_product(first, step, zero, stored, scales), constant)
        total = self.node("Add", total, self.integer_product(second, fine_step, middle, stored, scales))
        if not self.fine:
            return total
        values, scale = quantize_columns(weight - values * scale)
        stored, scales = self.weight(f"{name}.rest", values), self.weight(f"{name}.rest.scale", scale)
        return self.node("Add", total, self.integer_product(first, step, zero, stored, scales))

    def scale_and_zero_point(self, x: str) -> tuple[str, str]:
        """Scale and zero point that map the range of x, extended to include 0, to `LEVELS` steps."""
        high = self.node("Max", self.node("ReduceMax", x, keepdims=0), self.scalar(0.0))
        low = self.node("Max", self.node("Neg", self.node("ReduceMin", x, keepdims=0)), self.scalar(_TINY))
        step = self.node("Mul", self.node("Add", high, low), self.scalar(1 / LEVELS))
        return step, self.node("QuantizeLinear", low, step)

    def integer_product(self, x: str, step: str, zero: str, weight: str, scale: str) -> str:
        """Quantized x @ (weight * scale), in the pattern of nodes that onnxruntime fuses."""
        product = self.node("MatMulInteger", x, weight, zero)
        return self.node("Mul", self.node("Cast", product, to=_FLOAT32), self.node("Mul", step, scale))

    def tower_tensor(self, name: str) -> str:
        """A tensor of the tower, unchanged."""
        return self.weight(name, self.tensors[f"{VISION_PREFIX}{name}"])

    def ints(self, *values: int) -> str:
        """A constant list of int64."""
        return self.weight("ints_" + "_".join(map(str, values)), np.array(values, np.int64))

    def index(self, value: int) -> str:
        """A constant int64 scalar."""
        return self.weight(f"index_{value}", np.array(value, np.int64))

    def scalar(self, value: float) -> str:
        """A constant float32 scalar."""
        return self.weight(f"scalar_{value}", np.array(value, np.float32))

    def weight(self, name: str, array: np.ndarray) -> str:
        """Add an initializer, unless the name exists; returns its name."""
        if name not in self.initializers:
            self.initializers[name] = self._tensor_proto(name, np.array(array, order="C", copy=None))
        return name

    def _tensor_proto(self, name: str, array: np.ndarray) -> Any:
        """A TensorProto with its values inline or in the data file."""
        from onnx import TensorProto, helper, numpy_helper

        if array.nbytes < INLINE_BYTES:
            return numpy_helper.from_array(array, name)
        alignment = MAP_ALIGNMENT if array.nbytes >= MAP_FROM_BYTES else 64
        self.data.write(bytes(-self.data.tell() % alignment))
        offset = self.data.tell()
        self.data.write(array.data)
        tensor = TensorProto(name=name, dims=array.shape, data_type=helper.np_dtype_to_tensor_dtype(array.dtype))
        tensor.data_location = TensorProto.EXTERNAL
        for key, value in (("location", VISION_DATA), ("offset", str(offset)), ("length", str(array.nbytes))):
            tensor.external_data.add(key=key, value=value)
        return tensor
