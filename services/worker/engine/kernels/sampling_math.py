"""What the kernels of sampling share: records of rows, noise, ordered keys, selection.

A *job* is one pass over one row of logits. It is described by a record of RECORD_WORDS int32
words, floats as their bits; `sampling/records.py` has the same layout as a numpy type. A row is
read from `logits`, or from `changed` (float32) when penalties or biases made a copy of it.

The noise is that of `sampling/philox.py`. Here log1p comes from log, by the correction of what
1 - v rounds off, so that both logarithms are as good as the device's `log` (1 ulp).

Shapes: J jobs, V vocabulary, G groups of GROUP tokens, U tiles of TILE tokens, C candidates.
"""

from __future__ import annotations

from collections.abc import Hashable

import torch
import triton
import triton.language as tl

RECORD_WORDS = 24
TILE = 2048
GROUP = 128

# Words of a record.
LOGITS_ROW = tl.constexpr(0)
CHANGED_ROW = tl.constexpr(1)
MODE = tl.constexpr(2)
TEMPERATURE = tl.constexpr(3)
TOP_K = tl.constexpr(4)
TOP_P = tl.constexpr(5)
LOG_MIN_P = tl.constexpr(6)
SEED_LOW = tl.constexpr(7)
SEED_HIGH = tl.constexpr(8)
CHOICE = tl.constexpr(9)
POSITION = tl.constexpr(10)
COUNT_ROW = tl.constexpr(11)
REPETITION = tl.constexpr(12)
FREQUENCY = tl.constexpr(13)
PRESENCE = tl.constexpr(14)
BIAS_ROW = tl.constexpr(15)
NUM_BIASES = tl.constexpr(16)
REQUESTED_ROW = tl.constexpr(17)
NUM_REQUESTED = tl.constexpr(18)
NUM_TOP = tl.constexpr(19)
SAMPLED_ROW = tl.constexpr(20)
# Of record m: the job whose row is the m-th changed one.
CHANGED_JOB = tl.constexpr(21)

# Bits of MODE. What the first pass finds: the largest value, the largest value plus noise, the
# largest value of each group, the mass of each tile; and whether filters decide afterwards.
ARGMAX = 1
NOISE = 2
GROUPS = 4
MASS = 8
FILTER = 16

NO_ID = 2**31 - 1
MINUS_INFINITY_KEY = -0x7F800001

_NO_ID = tl.constexpr(NO_ID)
_WORDS = tl.constexpr(RECORD_WORDS)
_MINUS_INFINITY_KEY = tl.constexpr(MINUS_INFINITY_KEY)
_LARGEST_UNIFORM = tl.constexpr(1.0 - 2.0**-24)
_WORD_UNIT = tl.constexpr(2.0**-32)
# -log(v) <= _BOUND - _BOUND_UNIT * bits of float32(word + 0.5), as log2(1 + m) >= m in [0, 1].
_BOUND_UNIT = tl.constexpr(0.6931471805599453 * 2.0**-23)
_BOUND = tl.constexpr(0.6931471805599453 * (32 + 127))
_LOG2_E = tl.constexpr(1.4426950216293335)
_LOG2_E_REST = tl.constexpr(1.9259629911266175e-08)


