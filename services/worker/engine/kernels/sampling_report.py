"""Log-probabilities of raw logits: the chosen token's, the most likely ones', requested ones'.

Most likely tokens come from the largest values of groups: the next one is in the group with the
largest value left, of which only that group must be read again.

Shapes: J jobs, V vocabulary, U tiles, G groups, K most likely, M requested, N jobs of a scan.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from services.worker.engine.kernels.launch import Launcher
from services.worker.engine.kernels.sampling_math import (
    GROUP,
    LOGITS_ROW,
    NO_ID,
    NUM_REQUESTED,
    NUM_TOP,
    REQUESTED_ROW,
    SAMPLED_ROW,
    int_word,
    next_power_of_2,
    variant_of,
)
from services.worker.engine.kernels.sampling_scan import Scan

_BLOCK = 32

_NO_ID = tl.constexpr(NO_ID)


@triton.jit(do_not_specialize=["first_job", "requested_width", "num_top", "width"])
def _report(
    records, logits, tile_max, tile_mass, group_max, token_ids, requested, out,
    first_job, stride, vocab_size, num_tiles, num_groups, requested_width, num_top, width,
    TILES: tl.constexpr, GROUPS: tl.constexpr, GROUP_SIZE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    job = (first_job + tl.program_id(0)).to(tl.int64)
    tiles = tl.arange(0, TILES)
    tops = tl.load(tile_max + job * num_tiles + tiles, tiles < num_tiles, other=float("-inf"))
    masses = tl.load(tile_mass + job * num_tiles + tiles, tiles < num_tiles, other=0.0)
    top = tl.max(tops)
    shifted = tl.exp((tops - top).to(tl.float64))
    total = tl.sum(tl.where(tiles < num_tiles, shifted * masses.to(tl.float64), 0.0))
    normaliser = (top.to(tl.float64) + tl.log(total)).to(tl.float32)

    row = logits + int_word(records, job, LOGITS_ROW).to(tl.int64) * stride
    line = out + tl.program_id(0).to(tl.int64) * width
    chosen = tl.load(token_ids + int_word(records, job, SAMPLED_ROW))
    tl.store(line, (tl.load(row + chosen).to(tl.float32) - normaliser).to(tl.int32, bitcast=True))

    wanted = requested + int_word(records, job, REQUESTED_ROW).to(tl.int64) * requested_width * 2
    num_requested = int_word(records, job, NUM_REQUESTED)
    for start in range(0, num_requested, BLOCK):
        places = start + tl.arange(0, BLOCK)
        is_wanted = places < num_requested
        ids = tl.load(wanted + 2 * places, is_wanted, other=0)
        values = tl.load(row + ids, is_wanted, other=0.0).to(tl.float32) - normaliser
        tl.store(line + 1 + 2 * num_top + places, values.to(tl.int32, bitcast=True), is_wanted)

    groups = tl.arange(0, GROUPS)
    left = tl.load(group_max + job * num_groups + groups, groups < num_groups, other=float("-inf"))
    last = float("inf")
    last_id = -1
    for place in range(int_word(records, job, NUM_TOP)):
        value = tl.max(left)
        group = tl.min(tl.where((left == value) & (groups < num_groups), groups, num_groups - 1))
        ids = group * GROUP_SIZE + tl.arange(0, GROUP_SIZE)
        inside = ids < vocab_size
        values = tl.load(row + ids, inside, other=float("-inf")).to(tl.float32)
        is_left = inside & ((values < last) | ((values == last) & (ids > last_id)))
        token_id = tl.min(tl.where(is_left & (values == value), ids, _NO_ID))
        token_id = tl.minimum(token_id, vocab_size - 1)
        is_left = inside & ((values < value) | ((values == value) & (ids > token_id)))
        next_value = tl.max(tl.where(is_left, values, float("-inf")))
        left = tl.where(groups == group, next_value, left)
        last, last_id = value, token_id
        tl.store(line + 1 + place, (value - normaliser).to(tl.int32, bitcast=True))
        tl.store(line + 1 + num_top + place, token_id)


_launch_report = Launcher(_report, num_warps=4)


def report(
    records: torch.Tensor,
    logits: torch.Tensor,
    found: Scan,
    token_ids: torch.Tensor,
    requested: torch.Tensor,
    out: torch.Tensor,
    *,
    num_top: int,
) -> None:
    """Fill `out` [J, 1 + 2 K + M] int32 for the last J jobs of a scan.

    A line holds float bits but for the ids: the chosen token's, K values, their K ids, M values.
    `token_ids` has the chosen ids at SAMPLED_ROW; `requested` [B, W, 2] int32 the wanted ones.
    `out` is aligned to 16 bytes.
    """
    num_groups, num_tiles = found.group_max.shape[1], found.tile_max.shape[1]
    lines, width = out.shape
    _launch_report(
        (lines, 1, 1), variant_of(logits, logits),
        records, logits, found.tile_max, found.tile_mass, found.group_max, token_ids, requested,
        out, len(records) - lines, logits.stride(0), logits.shape[1], num_tiles, num_groups,
        requested.shape[1], num_top, width, next_power_of_2(num_tiles),
        next_power_of_2(num_groups), GROUP, _BLOCK,
    )  # fmt: skip
