"""Tensor files -> numpy, one tensor at a time: `.safetensors` (mapped) and PyTorch's `.bin` pickles.

Knows file formats only, no models. Values are returned as float32, C-contiguous; bfloat16 is converted by hand, since
numpy has no such type. Pickles are only ever read with `weights_only=True`; there is no fallback.
"""

from __future__ import annotations

import json
import math
import re
import warnings
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from llava_edge.errors import (
    CheckpointError,
    MissingError,
    StorageError,
    UnavailableError,
    import_problem,
    is_out_of_memory,
)
from llava_edge.interrupts import held_back
from llava_edge.placeholder import PREFIX_BYTES, describe_placeholder

MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library
SINGLE_FILES = ("model.safetensors", "pytorch_model.bin")
INDEX_FILES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")

_REMEDY = "Use the checkpoint's safetensors files, if it has any, or save it with torch.save(model.state_dict(), FILE)."

_Entry = tuple[str, tuple[int, ...], int, int]  # type, shape, first byte, last byte + 1
_DTYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2", "I64": "<i8"}


class StoredTensor:
    """A tensor that `read` reads from disk."""

    def __init__(self, shape: tuple[int, ...], read: Callable[[], np.ndarray]) -> None:
        self.shape = shape
        self.read = read


def open_folder(folder: Path) -> dict[str, StoredTensor]:
    """All tensors of a checkpoint folder by their stored names. safetensors are preferred over pickles.

    Raises `MissingError` when there are no weights, `CheckpointError` when a file cannot be right.
    """
    for single, index in zip(SINGLE_FILES, INDEX_FILES, strict=True):
        if (folder / single).is_file():
            return open_file(folder / single)
        if (folder / index).is_file():
            return _merge_shards(open_file(path) for path in _shards(folder, folder / index))
    for index in INDEX_FILES:
        stem, suffix = index.removesuffix(".index.json").split(".")
        if shard := min(folder.glob(f"{stem}-*-of-*.{suffix}"), default=None):
            raise MissingError(f"{folder} holds {shard.name}, but not {index}, which lists the shards; download it.")
    raise MissingError(
        f"{folder} holds no weights; expected model.safetensors or pytorch_model.bin, whole or in shards with an index."
    )


def has_weights(folder: Path) -> bool:
    """Whether `open_folder` would find anything."""
    return any((folder / name).is_file() for name in (*SINGLE_FILES, *INDEX_FILES))


def to_float16(name: str, array: np.ndarray) -> np.ndarray:
    """Round to float16, C-contiguous. Raises `CheckpointError` for values that would become infinite."""
    with np.errstate(over="ignore"):
        rounded = np.ascontiguousarray(array, np.float16)
    if not np.isfinite(rounded).all():
        largest = float(np.abs(array).max())
        raise CheckpointError(f"The tensor {name} reaches {largest:.3g}, more than float16 can hold (65504).")
    return rounded


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises `CheckpointError` with the reason."""
    refuse_placeholder(path)
    try:
        raw = json.loads(path.read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}. Correct it, or download it again.") from error
    if not isinstance(raw, dict):
        raise CheckpointError(f"{path} should hold a JSON object.")
    return raw


def read_json_if_any(path: Path) -> dict[str, Any]:
    """The same; empty if there is no such file."""
    return read_json(path) if path.is_file() else {}


def _shards(folder: Path, index: Path) -> list[Path]:
    files = read_json(index).get("weight_map")
    if not files or not isinstance(files, dict) or not all(isinstance(name, str) for name in files.values()):
        raise CheckpointError(f"{index} has no weight_map from tensor names to file names; download it again.")
    names = sorted(set(files.values()))
    if any(Path(name).name != name for name in names):
        raise CheckpointError(f"{index} points outside its folder; shard names must be plain file names.")
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise MissingError(f"{folder} lacks the shards {', '.join(missing)} that {index.name} names; download them.")
    numbered = re.search(r"-of-(\d+)\.", names[0])
    if numbered and len(names) < int(numbered[1]):
        raise CheckpointError(f"{index} names {len(names)} of {int(numbered[1])} shards; download it again.")
    return [folder / name for name in names]


def _merge_shards(files: Iterable[dict[str, StoredTensor]]) -> dict[str, StoredTensor]:
    joined: dict[str, StoredTensor] = {}
    for tensors in files:
        duplicates = joined.keys() & tensors.keys()
        if duplicates:
            raise CheckpointError(f"The tensor {min(duplicates)} is in two shards; the folder mixes two checkpoints.")
        joined |= tensors
    return joined


def refuse_placeholder(path: Path) -> None:
    """Raise `CheckpointError` for a Git LFS pointer or a web page in place of the file."""
    with path.open("rb") as file:
        placeholder = describe_placeholder(file.read(PREFIX_BYTES))
    if placeholder:
        raise CheckpointError(f"{path} is {placeholder}.")


def open_file(path: Path) -> dict[str, StoredTensor]:
    """All tensors of a safetensors or pickle file by their stored names. Raises `CheckpointError`."""
    refuse_placeholder(path)
    return _safetensors(path) if path.suffix == ".safetensors" else _pickle(path)


def _safetensors(path: Path) -> dict[str, StoredTensor]:
    """Layout: uint64 header length, JSON header, values. Offsets in the header are relative to its end."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, MAX_HEADER_BYTES):
            raise _damaged(path, f"it has {size} bytes, and {length} are too many for its header")
        try:
            header = json.loads(file.read(length))
            entries = {name: _parse_entry(entry) for name, entry in header.items() if name != "__metadata__"}
        except (ValueError, TypeError, OverflowError, KeyError, AttributeError, RecursionError) as error:
            raise _damaged(path, f"its header cannot be read, {error!r}") from error
    start = 8 + length
    for name, (dtype, shape, begin, end) in entries.items():
        if min(shape, default=0) < 0 or not 0 <= begin <= end <= size - start:
            raise _damaged(path, f"{name} lies at bytes {begin} to {end} of {size - start}")
        if dtype in _DTYPES and end - begin != math.prod(shape) * np.dtype(_DTYPES[dtype]).itemsize:
            raise _damaged(path, f"{name} has {end - begin} bytes, its shape {shape} in {dtype} needs others")
    return {name: _mapped_tensor(path, name, start, entry) for name, entry in entries.items()}


