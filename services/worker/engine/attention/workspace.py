"""How much workspace FlashInfer's FA2 kernels want, so that no plan is refused.

A pass whose keys are cut in chunks leaves every chunk's sums there for a merge: for each query
head and tile of queries, the tile's rows times the head size and one number more, in float32
(`PrefillPlan` of FlashInfer's scheduler.cuh, release 0.6.12).
"""

from __future__ import annotations

_SMALLEST_BYTES = 256 * 1024**2
_FLOAT_BYTES = 4
# Programs that a plan makes for each processor when it cuts keys in chunks.
_PROGRAMS_PER_PROCESSOR = 2
# Queries of a tile: of group sizes up to the first number, the second.
_TILE_ROWS = ((16, 16), (64, 64))
_MOST_TILE_ROWS = 128


def float_workspace_bytes(
    *,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    max_captured_rows: int,
    num_processors: int,
) -> int:
    """For captured steps of up to so many rows of one token, and any step that is not captured.

    Captured plans always cut, and reserve a tile for each row beside those that full tiles make;
    others cut only while that gives no more tiles than there are programs.
    """
    group = num_heads // num_kv_heads
    programs = _PROGRAMS_PER_PROCESSOR * num_processors // num_kv_heads
    rows = programs * _MOST_TILE_ROWS
    if max_captured_rows:
        tile_rows = next((rows for most, rows in _TILE_ROWS if group <= most), _MOST_TILE_ROWS)
        tiles = -(-max_captured_rows * group // tile_rows) + max_captured_rows - 1
        rows = max(rows, max(programs, tiles) * tile_rows)
    # The two arrays start at multiples of 16.
    wanted = num_heads * rows * (head_dim + 1) * _FLOAT_BYTES + 2 * 16
    return max(_SMALLEST_BYTES, wanted)
