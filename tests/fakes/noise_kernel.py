"""A kernel that writes out the words and the noise that sampling's kernels draw."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from services.worker.engine.kernels.sampling_math import gumbel, tile_words

_SIZE = 1024


@triton.jit
def _draw(record, words_out, noise_out, SIZE: tl.constexpr):
    first = tl.program_id(0) * SIZE
    words = tile_words(first, record, 0, SIZE)
    places = first + tl.arange(0, SIZE)
    tl.store(words_out + places, words.to(tl.int64))
    tl.store(noise_out + places, gumbel(words))


def noise_of(record: torch.Tensor, vocab_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A record of `sampling_math` and a multiple of 1024 -> words and noise [V]."""
    words = torch.empty(vocab_size, dtype=torch.int64, device=record.device)
    noise = torch.empty(vocab_size, dtype=torch.float32, device=record.device)
    _draw[(vocab_size // _SIZE,)](record, words, noise, SIZE=_SIZE)
    return words, noise
