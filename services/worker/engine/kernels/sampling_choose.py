"""The second pass of sampling: from what the scan found to one token a row.

A filtered row keeps the tokens whose scaled value is at least its threshold (`sampling/filters.py`
defines it; the same symbols here). The threshold is found without sorting the row:

- A bound below it comes from the largest values of groups. The k largest of those are k tokens, so
  the k-th largest token is no smaller than the k-th of them; and when the largest tokens of some
  groups hold the wanted mass by themselves, the threshold is no smaller than the least of them.
- Tokens at or above the bound are gathered from the groups that hold any. When they fit, the
  threshold is selected among them by bisection over ordered keys, in float64 as the reference, and
  noise is drawn for them alone.
- Otherwise what is kept is wide, and a draw from above the bound falls into it about as often as
  `top_p` says. So the drawn token is weighed instead: it is kept when the tokens above it hold less
  than the wanted mass and are fewer than k. If not, it and all below it are out, and the next is
  drawn (Gumbel-max: the argmax over what is left). The token is the one that the threshold gives.

The wanted mass of an open top-p, and what weighed rows hold, are float32 sums, good to 1e-6: only a
token whose cumulative mass is so near to `top_p` can be kept here and not by the reference, or the
other way round. All else is exact.

Shapes: J jobs, R of them rows that sample, P parts, U tiles, G groups, C candidates.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from services.worker.engine.kernels.launch import Launcher
from services.worker.engine.kernels.sampling_math import (
    ARGMAX,
    CHANGED_ROW,
    COUNT_ROW,
    FILTER,
    GROUP,
    LOG_MIN_P,
    LOGITS_ROW,
    MINUS_INFINITY_KEY,
    MODE,
    NO_ID,
    NOISE,
    TEMPERATURE,
    TOP_K,
    TOP_P,
    exp_rn,
    float_word,
    gumbel,
    improve,
    improve_with_noise,
    int_word,
    key_of,
    largest_key_holding,
    load_row,
    next_power_of_2,
    value_of,
    variant_of,
    words_of,
)
from services.worker.engine.kernels.sampling_scan import Scan

_CANDIDATES = 4096
# So many are handled with less work.
_FEW = 1024
_PIVOTS = 8
# Groups read at one time when candidates are gathered, and tokens when a row is weighed.
_GATHERED_GROUPS = 32
_WEIGHED = 4096
_DRAWN = 2048

_NO_ID = tl.constexpr(NO_ID)
_DRAWS = tl.constexpr(ARGMAX | NOISE)
_FILTER = tl.constexpr(FILTER)
_MINUS_INFINITY_KEY = tl.constexpr(MINUS_INFINITY_KEY)


@triton.jit
def _lower_bound(
    groups_held, top, total, top_k, top_p, vocab_size, num_groups, PIVOTS: tl.constexpr
):  # fmt: skip
    """A value that the row's threshold by rank is not below, from the groups' largest values."""
    keys = key_of(groups_held)
    low = tl.full((), _MINUS_INFINITY_KEY, tl.int32)
    high = key_of(top).to(tl.int64) + 1
    bound = low
    if top_k < vocab_size:
        if top_k <= num_groups:
            ones = tl.where(groups_held > float("-inf"), 1.0, 0.0)
            bound = largest_key_holding(keys, ones, top_k.to(tl.float32), low, high, PIVOTS)
    elif top_p < 1.0:
        weights = tl.exp((groups_held - top).to(tl.float64))
        # Surely the wanted mass, whatever the total was rounded to.
        wanted = top_p.to(tl.float64) * total * (1.0 + 1e-5)
        bound = largest_key_holding(keys, weights, wanted, low, high, PIVOTS)
    return value_of(bound)


@triton.jit
def _gather(
    logits, changed, row, changed_row, stride, vocab_size, temperature, groups_held,
    bound, group_list, values_out, ids_out,
    GROUPS: tl.constexpr, GROUP_SIZE: tl.constexpr, BATCH: tl.constexpr, CANDIDATES: tl.constexpr,
):  # fmt: skip
    """Write the tokens with values >= `bound`, ids ascending -> how many; stops beyond C."""
    holds = groups_held >= bound
    order = tl.cumsum(holds.to(tl.int32), 0) - 1
    tl.store(group_list + order, tl.arange(0, GROUPS), holds)
    num_holding = tl.sum(holds.to(tl.int32))
    tl.debug_barrier()
    start = 0
    count = 0
    while (start < num_holding) & (count <= CANDIDATES):
        index = start + tl.arange(0, BATCH)
        groups = tl.load(group_list + index, index < num_holding, other=0)
        ids = groups[:, None] * GROUP_SIZE + tl.arange(0, GROUP_SIZE)[None, :]
        valid = tl.broadcast_to((index < num_holding)[:, None], (BATCH, GROUP_SIZE))
        raw = load_row(logits, changed, row, changed_row, stride, vocab_size, ids, valid)
        scaled = tl.div_rn(raw, temperature)
        stays = valid & (ids < vocab_size) & (scaled >= bound)
        scaled = tl.reshape(scaled, (BATCH * GROUP_SIZE,))
        ids = tl.reshape(ids, (BATCH * GROUP_SIZE,))
        stays = tl.reshape(stays, (BATCH * GROUP_SIZE,))
        place = count + tl.cumsum(stays.to(tl.int32), 0) - 1
        tl.store(values_out + place, scaled, stays & (place < CANDIDATES))
        tl.store(ids_out + place, ids, stays & (place < CANDIDATES))
        count += tl.sum(stays.to(tl.int32))
        start += BATCH
    tl.debug_barrier()
    return count


@triton.jit
def _choose_among(
    records, job, values_in, ids_in, count, top, total, bound, floor, top_k, top_p, vocab_size,
    CANDIDATES: tl.constexpr, PIVOTS: tl.constexpr,
):  # fmt: skip
    """The token of a row whose candidates were gathered."""
    places = tl.arange(0, CANDIDATES)
    inside = places < count
    values = tl.load(values_in + places, inside, other=float("-inf"))
    ids = tl.load(ids_in + places, inside, other=_NO_ID)
    keys = key_of(values)
    # When too few are left by the bound, it is the floor, and keeps them all.
    low = key_of(bound)
    high = key_of(top).to(tl.int64) + 1
    threshold_key = low
    if top_k < vocab_size:
        ones = tl.where(inside, 1.0, 0.0)
        threshold_key = largest_key_holding(keys, ones, top_k.to(tl.float32), low, high, PIVOTS)
    if top_p < 1.0:
        weights = tl.where(inside, tl.exp((values - top).to(tl.float64)), 0.0)
        mass = total
        if top_k < vocab_size:
            is_above = keys > threshold_key
            num_above = tl.sum(is_above.to(tl.int32))
            last = tl.exp((value_of(threshold_key) - top).to(tl.float64))
            mass = tl.sum(tl.where(is_above, weights, 0.0)) + (top_k - num_above) * last
        wanted = top_p.to(tl.float64) * mass
        threshold_key = largest_key_holding(keys, weights, wanted, threshold_key, high, PIVOTS)
    threshold = tl.maximum(value_of(threshold_key), floor)
    noisy = values + gumbel(words_of(ids, records, job))
    scores = tl.where(inside & (values >= threshold), noisy, float("-inf"))
    return improve(float("-inf"), 0, scores, ids)[1]


@triton.jit
def _weigh(
    logits, changed, row, changed_row, stride, vocab_size, temperature, top, least_key,
    SIZE: tl.constexpr,
):  # fmt: skip
    """How many tokens of the row have keys of at least `least_key`, and their mass."""
    counts = tl.zeros((SIZE,), tl.int32)
    masses = tl.zeros((SIZE,), tl.float32)
    for first_id in range(0, vocab_size, SIZE):
        ids = first_id + tl.arange(0, SIZE)
        raw = load_row(logits, changed, row, changed_row, stride, vocab_size, ids, ids < vocab_size)
        scaled = tl.div_rn(raw, temperature)
        counted = (key_of(scaled) >= least_key) & (scaled > float("-inf"))
        counts += counted.to(tl.int32)
        masses += tl.where(counted, exp_rn(scaled - top), 0.0)
    return tl.sum(counts), tl.sum(masses.to(tl.float64))


@triton.jit
def _draw_above(
    records, job, logits, changed, row, changed_row, stride, vocab_size, temperature, least_key,
    SIZE: tl.constexpr,
):  # fmt: skip
    """The largest value plus noise among tokens with keys of at least `least_key`, and its id."""
    best = float("-inf")
    best_id = 0
    for first_id in range(0, vocab_size, SIZE):
        ids = first_id + tl.arange(0, SIZE)
        raw = load_row(logits, changed, row, changed_row, stride, vocab_size, ids, ids < vocab_size)
        valid = key_of(tl.div_rn(raw, temperature)) >= least_key
        best, best_id = improve_with_noise(
            best, best_id, raw, valid, first_id, temperature, records, job, SIZE
        )
    return best, best_id


@triton.jit
def _choose_wide(
    records, job, logits, changed, row, changed_row, stride, vocab_size, temperature, drawn,
    is_drawn, top, total, bound, floor, top_k, top_p, WEIGHED: tl.constexpr, DRAWN: tl.constexpr,
):  # fmt: skip
    """The token of a row that keeps more than fit the candidates; `drawn` is a first draw."""
    least_key = key_of(bound)
    top_key = key_of(top)
    mass = total
    if (top_k < vocab_size) & (top_p < 1.0):
        # The mass that top-k leaves is asked for, so the k-th value must be known.
        low, high = least_key.to(tl.int64), top_key.to(tl.int64) + 1
        while high - low > 1:
            middle = (low + high) >> 1
            count, _ = _weigh(logits, changed, row, changed_row, stride, vocab_size, temperature,
                              top, middle.to(tl.int32), WEIGHED)  # fmt: skip
            low = tl.where(count >= top_k, middle, low)
            high = tl.where(count >= top_k, high, middle)
        least_key = low.to(tl.int32)
        above, above_mass = _weigh(logits, changed, row, changed_row, stride, vocab_size,
                                   temperature, top, least_key + 1, WEIGHED)  # fmt: skip
        last = tl.exp((value_of(least_key) - top).to(tl.float64))
        mass = above_mass + (top_k - above) * last
    wanted = top_p.to(tl.float64) * mass
    least_key = tl.maximum(least_key, key_of(floor))
    is_kept = False
    while not is_kept:
        key = top_key
        if is_drawn:
            raw = load_row(logits, changed, row, changed_row, stride, vocab_size, drawn, True)
            key = key_of(tl.div_rn(raw, temperature))
        if is_drawn & (key >= least_key):
            if (top_k >= vocab_size) & (top_p >= 1.0):
                is_kept = True
            else:
                above, above_mass = _weigh(logits, changed, row, changed_row, stride, vocab_size,
                                           temperature, top, key + 1, WEIGHED)  # fmt: skip
                is_kept = (above < top_k) & ((top_p >= 1.0) | (above_mass < wanted))
                is_kept = is_kept | (key >= top_key)
            least_key = key + 1
        if not is_kept:
            score, drawn = _draw_above(records, job, logits, changed, row, changed_row, stride,
                                       vocab_size, temperature, least_key, DRAWN)  # fmt: skip
            is_drawn = True
            # Logits that are no numbers end here too.
            is_kept = score == float("-inf")
    return drawn


@triton.jit(do_not_specialize=["num_parts"])
def _choose(
    records, logits, changed, best, best_ids, tile_max, tile_mass, group_max, group_lists,
    values, ids, output_counts, token_ids, packed,
    stride, vocab_size, num_parts, num_tiles, num_groups,
    TILES: tl.constexpr, GROUPS: tl.constexpr, GROUP_SIZE: tl.constexpr, BATCH: tl.constexpr,
    CANDIDATES: tl.constexpr, FEW: tl.constexpr, PIVOTS: tl.constexpr, WEIGHED: tl.constexpr,
    DRAWN: tl.constexpr,
):  # fmt: skip
    job = tl.program_id(0).to(tl.int64)
    mode = int_word(records, job, MODE)
    parts = tl.arange(0, TILES)
    scores = tl.load(best + job * num_parts + parts, parts < num_parts, other=float("-inf"))
    winners = tl.load(best_ids + job * num_parts + parts, parts < num_parts, other=_NO_ID)
    chosen = tl.min(tl.where(scores == tl.max(scores), winners, _NO_ID))
    if mode & _FILTER:
        row, changed_row = int_word(records, job, LOGITS_ROW), int_word(records, job, CHANGED_ROW)
        temperature = float_word(records, job, TEMPERATURE)
        top_k, top_p = int_word(records, job, TOP_K), float_word(records, job, TOP_P)
        groups = tl.arange(0, GROUPS)
        groups_held = tl.load(
            group_max + job * num_groups + groups, groups < num_groups, other=float("-inf")
        )
        top = tl.max(groups_held)
        floor = top + float_word(records, job, LOG_MIN_P)
        total = tl.full((), 0.0, tl.float64)
        if (top_k >= vocab_size) & (top_p < 1.0):
            tiles = tl.arange(0, TILES)
            inside = tiles < num_tiles
            tops = tl.load(tile_max + job * num_tiles + tiles, inside, other=float("-inf"))
            masses = tl.load(tile_mass + job * num_tiles + tiles, inside, other=0.0)
            shifted = tl.exp((tops - top).to(tl.float64))
            total = tl.sum(tl.where(inside, shifted * masses.to(tl.float64), 0.0))
        bound = _lower_bound(groups_held, top, total, top_k, top_p, vocab_size, num_groups, PIVOTS)
        if (top_k >= vocab_size) | (top_p >= 1.0):
            # Else tokens below the floor count in the mass that top-k leaves.
            bound = tl.maximum(bound, floor)
        count = vocab_size
        kept_values, kept_ids = values + job * CANDIDATES, ids + job * CANDIDATES
        if (bound > float("-inf")) | (vocab_size <= CANDIDATES):
            count = _gather(
                logits, changed, row, changed_row, stride, vocab_size, temperature, groups_held,
                bound, group_lists + job * GROUPS, kept_values, kept_ids, GROUPS, GROUP_SIZE,
                BATCH, CANDIDATES)  # fmt: skip
        if count <= FEW:
            chosen = _choose_among(
                records, job, kept_values, kept_ids, count, top, total, bound, floor, top_k, top_p,
                vocab_size, FEW, PIVOTS)  # fmt: skip
        elif count <= CANDIDATES:
            chosen = _choose_among(
                records, job, kept_values, kept_ids, count, top, total, bound, floor, top_k, top_p,
                vocab_size, CANDIDATES, 2)  # fmt: skip
        else:
            chosen = _choose_wide(
                records, job, logits, changed, row, changed_row, stride, vocab_size, temperature,
                chosen, (mode & _DRAWS) != 0, top, total, bound, floor, top_k, top_p, WEIGHED,
                DRAWN)  # fmt: skip
    chosen = tl.minimum(chosen, vocab_size - 1)
    tl.store(token_ids + job, chosen.to(tl.int64))
    tl.store(packed + job, chosen)
    count_row = int_word(records, job, COUNT_ROW).to(tl.int64)
    if count_row >= 0:
        counted = output_counts + count_row * vocab_size + chosen
        tl.store(counted, tl.load(counted) + 1)


# With 128 registers a thread two programs share a processor, and almost nothing is spilled.
_launch_choose = Launcher(_choose, num_warps=8, maxnreg=128)


def choose(
    records: torch.Tensor,
    logits: torch.Tensor,
    changed: torch.Tensor,
    found: Scan,
    output_counts: torch.Tensor,
    token_ids: torch.Tensor,
    packed: torch.Tensor,
) -> None:
    """Fill `token_ids` [R] int64 and `packed` [R] int32 for the first R jobs; count the tokens."""
    num_rows = len(token_ids)
    num_tiles, num_groups = found.tile_max.shape[1], found.group_max.shape[1]
    width = next_power_of_2(num_groups)
    # Where nothing filters they are not touched, and making tensors is most of what this costs.
    group_lists, values, ids = found.best_ids, found.best, found.best_ids
    if len(found.group_max):
        group_lists = packed.new_empty((num_rows, width))
        values = found.best.new_empty((num_rows, _CANDIDATES))
        ids = packed.new_empty((num_rows, _CANDIDATES))
    _launch_choose(
        (num_rows, 1, 1), variant_of(logits, changed),
        records, logits, changed, found.best, found.best_ids, found.tile_max, found.tile_mass,
        found.group_max, group_lists, values, ids, output_counts, token_ids, packed,
        logits.stride(0), logits.shape[1], found.best.shape[1], num_tiles, num_groups,
        next_power_of_2(num_tiles), width, GROUP, _GATHERED_GROUPS, _CANDIDATES,
        min(_FEW, _CANDIDATES), _PIVOTS, _WEIGHED, _DRAWN,
    )  # fmt: skip
