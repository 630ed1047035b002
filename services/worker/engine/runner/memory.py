"""How much memory a device has for keys and values."""

from __future__ import annotations

from pathlib import Path

import torch

# A CPU's pool beyond this is asked for with num_pages: its memory is everybody's.
MAX_CPU_POOL_BYTES = 2 * 1024**3

_MEMINFO = Path("/proc/meminfo")
_CGROUP = Path("/sys/fs/cgroup")


def pool_budget_bytes(device: torch.device, fraction: float, ranks_per_node: int) -> int:
    """Bytes for one rank's pool, once its weights are loaded.

    On a GPU: `fraction` of its memory less what is used by now. On CPUs: `fraction` of what is
    available, shared by the ranks, at most MAX_CPU_POOL_BYTES for all of them.
    """
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return int(total * fraction) - (total - free)
    return min(int(_available_host_bytes() * fraction), MAX_CPU_POOL_BYTES) // ranks_per_node


def _available_host_bytes() -> int:
    """What this process can still use: the host's memory or its control group's, the smaller."""
    available = 0
    for line in _MEMINFO.read_text().splitlines():
        if line.startswith("MemAvailable:"):
            available = int(line.split()[1]) * 1024
    limit, used = _CGROUP / "memory.max", _CGROUP / "memory.current"
    if limit.is_file() and (text := limit.read_text().strip()).isdigit():
        available = min(available, int(text) - int(used.read_text()))
    return available
