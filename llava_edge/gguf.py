"""A small GGUF reader that checks every count, size and offset before using it.

Used for projector weights, and to check language.gguf before llama.cpp's C code reads it: what does not fit the file
is refused here with a sentence. It neither writes nor dequantizes.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md (versions 2 and 3, little-endian).
"""

from __future__ import annotations

import mmap
import re
import struct
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from llava_edge.errors import BundleError, MissingError
from llava_edge.placeholder import PREFIX_BYTES, describe_placeholder

MAGIC = b"GGUF"
MAX_TENSORS = 65_536
MAX_KEYS = 4_096
MAX_KEY_BYTES = 256
MAX_NAME_BYTES = 64  # GGML_MAX_NAME
MAX_STRING_BYTES = 1 << 20
MAX_ITEMS = 1 << 21  # per array; the largest vocabularies have about 2^18 tokens
MAX_DIMENSIONS = 4  # GGML_MAX_DIMS
# Largest value of a key that ends in one of these names.
MAX_NUMBERS = {
    "block_count": 512,  # LLAMA_MAX_LAYERS
    "context_length": 1 << 24,
    "embedding_length": 1 << 17,
    "feed_forward_length": 1 << 20,
    "head_count": 1024,
    "image_size": 4096,
    "patch_size": 4096,
}

# Metadata value types: id -> struct format. 8 is a string, 9 an array.
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9

# Tensor types of ggml.h that a LLaMA export may use: id -> (name, values per block, bytes per block).
TENSOR_TYPES = {
    0: ("F32", 1, 4),
    1: ("F16", 1, 2),
    2: ("Q4_0", 32, 18),
    3: ("Q4_1", 32, 20),
    6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24),
    8: ("Q8_0", 32, 34),
    10: ("Q2_K", 256, 84),
    11: ("Q3_K", 256, 110),
    12: ("Q4_K", 256, 144),
    13: ("Q5_K", 256, 176),
    14: ("Q6_K", 256, 210),
    20: ("IQ4_NL", 32, 18),
    23: ("IQ4_XS", 256, 136),
    30: ("BF16", 1, 2),
}

_LANGUAGE_TENSOR = re.compile(
    r"token_embd\.weight|output(_norm)?\.weight|rope_freqs\.weight"
    r"|blk\.(\d{1,3})\.(attn_(norm|q|k|v|output)|ffn_(norm|gate|up|down))\.weight"
)


@dataclass(frozen=True)
class Array:
    """A metadata array that was not read yet: type id and count of its items, and their offset in the file."""

    kind: int
    count: int
    offset: int


@dataclass(frozen=True)
class Tensor:
    """A tensor's place in the file. `shape` is in numpy order (slowest first), `offset` from the start of the file."""

    name: str
    shape: tuple[int, ...]
    kind: str
    offset: int
    size: int


@dataclass(frozen=True)
class Gguf:
    """Header of a GGUF file, checked against the size of the file."""

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, Tensor]

    @property
    def architecture(self) -> str:
        """`general.architecture`, or an empty string."""
        return str(self.metadata.get("general.architecture", ""))

    def array(self, name: str) -> np.ndarray[Any, Any]:
        """Memory-map an F32 or F16 tensor. Raises `BundleError` if it is missing, unreadable or of another type."""
        tensor = self.tensors.get(name)
        if tensor is None:
            raise BundleError(f"{self.path} has no tensor {name!r}.")
        if tensor.kind not in ("F32", "F16"):
            raise BundleError(f"Tensor {name!r} of {self.path} is {tensor.kind}; expected F32 or F16.")
        kind = np.dtype("<f4" if tensor.kind == "F32" else "<f2")
        try:
            return np.memmap(self.path, kind, mode="r", offset=tensor.offset, shape=tensor.shape)
        except OSError as error:
            raise BundleError(f"{self.path} cannot be read: {error.strerror}.") from error

    def items(self, key: str) -> list[Any]:
        """The values of a metadata array; empty if there is no such array."""
        array = self.metadata.get(key)
        if not isinstance(array, Array):
            return []
        with self.path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _Header(self.path, data).items(array)

    def number(self, key: str, low: int = 1, high: int | None = None) -> int:
        """An integer from the metadata, up to `high` or that of `MAX_NUMBERS`. Raises `BundleError`."""
        value = self.metadata.get(key)
        high = MAX_NUMBERS[key.rpartition(".")[2]] if high is None else high
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            raise BundleError(f"{self.path} has {key} = {value!r}; expected an integer from {low} to {high}.")
        return value


