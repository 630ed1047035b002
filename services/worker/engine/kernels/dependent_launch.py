"""Programmatic dependent launch (CUDA C++ programming guide, "Programmatic Dependent Launch").

A kernel launched so may start while its predecessor in the stream still runs. Until it waits it
must touch nothing that a kernel before it writes; every such kernel waits, so that those before
its predecessor have ended as well.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from triton import knobs

_FIRST_CAPABILITY = (9, 0)


@functools.cache
def can_launch_dependents(device: torch.device) -> bool:
    """Whether the device starts kernels before their predecessors end."""
    if device.type != "cuda" or knobs.runtime.interpret:
        return False
    return torch.cuda.get_device_capability(device) >= _FIRST_CAPABILITY


@triton.jit
def allow_dependents():
    """Let the next kernel start once every program has said so."""
    tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def wait_for_predecessors():
    """Wait until the kernels before this one have ended and their writes are visible."""
    tl.extra.cuda.gdc_wait()


@triton.jit
def prefetch_to_l2(pointer, num_bytes):
    """Ask for `num_bytes` (a multiple of 16, at a multiple of 16) to come to the L2 cache.

    One thread of the program asks; PTX's cp.async.bulk.prefetch.L2.
    """
    tl.inline_asm_elementwise(
        """{
        .reg .pred first;
        .reg .u32 thread;
        mov.u32 thread, %tid.x;
        setp.eq.u32 first, thread, 0;
        @first cp.async.bulk.prefetch.L2.global [$1], $2;
        mov.u32 $0, 0;
        }""",
        "=r,l,r",
        [pointer.to(tl.uint64), num_bytes],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )
