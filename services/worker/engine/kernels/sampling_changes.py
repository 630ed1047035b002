"""Penalties, biases and bars on stop ids: the rows that have any, copied with them applied.

The copy leaves the raw logits to log-probabilities. Order and rounding are those of
`TokenCounts.apply` and `sample`.

Shapes: M changed rows, V vocabulary, C rows of counts, B rows of W (id, float bits) entries.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from services.worker.engine.kernels.launch import Launcher
from services.worker.engine.kernels.sampling_math import (
    BIAS_ROW,
    CHANGED_JOB,
    COUNT_ROW,
    FREQUENCY,
    LOGITS_ROW,
    NUM_BIASES,
    PRESENCE,
    REPETITION,
    TILE,
    cdiv,
    float_word,
    int_word,
    variant_of,
)

_ENTRIES = 128


@triton.jit(do_not_specialize=["bias_width"])
def _change(
    records, logits, changed, prompt_seen, output_counts, biases,
    stride, vocab_size, bias_width, SIZE: tl.constexpr, ENTRIES: tl.constexpr,
):  # fmt: skip
    target = tl.program_id(0).to(tl.int64)
    job = int_word(records, target, CHANGED_JOB).to(tl.int64)
    first_id = tl.program_id(1) * SIZE
    ids = first_id + tl.arange(0, SIZE)
    inside = ids < vocab_size
    row = int_word(records, job, LOGITS_ROW).to(tl.int64)
    values = tl.load(logits + row * stride + ids, inside).to(tl.float32)
    count_row = int_word(records, job, COUNT_ROW).to(tl.int64)
    if count_row >= 0:
        counts = tl.load(output_counts + count_row * vocab_size + ids, inside)
        in_prompt = tl.load(prompt_seen + count_row * vocab_size + ids, inside) != 0
        repetition = float_word(records, job, REPETITION)
        repeated = tl.where(values > 0, tl.div_rn(values, repetition), values * repetition)
        values = tl.where(in_prompt | (counts > 0), repeated, values)
        values -= float_word(records, job, FREQUENCY) * counts.to(tl.float32)
        values -= float_word(records, job, PRESENCE) * (counts > 0).to(tl.float32)
    out = changed + target * vocab_size
    tl.store(out + ids, values, inside)
    num_biases = int_word(records, job, NUM_BIASES)
    if num_biases > 0:
        # Entries add to what other threads of this program have stored.
        tl.debug_barrier()
        entries = biases + int_word(records, job, BIAS_ROW).to(tl.int64) * bias_width * 2
        for start in range(0, num_biases, ENTRIES):
            index = start + tl.arange(0, ENTRIES)
            token_ids = tl.load(entries + 2 * index, index < num_biases, other=-1)
            added = tl.load(entries + 2 * index + 1, index < num_biases, other=0)
            is_here = (token_ids >= first_id) & (token_ids < first_id + SIZE)
            tl.atomic_add(out + token_ids, added.to(tl.float32, bitcast=True), is_here)


# A product and the subtraction of it are rounded one by one, as torch does.
_launch_change = Launcher(_change, num_warps=4, enable_fp_fusion=False)


def change(
    records: torch.Tensor,
    logits: torch.Tensor,
    num_changed: int,
    *,
    prompt_seen: torch.Tensor,
    output_counts: torch.Tensor,
    biases: torch.Tensor,
) -> torch.Tensor:
    """Records [J, RECORD_WORDS] and logits [R, V] -> the changed rows, [M, V] float32.

    `prompt_seen` [C, V] bool, `output_counts` [C, V] int32, `biases` [B, W, 2] int32.
    """
    vocab_size = logits.shape[1]
    changed = torch.empty((num_changed, vocab_size), dtype=torch.float32, device=logits.device)
    _launch_change(
        (num_changed, cdiv(vocab_size, TILE), 1), variant_of(logits, changed),
        records, logits, changed, prompt_seen.view(torch.uint8), output_counts, biases,
        logits.stride(0), vocab_size, biases.shape[1], TILE, _ENTRIES,
    )  # fmt: skip
    return changed