def read(path: Path) -> Gguf:
    """Read and check the header. Raises `MissingError`, or `BundleError` with what does not fit; reads no weights."""
    try:
        if path.is_fifo():  # opening one would block
            raise BundleError(f"{path} is a pipe; expected a GGUF file.")
        with path.open("rb") as file:
            _check_magic(path, file.read(PREFIX_BYTES))
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return _Header(path, data).read()
    except FileNotFoundError as error:
        raise MissingError(f"{path} does not exist.") from error
    except OSError as error:
        raise BundleError(f"{path} cannot be read: {error.strerror}.") from error


def check_language(file: Gguf) -> None:
    """Refuse a language model unlike those that this project exports. Raises `BundleError`.

    llama.cpp does not check most of this: sizes of zero, too many blocks, tokenizer arrays of another type.
    """
    if file.architecture != "llama":
        raise BundleError(f"{file.path} has the architecture {file.architecture!r}; only 'llama' is supported.")
    blocks = file.number("llama.block_count")
    width = file.number("llama.embedding_length")
    heads = file.number("llama.attention.head_count")
    kv_heads = heads
    if "llama.attention.head_count_kv" in file.metadata:
        kv_heads = file.number("llama.attention.head_count_kv", 1, heads)
    file.number("llama.context_length")
    file.number("llama.feed_forward_length")
    if width % heads or heads % kv_heads:
        raise BundleError(f"{file.path} has {heads} heads and {kv_heads} key/value heads in a width of {width}.")
    _check_metadata(file)
    for tensor in file.tensors.values():
        known = _LANGUAGE_TENSOR.fullmatch(tensor.name)
        if not known or (known[2] is not None and int(known[2]) >= blocks):
            raise BundleError(f"{file.path} has a tensor unknown to a LLaMA of {blocks} blocks: {tensor.name!r}.")
    _check_vocabulary(file, width)


def check_adapter(file: Gguf, base: Gguf) -> None:
    """Raise `BundleError` unless `file` is a LoRA adapter of `base`, each pair of tensors fitting its weight."""
    kind = (file.metadata.get("general.type"), file.metadata.get("adapter.type"), file.architecture)
    if kind != ("adapter", "lora", base.architecture):
        raise BundleError(f"{file.path} is not a LoRA adapter for {base.architecture}: its types are {kind}.")
    pairs = {name.rpartition(".lora_")[0] for name in file.tensors}
    for name in pairs:
        a, b, weight = file.tensors.get(f"{name}.lora_a"), file.tensors.get(f"{name}.lora_b"), base.tensors.get(name)
        if a is None or b is None or weight is None or len(weight.shape) != 2:
            raise BundleError(f"{file.path} adapts {name!r}, which is not a matrix of the model, or lacks half a pair.")
        if (b.shape[0], a.shape[-1]) != weight.shape or a.shape != (b.shape[-1], weight.shape[1]):
            raise BundleError(f"{file.path} has {a.shape} and {b.shape} for {name!r}, whose weight is {weight.shape}.")
    if 2 * len(pairs) != len(file.tensors):
        raise BundleError(f"{file.path} has tensors that are not part of a LoRA pair.")


def _check_metadata(file: Gguf) -> None:
    """Refuse metadata that makes llama.cpp abort or load another kind of model."""
    experts = [key for key, value in file.metadata.items() if key.startswith("llama.expert") and value]
    if experts:
        raise BundleError(f"{file.path} has {experts[0]}: mixture-of-experts models are not supported.")
    scaling = file.metadata.get("llama.rope.scaling.type", "none")
    if scaling not in ("none", "linear", "yarn", "longrope"):
        raise BundleError(f"{file.path} has the rope scaling {scaling!r}, which llama.cpp does not support.")
    kind = file.metadata.get("tokenizer.ggml.model", "none")
    if kind not in ("llama", "gpt2", "none"):
        raise BundleError(f"{file.path} has a tokenizer of type {kind!r}; expected 'llama' or 'gpt2'.")


