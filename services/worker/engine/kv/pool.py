"""The keys and values of every page on one rank's device, and how many pages fit.

Shapes: N pages, P tokens a page, H this rank's key/value heads, D head size.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch


class PagePool:
    """Owns `tensor` [layers, 2, N, P, H, D]; page ids index its third dimension.

    Which page belongs to whom is not its business. Starts as zeros, so that what was never
    written is finite.
    """

    def __init__(
        self,
        *,
        num_layers: int,
        num_pages: int,
        page_size: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.num_pages = num_pages
        self.page_size = page_size
        shape = (num_layers, 2, num_pages, page_size, num_kv_heads, head_dim)
        self.tensor = _zeros(shape, dtype, device)

    def keys(self, layer: int) -> torch.Tensor:
        """[N, P, H, D]"""
        return self.tensor[layer, 0]

    def values(self, layer: int) -> torch.Tensor:
        """[N, P, H, D]"""
        return self.tensor[layer, 1]


@dataclass(frozen=True, slots=True)
class StepPlaces:
    """Where a step's keys and values go, in every layer of `pool`."""

    pool: PagePool
    # [T] on the device, int64: page * P + offset. Tokens beyond these are padding.
    locations: torch.Tensor


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    # numpy takes zeroed memory from the kernel, so a page costs memory only once it is written.
    num_bytes = math.prod(shape) * dtype.itemsize
    return torch.from_numpy(np.zeros(num_bytes, np.uint8)).view(dtype).view(shape)


def write_tokens(pages: torch.Tensor, locations: torch.Tensor, tokens: torch.Tensor) -> None:
    """Tokens [T, H, D] to places (page * P + offset) of one layer's `pages` [N, P, H, D].

    Tokens beyond as many as there are places are padding, which is not written. What an FP8 pool
    cannot hold becomes its largest value of that sign.
    """
    places = pages.flatten(0, 1)
    tokens = tokens[: len(locations)]
    if not _is_fp8(pages.dtype):
        places.index_copy_(0, locations, tokens)
        return
    largest = torch.finfo(pages.dtype).max
    stored = tokens.float().clamp(-largest, largest).to(pages.dtype)
    # Torch moves bytes where it has no kernel for the type.
    places.view(torch.uint8).index_copy_(0, locations, stored.view(torch.uint8))


def gather_pages(pages: torch.Tensor, ids: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Pages [N, P, H, D] of one layer at [S] ids -> [S, P, H, D] in `dtype`."""
    if not _is_fp8(pages.dtype):
        return pages.index_select(0, ids)
    return pages.view(torch.uint8).index_select(0, ids).view(pages.dtype).to(dtype)


def _is_fp8(dtype: torch.dtype) -> bool:
    return dtype.itemsize == 1


def page_bytes(
    *, num_layers: int, page_size: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype
) -> int:
    """Bytes that one page takes over all layers of one rank."""
    return 2 * num_layers * page_size * num_kv_heads * head_dim * dtype.itemsize


def fitting_pages(*, free_bytes: int, bytes_per_page: int) -> int:
    """Pages for a pool in `free_bytes`. Raises ValueError when not even one fits."""
    if free_bytes < bytes_per_page:
        raise ValueError(
            f"no room for keys and values: a page takes {bytes_per_page} bytes, "
            f"{max(free_bytes, 0)} are free"
        )
    return free_bytes // bytes_per_page
