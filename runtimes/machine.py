"""What this machine offers the process: cores, memory, instruction sets; and what other programs use of it.

Reads /proc, /sys and cgroups on Linux, `sysctl` on macOS; elsewhere it uses fallbacks.
"""

from __future__ import annotations

import functools
import os
import platform
import resource
import subprocess
import sys
import time
from pathlib import Path, PurePosixPath

from llava_edge.errors import UnavailableError
from llava_edge.options import Memory

MAX_EXTERNAL_LOAD = 0.15  # share of the processors: measurements beside more say nothing about a quiet machine
# Of a processor, those that matter to the kernels, by their names in /proc/cpuinfo.
FEATURES = (
    *("avx", "avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_vnni", "avx512_bf16"),
    *("avx_vnni", "amx_tile", "amx_int8", "amx_bf16", "asimd", "asimddp", "i8mm", "sve"),
)
_IMPORTED = time.monotonic()
_PAGE_CACHE = ("active_file", "inactive_file")  # fields of memory.stat


def require_proc() -> None:
    """Raise `UnavailableError` on Linux without /proc, as in a chroot: there ONNX Runtime loads no external weights."""
    if sys.platform == "linux" and not Path("/proc/self").exists():
        raise UnavailableError("/proc is not mounted here, which ONNX Runtime needs. Run: mount -t proc proc /proc")


def nvidia_gpus() -> list[str]:
    """Return the models of NVIDIA's GPUs and the driver's version, from Linux's /proc; empty elsewhere."""
    folders = sorted(Path("/proc/driver/nvidia/gpus").glob("*/information"))
    lines = [line for path in folders for line in _read(str(path)).splitlines() if line.startswith("Model:")]
    return [*lines, _read("/proc/driver/nvidia/version")] if lines else []


def thread_count() -> tuple[int, str]:
    """Return the number of threads to compute with, and why: usable physical cores, within the CPU quota."""
    allowed = allowed_cpus()
    cores = _physical_cores(allowed)
    reason = f"{cores} physical cores of {len(allowed)} processors this process may use"
    quota = _cpu_quota()
    if quota is not None and quota < cores:
        cores = max(1, int(quota))
        reason = f"the CPU quota of this process is {quota:g} processors"
    return cores, reason


