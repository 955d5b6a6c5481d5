"""Tests in a child process, which a bad build would crash, whether an installed engine works on this processor.

llama.cpp built by gcc 12 with -O3 dies of an illegal instruction in its AMX matrix kernels unless two optimisations
are off. The child loads a small random model and runs 64 tokens through it, enough to reach those kernels. Knows
nothing about bundles.
"""

from __future__ import annotations

import hashlib
import json
import struct
import sys
import tempfile
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

from llava_edge import interpreter, store
from llava_edge.errors import NO_THREAD, MemoryLimitError, MissingError, StorageError, UnavailableError
from llava_edge.runtimes import bindings, devices, machine

REBUILD = (
    'CXXFLAGS="-fno-tree-dse -fno-dse" pip install --force-reinstall --no-cache-dir '
    "--no-binary llama-cpp-python llama-cpp-python==0.3.36"
)
INSTALL = {"llama_cpp": REBUILD, "onnxruntime": "pip install --force-reinstall onnxruntime"}
TIMEOUT_SECONDS = 120

WIDTH = 256  # one K-quant block, and a whole number of AMX tiles
HEADS = 4
VOCABULARY = 256
TOKENS = 64  # more rows than one AMX tile of 16


@dataclass(frozen=True)
class Report:
    """The result of testing an engine. `problem` is empty if it works; otherwise `fix` is the command to run."""

    problem: str = ""
    fix: str = ""
    facts: dict[str, Any] = field(default_factory=dict)


def check(engine: str) -> Report:
    """Test "llama_cpp" or "onnxruntime" in a child process.

    Raises `StorageError` if there is no disk space for the test, `MemoryLimitError` if it may start no thread,
    `UnavailableError` in a frozen app.
    """
    # Without threads of OpenBLAS, which ends the process with SIGINT where it may start none.
    code = "import os; os.environ['OPENBLAS_NUM_THREADS'] = '1'; "
    code += f"from llava_edge.runtimes import probe; probe.run_child({engine!r})"
    try:
        facts = interpreter.run_json(f"The test of {engine}", "-c", code, seconds=TIMEOUT_SECONDS)
    except interpreter.ChildError as error:
        if NO_THREAD.rstrip(".") in str(error):
            raise MemoryLimitError(NO_THREAD) from error
        return Report(f"{engine} does not work here: its test {error}.", INSTALL[engine])
    if "storage_error" in facts:
        raise StorageError(
            f"{engine} could not be tested in a temporary folder: {facts['storage_error']}. Free some disk space, or "
            "set TMPDIR to another folder."
        )
    return Report(facts=facts)


def require_working_build() -> None:
    """On a processor with AMX, test each build of llama.cpp once, and remember a success.

    Raises `UnavailableError` with the command that repairs the build, `StorageError` if it could not be tested. Other
    processors are not affected; the build in a frozen app was tested when it was frozen.
    """
    if "amx_int8" not in machine.processor()[1] or interpreter.is_frozen():
        return
    try:
        marker = _success_marker()
        if marker is not None and marker.exists():
            return
        report = check("llama_cpp")
    except (ImportError, OSError):
        return
    if report.problem:
        raise UnavailableError(f"{report.problem} Its build is broken; run: {report.fix}")
    with suppress(OSError):  # with a read-only home, or none, the test is repeated each time
        if marker is not None:
            marker.parent.mkdir(parents=True, exist_ok=True)
            marker.touch()


def run_child(engine: str) -> None:
    """Run in the child process: exercise the engine, print facts as one line of JSON."""
    facts = _llama_facts() if engine == "llama_cpp" else _onnxruntime_facts()
    sys.stdout.write(json.dumps(facts) + "\n")


def _llama_facts() -> dict[str, Any]:
    from llava_edge.runtimes.language import LanguageModel

    api = bindings.library()
    facts = {
        "version": bindings.version(),
        "build": api.llama_print_system_info().decode("utf-8", "replace").strip(),
        "cuda": devices.unavailable_reason("cuda") or "works",
        "metal": devices.unavailable_reason("metal") or "works",
    }
    with ExitStack() as stack:
        try:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            for kind in ("Q4_0", "Q8_0"):
                write_model(folder / kind, kind)
        except OSError as error:
            return {"storage_error": error.strerror}
        for path in folder.iterdir():
            with LanguageModel(path, context=TOKENS * 2, threads=1) as model:
                model.evaluate_tokens([token % VOCABULARY for token in range(TOKENS)])
                model.logits()
                facts["native"] = asdict(model.native)
    return facts


