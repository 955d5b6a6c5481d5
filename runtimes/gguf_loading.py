"""A GGUF, and an adapter if it has one -> llama.cpp's model and a context to evaluate it in."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llava_edge.errors import BundleError, MemoryLimitError
from llava_edge.runtimes import CancelledError, bindings
from llava_edge.runtimes.worker import Worker


@dataclass(frozen=True)
class Settings:
    """How a model is loaded, and the context created.

    gpu_layers: -1 is all. repack: rearrange weights for llama.cpp's own kernels. context, batch: in positions.
    sequences: that the KV cache can tell apart. eight_bits: of the values in the KV cache, instead of 16.
    flash_attention: use it everywhere; otherwise llama.cpp chooses.
    """

    gpu_layers: int
    repack: bool
    context: int
    batch: int
    sequences: int
    eight_bits: bool
    flash_attention: bool


def load(
    api: Any, path: Path, adapter: Path | None, settings: Settings, on_load: Callable[[float], bool]
) -> tuple[Any, Any]:
    """Return pointers to the model and the context, which the caller frees, the context first.

    Raises `CancelledError` or what `on_load` raises, `BundleError` and `MemoryLimitError`; then all has been freed.
    """
    with ExitStack() as parts:
        model = _load_model(api, path, settings, on_load)
        parts.callback(api.llama_model_free, model)
        lora = _load_adapter(api, model, adapter) if adapter is not None else None
        context = _create_context(api, model, settings)
        parts.callback(api.llama_free, context)
        if lora is not None:
            _apply_adapter(api, context, lora, path)
        parts.pop_all()
    return model, context


def _load_model(api: Any, path: Path, settings: Settings, on_load: Callable[[float], bool]) -> Any:
    errors: list[BaseException] = []

    def progress(fraction: float, _: Any) -> bool:
        try:
            if not errors and not on_load(fraction):
                errors.append(CancelledError())
        except BaseException as error:  # noqa: BLE001 - C cannot pass it on
            errors.append(error)
        return not errors

    params = api.llama_model_default_params()
    params.n_gpu_layers = settings.gpu_layers
    no_devices = (ctypes.c_void_p * 1)()  # else large products go to a GPU even without layers on it
    if not settings.gpu_layers:
        params.devices = ctypes.addressof(no_devices)
    params.load_mode = api.LLAMA_LOAD_MODE_MMAP
    params.use_extra_bufts = settings.repack
    callback = api.llama_progress_callback(progress)
    params.progress_callback = callback
    # In a thread that ends: repacking weights starts OpenMP threads for the thread that loads (compute.py).
    bindings.errors.clear()
    loader = Worker("llama.cpp loading")
    try:
        model = loader.submit(api.llama_model_load_from_file, os.fsencode(path), params).result()
    finally:
        loader.shutdown()
    if errors:
        if model:
            api.llama_model_free(model)
        raise errors[0]
    if not model:
        if any("allocate" in error for error in bindings.errors):
            raise MemoryLimitError(f"There is not enough memory to load {path}: {bindings.errors[0]}")
        raise BundleError(f"llama.cpp cannot load {path}: {bindings.last_error()}")
    return model


def _load_adapter(api: Any, model: Any, path: Path) -> Any:
    """Load the adapter, which llama.cpp frees together with the model."""
    lora = api.llama_adapter_lora_init(model, os.fsencode(path))
    if not lora:
        raise BundleError(f"llama.cpp cannot load {path}: {bindings.last_error()}")
    return lora


def _create_context(api: Any, model: Any, settings: Settings) -> Any:
    params = api.llama_context_default_params()
    params.n_ctx = settings.context
    params.n_batch = params.n_ubatch = settings.batch
    params.n_seq_max = settings.sequences
    params.kv_unified = True  # sequences share the positions of a common prefix
    if settings.eight_bits:
        params.type_k = params.type_v = api.GGML_TYPE_Q8_0
    if settings.flash_attention:
        params.flash_attn_type = api.LLAMA_FLASH_ATTN_TYPE_ENABLED
    context = api.llama_init_from_model(model, params)
    if not context:
        raise MemoryLimitError(
            f"llama.cpp cannot create a context of {settings.context} positions: {bindings.last_error()} "
            "Use a smaller --context."
        )
    return context


def _apply_adapter(api: Any, context: Any, lora: Any, path: Path) -> None:
    handles, scales = (api.llama_adapter_lora_p_ctypes * 1)(lora), (ctypes.c_float * 1)(1.0)
    if api.llama_set_adapters_lora(context, handles, 1, scales):
        raise BundleError(f"llama.cpp cannot apply the adapter of {path}: {bindings.last_error()}")
