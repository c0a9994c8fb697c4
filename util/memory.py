"""How much memory is available, and a limit that turns too little of it into an error that can be caught."""
import contextlib
import os
import pathlib
import re

import torch

try:
    import resource
except ImportError:                          # Windows
    resource = None


def available(device):
    """Bytes that this process can still take on a torch device: on a GPU what is free; on a CPU what the
    system calls available, or what a container's limit leaves. None if unknown."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type != "cpu":
        return None
    sizes = []
    with contextlib.suppress(OSError, TypeError):
        sizes.append(1024 * int(re.search(r"MemAvailable:\s+(\d+) kB", _read("/proc/meminfo"))[1]))
    for limit, used in (("memory.max", "memory.current"),         # cgroup v2, v1
                        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes")):
        with contextlib.suppress(OSError, ValueError):            # "max": no limit
            sizes.append(int(_read(f"/sys/fs/cgroup/{limit}")) - int(_read(f"/sys/fs/cgroup/{used}")))
    if not sizes:
        with contextlib.suppress(ValueError, OSError, AttributeError):    # not Linux: what is built in
            sizes.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    return min(sizes, default=None)


def limit_memory(share=1):
    """Linux: an allocation for which no memory is left will fail, so that the script ends with a message
    instead of being killed by the system. share: the part of what is available that it may take."""
    with contextlib.suppress(OSError, ValueError, TypeError, AttributeError):
        taken = 1024 * int(re.search(r"VmSize:\s+(\d+) kB", _read("/proc/self/status"))[1])
        _, hard = resource.getrlimit(resource.RLIMIT_AS)
        limit = int(taken + share * available(torch.device("cpu")))
        resource.setrlimit(resource.RLIMIT_AS, (limit if hard < 0 else min(limit, hard), hard))


def _read(path):
    return pathlib.Path(path).read_text()
