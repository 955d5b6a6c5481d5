"""One ggml operation at a time, on a chosen device: what a kernel is compared with, in result and in speed.

Uses the C functions of the ggml that llama.cpp has loaded into this process. Knows nothing about models.
"""

from __future__ import annotations

import ctypes
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]

TYPES = {"F16": 1, "Q4_0": 2, "Q4_1": 3, "Q8_0": 8, "Q4_K": 12, "Q5_K": 13, "Q6_K": 14}  # ggml_type
_F32, _F16, _I32 = 0, 1, 26
_CPU = 0  # ggml_backend_dev_type


def loaded(name: str) -> Path | None:
    """File of the library whose name begins so and that this process has loaded, e.g. "libggml-base.so".

    llama-cpp-python ships each library several times; opening another copy would be another registry of backends.
    """
    for line in Path("/proc/self/maps").read_text("utf-8", "surrogateescape").splitlines():
        mapped = line.split(maxsplit=5)[5:]
        if mapped and Path(mapped[0]).name.startswith(name):
            return Path(mapped[0])
    return None


@dataclass(frozen=True)
class Weights:
    """A matrix (columns, inner) as it lies in a GGUF file; `type` is a name in `TYPES`."""

    type: str
    columns: int
    inner: int
    data: bytes


class Ggml:
    """The loaded libggml and libggml-base. Raises `FileNotFoundError` if there are none."""

    def __init__(self) -> None:
        base, registry = loaded("libggml-base.so"), loaded("libggml.so")
        if base is None or registry is None:
            raise FileNotFoundError("llama.cpp has loaded no libggml into this process")
        self._base, self._registry = ctypes.CDLL(str(base)), ctypes.CDLL(str(registry))

    def version(self) -> str:
        """As ggml calls itself, e.g. `0.25.3`."""
        return str(self._call("ggml_version", ctypes.c_char_p, ()).decode())

    def load_backend(self, path: Path) -> bool:
        """Add the backend in a shared library to the registry; ggml refuses one made for another interface."""
        return bool(self.pointer("ggml_backend_load", str(path).encode()))

    def device(self, name: str | None = None) -> int:
        """A device by name, the CPU without one; 0 if there is none."""
        if name is None:
            return self.pointer("ggml_backend_dev_by_type", ctypes.c_int(_CPU))
        return self.pointer("ggml_backend_dev_by_name", name.encode())

    def quantize(self, kind: str, values: Array) -> bytes:
        """Rows of float32 as llama.cpp's own quantizer writes them."""
        rows = np.ascontiguousarray(values, np.float32)
        if kind == "F16":
            return rows.astype(np.float16).tobytes()
        number = ctypes.c_int(TYPES[kind])
        row_bytes = self.number("ggml_row_size", number, ctypes.c_int64(rows.shape[1]))
        out = ctypes.create_string_buffer(row_bytes * len(rows))
        sizes = (ctypes.c_int64(0), ctypes.c_int64(len(rows)), ctypes.c_int64(rows.shape[1]))
        self.number("ggml_quantize_chunk", number, rows.ctypes.data_as(ctypes.c_void_p), out, *sizes, None)
        return out.raw

    def multiply(
        self, weights: Weights, x: Array, *, device: int, threads: int, repacked: bool = False
    ) -> Operation | None:
        """x (rows, inner) float32 times weights: (rows, columns). None if the device does not do that.

        repacked: with weights in the first kind of memory that the CPU device re-orders them in, as llama.cpp would.
        """
        for buffers in self._extra_buffers() if repacked else [0]:
            made = Operation(self, device, threads)
            shape = (weights.inner, weights.columns)
            w = made.tensor(TYPES[weights.type], *shape, data=weights.data, buffers=buffers)
            b = made.tensor(_F32, *x.shape[::-1], data=np.ascontiguousarray(x, np.float32).tobytes())
            if (found := made.of("ggml_mul_mat", w, b)) is not None:
                return found
        return None

    def rows(self, weights: Weights) -> Array:
        """The matrix in float32, as the CPU device unpacks it."""
        with Operation(self, self.device(), 1) as made:
            w = made.tensor(TYPES[weights.type], weights.inner, weights.columns, data=weights.data)
            ids = made.tensor(_I32, weights.columns, data=np.arange(weights.columns, dtype=np.int32).tobytes())
            found = made.of("ggml_get_rows", w, ids)
            assert found is not None
            return found.values().reshape(weights.columns, weights.inner)

    def attend(self, q: Array, k: Array, v: Array, mask: Array, *, device: int, threads: int) -> Operation | None:
        """Attention of q (heads, queries, width) float32 over k, v (shared heads, keys, width) float16, with a mask
        (queries, keys) float16: (queries, heads, width). None if the device does not do that.

        In memory the heads of a position lie side by side, as in llama.cpp.
        """
        made = Operation(self, device, threads)
        parts = [made.swapped(kind, values) for kind, values in ((_F32, q), (_F16, k), (_F16, v))]
        parts.append(made.tensor(_F16, *mask.shape[::-1], data=np.ascontiguousarray(mask).tobytes()))
        numbers = [ctypes.c_float(q.shape[-1] ** -0.5), ctypes.c_float(0), ctypes.c_float(0)]
        return made.of("ggml_flash_attn_ext", *parts, *numbers)

    def _extra_buffers(self) -> list[int]:
        """The CPU device's kinds of memory with re-ordered weights (AMX, CPU_REPACK), preferred ones first."""
        registry = self.pointer("ggml_backend_dev_backend_reg", self.device())
        get = self.pointer("ggml_backend_reg_get_proc_address", registry, b"ggml_backend_dev_get_extra_bufts")
        found: list[int] = []
        if get:
            kinds = ctypes.CFUNCTYPE(ctypes.POINTER(ctypes.c_void_p), ctypes.c_void_p)(get)(self.device())
            while kinds and (kind := kinds[len(found)]):
                found.append(int(kind))
        return found

    # Whole numbers among the arguments of these two are pointers; others come as ctypes values.

    def pointer(self, name: str, *arguments: Any) -> int:
        """Call a C function that returns a pointer; 0 is null."""
        return self._call(name, ctypes.c_void_p, arguments) or 0

    def number(self, name: str, *arguments: Any) -> int:
        """Call a C function that returns a size, a status, or nothing that matters."""
        return int(self._call(name, ctypes.c_size_t, arguments))

    def _call(self, name: str, result: Any, arguments: tuple[Any, ...]) -> Any:
        function = getattr(self._base, name, None) or getattr(self._registry, name)
        function.restype = result
        return function(*(ctypes.c_void_p(value) if isinstance(value, int) else value for value in arguments))


