"""Times pixels -> embeddings (CLIP and projector): ours beside llama.cpp's mtmd, OpenVINO, PyTorch and Optimum.

    python benchmarks/encode.py BUNDLE --mmproj FILE [--fp32-bundle DIR] [--threads N] [--repeats N]

Every peer gets pixels of the encoder's size, so that decoding and resizing are not counted. mtmd reads the
mmproj that `llava-edge export --emit-mmproj` wrote from the same checkpoint; OpenVINO reads the bundles' vision.onnx;
PyTorch runs transformers' CLIP of the same sizes with random weights, and Optimum exports it for ONNX Runtime, as it is
or with its dynamic quantization to int8. Peers that are not installed are left out.
"""

from __future__ import annotations

import argparse
import ctypes
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from interleave import report, run_persistent, serve

from llava_edge.bench.work import initializers
from llava_edge.bundle import LANGUAGE, PROJECTOR, VISION, Bundle
from llava_edge.runtimes import machine

Work = Callable[[], dict[str, Any]]


def ours(bundle: Bundle, arguments: argparse.Namespace) -> Work:
    from llava_edge.runtimes import native, tune
    from llava_edge.runtimes.projector import Projector

    vision = tune.open_encoder(bundle, tune.default_setting(bundle, arguments.threads))
    projector = Projector(bundle, native.projector_library(), arguments.threads)
    image = pixels(bundle)
    return lambda: {"shape": projector.project(vision.encode(image)).shape}


def mtmd(bundle: Bundle, arguments: argparse.Namespace) -> Work:
    """llama.cpp's own encoder, as llama-cpp-python's chat handlers call it; only `mtmd_encode_chunk` is timed."""
    import llama_cpp
    from llama_cpp import mtmd_cpp as api

    model = llama_cpp.Llama(str(bundle.part(LANGUAGE)), n_ctx=64, verbose=False)
    settings = api.mtmd_context_params_default()
    settings.use_gpu, settings.n_threads = False, arguments.threads
    context = api.mtmd_init_from_file(str(arguments.mmproj).encode(), model.model, settings)
    side = bundle.manifest.preprocessing.image_size
    data = np.random.default_rng(0).integers(0, 256, side * side * 3, np.uint8).tobytes()
    bitmap = api.mtmd_bitmap_init(side, side, (ctypes.c_uint8 * len(data)).from_buffer_copy(data))
    chunks, marker = api.mtmd_input_chunks_init(), api.mtmd_default_marker()
    text = api.mtmd_input_text(marker, len(marker), False, False)
    bitmaps = (api.mtmd_bitmap_p_ctypes * 1)(bitmap)
    if api.mtmd_tokenize(context, chunks, ctypes.byref(text), bitmaps, 1):
        raise RuntimeError("mtmd_tokenize failed")
    all_chunks = [api.mtmd_input_chunks_get(chunks, i) for i in range(api.mtmd_input_chunks_size(chunks))]
    chunk = next(c for c in all_chunks if api.mtmd_input_chunk_get_type(c) == api.MTMD_INPUT_CHUNK_TYPE_IMAGE)

    def encode() -> dict[str, Any]:
        if api.mtmd_encode_chunk(context, chunk):
            raise RuntimeError("mtmd_encode_chunk failed")
        return {"tokens": api.mtmd_input_chunk_get_n_tokens(chunk), "model": model is not None}

    return encode


def openvino(bundle: Bundle, arguments: argparse.Namespace, precision: str = "f32") -> Work:
    """The bundle's graph in OpenVINO, with the projector built from OpenVINO operations."""
    import openvino
    from openvino import opset13 as ops

    from llava_edge import gguf

    core = openvino.Core()
    settings = {"INFERENCE_NUM_THREADS": arguments.threads, "INFERENCE_PRECISION_HINT": precision}
    settings["PERFORMANCE_HINT"] = "LATENCY"
    vision = core.compile_model(str(bundle.part(VISION)), "CPU", settings)
    file = gguf.read(bundle.part(PROJECTOR))
    part = bundle.manifest.vision
    features = value = ops.parameter([part.image_tokens, part.width], np.float32)
    for index in sorted({int(name.split(".")[1]) for name in file.tensors if name.startswith("mm.")}):
        value = ops.gelu(value, "erf") if value is not features else value
        weight, bias = (np.array(file.array(f"mm.{index}.{kind}"), np.float32) for kind in ("weight", "bias"))
        value = ops.add(ops.matmul(value, ops.constant(weight), False, True), ops.constant(bias))
    projector = core.compile_model(openvino.Model([value], [features], "projector"), "CPU", settings)
    image = pixels(bundle)[None]
    return lambda: {"shape": projector(vision(image)[0][0])[0].shape}


def torch(bundle: Bundle, arguments: argparse.Namespace, kind: str = "float32") -> Work:
    import torch

    torch.set_num_threads(arguments.threads)
    tower, projector = (part.to(getattr(torch, kind)) for part in torch_parts(bundle))
    image = torch.from_numpy(pixels(bundle))[None].to(getattr(torch, kind))

    def encode() -> dict[str, Any]:
        with torch.inference_mode():
            return {"shape": tuple(projector(tower(image).last_hidden_state[:, 1:]).shape)}

    return encode


