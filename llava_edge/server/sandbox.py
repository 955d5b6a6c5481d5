"""What the child process gives up before it sees anybody's picture: writing, other people's files, the network,
other programs, its parent's death. Linux only; elsewhere, and where the kernel lacks a part, that part is left out.

Landlock (kernel 5.13; TCP from 6.7) and a seccomp filter, by system call numbers: there is no Python module for them
in the standard library.
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

from llava_edge.errors import UnavailableError
from llava_edge.store import home

ROOM = 4 << 30  # bytes of address space that requests may take beyond what the loaded model has

_DEATH_SIGNAL, _NO_NEW_PRIVILEGES, _SECCOMP = 1, 38, 22  # prctl
_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446  # system calls, the same on every architecture
_WRITE, _READ_FILE, _READ_DIR = 1 << 1, 1 << 2, 1 << 3
_READ = _READ_FILE | _READ_DIR
_ALL_BY_ABI = {1: (1 << 13) - 1, 2: (1 << 14) - 1, 3: (1 << 15) - 1}  # rights a kernel knows; more since
_TCP = 0b11
_SCOPED = 0b11  # of Landlock: abstract sockets of others, and signals to them
# Refused calls, and AUDIT_ARCH and the calls' numbers.
_REFUSED = (
    *("socket", "socketpair", "connect", "execve", "execveat", "ptrace", "io_uring_setup"),
    *("kill", "tkill", "rt_sigqueueinfo", "rt_tgsigqueueinfo", "pidfd_send_signal", "setpriority"),
    *("process_vm_readv", "process_vm_writev", "pidfd_getfd"),
)
_OWN_ONLY = ("tgkill", "prlimit64")  # allowed for this process: to abort, and to limit itself
_ARCHITECTURES = {
    "x86_64": (0xC000003E, (41, 53, 42, 59, 322, 101, 425, 62, 200, 129, 297, 424, 141, 310, 311, 438), (234, 302)),
    "aarch64": (
        0xC00000B7,
        (198, 199, 203, 221, 281, 117, 425, 129, 130, 138, 240, 424, 140, 270, 271, 438),
        (131, 261),
    ),
}
_READABLE = [
    *("/usr", "/lib", "/lib64", "/etc/ld.so.cache", "/etc/localtime", "/dev/urandom"),
    *("/proc/self", "/proc/meminfo", "/proc/cpuinfo", "/proc/stat", "/sys/devices", "/sys/bus", "/sys/fs/cgroup"),
]
_PACKAGES = ("llava_edge", "numpy", "PIL", "onnxruntime", "llama_cpp")


def enter(bundle: Path, device: str, draft: str | Path | None = None) -> None:
    """Give everything up for good. To be called before threads exist, since the kernel binds most of it to a thread.

    bundle, draft: what stays readable besides the program.
    With a graphics device only what its driver does not need is given up.
    Raises `UnavailableError` if there are threads already: each could do all that this one gives up.
    """
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(256, most) if most != resource.RLIM_INFINITY else 256,) * 2)
    if sys.platform != "linux":
        return
    threads = len(list(Path("/proc/self/task").iterdir()))
    if threads > 1:
        raise UnavailableError(f"The model's process has {threads} threads before it is confined; one was expected.")
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(_DEATH_SIGNAL, 9, 0, 0, 0)
    libc.prctl(_NO_NEW_PRIVILEGES, 1, 0, 0, 0)
    if device in ("auto", "cpu") and not Path("/dev/nvidiactl").exists():
        _restrict_files(libc, [bundle, Path(draft)] if draft else [bundle])
    _refuse_calls(libc)


def limit_memory() -> None:
    """Bound what requests can take on top of what is loaded."""
    with contextlib.suppress(OSError, ValueError):
        pages = int(Path("/proc/self/statm").read_text("ascii").split()[0])
        limit = pages * os.sysconf("SC_PAGE_SIZE") + ROOM
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def _restrict_files(libc: ctypes.CDLL, models: list[Path]) -> None:
    """Reading: the models, Python and its packages, the system's libraries. Writing: nothing. No programs, no TCP."""
    abi = libc.syscall(_CREATE_RULESET, None, ctypes.c_size_t(0), 1)
    if abi < 1:
        return
    rights = _ALL_BY_ABI[min(abi, 3)]
    known = (rights, *([_TCP] if abi >= 4 else []), *([_SCOPED] if abi >= 6 else []))
    attributes = struct.pack(f"{len(known)}Q", *known)
    ruleset = libc.syscall(_CREATE_RULESET, attributes, ctypes.c_size_t(len(attributes)), 0)
    if ruleset < 0:
        return
    origins = [Path(spec.origin) for name in _PACKAGES if (spec := find_spec(name)) and spec.origin]
    # Not the current folder, which can be all of somebody's home.
    readable = [Path(path) for path in sys.path if path and Path(path).resolve() != Path.cwd()]
    readable += [
        *models,
        *(home() / name for name in ("builds", "native", "tune")),
        *(origin.resolve().parent.parent for origin in origins),
    ]
    for path in (*readable, *map(Path, (sys.prefix, sys.base_prefix, *_READABLE))):
        _allow(libc, ruleset, path, _READ)
    _allow(libc, ruleset, Path("/dev/null"), _READ | _WRITE)
    libc.syscall(_RESTRICT_SELF, ruleset, 0)
    os.close(ruleset)


def _allow(libc: ctypes.CDLL, ruleset: int, path: Path, rights: int) -> None:
    """Let everything below `path` be used so. A path that is not there needs no rule."""
    with contextlib.suppress(OSError):
        file = os.open(path.resolve(), os.O_PATH | os.O_CLOEXEC)
        if not path.is_dir():
            rights &= _READ_FILE | _WRITE
        libc.syscall(_ADD_RULE, ruleset, 1, struct.pack("=Qi", rights, file), 0)
        os.close(file)


def _refuse_calls(libc: ctypes.CDLL) -> None:
    """Those of `_REFUSED`, and of `_OWN_ONLY` for other processes, fail with EPERM: a classic BPF program.

    io_uring among them, because it makes sockets without the others; signals and memory of other processes; socket
    pairs, from which datagrams can be sent to any socket with a name.
    """
    if platform.machine() not in _ARCHITECTURES:
        return
    architecture, refused, own_only = _ARCHITECTURES[platform.machine()]
    load, equal, at_least, give = 0x20, 0x15, 0x35, 0x06
    allow, refuse = 0x7FFF0000, 0x00050000 | 1  # SECCOMP_RET_ALLOW; SECCOMP_RET_ERRNO with EPERM
    tail: list[tuple[int, int, int, int]] = []
    for number in own_only:  # 16: the low half of the first argument, a process; 0 is oneself
        tail += [(equal, 0, 5, number), (load, 0, 0, 16), (equal, 2, 0, os.getpid()), (equal, 1, 0, 0)]
        tail += [(give, 0, 0, refuse), (give, 0, 0, allow)]
    tail.append((give, 0, 0, allow))
    checks = [(at_least, 0x40000000), *((equal, number) for number in refused)]  # the first: x86's second numbering
    program = [(load, 0, 0, 4), (equal, 1, 0, architecture), (give, 0, 0, refuse), (load, 0, 0, 0)]
    program += [(kind, len(checks) - i - 1 + len(tail), 0, value) for i, (kind, value) in enumerate(checks)]
    program += [*tail, (give, 0, 0, refuse)]
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *step) for step in program))
    handle = struct.pack("HxxxxxxQ", len(program), ctypes.addressof(code))
    libc.prctl(_SECCOMP, 2, ctypes.c_char_p(handle), 0, 0)
