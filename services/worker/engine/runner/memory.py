"""How a device's memory is shared out: weights, what a step needs, and pages for the rest.

Of a GPU's memory, the pool of pages gets what remains beside

    in use by others + weights + step + graphs + reserve

where `step` is measured: two steps of the largest kind are run before the pool is made (see
profile.py). `--mem-fraction-static`, as in SGLang, is the share of the memory free at the start
that weights and pool may take together; it can only make the pool smaller than what fits. So no
step runs out of memory: none needs more than the largest one did, and nothing else allocates.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from services.worker.engine.options import EngineOptions

GIB = 1024**3
# A CPU's pool beyond this is asked for with num_pages: its memory is everybody's.
MAX_CPU_POOL_BYTES = 2 * GIB
# Never given out: the allocator's rounding and gaps, what libraries take when first used, and the
# few MB by which float32 logits of up to 32 rows can exceed 16-bit ones of some more.
RESERVE_BYTES = GIB // 2
# The same of a GPU that is one of several: NCCL takes buffers when it first meets an algorithm, and
# for the collectives of graphs. With 0.5 GiB the largest step behind all graphs did not fit.
SHARED_RESERVE_BYTES = 3 * GIB // 2

_MEMINFO = Path("/proc/meminfo")
_CGROUP = Path("/sys/fs/cgroup")


class ModelTooLargeError(ValueError):
    """The model and what it must hold beside it do not fit the device."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryUse:
    """What one rank's GPU memory goes to, in bytes."""

    total: int
    # Free before this rank took any.
    free_at_start: int
    weights: int
    # The most that a step takes beside weights and pages, workspaces and kernels included.
    step: int = 0
    graphs: int = 0
    reserve: int = RESERVE_BYTES

    def pool(self, fraction: float | None) -> int:
        """Bytes for pages; negative where the rest does not fit by itself.

        `fraction` of the memory that was free bounds weights and pages together.
        """
        fitting = self.free_at_start - self.weights - self.step - self.graphs - self.reserve
        if fraction is None:
            return fitting
        return min(fitting, int(self.free_at_start * fraction) - self.weights)

    def check_pool(self, options: EngineOptions, step: str, num_bytes: int, what: str) -> None:
        """Raise ModelTooLargeError unless `num_bytes` for `what` are there.

        `step` says how large the largest step is.
        """
        missing = num_bytes - self.pool(options.mem_fraction_static)
        if missing <= 0:
            return
        bound = options.mem_fraction_static
        share = "" if bound is None else f", of which --mem-fraction-static {bound} gives a part"
        raise ModelTooLargeError(
            f"the model is too large for the GPU: {gib(missing)} GiB are missing. "
            f"{gib(self.free_at_start)} of {gib(self.total)} GiB were free{share}; needed are "
            f"{gib(self.weights)} for weights, {gib(self.step)} for {step}, "
            f"{gib(self.graphs)} for CUDA graphs, {gib(self.reserve)} in reserve and "
            f"{gib(num_bytes)} for {what}. What helps: {', '.join(remedies(options))}"
        )


def remedies(options: EngineOptions, *, fits_weights: bool = True) -> list[str]:
    """Flags that make a model fit, the mildest first."""
    flags = []
    if options.mem_fraction_static is not None:
        flags.append("a larger --mem-fraction-static")
    if fits_weights:
        flags += ["a smaller --context-length", "--kv-cache-dtype fp8_e4m3"]
        flags.append("a smaller --chunked-prefill-size or --max-running-requests")
    return [*flags, "--quantization fp8", "more GPUs with --tp"]


def check_weights(options: EngineOptions, num_bytes: int, device: torch.device) -> None:
    """Raise ModelTooLargeError when a GPU has no room for the weights alone, or the host has none.

    `num_bytes` are one rank's on a GPU, those of all the host's ranks on CPUs.
    """
    if device.type == "cpu":
        check_host(num_bytes, "the weights take")
        return
    free, total = free_memory(device)
    missing = num_bytes + RESERVE_BYTES - free
    if missing > 0:
        raise ModelTooLargeError(
            f"the model is too large for the GPU: {gib(missing)} GiB are missing for the weights, "
            f"which take {gib(num_bytes)}, and {gib(RESERVE_BYTES)} in reserve; {gib(free)} of "
            f"{gib(total)} GiB are free. "
            f"What helps: {', '.join(remedies(options, fits_weights=False))}"
        )


def gib(num_bytes: int) -> str:
    """Bytes in GiB, for people."""
    return f"{num_bytes / GIB:.2f}"


def free_memory(device: torch.device) -> tuple[int, int]:
    """A GPU's free and total bytes; this process's cached blocks count as free."""
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(device)
    return free, total


def host_pool_bytes(fraction: float, ranks_per_node: int) -> int:
    """Bytes for one rank's pool on CPUs, once its weights are loaded.

    `fraction` of what is available, shared by the host's ranks; at most MAX_CPU_POOL_BYTES
    for all of them.
    """
    return min(int(_available_host_bytes() * fraction), MAX_CPU_POOL_BYTES) // ranks_per_node


def check_host(num_bytes: int, what: str) -> None:
    """Raise ModelTooLargeError when the host has not so many bytes left."""
    available = _available_host_bytes()
    if num_bytes > available:
        raise ModelTooLargeError(
            f"the host's memory is too small: {what} {gib(num_bytes)} GiB, "
            f"{gib(available)} are available"
        )


def _available_host_bytes() -> int:
    """What this process can still use: the host's memory or its control group's, the smaller."""
    available = 0
    for line in _MEMINFO.read_text().splitlines():
        if line.startswith("MemAvailable:"):
            available = int(line.split()[1]) * 1024
    limit, used = _CGROUP / "memory.max", _CGROUP / "memory.current"
    if limit.is_file() and (text := limit.read_text().strip()).isdigit():
        # Files that were read stay cached, which counts as used; the kernel drops them at need.
        statistics = dict(
            line.split() for line in (_CGROUP / "memory.stat").read_text().splitlines()
        )
        cached = sum(int(statistics[name]) for name in ("inactive_file", "active_file"))
        available = min(available, int(text) - int(used.read_text()) + cached)
    return available
