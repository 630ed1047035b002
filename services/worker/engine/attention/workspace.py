"""How much workspace FlashInfer's FA2 kernels want, so that no plan is refused.

A pass whose keys are cut in chunks leaves every chunk's sums there for a merge: for each query
head and tile of queries, the tile's rows times the head size and one number more, in float32
(`PrefillPlan` of FlashInfer's scheduler.cuh, release 0.6.12). Plans that no graph captures cut only
while that gives no more tiles than there are programs.
"""

from __future__ import annotations

_SMALLEST_BYTES = 256 * 1024**2
_FLOAT_BYTES = 4
# Programs that a plan makes for each processor when it cuts keys in chunks.
_PROGRAMS_PER_PROCESSOR = 2
# Queries of a tile at most.
_TILE_ROWS = 128


def float_workspace_bytes(
    *, num_heads: int, num_kv_heads: int, head_dim: int, num_processors: int
) -> int:
    """For any step, captured by no graph."""
    programs = _PROGRAMS_PER_PROCESSOR * num_processors // num_kv_heads
    # The two arrays start at multiples of 16.
    wanted = num_heads * programs * _TILE_ROWS * (head_dim + 1) * _FLOAT_BYTES + 2 * 16
    return max(_SMALLEST_BYTES, wanted)
