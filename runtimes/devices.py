"""The choice of a device, CPU or GPU, with its reason. Knows nothing about models."""

from __future__ import annotations

import sys
from dataclasses import dataclass

from llava_edge.errors import UnavailableError
from llava_edge.options import Device
from llava_edge.protobuf import encode
from llava_edge.runtimes import bindings

_PROVIDERS = {"cuda": "CUDAExecutionProvider", "metal": "CoreMLExecutionProvider", "cpu": "CPUExecutionProvider"}
_BACKENDS = {"cuda": "CUDA", "metal": "MTL"}  # names in llama_print_system_info; Metal calls itself MTL or Metal


@dataclass(frozen=True)
class DeviceChoice:
    """A device, why it was chosen, and what the two engines need to use it."""

    name: str
    reason: str
    gpu_layers: int  # for llama.cpp: 0 none, -1 all
    provider: str  # for ONNX Runtime


def choose(device: Device) -> DeviceChoice:
    """Resolve `auto`, or check that a device works in both engines. Raises `UnavailableError`."""
    if device == "cpu":
        return DeviceChoice("cpu", "asked for", 0, _PROVIDERS["cpu"])
    if device != "auto":
        problem = unavailable_reason(device)
        if problem:
            raise UnavailableError(f"Device {device} is not available: {problem} Use --device cpu or --device auto.")
        return DeviceChoice(device, "asked for", -1, _PROVIDERS[device])
    gpu = "metal" if sys.platform == "darwin" else "cuda"
    problem = unavailable_reason(gpu)
    if problem:
        return DeviceChoice("cpu", f"{gpu} is not available: {problem.rstrip('.')}", 0, _PROVIDERS["cpu"])
    return DeviceChoice(gpu, f"{gpu} works in both engines", -1, _PROVIDERS[gpu])


def unavailable_reason(device: str) -> str:
    """Return a sentence saying why `device` ("cuda" or "metal") does not work; empty if it does."""
    llama = bindings.library()
    system_info = llama.llama_print_system_info().decode("utf-8", "replace")
    names = (_BACKENDS[device], device.capitalize())
    if not any(f"{name} :" in system_info for name in names):
        return f"llama-cpp-python was built without {device.upper()}."
    if not llama.llama_supports_gpu_offload():
        return f"llama.cpp finds no {device.upper()} device."
    ort = bindings.onnxruntime()
    if _PROVIDERS[device] not in ort.get_available_providers():
        package = "onnxruntime-gpu[cuda,cudnn]" if device == "cuda" else "onnxruntime for macOS"
        return f"ONNX Runtime has no {_PROVIDERS[device]} (install {package})."
    if device == "cuda" and not _provider_works(_PROVIDERS[device]):
        return "ONNX Runtime cannot load CUDA or cuDNN (install onnxruntime-gpu[cuda,cudnn])."
    return ""


def _provider_works(provider: str) -> bool:
    """Whether ONNX Runtime can use a provider that it was compiled with; otherwise it falls back to the CPU."""
    bindings.load_cuda()
    ort = bindings.onnxruntime()
    settings = ort.SessionOptions()
    settings.log_severity_level = 4  # even so, ONNX Runtime writes to stderr why CUDA does not start
    name, kind = encode(1, b"x"), encode(2, encode(1, encode(1, 1)))  # float32 of any shape
    graph = encode(1, name + encode(2, b"y") + encode(4, b"Identity")) + encode(2, b"try")
    graph += encode(11, name + kind) + encode(12, encode(1, b"y") + kind)
    model = encode(1, 8) + encode(7, graph) + encode(8, encode(2, 17))
    try:
        return bool(ort.InferenceSession(model, settings, providers=[provider]).get_providers()[0] == provider)
    except Exception:  # noqa: BLE001 - ONNX Runtime raises a dozen kinds
        return False
