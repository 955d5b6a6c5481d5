"""What this machine offers the process: cores, memory, accelerators; and the choice of a device, with its reason.

Knows nothing about models. Reads /proc, /sys and cgroups on Linux, `sysctl` on macOS; elsewhere it falls back.
"""

from __future__ import annotations

import functools
import os
import platform
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from llava_edge.errors import UnavailableError
from llava_edge.options import Device, Memory
from llava_edge.protobuf import encode
from llava_edge.runtimes import bindings

BUSY = 0.15  # of the processors' time: what is measured beside so much does not hold for a quiet machine
_FIRST_SEEN = time.monotonic()
_PROVIDERS = {"cuda": "CUDAExecutionProvider", "metal": "CoreMLExecutionProvider", "cpu": "CPUExecutionProvider"}
_BACKENDS = {"cuda": "CUDA", "metal": "MTL"}  # names in llama_print_system_info; Metal calls itself MTL or Metal


@dataclass(frozen=True)
class Choice:
    """A device, why it was taken, and what the two engines need to use it."""

    name: str
    reason: str
    gpu_layers: int  # for llama.cpp: 0 none, -1 all
    provider: str  # for ONNX Runtime


def choose(device: Device) -> Choice:
    """Resolve `auto`, or check that the named device works in both engines. Raises `UnavailableError`."""
    if device == "cpu":
        return Choice("cpu", "asked for", 0, _PROVIDERS["cpu"])
    if device != "auto":
        lacks = lacking(device)
        if lacks:
            raise UnavailableError(f"Device {device} is not available: {lacks} Use --device cpu or --device auto.")
        return Choice(device, "asked for", -1, _PROVIDERS[device])
    wanted = "metal" if sys.platform == "darwin" else "cuda"
    lacks = lacking(wanted)
    if lacks:
        return Choice("cpu", f"{wanted} is not available: {lacks.rstrip('.')}", 0, _PROVIDERS["cpu"])
    return Choice(wanted, f"{wanted} works in both engines", -1, _PROVIDERS[wanted])


def lacking(device: str) -> str:
    """What keeps `device` ("cuda" or "metal") from working, as a sentence; empty if nothing does."""
    from llava_edge.runtimes.language import library  # nobody else may load llama.cpp: see there

    llama = library()
    built_for = llama.llama_print_system_info().decode("utf-8", "replace")
    names = (_BACKENDS[device], device.capitalize())
    if not any(f"{name} :" in built_for for name in names):
        return f"llama-cpp-python was built without {device.upper()}."
    if not llama.llama_supports_gpu_offload():
        return "llama.cpp finds no such device."
    ort = bindings.onnxruntime()
    if _PROVIDERS[device] not in ort.get_available_providers():
        package = "onnxruntime-gpu[cuda,cudnn]" if device == "cuda" else "onnxruntime for macOS"
        return f"ONNX Runtime has no {_PROVIDERS[device]} (install {package})."
    if device == "cuda" and not _starts(_PROVIDERS[device]):
        return "ONNX Runtime finds no CUDA or cuDNN that it can use (install onnxruntime-gpu[cuda,cudnn])."
    return ""


def _starts(provider: str) -> bool:
    """Whether ONNX Runtime can use a provider that it was compiled with: it takes the processor if it cannot."""
    bindings.load_cuda()
    ort = bindings.onnxruntime()
    settings = ort.SessionOptions()
    settings.log_severity_level = 4  # why CUDA does not start is said on stderr all the same
    name, kind = encode(1, b"x"), encode(2, encode(1, encode(1, 1)))  # of a float32 of any shape
    graph = encode(1, name + encode(2, b"y") + encode(4, b"Identity")) + encode(2, b"try")
    graph += encode(11, name + kind) + encode(12, encode(1, b"y") + kind)
    model = encode(1, 8) + encode(7, graph) + encode(8, encode(2, 17))
    try:
        return bool(ort.InferenceSession(model, settings, providers=[provider]).get_providers()[0] == provider)
    except Exception:  # noqa: BLE001 - a dozen kinds
        return False


