"""Chooses each row's next token from its logits.

In this order, as SGLang does: repetition, frequency and presence penalties; logit bias;
end-of-sequence and stop ids barred until `min_new_tokens`; then either the largest logit
(temperature 0) or division by temperature, top-k, top-p over what is left, min-p, and the argmax
of the remaining values plus Gumbel noise (Gumbel-max: a sample from their softmax).

Nothing here depends on a row's neighbours.

Shapes: R rows, V vocabulary, X rows that draw noise.
"""

from __future__ import annotations

import torch

from services.worker.engine.sampling.counts import TokenCounts
from services.worker.engine.sampling.filters import thresholds
from services.worker.engine.sampling.philox import sampling_noise
from services.worker.engine.sampling.table import NoiseRows, SamplingBatch


def sample(logits: torch.Tensor, batch: SamplingBatch, counts: TokenCounts) -> torch.Tensor:
    """[R, V] float32 -> token ids [R], int64; counts them. Overwrites `logits`."""
    if batch.penalties is not None:
        counts.apply(logits, batch.penalties)
    if batch.bias is not None:
        bias = batch.bias
        logits.index_put_((bias.rows, bias.token_ids), bias.values, accumulate=True)
    if batch.noise is None:
        token_ids = logits.argmax(-1)
    elif batch.noise.rows is None:
        token_ids = _sample_noisy(logits, batch.noise)
    else:
        token_ids = logits.argmax(-1)
        token_ids[batch.noise.rows] = _sample_noisy(logits[batch.noise.rows], batch.noise)
    if batch.penalties is not None:
        counts.add(batch.penalties, token_ids)
    return token_ids


def _sample_noisy(logits: torch.Tensor, noise: NoiseRows) -> torch.Tensor:
    """[X, V] -> [X]"""
    scaled = logits.div_(noise.temperature)
    if noise.filters is not None:
        scaled.masked_fill_(scaled < thresholds(scaled, noise.filters), float("-inf"))
    scaled += sampling_noise(
        noise.seeds, noise.choices, noise.positions, scaled.shape[1], scaled.device
    )
    return scaled.argmax(-1)