def cdiv(number: int, divisor: int) -> int:
    """Rounded up. Triton's own, which kernels can call too, takes the host 6 us."""
    return -(-number // divisor)


def next_power_of_2(number: int) -> int:
    """The smallest power of two that is not below."""
    return 1 << (number - 1).bit_length()


@triton.jit
def int_word(records, job, word):
    """One word of a job's record."""
    return tl.load(records + job * _WORDS + word)


@triton.jit
def float_word(records, job, word):
    """One word of a job's record, as the float32 whose bits it holds."""
    return tl.load(records + job * _WORDS + word).to(tl.float32, bitcast=True)


def variant_of(logits: torch.Tensor, changed: torch.Tensor) -> Hashable:
    """What Triton specialises on in the tensors that `load_row` reads."""
    return (
        (logits.dtype, logits.data_ptr() % 16, logits.shape[1], logits.stride(0)),
        (changed.dtype, changed.data_ptr() % 16),
    )


@triton.jit
def load_row(logits, changed, row, changed_row, stride, vocab_size, ids, valid):
    """Raw values of the tokens `ids`, minus infinity where not `valid` or beyond V."""
    is_changed = changed_row >= 0
    inside = valid & (ids < vocab_size)
    source = logits + row.to(tl.int64) * stride + ids
    copy = changed + tl.maximum(changed_row, 0).to(tl.int64) * vocab_size + ids
    raw = tl.load(source, inside & (changed_row < 0), other=float("-inf")).to(tl.float32)
    other = tl.load(copy, inside & is_changed, other=float("-inf")).to(tl.float32)
    return tl.where(is_changed, other, raw)


@triton.jit
def noise_words(counters, records, job):
    """Philox4x32-10 of the job's key -> the four words of each counter."""
    zeros = tl.zeros_like(counters)
    return tl.philox_impl(
        counters.to(tl.uint32, bitcast=True),
        (zeros + int_word(records, job, POSITION)).to(tl.uint32, bitcast=True),
        (zeros + int_word(records, job, CHOICE)).to(tl.uint32, bitcast=True),
        zeros.to(tl.uint32, bitcast=True),
        int_word(records, job, SEED_LOW).to(tl.uint32, bitcast=True),
        int_word(records, job, SEED_HIGH).to(tl.uint32, bitcast=True),
        10,
    )


@triton.jit
def tile_words(first_id, records, job, SIZE: tl.constexpr):
    """The words of SIZE consecutive tokens, the first one's id a multiple of 4."""
    a, b, c, d = noise_words(first_id // 4 + tl.arange(0, SIZE // 4), records, job)
    return tl.reshape(tl.join(tl.join(a, c), tl.join(b, d)), (SIZE,))


@triton.jit
def words_of(ids, records, job):
    """The words of any tokens."""
    a, b, c, d = noise_words(ids // 4, records, job)
    lane = ids % 4
    return tl.where(lane < 2, tl.where(lane == 0, a, b), tl.where(lane == 2, c, d))


@triton.jit
def gumbel(words):
    """Words -> standard Gumbel noise."""
    v = tl.minimum((words.to(tl.float32) + 0.5) * _WORD_UNIT, _LARGEST_UNIFORM)
    u = 1.0 - v
    log1p = tl.log(u) + ((1.0 - u) - v) / u
    return -tl.log(-log1p)


@triton.jit
def gumbel_bound(words):
    """At least the noise, and at most 0.07 more where that is large; up to rounding (1e-4)."""
    bits = (words.to(tl.float32) + 0.5).to(tl.int32, bitcast=True)
    return bits.to(tl.float32) * -_BOUND_UNIT + _BOUND


@triton.jit
def key_of(values):
    """Float32 -> int32 in the same order, both zeros alike."""
    bits = (values + 0.0).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def value_of(key):
    """The inverse of `key_of`."""
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def exp_rn(x):
    """exp of x <= 0 to 3 ulp: the hardware's exp2, with what the product rounds off put back."""
    # All below is zero, and a product that overflows would leave no number.
    x = tl.maximum(x, -200.0)
    high = x * _LOG2_E
    low = tl.fma(x, _LOG2_E, -high) + x * _LOG2_E_REST
    return tl.exp2(high) * (1.0 + low * 0.6931471805599453)


@triton.jit
def largest_key_holding(keys, weights, target, low, high, PIVOTS: tl.constexpr):
    """The largest key t in [low, high) for which the weights of keys >= t sum to `target`.

    `low` itself when none does; no sum from `high` on may do. Each round cuts the interval in
    PIVOTS + 1: what a round costs is mostly its reduction, however many sums that has.
    """
    low = low.to(tl.int64)
    high = high.to(tl.int64)
    number = 1 + tl.arange(0, PIVOTS)
    while high - low > 1:
        step = (high - low + PIVOTS) // (PIVOTS + 1)
        pivots = low + number * step
        above = keys[None, :] >= pivots.to(tl.int32)[:, None]
        sums = tl.sum(tl.where(above, weights[None, :], 0.0), axis=1)
        low += step * tl.sum(((sums >= target) & (pivots < high)).to(tl.int32))
        high = tl.minimum(high, low + step)
    return low.to(tl.int32)


@triton.jit
def improve(best, best_id, scores, ids):
    """The larger of `best` and the largest score; ids of later calls are higher, so ties stay."""
    largest = tl.max(scores)
    first = tl.min(tl.where(scores == largest, ids, _NO_ID))
    is_better = largest > best
    return tl.where(is_better, largest, best), tl.where(is_better, first, best_id)


@triton.jit
def improve_with_noise(best, best_id, raw, valid, first_id, temperature, records, job,
                       SIZE: tl.constexpr):  # fmt: skip
    """`improve` by value over temperature plus noise, of SIZE tokens from `first_id` on.

    Exact noise costs four times its bound, and after the first tiles few tokens can still win.
    """
    words = tile_words(first_id, records, job, SIZE)
    bound = tl.where(valid, raw * (1.0 / temperature) + gumbel_bound(words), float("-inf"))
    if tl.max(bound) > best - (1e-3 + 1e-6 * tl.abs(best)):
        scores = tl.where(valid, tl.div_rn(raw, temperature) + gumbel(words), float("-inf"))
        best, best_id = improve(best, best_id, scores, first_id + tl.arange(0, SIZE))
    return best, best_id