def graphics() -> list[str]:
    """NVIDIA's graphics processors and their driver, as Linux names them; empty elsewhere."""
    folders = sorted(Path("/proc/driver/nvidia/gpus").glob("*/information"))
    lines = [line for path in folders for line in _read(str(path)).splitlines() if line.startswith("Model:")]
    return [*lines, _read("/proc/driver/nvidia/version")] if lines else []


def thread_count() -> tuple[int, str]:
    """Threads to compute with, and why: physical cores this process may use, within its CPU quota."""
    allowed = allowed_cpus()
    cores = _physical_cores(allowed)
    reason = f"{cores} physical cores of {len(allowed)} processors this process may use"
    quota = _cpu_quota()
    if quota is not None and quota < cores:
        cores = max(1, int(quota))
        reason = f"the CPU quota of this process is {quota:g} processors"
    return cores, reason


def allowed_cpus() -> set[int]:
    """Numbers of the processors that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return set(os.sched_getaffinity(0))
    return set(range(os.cpu_count() or 1))


def _physical_cores(allowed: set[int]) -> int:
    """Hyper-threads of one core share their sibling list. Apple's efficiency cores only slow matmuls down."""
    if sys.platform == "darwin":
        for key in ("hw.perflevel0.physicalcpu", "hw.physicalcpu"):
            answer = subprocess.run(["sysctl", "-n", key], capture_output=True, text=True, check=False).stdout.strip()
            if answer.isdigit() and int(answer) > 0:
                return int(answer)
    lists = (_read(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list") for cpu in allowed)
    siblings = {text for text in lists if text}
    return len(siblings) or len(allowed)


def _cpu_quota() -> float | None:
    """Processors' worth of time that this process's cgroups leave it, or None without a limit."""
    quotas = []
    for folder, unified in _groups("cpu"):
        if unified:
            words = _read(f"{folder}/cpu.max").split()
        else:
            words = [_read(f"{folder}/cpu.cfs_{name}_us") for name in ("quota", "period")]
        if len(words) == 2 and all(word.isdigit() for word in words) and int(words[1]):
            quotas.append(int(words[0]) / int(words[1]))
    return min(quotas, default=None)


@functools.cache
def processor() -> tuple[str, list[str]]:
    """Name of the processor and those of its features that matter to the kernels."""
    wanted = ["avx", "avx2", "fma", "f16c", "avx512f", "avx512_vnni", "avx512_bf16", "avx_vnni"]
    wanted += ["amx_tile", "amx_int8", "amx_bf16", "asimd", "asimddp", "i8mm", "sve"]
    name, flags = "", set[str]()
    for line in _read("/proc/cpuinfo").splitlines():
        key, _, value = line.partition(":")
        if key.strip() == "model name" and not name:
            name = value.strip()
        elif key.strip() in ("flags", "Features") and not flags:
            flags = set(value.split())
    if not name:
        name = platform.processor() or platform.machine()
    return name, [flag for flag in wanted if flag in flags]


def int8_saturates() -> bool:
    """Whether ONNX Runtime's fast u8 x s8 products may overflow 16 bits: on x86 unless it is known to have VNNI."""
    flags = processor()[1]
    return platform.machine() in ("x86_64", "AMD64") and "avx512_vnni" not in flags and "avx_vnni" not in flags


def int8_is_fast() -> bool:
    """Whether ONNX Runtime's products of bytes are as fast as ours: with AMX, and perhaps with AVX-VNNI alone."""
    flags = processor()[1]
    return not int8_saturates() and ("amx_int8" in flags or "avx512_vnni" not in flags)


_FILES = ("active_file", "inactive_file")  # of memory.stat


def available_memory() -> int | None:
    """Bytes this process may still take without swapping, or None if unknown."""
    limits = []
    for line in _read("/proc/meminfo").splitlines():
        if line.startswith("MemAvailable:"):
            limits.append(int(line.split()[1]) * 1024)
    for folder, unified in _groups("memory"):
        names = ("max", "current") if unified else ("limit_in_bytes", "usage_in_bytes")
        limit, used = (_read(f"{folder}/memory.{name}") for name in names)
        if limit.isdigit() and used.isdigit():
            # Files that were read or written count as used until something else needs the memory.
            fields = dict(line.split(maxsplit=1) for line in _read(f"{folder}/memory.stat").splitlines() if " " in line)
            # In version 1 those of groups within count as used, too, but have numbers of their own.
            kinds = [f"total_{name}" if f"total_{name}" in fields else name for name in _FILES]
            files = sum(int(fields.get(kind, 0)) for kind in kinds)
            limits.append(max(0, int(limit) - int(used) + files))
    return min(limits, default=None)


def address_space() -> int | None:
    """Bytes that this process may still map under its RLIMIT_AS (`ulimit -v`), or None without a limit, or unknown."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    limit, pages = resource.getrlimit(resource.RLIMIT_AS)[0], _read("/proc/self/statm").partition(" ")[0]
    if limit == resource.RLIM_INFINITY or not pages.isdigit():
        return None
    return max(0, limit - int(pages) * os.sysconf("SC_PAGE_SIZE"))


def _groups(controller: str) -> list[tuple[str, bool]]:
    """Folders of this process's cgroups, each with its parents, and whether they are of version 2.

    In a container the path may be the one outside, which is not there; the topmost folder is then its own.
    """
    found = []
    for line in _read("/proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            top = "/sys/fs/cgroup"
        elif controller in controllers.split(","):
            top = f"/sys/fs/cgroup/{controller}"
        else:
            continue
        own = PurePosixPath(path)
        found += [(f"{top}{part}".rstrip("/"), not controllers) for part in map(str, (own, *own.parents))]
    return found


def memory_use() -> Memory:
    """Peak resident memory of this process, and its private and file-backed memory now."""
    fields = dict(line.split(":", 1) for line in _read("/proc/self/status").splitlines() if ":" in line)
    if "VmHWM" in fields and "RssAnon" in fields:
        # Not getrusage: its peak is inherited from the process that forked this one.
        peak, private, mapped = (int(fields[name].split()[0]) * 1024 for name in ("VmHWM", "RssAnon", "RssFile"))
        return Memory(peak, private, mapped)
    if sys.platform == "darwin":
        import resource

        return Memory(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, None)
    return Memory(None, None)


class Others:
    """What other programs take of the processors from now on."""

    def __init__(self) -> None:
        self._begun, self._taken = time.monotonic(), others_seconds()

    def passed(self) -> float:
        """Seconds until now."""
        return time.monotonic() - self._begun

    def processors(self) -> float:
        """Of those that this process may use, 1.0 is one for the whole time; 0 elsewhere than on Linux."""
        return max(0.0, others_seconds() - self._taken) / self.passed()  # it may use fewer than before

    def share(self) -> float:
        """`processors` as a share of all that this process may use."""
        return self.processors() / len(allowed_cpus())


def others_seconds() -> float:
    """What others have taken so far of the processors that this process may use; 0 elsewhere than on Linux."""
    allowed = {f"cpu{number}" for number in allowed_cpus()}
    rows = [words for line in _read("/proc/stat").splitlines() if (words := line.split()) and words[0] in allowed]
    # All but idle and waiting for disks, see proc(5).
    ticks = sum(sum(map(int, words[1:4])) + sum(map(int, words[6:9])) for words in rows)
    return ticks / os.sysconf("SC_CLK_TCK") - time.process_time() if ticks else 0.0


def process_start() -> float:
    """When this process began, on the clock of `time.monotonic`; elsewhere than on Linux, when it was first asked."""
    words = _read("/proc/self/stat").rpartition(")")[2].split()
    if len(words) > 19 and hasattr(time, "CLOCK_BOOTTIME"):
        # Field 22 of proc(5): ticks after boot.
        age = time.clock_gettime(time.CLOCK_BOOTTIME) - int(words[19]) / os.sysconf("SC_CLK_TCK")
        start = time.monotonic() - age
        if age >= 0 and start <= _FIRST_SEEN + 0.02:
            return start
    return _FIRST_SEEN


def _read(path: str) -> str:
    try:
        return Path(path).read_text("utf-8", "replace").strip()
    except OSError:
        return ""
