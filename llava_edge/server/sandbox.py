"""Confines the child process before it decodes any image: no writing, no other files, no network, no other programs,
and no outliving its parent. Linux only; elsewhere, and where the kernel lacks a part, that part is skipped.

Landlock (kernel 5.13; TCP from 6.7) and a seccomp filter, by system call numbers: the standard library has no module
for them.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import resource
import struct
import sys
from importlib.util import find_spec
from pathlib import Path

from llava_edge.errors import MissingError, UnavailableError
from llava_edge.store import home

REQUEST_MEMORY = 4 << 30  # bytes of address space for requests, on top of the loaded model

_DEATH_SIGNAL, _NO_NEW_PRIVILEGES, _SECCOMP = 1, 38, 22  # prctl
_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446  # system calls, the same on every architecture
_WRITE, _READ_FILE, _READ_DIR = 1 << 1, 1 << 2, 1 << 3
_READ = _READ_FILE | _READ_DIR
_ALL_BY_ABI = {1: (1 << 13) - 1, 2: (1 << 14) - 1, 3: (1 << 15) - 1}  # file rights each Landlock version knows
_TCP = 0b11
_SCOPED = 0b11  # Landlock: abstract sockets of other processes, and signals to them
# System calls that fail, with their numbers on x86-64 and aarch64.
_BLOCKED_CALLS = {
    "socket": (41, 198), "socketpair": (53, 199), "connect": (42, 203), "execve": (59, 221), "execveat": (322, 281),
    "ptrace": (101, 117), "io_uring_setup": (425, 425), "kill": (62, 129), "tkill": (200, 130),
    "rt_sigqueueinfo": (129, 138), "rt_tgsigqueueinfo": (297, 240), "pidfd_send_signal": (424, 424),
    "setpriority": (141, 140), "process_vm_readv": (310, 270), "process_vm_writev": (311, 271),
    "pidfd_getfd": (438, 438),
}  # fmt: skip
_SELF_ONLY_CALLS = {"tgkill": (234, 131), "prlimit64": (302, 261)}  # on this process itself: to abort, to set limits
_ARCHITECTURES = {"x86_64": (0xC000003E, 0), "aarch64": (0xC00000B7, 1)}  # AUDIT_ARCH, and which of those numbers
_READABLE = [
    *("/usr", "/lib", "/lib64", "/etc/ld.so.cache", "/etc/localtime", "/dev/urandom"),
    *("/proc/self", "/proc/meminfo", "/proc/cpuinfo", "/proc/stat", "/sys/devices", "/sys/bus", "/sys/fs/cgroup"),
]
_PACKAGES = ("llava_edge", "numpy", "PIL", "onnxruntime", "llama_cpp")


def enter(bundle: Path, device: str, draft: str | Path | None = None) -> None:
    """Confine this process for good. Call it before starting threads: most restrictions apply per thread.

    bundle, draft: what stays readable besides the program.
    With a GPU, only what its driver does not need is restricted.
    Raises `UnavailableError` if there already are other threads, which would stay unconfined.
    """
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    hard_limit = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    files = 256 if hard_limit == resource.RLIM_INFINITY else min(256, hard_limit)
    resource.setrlimit(resource.RLIMIT_NOFILE, (files, files))
    if sys.platform != "linux":
        return
    tasks = Path("/proc/self/task")
    threads = len(list(tasks.iterdir())) if tasks.exists() else 1  # unknown without /proc
    if threads > 1:
        raise UnavailableError(f"The model's process has {threads} threads before its sandbox starts; expected one.")
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(_DEATH_SIGNAL, 9, 0, 0, 0)
    libc.prctl(_NO_NEW_PRIVILEGES, 1, 0, 0, 0)
    if device in ("auto", "cpu") and not Path("/dev/nvidiactl").exists():
        _restrict_files(libc, [bundle, Path(draft)] if draft else [bundle])
    _filter_calls(libc)


def limit_memory() -> None:
    """Limit the address space to what is in use now plus `REQUEST_MEMORY`."""
    with contextlib.suppress(OSError, ValueError):
        pages = int(Path("/proc/self/statm").read_text("ascii").split()[0])
        limit = pages * os.sysconf("SC_PAGE_SIZE") + REQUEST_MEMORY
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def _restrict_files(libc: ctypes.CDLL, models: list[Path]) -> None:
    """Landlock: read the models, Python and its packages and system libraries; no writing, programs or TCP."""
    abi = libc.syscall(_CREATE_RULESET, None, ctypes.c_size_t(0), 1)
    if abi < 1:
        return
    rights = _ALL_BY_ABI[min(abi, 3)]
    handled = (rights, *([_TCP] if abi >= 4 else []), *([_SCOPED] if abi >= 6 else []))
    attributes = struct.pack(f"{len(handled)}Q", *handled)
    ruleset = libc.syscall(_CREATE_RULESET, attributes, ctypes.c_size_t(len(attributes)), 0)
    if ruleset < 0:
        return
    packages = [Path(spec.origin) for name in _PACKAGES if (spec := find_spec(name)) and spec.origin]
    # Not the current folder, which may be the user's home.
    readable = [Path(path) for path in sys.path if path and Path(path).resolve() != Path.cwd()]
    with contextlib.suppress(MissingError):
        readable += [home() / name for name in ("builds", "native", "tune")]
    readable += [*models, *(package.resolve().parent.parent for package in packages)]
    for path in (*readable, *map(Path, (sys.prefix, sys.base_prefix, *_READABLE))):
        _allow(libc, ruleset, path, _READ)
    _allow(libc, ruleset, Path("/dev/null"), _READ | _WRITE)
    libc.syscall(_RESTRICT_SELF, ruleset, 0)
    os.close(ruleset)


def _allow(libc: ctypes.CDLL, ruleset: int, path: Path, rights: int) -> None:
    """Grant `rights` for everything below `path`, if it exists."""
    with contextlib.suppress(OSError):
        file = os.open(path.resolve(), os.O_PATH | os.O_CLOEXEC)
        if not path.is_dir():
            rights &= _READ_FILE | _WRITE
        libc.syscall(_ADD_RULE, ruleset, 1, struct.pack("=Qi", rights, file), 0)
        os.close(file)


def _filter_calls(libc: ctypes.CDLL) -> None:
    """seccomp: `_BLOCKED_CALLS`, and `_SELF_ONLY_CALLS` on other processes, fail with EPERM. A classic BPF program.

    io_uring is blocked because it can create sockets without the other calls; socket pairs because datagrams can be
    sent from them to any named socket.
    """
    if platform.machine() not in _ARCHITECTURES:
        return
    architecture, column = _ARCHITECTURES[platform.machine()]
    blocked, self_only = ([call[column] for call in calls.values()] for calls in (_BLOCKED_CALLS, _SELF_ONLY_CALLS))
    load, equal, at_least, ret = 0x20, 0x15, 0x35, 0x06
    allow, deny = 0x7FFF0000, 0x00050000 | 1  # SECCOMP_RET_ALLOW; SECCOMP_RET_ERRNO with EPERM
    tail: list[tuple[int, int, int, int]] = []
    for number in self_only:  # 16: low half of the first argument, a process id; 0 is this process
        tail += [(equal, 0, 5, number), (load, 0, 0, 16), (equal, 2, 0, os.getpid()), (equal, 1, 0, 0)]
        tail += [(ret, 0, 0, deny), (ret, 0, 0, allow)]
    tail.append((ret, 0, 0, allow))
    checks = [(at_least, 0x40000000), *((equal, number) for number in blocked)]  # the first: x32's call numbers
    program = [(load, 0, 0, 4), (equal, 1, 0, architecture), (ret, 0, 0, deny), (load, 0, 0, 0)]
    program += [(kind, len(checks) - i - 1 + len(tail), 0, value) for i, (kind, value) in enumerate(checks)]
    program += [*tail, (ret, 0, 0, deny)]
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *step) for step in program))
    handle = struct.pack("HxxxxxxQ", len(program), ctypes.addressof(code))
    libc.prctl(_SECCOMP, 2, ctypes.c_char_p(handle), 0, 0)