def torch_parts(bundle: Bundle) -> tuple[Any, Any]:
    """transformers' CLIP with as many blocks as LLaVA runs, and LLaVA's projector of two layers."""
    import torch
    from transformers import CLIPVisionConfig, CLIPVisionModel

    part, side = bundle.manifest.vision, bundle.manifest.preprocessing.image_size
    shapes = initializers(bundle.part(VISION))
    kernel = next(shape for shape in shapes.values() if len(shape) == 4)
    fc1 = [shape for name, shape in shapes.items() if name.endswith("mlp.fc1.weight")]
    config = CLIPVisionConfig(
        hidden_size=part.width, intermediate_size=fc1[0][1], num_hidden_layers=len(fc1), image_size=side,
        num_attention_heads=max(1, part.width // 64), patch_size=kernel[-1], attn_implementation="sdpa",
    )  # fmt: skip
    hidden = bundle.manifest.language.hidden_size
    layers = [torch.nn.Linear(part.width, hidden), torch.nn.GELU(), torch.nn.Linear(hidden, hidden)]
    return CLIPVisionModel(config).eval(), torch.nn.Sequential(*layers)


def optimum(bundle: Bundle, arguments: argparse.Namespace, quantize: bool = False) -> Work:
    """Optimum's export of the tower, in ONNX Runtime; the projector in PyTorch."""
    import onnxruntime
    import torch
    from optimum.exporters.onnx import onnx_export_from_model

    torch.set_num_threads(arguments.threads)
    tower, projector = torch_parts(bundle)
    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = arguments.threads
    with tempfile.TemporaryDirectory() as name:
        onnx_export_from_model(tower, Path(name), task="feature-extraction", do_validation=False)
        file = quantized(Path(name)) if quantize else Path(name) / "model.onnx"
        session = onnxruntime.InferenceSession(file, settings, providers=["CPUExecutionProvider"])
    image = pixels(bundle)[None]

    def encode() -> dict[str, Any]:
        (states,) = session.run(["last_hidden_state"], {"pixel_values": image})
        with torch.inference_mode():
            return {"shape": tuple(projector(torch.from_numpy(states[0, 1:])).shape)}

    return encode


def quantized(folder: Path) -> Path:
    """What `optimum-cli onnxruntime quantize --avx512_vnni`, or --avx2, makes of a folder's model.onnx."""
    from optimum.onnxruntime import ORTQuantizer
    from optimum.onnxruntime.configuration import AutoQuantizationConfig

    vnni = "avx512_vnni" in machine.processor()[1]
    settings = (AutoQuantizationConfig.avx512_vnni if vnni else AutoQuantizationConfig.avx2)(is_static=False)
    ORTQuantizer.from_pretrained(folder).quantize(save_dir=folder, quantization_config=settings)
    return folder / "model_quantized.onnx"


def pixels(bundle: Bundle) -> np.ndarray:
    side = bundle.manifest.preprocessing.image_size
    return np.random.default_rng(0).standard_normal((3, side, side), np.float32)


WORKERS: dict[str, Callable[[Bundle, argparse.Namespace], Work]] = {
    "ours": ours,
    "mtmd": mtmd,
    "openvino f32": lambda bundle, arguments: openvino(_fp32(bundle, arguments), arguments, "f32"),
    "openvino bf16": lambda bundle, arguments: openvino(_fp32(bundle, arguments), arguments, "bf16"),
    "openvino, our graph": lambda bundle, arguments: openvino(bundle, arguments, "bf16"),
    "optimum float32": lambda bundle, arguments: optimum(bundle, arguments),
    "optimum int8": lambda bundle, arguments: optimum(bundle, arguments, quantize=True),
    "torch float32": lambda bundle, arguments: torch(bundle, arguments, "float32"),
    "torch bfloat16": lambda bundle, arguments: torch(bundle, arguments, "bfloat16"),
}


def _fp32(bundle: Bundle, arguments: argparse.Namespace) -> Bundle:
    return Bundle.open(arguments.fp32_bundle) if arguments.fp32_bundle else bundle


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--mmproj", type=Path, help="for llama.cpp")
    parser.add_argument("--fp32-bundle", type=Path, help="the same with --vision fp32, for OpenVINO")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--processor-time", action="store_true", help="for a busy machine; with one thread")
    parser.add_argument("--only", action="append", help="peer; may be repeated")
    parser.add_argument("--worker", choices=WORKERS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        clock = time.process_time if arguments.processor_time else time.perf_counter
        serve(WORKERS[arguments.worker](Bundle.open(arguments.bundle), arguments), clock)
        return
    names = [name for name in arguments.only or WORKERS if name != "mtmd" or arguments.mmproj]
    command = [sys.executable, *sys.argv]
    peers = {name: [*command, "--worker", name] for name in dict.fromkeys(["ours", *names])}
    report(run_persistent(peers, arguments.repeats), "ours")


if __name__ == "__main__":
    main()
