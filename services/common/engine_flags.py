"""What the flags of an engine may say, for the launcher and the worker alike."""

from __future__ import annotations

from typing import Protocol


class EngineFlags(Protocol):
    """The flags that the launcher passes on to each worker; None is the worker's own choice."""

    @property
    def page_size(self) -> int: ...
    @property
    def base_gpu_id(self) -> int: ...
    @property
    def context_length(self) -> int | None: ...
    @property
    def chunked_prefill_size(self) -> int | None: ...
    @property
    def max_running_requests(self) -> int | None: ...
    @property
    def max_total_tokens(self) -> int | None: ...
    @property
    def mem_fraction_static(self) -> float | None: ...


def check_engine_flags(flags: EngineFlags) -> None:
    """Raises ValueError for a number that no engine can work with."""
    for name, value in (
        ("page_size", flags.page_size),
        ("context_length", flags.context_length),
        ("chunked_prefill_size", flags.chunked_prefill_size),
        ("max_running_requests", flags.max_running_requests),
    ):
        if value is not None and value < 1:
            raise ValueError(f"{name} must be >= 1, got {value}")
    if flags.base_gpu_id < 0:
        raise ValueError(f"base_gpu_id must be >= 0, got {flags.base_gpu_id}")
    if flags.max_total_tokens is not None and flags.max_total_tokens < flags.page_size:
        raise ValueError(
            f"max_total_tokens must hold a page of {flags.page_size}, got {flags.max_total_tokens}"
        )
    if flags.mem_fraction_static is not None and not 0 < flags.mem_fraction_static <= 1:
        raise ValueError(
            f"mem_fraction_static must be within (0, 1], got {flags.mem_fraction_static}"
        )