class Operation:
    """A graph of one operation, its tensors, and the backend that computes it; freed at the end of `with`."""

    def __init__(self, ggml: Ggml, device: int, threads: int) -> None:
        self._ggml, self._device = ggml, device
        self._buffers: list[int] = []
        self._contexts: list[int] = []
        self._inputs: list[tuple[int, bytes]] = []
        self._read: list[int] = []
        self._context = self._new_context()
        self._backend = ggml.pointer("ggml_backend_dev_init", device, None)
        registry = ggml.pointer("ggml_backend_dev_backend_reg", device)
        found = ggml.pointer("ggml_backend_reg_get_proc_address", registry, b"ggml_backend_set_n_threads")
        ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int)(found)(self._backend, threads)
        self._node = self._graph = 0

    def __enter__(self) -> Operation:
        return self

    def __exit__(self, *_: object) -> None:
        self._ggml.number("ggml_backend_free", self._backend)
        for buffer in self._buffers:
            self._ggml.number("ggml_backend_buffer_free", buffer)
        for context in self._contexts:
            self._ggml.number("ggml_free", context)

    def tensor(self, kind: int, *shape: int, data: bytes, buffers: int = 0) -> int:
        """A tensor in memory of its own."""
        context = self._new_context()
        sizes = [ctypes.c_int64(size) for size in shape]
        made = self._ggml.pointer(f"ggml_new_tensor_{len(shape)}d", context, ctypes.c_int(kind), *sizes)
        self._allocate(context, buffers)
        self._inputs.append((made, data))
        return made

    def swapped(self, kind: int, values: Array) -> int:
        """A tensor of (a, b, width) values that lie in memory as (b, a, width)."""
        lying = np.ascontiguousarray(values.swapaxes(0, 1))
        made = self.tensor(kind, *lying.shape[::-1], data=lying.tobytes())
        axes = (ctypes.c_int(axis) for axis in (0, 2, 1, 3))
        return self._ggml.pointer("ggml_permute", self._context, made, *axes)

    def of(self, name: str, *arguments: Any) -> Operation | None:
        """Make it this operation; None, with everything freed, if the device does not do that."""
        self._node = self._ggml.pointer(name, self._context, *arguments)
        if not self._ggml.number("ggml_backend_dev_supports_op", self._device, self._node) & 0xFF:
            self.__exit__()
            return None
        for made, data in self._inputs:  # not before: buffers of re-ordered weights crash on types they do not take
            self._ggml.number("ggml_backend_tensor_set", made, data, ctypes.c_size_t(0), ctypes.c_size_t(len(data)))
            self._read.append(made)
        self._inputs.clear()
        self._allocate(self._context)
        self._graph = self._ggml.pointer("ggml_new_graph", self._context)
        self._ggml.number("ggml_build_forward_expand", self._graph, self._node)
        return self

    def memory(self) -> list[tuple[int, int]]:
        """Address and size of each tensor that it reads."""
        call = self._ggml
        return [(call.pointer("ggml_get_data", made), call.number("ggml_nbytes", made)) for made in self._read]

    def seconds(self) -> float:
        """Compute it once; how long that took."""
        start = time.perf_counter()
        status = self._ggml.number("ggml_backend_graph_compute", self._backend, self._graph) & 0xFFFFFFFF
        if status:
            raise OSError(f"ggml could not compute: status {status}")
        return time.perf_counter() - start

    def values(self) -> Array:
        """Compute it; the result as flat float32."""
        self.seconds()
        values = np.empty(self._ggml.number("ggml_nbytes", self._node) // 4, np.float32)
        out = values.ctypes.data_as(ctypes.c_void_p)
        size = ctypes.c_size_t(values.nbytes)
        self._ggml.number("ggml_backend_tensor_get", self._node, out, ctypes.c_size_t(0), size)
        return values

    def _new_context(self) -> int:
        class InitParams(ctypes.Structure):
            _fields_ = (("size", ctypes.c_size_t), ("memory", ctypes.c_void_p), ("no_alloc", ctypes.c_bool))

        self._contexts.append(self._ggml.pointer("ggml_init", InitParams(1 << 20, None, True)))
        return self._contexts[-1]

    def _allocate(self, context: int, buffers: int = 0) -> None:
        kind = buffers or self._ggml.pointer("ggml_backend_cpu_buffer_type")
        self._buffers.append(self._ggml.pointer("ggml_backend_alloc_ctx_tensors_from_buft", context, kind))
