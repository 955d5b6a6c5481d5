"""Run single ggml operations on a chosen device, to compare a kernel's results and speed with llama.cpp's.

Calls the C functions of the ggml that llama.cpp has loaded into this process. Knows nothing about models.
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


def loaded_library(name: str) -> Path | None:
    """File of the loaded library whose name starts with `name`, e.g. "libggml-base.so"; None if there is none.

    llama-cpp-python ships several copies of each library; opening another one would create another backend registry.
    """
    for line in Path("/proc/self/maps").read_text("utf-8", "surrogateescape").splitlines():
        path = line.split(maxsplit=5)[5:]
        if path and Path(path[0]).name.startswith(name):
            return Path(path[0])
    return None


@dataclass(frozen=True)
class Weights:
    """A matrix (columns, inner) in GGUF's memory layout; `type` is a name in `TYPES`."""

    type: str
    columns: int
    inner: int
    data: bytes


class Ggml:
    """The loaded libggml and libggml-base. Raises `FileNotFoundError` if they are not loaded."""

    def __init__(self) -> None:
        base, registry = loaded_library("libggml-base.so"), loaded_library("libggml.so")
        if base is None or registry is None:
            raise FileNotFoundError("llama.cpp has loaded no libggml into this process")
        self._base, self._registry = ctypes.CDLL(str(base)), ctypes.CDLL(str(registry))

    def version(self) -> str:
        """ggml's version, e.g. `0.25.3`."""
        return str(self._call("ggml_version", ctypes.c_char_p, ()).decode())

    def load_backend(self, path: Path) -> bool:
        """Register the backend in a shared library; False if ggml refuses it, e.g. for another interface version."""
        return bool(self.call_pointer("ggml_backend_load", str(path).encode()))

    def device(self, name: str | None = None) -> int:
        """Handle of the named device (default: the CPU); 0 if there is none."""
        if name is None:
            return self.call_pointer("ggml_backend_dev_by_type", ctypes.c_int(_CPU))
        return self.call_pointer("ggml_backend_dev_by_name", name.encode())

    def quantize(self, kind: str, values: Array) -> bytes:
        """Quantize rows of float32 with llama.cpp's own quantizer."""
        rows = np.ascontiguousarray(values, np.float32)
        if kind == "F16":
            return rows.astype(np.float16).tobytes()
        number = ctypes.c_int(TYPES[kind])
        row_bytes = self.call_number("ggml_row_size", number, ctypes.c_int64(rows.shape[1]))
        out = ctypes.create_string_buffer(row_bytes * len(rows))
        sizes = (ctypes.c_int64(0), ctypes.c_int64(len(rows)), ctypes.c_int64(rows.shape[1]))
        self.call_number("ggml_quantize_chunk", number, rows.ctypes.data_as(ctypes.c_void_p), out, *sizes, None)
        return out.raw

    def mul_mat(
        self, weights: Weights, x: Array, *, device: int, threads: int, repacked: bool = False
    ) -> Operation | None:
        """x (rows, inner) float32 times weights: (rows, columns). None if the device does not support it.

        repacked: store the weights in the CPU device's first buffer type that repacks them, as llama.cpp would.
        """
        for buffer_type in self._repack_buffer_types() if repacked else [0]:
            operation = Operation(self, device, threads)
            shape = (weights.inner, weights.columns)
            w = operation.tensor(TYPES[weights.type], *shape, data=weights.data, buffer_type=buffer_type)
            b = operation.tensor(_F32, *x.shape[::-1], data=np.ascontiguousarray(x, np.float32).tobytes())
            if operation.build("ggml_mul_mat", w, b):
                return operation
        return None

    def dequantize(self, weights: Weights) -> Array:
        """Dequantize the matrix to float32 on the CPU device."""
        with Operation(self, self.device(), 1) as operation:
            w = operation.tensor(TYPES[weights.type], weights.inner, weights.columns, data=weights.data)
            ids = operation.tensor(_I32, weights.columns, data=np.arange(weights.columns, dtype=np.int32).tobytes())
            supported = operation.build("ggml_get_rows", w, ids)
            assert supported
            return operation.values().reshape(weights.columns, weights.inner)

    def flash_attention(
        self, q: Array, k: Array, v: Array, mask: Array, *, device: int, threads: int
    ) -> Operation | None:
        """Attention of q (heads, queries, width) float32 over k, v (KV heads, keys, width) float16, or blocks of Q8_0
        (KV heads, keys, bytes) uint8, with a mask (queries, keys) float16: (queries, heads, width). None if the device
        does not support it.

        In memory the heads of a position are adjacent, as in llama.cpp.
        """
        operation = Operation(self, device, threads)
        cached = TYPES["Q8_0"] if k.dtype == np.uint8 else _F16
        inputs = [operation.permuted_tensor(kind, values) for kind, values in ((_F32, q), (cached, k), (cached, v))]
        inputs.append(operation.tensor(_F16, *mask.shape[::-1], data=np.ascontiguousarray(mask).tobytes()))
        numbers = [ctypes.c_float(q.shape[-1] ** -0.5), ctypes.c_float(0), ctypes.c_float(0)]
        return operation if operation.build("ggml_flash_attn_ext", *inputs, *numbers) else None

    def _repack_buffer_types(self) -> list[int]:
        """The CPU device's buffer types that repack weights (AMX, CPU_REPACK), preferred ones first."""
        registry = self.call_pointer("ggml_backend_dev_backend_reg", self.device())
        get = self.call_pointer("ggml_backend_reg_get_proc_address", registry, b"ggml_backend_dev_get_extra_bufts")
        buffer_types: list[int] = []
        if get:
            array = ctypes.CFUNCTYPE(ctypes.POINTER(ctypes.c_void_p), ctypes.c_void_p)(get)(self.device())
            while array and (item := array[len(buffer_types)]):
                buffer_types.append(int(item))
        return buffer_types

    # Python integers among the arguments of these two are pointers; numbers are passed as ctypes values.

    def call_pointer(self, name: str, *arguments: Any) -> int:
        """Call a C function that returns a pointer; 0 is null."""
        return self._call(name, ctypes.c_void_p, arguments) or 0

    def call_number(self, name: str, *arguments: Any) -> int:
        """Call a C function that returns a size or a status, or whose result is not used."""
        return int(self._call(name, ctypes.c_size_t, arguments))

    def _call(self, name: str, result: Any, arguments: tuple[Any, ...]) -> Any:
        function = getattr(self._base, name, None) or getattr(self._registry, name)
        function.restype = result
        return function(*(ctypes.c_void_p(value) if isinstance(value, int) else value for value in arguments))


