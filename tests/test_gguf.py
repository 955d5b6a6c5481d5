"""The GGUF reader: reads what the gguf package writes, and refuses every file that does not fit itself."""

from __future__ import annotations

import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf as reference
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llava_edge import gguf
from llava_edge.errors import BundleError, LlavaEdgeError, MissingError
from llava_edge.runtimes.probe import write_model

WEIGHT = np.arange(12, dtype=np.float32).reshape(3, 4)
EXTREMES = (0, 2**31, 2**64 - 1)


def write_reference(path: Path, **change: Any) -> Path:
    """A tiny LLaMA by the gguf package. `change`: metadata to set, or to leave out when None."""
    writer = reference.GGUFWriter(str(path), change.pop("architecture", "llama"))
    numbers = {"block_count": 1, "embedding_length": 4, "context_length": 16, "feed_forward_length": 8}
    numbers |= {"attention.head_count": 2, "attention.head_count_kv": 1}
    for key, value in (numbers | change.pop("numbers", {})).items():
        if value is not None:
            writer.add_uint32(f"llama.{key}", value)
    writer.add_array("tokenizer.ggml.tokens", change.pop("tokens", ["a", "b", "€"]))
    writer.add_array("tokenizer.ggml.scores", change.pop("scores", [0.0, 1.0, 2.0]))
    writer.add_tensor("token_embd.weight", WEIGHT)
    writer.add_tensor(change.pop("tensor", "blk.0.attn_norm.weight"), np.ones(4, np.float16))
    for key, value in change.pop("others", {}).items():
        (writer.add_uint32 if isinstance(value, int) else writer.add_string)(key, value)
    assert not change
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def good(tmp_path: Path) -> Path:
    return write_reference(tmp_path / "good.gguf")


def test_reads_what_the_gguf_package_writes(good: Path) -> None:
    file = gguf.read(good)
    gguf.check_language(file)
    assert file.architecture == "llama"
    assert file.metadata["llama.embedding_length"] == 4
    tokens = file.metadata["tokenizer.ggml.tokens"]
    assert (tokens.kind, tokens.count) == (8, 3)
    assert file.items("tokenizer.ggml.tokens") == ["a", "b", "€"]
    assert file.items("tokenizer.ggml.scores") == [0.0, 1.0, 2.0]
    assert file.items("tokenizer.ggml.merges") == []
    assert np.array_equal(file.array("token_embd.weight"), WEIGHT)
    assert isinstance(file.array("token_embd.weight"), np.memmap)
    assert file.array("blk.0.attn_norm.weight").dtype == np.float16


@pytest.mark.parametrize("kind", ["Q4_0", "Q8_0"])
def test_the_probe_model_is_a_file_the_gguf_package_reads(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "probe.gguf"
    write_model(path, kind)
    theirs = {tensor.name: (tuple(tensor.shape), tensor.data_offset) for tensor in reference.GGUFReader(path).tensors}
    ours = gguf.read(path).tensors
    assert {name: (tensor.shape[::-1], tensor.offset) for name, tensor in ours.items()} == theirs


def test_every_truncation_is_refused(good: Path, tmp_path: Path) -> None:
    data = good.read_bytes()
    path = tmp_path / "cut.gguf"
    for size in range(len(data) - 32):  # the gguf package pads the end of the file
        path.write_bytes(data[:size])
        with pytest.raises(BundleError):
            gguf.read(path)


@pytest.mark.parametrize("value", EXTREMES)
def test_every_number_of_the_header_set_to_an_extreme(value: int, good: Path, tmp_path: Path) -> None:
    """Each 4 and 8 byte window of the header: the file is refused, or all of it still lies inside itself."""
    data = good.read_bytes()
    path = tmp_path / "bad.gguf"
    header = len(data) - 32 - WEIGHT.nbytes
    for at in range(4, header - 8):
        for form in ("<Q", "<I"):
            packed = struct.pack(form, value & (2**64 - 1 if form == "<Q" else 2**32 - 1))
            path.write_bytes(data[:at] + packed + data[at + len(packed) :])
            _reads_or_refuses(path)


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(changes=st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 255)), min_size=1, max_size=8))
def test_random_bytes(changes: list[tuple[int, int]], good: Path) -> None:
    data = bytearray(good.read_bytes())
    for at, value in changes:
        data[at % len(data)] = value
    path = good.with_name("mutated.gguf")
    path.write_bytes(data)
    _reads_or_refuses(path)


