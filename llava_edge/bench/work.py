"""The minimum work of each stage, computed from the bundle's files without an engine.

An operation is a multiplication or an addition: a product of (m, k) and (k, n) is 2 m k n.

    encode    2 T W + 4 T T d L + 2 P (3 p p d)   for each crop: T positions (P patches and the class token), W weights
                                                  in the matrices of L blocks of width d, patches of p x p pixels
    project   2 N W                               N rows of features (of all crops, or those left by a token budget),
                                                  W weights of the projector
    prefill   2 (n - k) W + 2 (n n - k k) d L     n positions, the first k of which are in the KV cache, W weights in
                                                  the matrices of L blocks of width d and of their adapters; attention
                                                  is causal, hence half of 4 n n d
              + 2 d V                             logits of the last position over a vocabulary of V
    decode    bytes of every weight except the token embeddings (unless tied to the output), of adapters, and of the
              KV cache of earlier positions
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from math import prod
from pathlib import Path

from llava_edge import gguf
from llava_edge.bundle import LANGUAGE, PROJECTOR, VISION, Bundle
from llava_edge.errors import BundleError
from llava_edge.runtimes.native.onnx_bytes import Graph
from llava_edge.runtimes.presets import KV_BYTES, kv_width

_BLOCK_MATRIX = re.compile(r"encoder\.layers\.(\d+)\..*\.weight")


@dataclass(frozen=True)
class Work:
    """Minimum work for one bundle, by the formulas above."""

    encode_ops: float  # for each crop
    project_ops: float  # for each row of features
    _matrices: int  # weights in the language model's blocks and adapters
    _blocks: int
    _width: int
    _vocabulary: int
    _token_bytes: int
    _cache_width: int  # of keys, and of values

    def prefill_ops(self, positions: int, known: int = 0) -> float:
        """Operations for a prompt of `positions`, the first `known` of which are in the KV cache."""
        attention = 2.0 * (positions**2 - known**2) * self._width * self._blocks
        return 2.0 * (positions - known) * self._matrices + attention + 2.0 * self._width * self._vocabulary

    def token_bytes(self, positions: float, kv: str = "f16") -> float:
        """Bytes read to decode one token after `positions` others, with a KV cache of type `kv`."""
        return self._token_bytes + 2 * KV_BYTES[kv] * self._cache_width * self._blocks * positions


def bundle_work(bundle: Bundle) -> Work:
    """Compute the work for a bundle. Raises `BundleError` if a file is malformed."""
    language = gguf.read(bundle.part(LANGUAGE))
    projector = gguf.read(bundle.part(PROJECTOR))
    read = {name: tensor for name, tensor in language.tensors.items() if name != "token_embd.weight"}
    if "output.weight" not in read:
        read["token_embd.weight"] = language.tensors["token_embd.weight"]
    if bundle.adapter is not None:
        read |= gguf.read(bundle.adapter).tensors  # their names end in .lora_a and .lora_b
    return Work(
        encode_ops=_encode_ops(bundle),
        project_ops=2.0 * sum(prod(item.shape) for item in projector.tensors.values() if len(item.shape) == 2),
        _matrices=sum(
            prod(item.shape) for name, item in read.items() if name.startswith("blk.") and len(item.shape) == 2
        ),
        _blocks=language.number("llama.block_count"),
        _width=language.number("llama.embedding_length"),
        _vocabulary=bundle.manifest.language.vocab_size,
        _token_bytes=sum(tensor.size for tensor in read.values()),
        _cache_width=kv_width(language),
    )


def _encode_ops(bundle: Bundle) -> float:
    shapes = initializers(bundle.part(VISION))
    width = bundle.manifest.vision.width
    kernel = next((shape for shape in shapes.values() if len(shape) == 4), None)
    matrices = {name: prod(shape) for name, shape in shapes.items() if _BLOCK_MATRIX.fullmatch(name) and len(shape) > 1}
    if kernel is None or not matrices:
        raise BundleError(f"{bundle.part(VISION)} does not name CLIP's weights; export the bundle again.")
    patches = (bundle.manifest.preprocessing.image_size // kernel[-1]) ** 2
    positions = patches + 1
    blocks = len({match[1] for name in matrices if (match := _BLOCK_MATRIX.fullmatch(name))})
    attention = 4.0 * positions**2 * width * blocks
    return 2.0 * positions * sum(matrices.values()) + attention + 2.0 * patches * prod(kernel)


def initializers(path: Path) -> dict[str, tuple[int, ...]]:
    """Shape of every initializer of an ONNX file, by name."""
    try:
        constants = Graph(path.read_bytes()).constants
    except (IndexError, ValueError) as error:
        raise BundleError(f"{path} is not an ONNX file; run 'llava-edge verify' on the bundle.") from error
    return {name: constant.shape for name, constant in constants.items()}
