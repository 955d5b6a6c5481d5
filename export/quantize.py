"""Float16 GGUF -> quantized GGUF, by llama.cpp's quantizer.

With an importance matrix (`importance.py`), the quantizer weights each input channel's error by it, and q4_0 keeps the
first eighth of the ffn_down tensors as q4_1. F16 and q8_0 ignore it.

K-quants need rows of a multiple of 256 values; where a model has others (576 in SmolLM2-135M), llama.cpp takes
the next larger classic type for that tensor (q4_K -> q5_0, q5_K -> q5_1, q6_K -> q8_0).
"""

from __future__ import annotations

import ctypes
import os
import shutil
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from llava_edge.errors import StorageError
from llava_edge.runtimes import bindings

Quant = Literal["q4_k_m", "q4_0", "q5_k_m", "q8_0", "f16"]
QUANTS: tuple[Quant, ...] = get_args(Quant)

# Bits per weight for estimating disk space, rounded up: mixes keep some tensors larger, and see above.
BITS: dict[Quant, float] = {"q4_k_m": 6.5, "q4_0": 5.5, "q5_k_m": 7.0, "q8_0": 8.5, "f16": 16.0}

_POLL_SECONDS = 0.2


def quantize(
    source: Path,
    target: Path,
    quant: Quant,
    threads: int = 0,
    importance: Mapping[str, np.ndarray] | None = None,
    progress: Callable[[float], None] = lambda share: None,
) -> None:
    """Write `target` from the float16 file `source`. Raises `StorageError` if llama.cpp fails.

    threads: 0 lets llama.cpp use all cores. importance: (input channels,) by tensor name; tensors without one are
    quantized without it.
    """
    if quant == "f16":
        shutil.copyfile(source, target)
        return
    api = bindings.library()
    params = api.llama_model_quantize_default_params()
    params.ftype = getattr(api, f"LLAMA_FTYPE_MOSTLY_{quant.upper()}")
    params.nthread = threads
    matrix = _matrix(api, importance) if importance else None
    params.imatrix = matrix
    result: list[int] = []

    def run() -> None:
        result.append(api.llama_model_quantize(os.fsencode(source), os.fsencode(target), ctypes.byref(params)))

    # In a thread, so that Ctrl-C works; llama.cpp reports no progress, so the size of the file is used.
    worker = threading.Thread(target=run, daemon=True)
    worker.start()
    expected = source.stat().st_size * BITS[quant] / 16
    while worker.is_alive():
        worker.join(_POLL_SECONDS)
        progress(min(1.0, target.stat().st_size / expected) if target.exists() else 0.0)
    if result != [0]:
        free = shutil.disk_usage(target.parent).free >> 20
        raise StorageError(f"llama.cpp could not write {target}: {bindings.last_error()} {free} MiB are free there.")


def _matrix(api: Any, importance: Mapping[str, np.ndarray]) -> Any:
    """`llama_model_imatrix_data[]`, terminated by an entry without a name. ctypes keeps what it points to alive."""
    entries = (api.llama_model_imatrix_data * (len(importance) + 1))()
    for entry, (name, values) in zip(entries, importance.items(), strict=False):
        floats = (ctypes.c_float * len(values))(*values.tolist())
        entry.name, entry.data, entry.size = name.encode(), floats, len(values)
    return entries
