"""The workspace that FlashInfer's plans of captured and other steps fit in."""

import pytest

from services.worker.engine.attention.workspace import float_workspace_bytes

MIB = 1024**2
H100_PROCESSORS = 132


def workspace(num_heads: int, num_kv_heads: int, rows: int, head_dim: int = 128) -> int:
    return float_workspace_bytes(
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        max_captured_rows=rows,
        num_processors=H100_PROCESSORS,
    )


def test_small_models_get_the_smallest() -> None:
    assert workspace(32, 8, 512) == workspace(14, 2, 0) == 256 * MIB


# What FlashInfer's plan adds up to: tiles of all rows' queries, one more a row but the last.
@pytest.mark.parametrize(
    ("num_heads", "num_kv_heads", "head_dim", "tiles", "tile_rows"),
    [
        # 64 heads over 8, as Qwen3-32B and Llama 70B have them.
        (64, 8, 128, 512 * 8 // 16 + 511, 16),
        (64, 8, 256, 512 * 8 // 16 + 511, 16),
        # A group of 32 makes larger tiles.
        (64, 2, 128, 512 * 32 // 64 + 511, 64),
    ],
)
def test_512_captured_rows_of_many_heads_fit(
    num_heads: int, num_kv_heads: int, head_dim: int, tiles: int, tile_rows: int
) -> None:
    values = num_heads * tiles * tile_rows * head_dim * 4
    sums = num_heads * tiles * tile_rows * 4
    wanted = values + sums
    assert wanted > 256 * MIB
    assert wanted <= workspace(num_heads, num_kv_heads, 512, head_dim) <= wanted * 1.01 + MIB


def test_large_groups_fit_without_graphs() -> None:
    # As many tiles of 128 queries as there are programs.
    wanted = 128 * (2 * H100_PROCESSORS // 8) * 128 * (128 + 1) * 4
    assert wanted > 256 * MIB
    assert wanted <= workspace(128, 8, 0)