def _check_vocabulary(file: Gguf, width: int) -> None:
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2 or embedding.shape[1] != width:
        raise BundleError(f"{file.path} has no token_embd.weight of width {width}.")
    count = embedding.shape[0]
    # 6: float32, 5: int32; llama.cpp assumes these types without checking.
    for key, kind in (("tokens", _STRING), ("scores", 6), ("token_type", 5), ("merges", _STRING)):
        value = file.metadata.get(f"tokenizer.ggml.{key}")
        if value is None and (key != "tokens" or file.metadata.get("tokenizer.ggml.model") == "none"):
            continue
        if not isinstance(value, Array) or value.kind != kind or (key != "merges" and value.count != count):
            raise BundleError(f"{file.path} has a tokenizer.ggml.{key} that does not match its {count} embeddings.")
    for key in ("bos", "eos", "unknown", "padding", "eot"):
        if f"tokenizer.ggml.{key}_token_id" in file.metadata:
            file.number(f"tokenizer.ggml.{key}_token_id", 0, count - 1)


def _check_magic(path: Path, head: bytes) -> None:
    if head[:4] != MAGIC:
        hint = ""
        if placeholder := describe_placeholder(head):
            hint = f" It is {placeholder}."
        elif head[:4] == b"GGML"[::-1] or head[:4] in (b"tjgg", b"fmgg", b"lmgg"):
            hint = " It is in the older ggml format: convert it to GGUF first."
        raise BundleError(f"{path} is not a GGUF file: it starts with {head[:4]!r}, not {MAGIC!r}.{hint}")
    if len(head) < 8:
        raise BundleError(f"{path} is truncated: it has only {len(head)} bytes.")


