"""Samples rows through the real table and sampler, one slot a row."""

from __future__ import annotations

import numpy as np
import torch

from services.worker.engine.batch import SlotAssignment
from services.worker.engine.messages import LogprobSpec, SamplingParams
from services.worker.engine.sampling.counts import TokenCounts
from services.worker.engine.sampling.sampler import sample
from services.worker.engine.sampling.table import SamplingTable

EOS = (1, 3)


def sample_rows(
    logits: torch.Tensor,
    params: list[SamplingParams],
    *,
    positions: list[int] | None = None,
    choices: list[int] | None = None,
    prompts: list[list[int]] | None = None,
    outputs: list[list[int]] | None = None,
    num_steps: int = 1,
) -> list[int]:
    """Row i of [R, V] `logits` samples by params[i]; the last of `num_steps` equal steps."""
    rows, vocab_size = logits.shape
    prompts = prompts or [[0]] * rows
    outputs = outputs or [[]] * rows
    counts = TokenCounts(vocab_size, logits.device)
    table = SamplingTable(
        num_slots=rows,
        vocab_size=vocab_size,
        eos_token_ids=EOS,
        counts=counts,
        device=logits.device,
    )
    for slot in range(rows):
        table.assign(
            SlotAssignment(
                slot=slot,
                sampling=params[slot],
                logprobs=LogprobSpec(),
                choice_index=choices[slot] if choices else 0,
                prompt_len=len(prompts[slot]),
                token_ids=prompts[slot] + outputs[slot],
            )
        )
    if positions is None:
        positions = [len(prompts[slot]) + len(outputs[slot]) for slot in range(rows)]
    token_ids = torch.zeros(rows, dtype=torch.int64)
    for step in range(num_steps):
        at = np.array(positions, np.int64) + step
        batch = table.batch(np.arange(rows, dtype=np.int32), at)
        token_ids = sample(logits.clone(), batch, counts)
    return token_ids.tolist()
