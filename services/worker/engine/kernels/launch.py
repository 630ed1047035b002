"""Launching a Triton kernel without binding its arguments anew each time."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any


class Launcher:
    """Owns the compiled variants of one kernel, for one device a process.

    Triton finds out at each launch which variant its arguments need, which takes the host several
    times what the launch itself does. Here the caller says it: a variant names everything about
    the arguments that Triton specialises on (types, constants, sizes that are 1 or divisible by
    16, addresses that are not aligned to 16 bytes).
    """

    def __init__(self, kernel: Any, **options: Any) -> None:
        self._kernel = kernel
        self._options = options
        self._compiled: dict[Hashable, Any] = {}

    def __call__(self, grid: tuple[int, int, int], variant: Hashable, *arguments: Any) -> None:
        """Launch with every parameter of the kernel, constants included, by position."""
        compiled = self._compiled.get(variant)
        if compiled is None:
            # None from the interpreter, which compiles nothing.
            self._compiled[variant] = self._kernel[grid](*arguments, **self._options)
        else:
            compiled[grid](*arguments)