class _Header:
    """A cursor over the mapped file. Every read is checked against its end."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self.path = path
        self.data = data
        self.position = 4
        self.end = len(data)

    def read(self) -> Gguf:
        version = self.scalar("I")
        if version not in (2, 3):
            big = struct.unpack(">I", struct.pack("<I", version))[0]
            hint = " (it is big-endian)" if big in (2, 3) else ""
            raise self.error(f"GGUF version {version} is not supported{hint}; expected 2 or 3")
        tensor_count = self.count(MAX_TENSORS, "tensors")
        key_count = self.count(MAX_KEYS, "metadata keys")
        metadata: dict[str, Any] = {}
        for _ in range(key_count):
            key = self.text(MAX_KEY_BYTES, "a metadata key")
            if not key or key in metadata:
                raise self.error(f"the metadata key {key!r} is empty or appears twice")
            metadata[key] = self.value(self.scalar("I"))
        infos = [self.read_tensor_info() for _ in range(tensor_count)]
        return Gguf(self.path, metadata, self.locate_tensors(infos, metadata.get("general.alignment", 32)))

    def locate_tensors(
        self, infos: list[tuple[str, tuple[int, ...], int, int]], alignment: object
    ) -> dict[str, Tensor]:
        """Check that tensors lie inside the file and do not overlap."""
        if not isinstance(alignment, int) or not 8 <= alignment <= 65_536 or alignment & (alignment - 1):
            raise self.error(f"general.alignment is {alignment!r}")
        base = -(-self.position // alignment) * alignment
        tensors: dict[str, Tensor] = {}
        previous_end = 0
        for name, shape, kind, offset in sorted(infos, key=lambda info: info[3]):
            type_name, block, block_bytes = TENSOR_TYPES[kind]
            if shape[-1] % block:
                raise self.error(
                    f"tensor {name!r} has rows of {shape[-1]} values, not a multiple of {block} for {type_name}"
                )
            size = prod(shape) // block * block_bytes
            if name in tensors or offset % alignment or offset < previous_end or base + offset + size > self.end:
                raise self.error(
                    f"tensor {name!r} ({size} bytes at {offset}) appears twice, overlaps another or lies outside "
                    "the file, which may be truncated"
                )
            tensors[name] = Tensor(name, shape, type_name, base + offset, size)
            previous_end = offset + size
        return tensors

    def read_tensor_info(self) -> tuple[str, tuple[int, ...], int, int]:
        name = self.text(MAX_NAME_BYTES, "a tensor name")
        dimensions = self.scalar("I")
        if not 1 <= dimensions <= MAX_DIMENSIONS:
            raise self.error(f"tensor {name!r} has {dimensions} dimensions; expected 1 to {MAX_DIMENSIONS}")
        shape = tuple(self.scalar("Q") for _ in range(dimensions))[::-1]
        kind = self.scalar("I")
        offset = self.scalar("Q")
        # The smallest type, Q2_K, takes a third of a byte per value.
        if min(shape) < 1 or prod(shape) > 4 * self.end:
            raise self.error(f"tensor {name!r} has the shape {shape}, which does not fit the file")
        if kind not in TENSOR_TYPES:
            raise self.error(f"tensor {name!r} is of type {kind}, which is not supported")
        return name, shape, kind, offset

    def value(self, kind: int) -> Any:
        if kind in _SCALARS:
            return self.scalar(_SCALARS[kind])
        if kind == _STRING:
            return self.text(MAX_STRING_BYTES, "a metadata string")
        if kind != _ARRAY:
            raise self.error(f"a metadata value is of type {kind}, which GGUF does not have")
        return self.array()

    def array(self) -> Array:
        kind = self.scalar("I")
        count = self.count(MAX_ITEMS, "items of an array")
        start = self.position
        if kind in _SCALARS:
            self.skip(count * struct.calcsize("<" + _SCALARS[kind]))
        elif kind == _STRING:
            self.skip_strings(count)
        else:
            raise self.error(f"an array has items of type {kind}; expected numbers or strings")
        return Array(kind, count, start)

    def items(self, array: Array) -> list[Any]:
        self.position = array.offset
        if array.kind == _STRING:
            return [self.text(MAX_STRING_BYTES, "an item of an array") for _ in range(array.count)]
        self.skip(array.count * struct.calcsize("<" + _SCALARS[array.kind]))
        return list(struct.unpack_from(f"<{array.count}{_SCALARS[array.kind]}", self.data, array.offset))

    def skip_strings(self, count: int) -> None:
        """Skip `count` strings. A vocabulary has about 10^5 of them, hence one tight loop."""
        length = struct.Struct("<Q").unpack_from
        data, position, end = self.data, self.position, self.end - 8
        for _ in range(count):
            if position > end:
                raise self.error("it ends inside its header, so it is truncated")
            size = length(data, position)[0]
            if size > MAX_STRING_BYTES:
                raise self.error(f"a string in an array claims {size} bytes, at most {MAX_STRING_BYTES} are accepted")
            position += 8 + size
        self.position = position
        self.skip(0)

    def text(self, limit: int, what: str) -> str:
        size = self.count(limit, f"bytes of {what}")
        start = self.position
        self.skip(size)
        try:
            return self.data[start : self.position].decode("utf-8")
        except UnicodeDecodeError as error:
            raise self.error(f"{what} is not UTF-8") from error

    def count(self, limit: int, what: str) -> int:
        number: int = self.scalar("Q")
        if number > limit:
            raise self.error(f"it claims {number} {what}, at most {limit} are accepted")
        return number

    def scalar(self, format_code: str) -> Any:
        start = self.position
        self.skip(struct.calcsize("<" + format_code))
        return struct.unpack_from("<" + format_code, self.data, start)[0]

    def skip(self, size: int) -> None:
        if self.position + size > self.end:
            raise self.error("it ends inside its header, so it is truncated")
        self.position += size

    def error(self, reason: str) -> BundleError:
        return BundleError(f"{self.path} is not a usable GGUF file: {reason}.")