def _damaged(path: Path, reason: str) -> CheckpointError:
    return CheckpointError(f"{path} is not a whole safetensors file: {reason}. Download it again.")


def _parse_entry(entry: dict[str, Any]) -> _Entry:
    begin, end = entry["data_offsets"]
    return str(entry["dtype"]), tuple(int(side) for side in entry["shape"]), int(begin), int(end)


def _mapped_tensor(path: Path, name: str, start: int, entry: _Entry) -> StoredTensor:
    dtype, shape, begin, end = entry

    def read() -> np.ndarray:
        if dtype not in _DTYPES:
            raise CheckpointError(f"{path} stores {name} as {dtype}; expected one of {', '.join(_DTYPES)}.")
        try:
            raw = np.memmap(path, _DTYPES[dtype], "c", start + begin, shape) if end > begin else np.zeros(shape)
        except (OSError, ValueError) as error:
            if is_out_of_memory(error):
                raise MemoryError from error
            raise StorageError(f"{path} could not be read at byte {start + begin}: {error}.") from error
        if dtype == "BF16":  # the upper half of a float32
            return (raw.astype(np.uint32) << 16).view(np.float32)
        return np.ascontiguousarray(raw, np.float32)

    return StoredTensor(shape, read)


def _pickle(path: Path) -> dict[str, StoredTensor]:
    try:
        with held_back():
            import torch
    except ImportError as error:
        raise UnavailableError(
            f"{path} is a PyTorch pickle; use the checkpoint's safetensors files, if it has any, because torch "
            f"{import_problem(error, 'train')}"
        ) from error
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of how the file was pickled
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=_is_zip(path))
    except MemoryError:
        raise
    except Exception as error:  # torch raises many types for a bad file
        if refused := re.search(r"GLOBAL (\S+)", str(error)):  # as torch names what it will not import
            raise CheckpointError(
                f"{path} holds {refused[1]} besides tensors, which may run code, so it is not opened. {_REMEDY}"
            ) from error
        reason = str(error).strip().partition("\n")[0].partition(". ")[0] or type(error).__name__
        raise CheckpointError(f"{path} is damaged, or no file of torch.save ({reason}). Download it again.") from error
    found = state.items() if isinstance(state, dict) else [("it", state)]
    for name, value in found:
        if not isinstance(value, torch.Tensor):
            raise CheckpointError(
                f"{path} should hold a dictionary of tensors and nothing else, but {name} is a {type(value).__name__}. "
                f"{_REMEDY}"
            )
    return {str(name): StoredTensor(tuple(x.shape), partial(_to_numpy, path, name, x)) for name, x in found}


def _to_numpy(path: Path, name: str, tensor: Any) -> np.ndarray:
    import torch

    known = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64)  # as of safetensors
    if tensor.dtype not in known or tensor.layout is not torch.strided or tensor.device.type != "cpu":
        raise CheckpointError(
            f"{path} stores {name} as {tensor.dtype} ({tensor.layout}, {tensor.device}); "
            f"expected dense values of one of {', '.join(map(str, known))}."
        )
    array: np.ndarray = tensor.detach().to(torch.float32).contiguous().numpy()
    return array


def _is_zip(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(2) == b"PK"
