"""What a torch device can do, and how much memory it has."""
import contextlib
import ctypes
import os
import pathlib
import re

import torch

try:
    import resource
except ImportError:                          # Windows
    resource = None


def best_device():
    return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"


def has_bf16(device):
    """Whether a device computes in bf16 by itself."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    known = torch.cpu.get_capabilities() if device.type == "cpu" else {}
    return known.get("avx512_bf16", False) or known.get("amx_bf16", False)


def set_tf32(allowed):
    """Allows or forbids TF32, in which a GPU rounds the factors of float32 convolutions and matrix products
    to 10 bits. Allowed in training, not in evaluation."""
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = allowed


@contextlib.contextmanager
def float32():
    """A context in which TF32 is off: for an evaluation."""
    before = torch.backends.cudnn.allow_tf32
    set_tf32(False)
    try:
        yield
    finally:
        set_tf32(before)


# ---------------------------------------------------------------------------------------------------------
# Memory

def keep_freed_memory():
    """Makes glibc keep the memory of freed tensors: by default it returns large blocks to the system, and the
    next tensor causes page faults again. A CPU's step of pretraining takes 0.83 of the time; training 3 x 8
    frames of 480 x 360 end to end 6.2 GB instead of 5.0. Does nothing with other C libraries."""
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-4, 0)                       # M_MMAP_MAX: no block of its own for a large tensor
        mallopt(-1, -1)                      # M_TRIM_THRESHOLD: never


def available(device):
    """Bytes that this process can still take on a torch device: on a GPU what is free; on a CPU what the
    system calls available, or what a limit of a container or of the process leaves. None if unknown."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type != "cpu":
        return None
    sizes = []
    with contextlib.suppress(OSError, TypeError):
        sizes.append(kilobytes("/proc/meminfo", "MemAvailable"))
        sizes.append(resource.getrlimit(resource.RLIMIT_AS)[0] - kilobytes("/proc/self/status", "VmSize"))
    for limit, used in (("memory.max", "memory.current"),         # cgroup v2, v1
                        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes")):
        with contextlib.suppress(OSError, ValueError):            # "max": no limit
            limit, used = (int(pathlib.Path("/sys/fs/cgroup", name).read_text()) for name in (limit, used))
            sizes.append(limit - used)
    if not sizes:
        with contextlib.suppress(ValueError, OSError, AttributeError):    # not Linux: what is built in
            sizes.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    return min((size for size in sizes if size >= 0), default=None)       # a limit of -1: there is none


def limit_memory():
    """Linux: an allocation for which no memory is left will fail, so that the script ends with a message
    instead of being killed by the system."""
    with contextlib.suppress(OSError, ValueError, TypeError, AttributeError):
        limit = kilobytes("/proc/self/status", "VmSize") + available(torch.device("cpu"))
        resource.setrlimit(resource.RLIMIT_AS, (limit, resource.getrlimit(resource.RLIMIT_AS)[1]))


def kilobytes(file, name):
    """Bytes of a line "NAME:  1234 kB" of a file in /proc."""
    return 1024 * int(re.search(rf"{name}:\s+(\d+) kB", pathlib.Path(file).read_text())[1])
