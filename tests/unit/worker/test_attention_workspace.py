"""The workspace that FlashInfer's plans fit in."""

from services.worker.engine.attention.workspace import float_workspace_bytes

MIB = 1024**2
H100_PROCESSORS = 132


def workspace(num_heads: int, num_kv_heads: int) -> int:
    return float_workspace_bytes(
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=128,
        num_processors=H100_PROCESSORS,
    )


def test_small_models_get_the_smallest() -> None:
    assert workspace(32, 8) == workspace(14, 2) == 256 * MIB


def test_large_groups_fit() -> None:
    # As many tiles of 128 queries as there are programs.
    wanted = 128 * (2 * H100_PROCESSORS // 8) * 128 * (128 + 1) * 4
    assert wanted > 256 * MIB
    assert wanted <= workspace(128, 8)