class Operation:
    """A graph of one operation, its tensors and backend; freed at the end of `with`."""

    def __init__(self, ggml: Ggml, device: int, threads: int) -> None:
        self._ggml, self._device = ggml, device
        self._buffers: list[int] = []
        self._contexts: list[int] = []
        self._pending: list[tuple[int, bytes]] = []  # tensors without their data
        self._inputs: list[int] = []
        self._context = self._new_context()
        self._backend = ggml.call_pointer("ggml_backend_dev_init", device, None)
        registry = ggml.call_pointer("ggml_backend_dev_backend_reg", device)
        set_n_threads = ggml.call_pointer("ggml_backend_reg_get_proc_address", registry, b"ggml_backend_set_n_threads")
        ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int)(set_n_threads)(self._backend, threads)
        self._node = self._graph = 0

    def __enter__(self) -> Operation:
        return self

    def __exit__(self, *_: object) -> None:
        self._ggml.call_number("ggml_backend_free", self._backend)
        for buffer in self._buffers:
            self._ggml.call_number("ggml_backend_buffer_free", buffer)
        for context in self._contexts:
            self._ggml.call_number("ggml_free", context)

    def tensor(self, kind: int, *shape: int, data: bytes, buffer_type: int = 0) -> int:
        """Create an input tensor in its own buffer; returns its handle."""
        context = self._new_context()
        sizes = [ctypes.c_int64(size) for size in shape]
        tensor = self._ggml.call_pointer(f"ggml_new_tensor_{len(shape)}d", context, ctypes.c_int(kind), *sizes)
        self._allocate(context, buffer_type)
        self._pending.append((tensor, data))
        return tensor

    def permuted_tensor(self, kind: int, values: Array) -> int:
        """Create a tensor of shape (a, b, width), of Q8_0 from (a, b, bytes), whose memory layout is (b, a, width)."""
        permuted = np.ascontiguousarray(values.swapaxes(0, 1))
        width = permuted.shape[2] // 34 * 32 if kind == TYPES["Q8_0"] else permuted.shape[2]
        tensor = self.tensor(kind, width, *permuted.shape[1::-1], data=permuted.tobytes())
        axes = (ctypes.c_int(axis) for axis in (0, 2, 1, 3))
        return self._ggml.call_pointer("ggml_permute", self._context, tensor, *axes)

    def build(self, name: str, *arguments: Any) -> bool:
        """Build the graph; False, with everything freed, if the device does not support the operation."""
        self._node = self._ggml.call_pointer(name, self._context, *arguments)
        if not self._ggml.call_number("ggml_backend_dev_supports_op", self._device, self._node) & 0xFF:
            self.__exit__()
            return False
        for tensor, data in self._pending:  # only now: repacking buffers crash on types that they do not support
            size = ctypes.c_size_t(len(data))
            self._ggml.call_number("ggml_backend_tensor_set", tensor, data, ctypes.c_size_t(0), size)
            self._inputs.append(tensor)
        self._pending.clear()
        self._allocate(self._context)
        self._graph = self._ggml.call_pointer("ggml_new_graph", self._context)
        self._ggml.call_number("ggml_build_forward_expand", self._graph, self._node)
        return True

    def inputs(self) -> list[tuple[int, int]]:
        """Address and size of each input tensor."""
        ggml = self._ggml
        return [
            (ggml.call_pointer("ggml_get_data", item), ggml.call_number("ggml_nbytes", item)) for item in self._inputs
        ]

    def run(self) -> float:
        """Compute once; returns the duration in seconds."""
        start = time.perf_counter()
        status = self._ggml.call_number("ggml_backend_graph_compute", self._backend, self._graph) & 0xFFFFFFFF
        if status:
            raise OSError(f"ggml failed to compute the graph: status {status}")
        return time.perf_counter() - start

    def values(self) -> Array:
        """Compute; returns the result as flat float32."""
        self.run()
        values = np.empty(self._ggml.call_number("ggml_nbytes", self._node) // 4, np.float32)
        out = values.ctypes.data_as(ctypes.c_void_p)
        size = ctypes.c_size_t(values.nbytes)
        self._ggml.call_number("ggml_backend_tensor_get", self._node, out, ctypes.c_size_t(0), size)
        return values

    def _new_context(self) -> int:
        class InitParams(ctypes.Structure):
            _fields_ = (("size", ctypes.c_size_t), ("memory", ctypes.c_void_p), ("no_alloc", ctypes.c_bool))

        self._contexts.append(self._ggml.call_pointer("ggml_init", InitParams(1 << 20, None, True)))
        return self._contexts[-1]

    def _allocate(self, context: int, buffer_type: int = 0) -> None:
        kind = buffer_type or self._ggml.call_pointer("ggml_backend_cpu_buffer_type")
        self._buffers.append(self._ggml.call_pointer("ggml_backend_alloc_ctx_tensors_from_buft", context, kind))
