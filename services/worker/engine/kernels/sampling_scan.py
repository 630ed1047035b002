"""The pass of sampling that reads whole rows: winners, and summaries for what filters them.

Summaries do not depend on how a row is split among programs, so neither do the tokens.

Shapes: J jobs, V vocabulary, P programs a row, U tiles, G groups.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from services.worker.engine.kernels.launch import Launcher
from services.worker.engine.kernels.sampling_math import (
    ARGMAX,
    CHANGED_ROW,
    GROUP,
    GROUPS,
    LOGITS_ROW,
    MASS,
    MODE,
    NOISE,
    TEMPERATURE,
    TILE,
    cdiv,
    exp_rn,
    float_word,
    improve,
    improve_with_noise,
    int_word,
    load_row,
    variant_of,
)

# Programs that fill a GPU some times over.
_PROGRAMS = 1056

_ARGMAX = tl.constexpr(ARGMAX)
_NOISE = tl.constexpr(NOISE)
_GROUPS = tl.constexpr(GROUPS)
_MASS = tl.constexpr(MASS)


@dataclass(frozen=True, slots=True)
class Scan:
    """What one pass found, on the device."""

    # [J, P] winners of each program's part, where the mode asks for one.
    best: torch.Tensor
    best_ids: torch.Tensor
    # [J, U] largest scaled value, and sum of exp of the differences to it; [J, G].
    tile_max: torch.Tensor
    tile_mass: torch.Tensor
    group_max: torch.Tensor


@triton.jit(do_not_specialize=["tiles_each"])
def _scan(
    records, logits, changed, best_out, best_ids, tile_max, tile_mass, group_max,
    stride, vocab_size, num_tiles, num_groups, tiles_each,
    SIZE: tl.constexpr, GROUP_SIZE: tl.constexpr,
):  # fmt: skip
    job = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    mode = int_word(records, job, MODE)
    row, changed_row = int_word(records, job, LOGITS_ROW), int_word(records, job, CHANGED_ROW)
    temperature = float_word(records, job, TEMPERATURE)
    first_tile = part * tiles_each
    best = float("-inf")
    best_id = first_tile * SIZE
    for tile in range(first_tile, tl.minimum(first_tile + tiles_each, num_tiles)):
        first_id = tile * SIZE
        ids = first_id + tl.arange(0, SIZE)
        valid = ids < vocab_size
        raw = load_row(logits, changed, row, changed_row, stride, vocab_size, ids, valid)
        if mode & _ARGMAX:
            best, best_id = improve(best, best_id, raw, ids)
        if mode & _NOISE:
            best, best_id = improve_with_noise(
                best, best_id, raw, valid, first_id, temperature, records, job, SIZE
            )
        if mode & _GROUPS:
            groups = tile * (SIZE // GROUP_SIZE) + tl.arange(0, SIZE // GROUP_SIZE)
            # Division keeps the order, so it can wait until few are left.
            largest = tl.max(tl.reshape(raw, (SIZE // GROUP_SIZE, GROUP_SIZE)), axis=1)
            largest = tl.div_rn(largest, temperature)
            tl.store(group_max + job * num_groups + groups, largest, groups < num_groups)
            if mode & _MASS:
                top = tl.max(largest)
                scaled = tl.div_rn(raw, temperature)
                weights = tl.where(scaled > float("-inf"), exp_rn(scaled - top), 0.0)
                tl.store(tile_max + job * num_tiles + tile, top)
                tl.store(tile_mass + job * num_tiles + tile, tl.sum(weights))
    tl.store(best_out + job * tl.num_programs(1) + part, best)
    tl.store(best_ids + job * tl.num_programs(1) + part, best_id)


_launch_scan = Launcher(_scan, num_warps=4)


def scan(
    records: torch.Tensor, logits: torch.Tensor, changed: torch.Tensor, summarised: bool
) -> Scan:
    """[J, RECORD_WORDS] and [R, V] -> summaries, of the jobs whose mode asks for them.

    `summarised` says that some job's does. `changed` is any float32 tensor when no row is.
    """
    num_jobs, vocab_size = len(records), logits.shape[1]
    num_tiles, num_groups = cdiv(vocab_size, TILE), cdiv(vocab_size, GROUP)
    tiles_each = max(1, num_jobs * num_tiles // _PROGRAMS)
    parts = cdiv(num_tiles, tiles_each)
    kept = num_jobs if summarised else 0
    best = logits.new_empty((num_jobs, parts), dtype=torch.float32)
    tile_max = logits.new_empty((kept, num_tiles), dtype=torch.float32)
    found = Scan(
        best=best,
        best_ids=torch.empty_like(best, dtype=torch.int32),
        tile_max=tile_max,
        tile_mass=torch.empty_like(tile_max) if kept else tile_max,
        group_max=logits.new_empty((kept, num_groups), dtype=torch.float32),
    )
    _launch_scan(
        (num_jobs, parts, 1), variant_of(logits, changed),
        records, logits, changed, found.best, found.best_ids, found.tile_max, found.tile_mass,
        found.group_max, logits.stride(0), vocab_size, num_tiles, num_groups, tiles_each,
        TILE, GROUP,
    )  # fmt: skip
    return found