def allowed_cpus() -> set[int]:
    """Return the numbers of the processors that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return set(os.sched_getaffinity(0))
    return set(range(os.cpu_count() or 1))


def _physical_cores(allowed: set[int]) -> int:
    """Count cores: hyper-threads of one share their sibling list. Apple's efficiency cores only slow matmuls down."""
    if sys.platform == "darwin":
        for key in ("hw.perflevel0.physicalcpu", "hw.physicalcpu"):
            output = subprocess.run(["sysctl", "-n", key], capture_output=True, text=True, check=False).stdout.strip()
            if output.isdigit() and int(output) > 0:
                return int(output)
    lists = (_read(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list") for cpu in allowed)
    siblings = {text for text in lists if text}
    return len(siblings) or len(allowed)


def _cpu_quota() -> float | None:
    """Return the CPU quota of this process's cgroups in processors, or None without one."""
    quotas = []
    for folder, is_v2 in _cgroups("cpu"):
        if is_v2:
            words = _read(f"{folder}/cpu.max").split()
        else:
            words = [_read(f"{folder}/cpu.cfs_{name}_us") for name in ("quota", "period")]
        if len(words) == 2 and all(word.isdigit() for word in words) and int(words[1]):
            quotas.append(int(words[0]) / int(words[1]))
    return min(quotas, default=None)


@functools.cache
def processor() -> tuple[str, list[str]]:
    """Return the name of the processor, and those of `FEATURES` that it has."""
    name, flags = "", set[str]()
    for line in _read("/proc/cpuinfo").splitlines():
        key, _, value = line.partition(":")
        if key.strip() == "model name" and not name:
            name = value.strip()
        elif key.strip() in ("flags", "Features") and not flags:
            flags = set(value.split())
    if not name:
        name = platform.processor() or platform.machine()
    return name, [flag for flag in FEATURES if flag in flags]


def int8_saturates() -> bool:
    """Whether ONNX Runtime's fast u8 x s8 products may overflow 16 bits: on x86 unless VNNI is known to be present."""
    flags = processor()[1]
    return platform.machine() == "x86_64" and "avx512_vnni" not in flags and "avx_vnni" not in flags


def int8_is_fast() -> bool:
    """Whether ONNX Runtime's int8 products may be as fast as ours: with AMX, and with AVX-VNNI alone."""
    flags = processor()[1]
    return not int8_saturates() and ("amx_int8" in flags or "avx512_vnni" not in flags)


def available_memory() -> int | None:
    """Return the bytes that this process can still allocate without swapping, or None if unknown."""
    lines = _read("/proc/meminfo").splitlines()
    limits = [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
    for folder, is_v2 in _cgroups("memory"):
        names = ("max", "current") if is_v2 else ("limit_in_bytes", "usage_in_bytes")
        limit, used = (_read(f"{folder}/memory.{name}") for name in names)
        if limit.isdigit() and used.isdigit():
            # The page cache counts as used, but is freed when something else needs the memory.
            fields = dict(line.split(maxsplit=1) for line in _read(f"{folder}/memory.stat").splitlines() if " " in line)
            # In version 1, usage includes that of child cgroups, whose page cache is in the total_ fields.
            keys = [f"total_{name}" if f"total_{name}" in fields else name for name in _PAGE_CACHE]
            files = sum(int(fields.get(key, 0)) for key in keys)
            limits.append(max(0, int(limit) - int(used) + files))
    return min(limits, default=None)


def address_space() -> int | None:
    """Return the bytes still free under RLIMIT_AS (`ulimit -v`), or None if that is unlimited or unknown."""
    limit, pages = resource.getrlimit(resource.RLIMIT_AS)[0], _read("/proc/self/statm").partition(" ")[0]
    if limit == resource.RLIM_INFINITY or not pages.isdigit():
        return None
    return max(0, limit - int(pages) * os.sysconf("SC_PAGE_SIZE"))


def _cgroups(controller: str) -> list[tuple[str, bool]]:
    """Return the folders of this process's cgroups and their parents, each with whether it is of version 2.

    In a container the path may be the host's, which does not exist here; the topmost folder is then its own.
    """
    folders = []
    for line in _read("/proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            top = "/sys/fs/cgroup"
        elif controller in controllers.split(","):
            top = f"/sys/fs/cgroup/{controller}"
        else:
            continue
        own = PurePosixPath(path)
        folders += [(f"{top}{part}".rstrip("/"), not controllers) for part in map(str, (own, *own.parents))]
    return folders


def memory_use() -> Memory:
    """Return this process's peak resident memory, and its current private and file-backed memory."""
    fields = dict(line.split(":", 1) for line in _read("/proc/self/status").splitlines() if ":" in line)
    if "VmHWM" in fields and "RssAnon" in fields:
        # Not getrusage, whose peak is inherited from the parent process.
        peak, private, mapped = (int(fields[name].split()[0]) * 1024 for name in ("VmHWM", "RssAnon", "RssFile"))
        return Memory(peak, private, mapped)
    if sys.platform == "darwin":
        return Memory(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, None)
    return Memory(None, None)


class ExternalLoad:
    """Measures how much CPU time other programs use from now on."""

    def __init__(self) -> None:
        self._started, self._cpu_seconds = time.monotonic(), external_cpu_seconds()

    def elapsed(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self._started

    def processors(self) -> float:
        """Average number of busy processors, of those that this process may use; 0 except on Linux."""
        used = external_cpu_seconds() - self._cpu_seconds
        return max(0.0, used) / self.elapsed()  # negative if this process may use fewer processors than before

    def share(self) -> float:
        """`processors` as a share of all that this process may use."""
        return self.processors() / len(allowed_cpus())


def external_cpu_seconds() -> float:
    """Return the CPU time other programs have used on the processors this process may use; 0 except on Linux."""
    allowed = {f"cpu{number}" for number in allowed_cpus()}
    rows = [words for line in _read("/proc/stat").splitlines() if (words := line.split()) and words[0] in allowed]
    # All fields but idle and iowait, see proc(5).
    ticks = sum(sum(map(int, words[1:4])) + sum(map(int, words[6:9])) for words in rows)
    return ticks / os.sysconf("SC_CLK_TCK") - time.process_time() if ticks else 0.0


def process_start() -> float:
    """Return the instant (`time.monotonic`) this process started; except on Linux, that this module was imported."""
    words = _read("/proc/self/stat").rpartition(")")[2].split()
    if len(words) > 19 and hasattr(time, "CLOCK_BOOTTIME"):
        # Field 22 in proc(5): start time in ticks after boot.
        age = time.clock_gettime(time.CLOCK_BOOTTIME) - int(words[19]) / os.sysconf("SC_CLK_TCK")
        start = time.monotonic() - age
        if age >= 0 and start <= _IMPORTED + 0.02:
            return start
    return _IMPORTED


def _read(path: str) -> str:
    try:
        return Path(path).read_text("utf-8", "replace").strip()
    except OSError:
        return ""
