"""The noise of sampling: Philox4x32-10 (Salmon et al., SC'11), keyed by what is sampled.

A noise value belongs to (seed, choice index, position, token id) and to nothing else, so a
sequence draws the same noise on any device, in any batch and on any worker. Layout:

    key     = (seed bits 0-31, seed bits 32-63)
    counter = (token id // 4, position, choice index, stream)
    word    = output word number (token id % 4)

`position` is the absolute position of the sampled token in its sequence (the first token of the
prompt is at 0), `stream` is SAMPLING_STREAM here and separates other uses of a seed. From word to
noise, in float32 with rounding to nearest:

    v = min((float32(word) + 0.5) * 2^-32, 1 - 2^-24)    in the open interval (0, 1)
    g = -log(-log1p(-v))                                 standard Gumbel

That is -log(-log(u)) for the uniform u = 1 - v; in terms of v large noise comes from small v,
where float32 is dense, so all 32 bits count where they decide. A device's log and log1p must be
good to 2 units in the last place (no fast-math variants). `vectors.json` beside this module
holds words and tokens that every implementation must reproduce.

Shapes: R rows, V vocabulary, B = ceil(V / 4) counters.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

SAMPLING_STREAM = 0

_MULTIPLIER_0 = 0xD2511F53
_MULTIPLIER_1 = 0xCD9E8D57
_KEY_STEP_0 = 0x9E3779B9
_KEY_STEP_1 = 0xBB67AE85
_MASK = 0xFFFFFFFF
_ROUNDS = 10
_LARGEST_UNIFORM = 1.0 - 2.0**-24

UInt32Array = npt.NDArray[np.uint32]
UInt64Array = npt.NDArray[np.uint64]
Int64Array = npt.NDArray[np.int64]


def philox_numpy(counter: UInt32Array, key: UInt32Array) -> UInt32Array:
    """Philox4x32-10 of counters [..., 4] and keys [..., 2] -> words [..., 4]."""
    c0, c1, c2, c3 = (counter[..., i].astype(np.uint64) for i in range(4))
    k0, k1 = (key[..., i].astype(np.uint64) for i in range(2))
    mask, shift = np.uint64(_MASK), np.uint64(32)
    for _ in range(_ROUNDS):
        product_0 = c0 * np.uint64(_MULTIPLIER_0)
        product_1 = c2 * np.uint64(_MULTIPLIER_1)
        c0, c1, c2, c3 = (
            (product_1 >> shift) ^ c1 ^ k0,
            product_1 & mask,
            (product_0 >> shift) ^ c3 ^ k1,
            product_0 & mask,
        )
        k0 = (k0 + np.uint64(_KEY_STEP_0)) & mask
        k1 = (k1 + np.uint64(_KEY_STEP_1)) & mask
    return np.stack(np.broadcast_arrays(c0, c1, c2, c3), axis=-1).astype(np.uint32)


def seed_key(seeds: UInt64Array) -> UInt32Array:
    """[R] seeds -> [R, 2] key halves, low one first."""
    halves = np.stack((seeds & np.uint64(_MASK), seeds >> np.uint64(32)), axis=-1)
    return halves.astype(np.uint32)


def sampling_words_numpy(
    seeds: UInt64Array, choices: Int64Array, positions: Int64Array, vocab_size: int
) -> UInt32Array:
    """[R] seeds, choice indices and positions -> words [R, V]."""
    num_counters = -(-vocab_size // 4)
    counter = np.empty((len(seeds), num_counters, 4), np.uint32)
    counter[..., 0] = np.arange(num_counters)
    counter[..., 1] = positions[:, None]
    counter[..., 2] = choices[:, None]
    counter[..., 3] = SAMPLING_STREAM
    words = philox_numpy(counter, seed_key(seeds)[:, None])
    return words.reshape(len(seeds), -1)[:, :vocab_size]


def sampling_words(
    key: torch.Tensor, choices: torch.Tensor, positions: torch.Tensor, vocab_size: int
) -> torch.Tensor:
    """[R, 2] key halves, [R] choice indices and positions, int64 -> words [R, V] as int64.

    Signed 64-bit products wrap, which leaves their bits right; the high half is masked after the
    arithmetic shift.
    """
    shape = (len(key), -(-vocab_size // 4))
    c0 = torch.arange(shape[1], device=key.device).expand(shape)
    c1, c2 = positions[:, None].expand(shape), choices[:, None].expand(shape)
    c3 = torch.full((1, 1), SAMPLING_STREAM, device=key.device)
    for number in range(_ROUNDS):
        k0 = (key[:, :1] + number * _KEY_STEP_0) & _MASK
        k1 = (key[:, 1:] + number * _KEY_STEP_1) & _MASK
        low_0, low_1 = c0 * _MULTIPLIER_0, c2 * _MULTIPLIER_1
        c0 = (low_1 >> 32).bitwise_and_(_MASK).bitwise_xor_(c1).bitwise_xor_(k0)
        c2 = (low_0 >> 32).bitwise_and_(_MASK).bitwise_xor_(c3).bitwise_xor_(k1)
        c1, c3 = low_1.bitwise_and_(_MASK), low_0.bitwise_and_(_MASK)
    return torch.stack((c0, c1, c2, c3), dim=-1).flatten(1)[:, :vocab_size]


def gumbel(words: torch.Tensor) -> torch.Tensor:
    """Words (any integer type that holds them) -> standard Gumbel noise in float32."""
    uniform = words.float().add_(0.5).mul_(2.0**-32).clamp_(max=_LARGEST_UNIFORM)
    return uniform.neg_().log1p_().neg_().log_().neg_()


def sampling_noise(
    seeds: UInt64Array,
    choices: Int64Array,
    positions: Int64Array,
    vocab_size: int,
    device: torch.device,
) -> torch.Tensor:
    """[R] host arrays -> Gumbel noise [R, V] on `device`."""
    if device.type == "cpu":
        # numpy's calls cost a third of torch's, which decides for few rows.
        words = sampling_words_numpy(seeds, choices, positions, vocab_size)
        return gumbel(torch.from_numpy(words.astype(np.int64)))
    rows = np.column_stack((seed_key(seeds), choices, positions)).astype(np.int64)
    uploaded = torch.from_numpy(rows).to(device, non_blocking=True)
    return gumbel(sampling_words(uploaded[:, :2], uploaded[:, 2], uploaded[:, 3], vocab_size))
