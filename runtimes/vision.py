"""Pixels -> CLIP features, by ONNX Runtime. Knows the vision part of a bundle; nothing about images or language."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np

from llava_edge.bundle import VISION, Bundle
from llava_edge.errors import BundleError, UnavailableError
from llava_edge.runtimes import CancelledError, bindings, devices, float_graph
from llava_edge.runtimes import native as native_kernels
from llava_edge.runtimes.native import operator

Array = np.ndarray[Any, Any]

# The graph has one convolution: a search for its fastest way costs more than it ever wins. And memory is taken as
# needed, not doubled each time: the language model wants it, too.
PROVIDER_OPTIONS = {
    "CUDAExecutionProvider": {"cudnn_conv_algo_search": "HEURISTIC", "arena_extend_strategy": "kSameAsRequested"}
}


class VisionEncoder:
    """An open session of vision.onnx: CLIP up to the chosen layer, pooled; `native` if our operator is in it.

    Raises `BundleError` if the file does not do what the manifest says, `UnavailableError` if ONNX Runtime would
    silently use another provider than the one asked for.
    threads: 0 is one for each physical core.
    prepack: let it keep weights rearranged for this processor: a private copy of all of them, made now.
    native: compute int8 linear layers and attention by our operators, where tried and right (`native.operator`), on the
        processor. Other providers compute int8 layers in float32 (`float_graph`).
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
        threads = threads or devices.thread_count()[0]
        self._part = bundle.manifest.vision
        self._size = bundle.manifest.preprocessing.image_size
        self._path = bundle.part(VISION)
        ort = bindings.onnxruntime()
        settings = ort.SessionOptions()
        settings.intra_op_num_threads = threads
        settings.inter_op_num_threads = 1
        settings.log_severity_level = 4  # fatal only: errors come as exceptions
        if not prepack:
            settings.add_session_config_entry("session.disable_prepacking", "1")
        if self._part.precision == "int8" and self._part.activation_bits == 8 and devices.int8_saturates():
            settings.add_session_config_entry("session.x64quantprecision", "1")  # slower, but right
        # The language model computes next: threads that spin for more work would take its cores.
        settings.add_session_config_entry("session.force_spinning_stop", "1")
        name = _utf8(self._path)
        on_cpu = provider == "CPUExecutionProvider"
        graph = self._with_operator(settings, threads) if on_cpu and native else None
        self.native = graph is not None
        if not on_cpu:
            graph = self._in_float(settings)
        wanted = provider, PROVIDER_OPTIONS.get(provider, {})
        # Weights that are widened at use take a quarter of the memory. CoreML has no step for that.
        left_out = {"ConstantFolding"} if provider == "CUDAExecutionProvider" and graph else None
        try:
            # enable_fallback=0: otherwise a failure prints to stdout and goes on with another provider.
            self._session = ort.InferenceSession(
                graph or name, settings, providers=[wanted], disabled_optimizers=left_out, enable_fallback=0
            )
        except Exception as error:  # ONNX Runtime raises a dozen kinds, UnicodeDecodeError among them
            raise BundleError(f"ONNX Runtime cannot load {self._path}: {_first_line(error)}") from error
        if self._session.get_providers()[0] != provider:
            raise UnavailableError(f"ONNX Runtime did not start {provider}; use --device cpu.")
        self._check_interface()

    def _with_operator(self, settings: Any, threads: int) -> bytes | None:
        """The graph with our operator, which `settings` then know; None where there is none, or no use for it."""
        library = native_kernels.operator_library()
        if library is None or self._part.precision != "int8":
            return None
        try:
            graph = operator.fuse_operators(self._path.read_bytes(), threads)
            if graph is not None:
                settings.register_custom_ops_library(_utf8(library))
                self._weights_beside(settings)
        except Exception:  # noqa: BLE001 - ONNX Runtime says what is wrong with a damaged file
            return None
        return graph

    def _in_float(self, settings: Any) -> bytes | None:
        """The graph with float32 products, if it has int8 ones."""
        if self._part.precision != "int8":
            return None
        try:
            graph = float_graph.in_float(self._path.read_bytes())
        except (OSError, ValueError, IndexError):  # ONNX Runtime says what is wrong with a damaged file
            return None
        if graph is not None:
            settings.add_session_config_entry("session.disable_quant_qdq", "1")  # or activations are rounded again
            self._weights_beside(settings)
        return graph

    def _weights_beside(self, settings: Any) -> None:
        """For a graph that is not read from its own place."""
        folder = _utf8(self._path.parent)
        settings.add_session_config_entry("session.model_external_initializers_file_folder_path", folder)

    def encode(self, pixels: Array, run: Any = None) -> Array:
        """(3, S, S) float32 -> (image_tokens, width) float32.

        run: from `new_run`; another thread may set its `terminate`, which raises `CancelledError` here.
        Raises `BundleError` on anything that is not finite.
        """
        return self._outputs(["features"], pixels, run)[0]

    def encode_attended(self, pixels: Array, run: Any = None) -> tuple[Array, Array]:
        """Like `encode`, and (image_tokens,) float32: how much CLIP's class token looks at each.

        Only for bundles whose manifest says `attention`.
        """
        features, attention = self._outputs(["features", "attention"], pixels, run)
        return features, attention

    def _outputs(self, names: list[str], pixels: Array, run: Any) -> list[Array]:
        try:
            outputs: list[Array] = self._session.run(names, {"pixels": pixels[None]}, run or self.new_run())
        except Exception as error:
            if run is not None and run.terminate:
                raise CancelledError from error
            raise BundleError(f"ONNX Runtime failed in {self._path}: {_first_line(error)}") from error
        found = [np.asarray(output[0], np.float32) for output in outputs]
        if not all(np.isfinite(output).all() for output in found):
            raise BundleError(f"{self._path} gave numbers that are not finite. Run 'llava-edge verify' on the bundle.")
        return found

    @staticmethod
    def new_run() -> Any:
        """A handle for one or more calls of `encode`: onnxruntime.RunOptions.

        Memory comes from an arena, or each layer's would be new to the process (0.4 s of a 7B's first picture), and is
        given back at the end, or what the largest picture took would be kept.
        """
        ort = bindings.onnxruntime()
        run = ort.RunOptions()
        run.add_run_config_entry("memory.enable_memory_arena_shrinkage", "cpu:0")
        return run

    def _check_interface(self) -> None:
        inputs = {item.name: tuple(item.shape) for item in self._session.get_inputs()}
        outputs = {item.name: tuple(item.shape) for item in self._session.get_outputs()}
        wanted = (3, self._size, self._size)
        expected: dict[str, tuple[int, ...]] = {"features": (self._part.image_tokens, self._part.width)}
        if self._part.attention:
            expected["attention"] = (self._part.image_tokens,)
        if list(inputs) != ["pixels"] or not _fits(inputs["pixels"][1:], wanted):
            raise BundleError(f"{self._path} has the inputs {inputs}; pixels (batch, {_shape(wanted)}) was expected.")
        for name, shape in expected.items():
            if name not in outputs or not _fits(outputs[name][1:], shape):
                raise BundleError(
                    f"{self._path} has the outputs {outputs}; {name} (batch, {_shape(shape)}) was expected."
                )


def _utf8(path: Path) -> str:
    """A path as ONNX Runtime, which encodes in UTF-8 whatever the locale says, finds it. Raises `BundleError`."""
    try:
        return os.fsencode(path).decode("utf-8")
    except UnicodeDecodeError as error:
        raise BundleError(
            f"{path} has bytes in its name that are not UTF-8, which ONNX Runtime cannot open: rename its folder."
        ) from error


def _fits(shape: tuple[Any, ...], wanted: tuple[int, ...]) -> bool:
    """Whether a declared shape, in which names stand for any size, admits the wanted one."""
    pairs = zip(shape, wanted, strict=False)
    return len(shape) == len(wanted) and all(not isinstance(have, int) or have == want for have, want in pairs)


def _shape(sizes: tuple[int, ...]) -> str:
    return ", ".join(map(str, sizes))


def _first_line(error: Exception) -> str:
    lines = str(error).splitlines() or [type(error).__name__]
    return lines[0][:300]
