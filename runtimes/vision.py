"""Pixels -> CLIP features, by ONNX Runtime. Knows the vision part of a bundle; nothing about images or language."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np

from llava_edge.bundle import VISION, Bundle
from llava_edge.errors import BundleError, MemoryLimitError, UnavailableError, not_finite
from llava_edge.runtimes import CancelledError, bindings, float_graph, machine
from llava_edge.runtimes import native as native_kernels
from llava_edge.runtimes.native import operator

Array = np.ndarray[Any, Any]

# The graph has one convolution: an exhaustive search for its fastest algorithm never pays off. The arena grows only as
# needed instead of doubling, because the language model needs memory too.
PROVIDER_OPTIONS = {
    "CUDAExecutionProvider": {"cudnn_conv_algo_search": "HEURISTIC", "arena_extend_strategy": "kSameAsRequested"}
}


class VisionEncoder:
    """A session of vision.onnx: CLIP up to the chosen layer, pooled; `native` tells whether our operators are in it.

    Raises `BundleError` if the file does not match the manifest, `UnavailableError` if ONNX Runtime would silently use
    another provider than the requested one, `MemoryLimitError` if ONNX Runtime gets too little memory.
    threads: 0 is one for each physical core.
    prepack: keep a private copy of all weights, rearranged for this processor; made now.
    native: compute int8 linear layers and attention by our operators, where tested and right (`native.operator`), on
        the CPU. Other providers compute int8 layers in float32 (`float_graph`).
    """

    def __init__(
        self,
        bundle: Bundle,
        threads: int = 0,
        provider: str = "CPUExecutionProvider",
        *,
        prepack: bool = False,
        native: bool = False,
    ) -> None:
        threads = threads or machine.thread_count()[0]
        self._part = bundle.manifest.vision
        self._image_size = bundle.manifest.preprocessing.image_size
        self._path = bundle.part(VISION)
        settings = self._session_options(threads, prepack)
        name = _utf8(self._path)
        on_cpu = provider == "CPUExecutionProvider"
        graph = self._graph_with_operators(settings, threads) if on_cpu and native else None
        self.native = graph is not None
        if not on_cpu:
            graph = self._float_graph(settings)
        provider_with_options = provider, PROVIDER_OPTIONS.get(provider, {})
        # Int8 weights that are dequantized at use take a quarter of the memory. CoreML has no operator for that.
        disabled = {"ConstantFolding"} if provider == "CUDAExecutionProvider" and graph else None
        try:
            # enable_fallback=0: otherwise a failure prints to stdout and another provider is used.
            self._session = bindings.onnxruntime().InferenceSession(
                graph or name,
                settings,
                providers=[provider_with_options],
                disabled_optimizers=disabled,
                enable_fallback=0,
            )
        except Exception as error:  # ONNX Runtime raises a dozen kinds, UnicodeDecodeError among them
            raise _failure(f"ONNX Runtime cannot load {self._path}", error) from error
        if self._session.get_providers()[0] != provider:
            raise UnavailableError(f"ONNX Runtime did not start {provider}; use --device cpu.")
        self._check_interface()

    def _session_options(self, threads: int, prepack: bool) -> Any:
        """Return onnxruntime.SessionOptions for the file itself, without our changes to its graph."""
        settings = bindings.onnxruntime().SessionOptions()
        settings.intra_op_num_threads = threads
        settings.inter_op_num_threads = 1
        settings.log_severity_level = 4  # fatal only: errors are raised as exceptions
        if not prepack:
            settings.add_session_config_entry("session.disable_prepacking", "1")
        if self._part.precision == "int8" and self._part.activation_bits == 8 and machine.int8_saturates():
            settings.add_session_config_entry("session.x64quantprecision", "1")  # slower, but exact
        # The language model computes next: spinning threads would occupy its cores.
        settings.add_session_config_entry("session.force_spinning_stop", "1")
        return settings

    def _graph_with_operators(self, settings: Any, threads: int) -> bytes | None:
        """Return the graph with our operators, registered in `settings`; None if there are none, or no use for them."""
        library = native_kernels.operator_library()
        if library is None or self._part.precision != "int8":
            return None
        try:
            graph = operator.fuse_operators(self._path.read_bytes(), threads)
            if graph is not None:
                settings.register_custom_ops_library(_utf8(library))
                self._set_weights_folder(settings)
        except Exception:  # noqa: BLE001 - ONNX Runtime will report a damaged file
            return None
        return graph

    def _float_graph(self, settings: Any) -> bytes | None:
        """Return the graph with float32 products, or None if it has no int8 ones."""
        if self._part.precision != "int8":
            return None
        try:
            graph = float_graph.to_float(self._path.read_bytes())
        except (OSError, ValueError, IndexError):  # ONNX Runtime will report a damaged file
            return None
        if graph is not None:
            settings.add_session_config_entry("session.disable_quant_qdq", "1")  # else activations are quantized again
            self._set_weights_folder(settings)
        return graph

    def _set_weights_folder(self, settings: Any) -> None:
        """Say where the external weights are, for a graph that is not loaded from its file."""
        folder = _utf8(self._path.parent)
        settings.add_session_config_entry("session.model_external_initializers_file_folder_path", folder)

    def encode(self, pixels: Array, run_options: Any = None) -> Array:
        """(3, S, S) float32 -> (image_tokens, width) float32.

        run_options: from `new_run_options`; if another thread sets its `terminate`, `CancelledError` is raised here.
        Raises `BundleError` if a value is not finite, `MemoryLimitError`.
        """
        return self._run(["features"], pixels, run_options)[0]

    def encode_with_attention(self, pixels: Array, run_options: Any = None) -> list[Array]:
        """Like `encode`, plus the attention of CLIP's class token to each image token: (image_tokens,) float32.

        Only for bundles with `attention` in their manifest.
        """
        return self._run(["features", "attention"], pixels, run_options)

    def _run(self, names: list[str], pixels: Array, run_options: Any) -> list[Array]:
        run_options = run_options or self.new_run_options()
        try:
            outputs: list[Array] = self._session.run(names, {"pixels": pixels[None]}, run_options)
        except Exception as error:
            if run_options.terminate:
                raise CancelledError from error
            raise _failure(f"ONNX Runtime failed in {self._path}", error) from error
        results = [np.asarray(output[0], np.float32) for output in outputs]
        if not all(np.isfinite(output).all() for output in results):
            raise not_finite(self._path)
        return results

    @staticmethod
    def new_run_options() -> Any:
        """Return onnxruntime.RunOptions for one or more calls of `encode`.

        Memory comes from an arena, because allocating each layer's anew cost 0.4 s of a 7B's first picture; the arena
        shrinks after each run, so that the memory of the largest picture is not kept.
        """
        ort = bindings.onnxruntime()
        run_options = ort.RunOptions()
        run_options.add_run_config_entry("memory.enable_memory_arena_shrinkage", "cpu:0")
        return run_options

    def _check_interface(self) -> None:
        inputs = {item.name: tuple(item.shape) for item in self._session.get_inputs()}
        outputs = {item.name: tuple(item.shape) for item in self._session.get_outputs()}
        pixels = (3, self._image_size, self._image_size)
        expected: dict[str, tuple[int, ...]] = {"features": (self._part.image_tokens, self._part.width)}
        if self._part.attention:
            expected["attention"] = (self._part.image_tokens,)
        if list(inputs) != ["pixels"] or not _admits(inputs["pixels"][1:], pixels):
            raise BundleError(f"{self._path} has the inputs {inputs}; expected pixels (batch, {_shape(pixels)}).")
        for name, shape in expected.items():
            if name not in outputs or not _admits(outputs[name][1:], shape):
                raise BundleError(f"{self._path} has the outputs {outputs}; expected {name} (batch, {_shape(shape)}).")


def _utf8(path: Path) -> str:
    """Return a path as a str that ONNX Runtime, which always encodes in UTF-8, can open. Raises `BundleError`."""
    try:
        return os.fsencode(path).decode("utf-8")
    except UnicodeDecodeError as error:
        raise BundleError(
            f"The path {path} is not valid UTF-8, which ONNX Runtime requires: rename its folder."
        ) from error


def _admits(declared: tuple[Any, ...], shape: tuple[int, ...]) -> bool:
    """Whether a declared shape, in which names stand for any size, admits a shape."""
    pairs = zip(declared, shape, strict=False)
    return len(declared) == len(shape) and all(not isinstance(size, int) or size == other for size, other in pairs)


def _shape(sizes: tuple[int, ...]) -> str:
    return ", ".join(map(str, sizes))


def _failure(what: str, error: Exception) -> BundleError | MemoryLimitError:
    """What to raise for an error of ONNX Runtime, whose types do not tell a lack of memory."""
    message = str(error) or type(error).__name__
    if any(sign in message for sign in ("allocate memory", "out of memory", "bad allocation", "bad_alloc")):
        return MemoryLimitError(f"{what}: there is not enough memory.")
    return BundleError(f"{what}: {message.splitlines()[0][:300]}")
