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

_FIRST_CAPABILITY = (9, 0)


@functools.cache
def can_overlap(device: torch.device) -> bool:
    """Whether kernels on this device can start while their predecessors run (Hopper and on)."""
    if device.type != "cuda":
        return False
    return torch.cuda.get_device_capability(device) >= _FIRST_CAPABILITY


@functools.cache
def launch_options(device: torch.device) -> dict[str, bool]:
    """What a launch is given: the constant DEPENDENT, and the driver's option where it is true."""
    return {"DEPENDENT": True, "launch_pdl": True} if can_overlap(device) else {"DEPENDENT": False}


@triton.jit
def allow_dependents():
    """Let the next kernel start once every program has said so."""
    tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def wait_for_predecessors():
    """Wait until the kernels before this one have ended and their writes are visible."""
    tl.extra.cuda.gdc_wait()