def _onnxruntime_facts() -> dict[str, Any]:
    ort: Any = import_module("onnxruntime")
    return {"version": ort.__version__, "providers": ort.get_available_providers()}


def write_model(path: Path, kind: str, kv_heads: int = HEADS) -> None:
    """Write a random LLaMA of one block in Q4_0 or Q8_0 as GGUF: no tokenizer, 256 wide, about half a megabyte."""
    import numpy as np  # here, because it starts threads, which a process that only tests the build may not want

    numbers = np.random.default_rng(0)
    type_id, payload = {"Q4_0": (2, 16), "Q8_0": (8, 32)}[kind]
    matrices = ["token_embd", "output", "blk.0.attn_q", "blk.0.attn_k", "blk.0.attn_v", "blk.0.attn_output"]
    matrices += ["blk.0.ffn_gate", "blk.0.ffn_up", "blk.0.ffn_down"]
    tensors: list[tuple[str, tuple[int, ...], int, bytes]] = []
    for name in matrices:
        rows = WIDTH * kv_heads // HEADS if name.endswith(("attn_k", "attn_v")) else WIDTH
        blocks = np.zeros(rows * WIDTH // 32, [("scale", "<f2"), ("values", "u1", payload)])
        blocks["scale"] = 1 / 1024
        blocks["values"] = numbers.integers(0, 256, (len(blocks), payload), np.uint8)
        tensors.append((f"{name}.weight", (rows, WIDTH), type_id, blocks.tobytes()))
    for name in ("output_norm", "blk.0.attn_norm", "blk.0.ffn_norm"):
        tensors.append((f"{name}.weight", (WIDTH,), 0, np.ones(WIDTH, "<f4").tobytes()))
    metadata: dict[str, str | int | float] = {
        "general.architecture": "llama",
        "llama.context_length": 512,
        "llama.embedding_length": WIDTH,
        "llama.block_count": 1,
        "llama.feed_forward_length": WIDTH,
        "llama.attention.head_count": HEADS,
        "llama.attention.head_count_kv": kv_heads,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "llama.vocab_size": VOCABULARY,
        "tokenizer.ggml.model": "none",
    }
    path.write_bytes(_gguf(metadata, tensors))


def _gguf(metadata: dict[str, str | int | float], tensors: list[tuple[str, tuple[int, ...], int, bytes]]) -> bytes:
    """Encode GGUF version 3: header, metadata, tensor infos, then the tensors, whose sizes are multiples of 32."""
    parts = [b"GGUF", struct.pack("<IQQ", 3, len(tensors), len(metadata))]
    for key, value in metadata.items():
        parts.append(_string(key))
        if isinstance(value, str):
            parts += [struct.pack("<I", 8), _string(value)]
        elif isinstance(value, int):
            parts.append(struct.pack("<II", 4, value))
        else:
            parts.append(struct.pack("<If", 6, value))
    offset = 0
    for name, shape, type_id, data in tensors:
        parts += [_string(name), struct.pack("<I", len(shape)), struct.pack(f"<{len(shape)}Q", *shape[::-1])]
        parts.append(struct.pack("<IQ", type_id, offset))
        offset += len(data)
    header = b"".join(parts)
    return header + bytes(-len(header) % 32) + b"".join(data for *_, data in tensors)


def _string(text: str) -> bytes:
    return struct.pack("<Q", len(text.encode())) + text.encode()


def _success_marker() -> Path | None:
    """Return the file whose presence says that llama.cpp's CPU kernels work on this processor, None without a home.

    Its name is a hash of both. Raises `ImportError` or `OSError`.
    """
    digest = hashlib.sha256(machine.processor()[0].encode())
    for path in sorted((bindings.package() / "lib").glob("*ggml-cpu*")):
        digest.update(path.read_bytes())
    with suppress(MissingError):
        return store.home() / "builds" / digest.hexdigest()[:32]
    return None
