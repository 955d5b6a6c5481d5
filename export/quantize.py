"""Float16 GGUF -> quantized GGUF with llama.cpp's own quantizer.

K-quants need rows of a multiple of 256 values; where a model has others (576 in SmolLM2-135M), llama.cpp takes
the next larger classic type for that tensor (q4_K -> q5_0, q5_K -> q5_1, q6_K -> q8_0).
"""

from __future__ import annotations

import ctypes
import os
import shutil
from pathlib import Path
from typing import Literal, get_args

from llava_edge.errors import StorageError
from llava_edge.runtimes import language

Quant = Literal["q4_k_m", "q4_0", "q5_k_m", "q8_0", "f16"]
QUANTS: tuple[Quant, ...] = get_args(Quant)

# Bits per weight to plan disk space with, rounded up: mixes keep some tensors larger, and see above.
BITS: dict[Quant, float] = {"q4_k_m": 6.5, "q4_0": 5.5, "q5_k_m": 7.0, "q8_0": 8.5, "f16": 16.0}


def quantize(source: Path, target: Path, quant: Quant, threads: int = 0) -> None:
    """Write `target` from the float16 file `source`. Raises `StorageError` when llama.cpp cannot.

    threads: 0 lets llama.cpp use all cores.
    """
    if quant == "f16":
        shutil.copyfile(source, target)
        return
    api = language.library()
    params = api.llama_model_quantize_default_params()
    params.ftype = getattr(api, f"LLAMA_FTYPE_MOSTLY_{quant.upper()}")
    params.nthread = threads
    if api.llama_model_quantize(os.fsencode(source), os.fsencode(target), ctypes.byref(params)):
        free = shutil.disk_usage(target.parent).free >> 20
        raise StorageError(f"llama.cpp could not write {target}: {language.last_error()} {free} MiB are free there.")