def _reads_or_refuses(path: Path) -> None:
    try:
        file = gguf.read(path)
        gguf.check_language(file)
    except BundleError:
        return
    size = path.stat().st_size
    assert all(tensor.offset > 0 and tensor.offset + tensor.size <= size for tensor in file.tensors.values())


@pytest.mark.parametrize(
    ("head", "hint"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "Git LFS"),
        (b"<!DOCTYPE html><html>", "web page"),
        (b"PK\x03\x04" + bytes(60), "GGUF"),
        (b"", "GGUF"),
        (b"GGUF\x03", "truncated"),
        (b"GGUF" + struct.pack(">I", 3) + bytes(64), "big-endian"),
        (b"GGUF" + struct.pack("<I", 1) + bytes(64), "version 1"),
        (b"GGUF" + struct.pack("<IQQ", 3, 2**62, 0), "tensors"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 2**62), "metadata keys"),
        # An array of 2^62 strings, in 49 bytes: other readers have hung on this one.
        (b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 1) + b"k" + struct.pack("<IIQ", 9, 8, 2**62), "items of an array"),
    ],
)
def test_other_kinds_of_files(head: bytes, hint: str, tmp_path: Path) -> None:
    path = tmp_path / "file.gguf"
    path.write_bytes(head)
    with pytest.raises(BundleError, match=hint):
        gguf.read(path)


def test_missing_and_folder(tmp_path: Path) -> None:
    with pytest.raises(MissingError):
        gguf.read(tmp_path / "none.gguf")
    with pytest.raises(BundleError):
        gguf.read(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(BundleError, match="is a pipe"):
        gguf.read(tmp_path / "pipe")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"architecture": "plamo2"}, "plamo2"),
        ({"others": {"llama.expert_count": 8}}, "expert"),
        ({"others": {"llama.expert_used_count": 1}}, "expert"),
        ({"others": {"llama.rope.scaling.type": "foo"}}, "foo"),
        ({"others": {"tokenizer.ggml.model": "rwkv"}}, "rwkv"),
        ({"numbers": {"block_count": 0}}, "block_count"),
        ({"numbers": {"block_count": 513}}, "block_count"),
        ({"numbers": {"attention.head_count": 0}}, "head_count"),
        ({"numbers": {"attention.head_count": 3}}, "heads"),
        ({"numbers": {"embedding_length": None}}, "embedding_length"),
        ({"numbers": {"embedding_length": 6}}, "token_embd"),
        ({"tokens": ["a", "b"]}, "tokens"),
        ({"tokens": [1, 2, 3]}, "tokens"),
        ({"scores": [1, 2, 3]}, "scores"),
        ({"tensor": "blk.1.attn_norm.weight"}, "blk.1"),
        ({"tensor": "mm.0.weight"}, "mm.0"),
    ],
)
def test_a_language_model_that_does_not_fit_itself(change: dict[str, Any], says: str, tmp_path: Path) -> None:
    path = write_reference(tmp_path / "bad.gguf", **change)
    with pytest.raises(BundleError, match=says):
        gguf.check_language(gguf.read(path))


def test_a_tensor_that_is_missing_or_quantized(tmp_path: Path, good: Path) -> None:
    write_model(tmp_path / "probe.gguf", "Q8_0")
    reads: list[Callable[[], object]] = [
        lambda: gguf.read(good).array("none"),
        lambda: gguf.read(tmp_path / "probe.gguf").array("output.weight"),
    ]
    for read in reads:
        with pytest.raises(LlavaEdgeError, match=r"[tT]ensor"):
            read()


def test_a_file_that_has_gone_since_it_was_read(good: Path) -> None:
    file = gguf.read(good)
    good.unlink()
    with pytest.raises(BundleError, match="cannot be read: No such file"):
        file.array("token_embd.weight")
