"""A mock worker's log-probabilities: made up, but shaped and placed as the contract says."""

from __future__ import annotations

import math

from rhizome.common.v1 import logprobs_pb2
from tests.fakes.mock_engine import MockSequence, TokenCycle

_REQUESTED = -10.0


def logprob_of(token_id: int) -> float:
    """The log-probability of a chosen token."""
    return -(token_id % 7 + 1) / 8


def bytes_a_position(seq: MockSequence) -> int:
    """Most bytes one position takes in a block."""
    options = seq.submit.logprobs
    return 9 + 9 * options.num_top + 4 * len(options.token_ids)


def first_position(seq: MockSequence, num_received: int) -> int | None:
    """First position to report, after `num_received` output ids; None reports nothing."""
    options = seq.submit.logprobs
    if options.HasField("prompt_start") and num_received == seq.first_output:
        return min(options.prompt_start, seq.prompt_len)
    return seq.prompt_len + num_received if options.output else None


def logprob_block(
    seq: MockSequence, cycle: TokenCycle, vocab_size: int, start: int, end: int
) -> logprobs_pb2.LogprobBlock:
    """Positions `start` to `end` (exclusive) of a sequence, all in its prompt or all after it."""
    options = seq.submit.logprobs
    if start < seq.prompt_len:
        ids = seq.prompt_ids[start:end]
    else:
        ids = cycle.output(seq.phase, start - seq.prompt_len, end - seq.prompt_len)
    num_top = options.num_top
    block = logprobs_pb2.LogprobBlock(
        start_position=start,
        token_ids=ids,
        logprobs=[logprob_of(token) for token in ids],
        num_top=num_top,
        top_token_ids=[(token + rank) % vocab_size for token in ids for rank in range(num_top)],
        top_logprobs=[logprob_of(token) - rank for token in ids for rank in range(num_top)],
        requested_logprobs=[_REQUESTED] * (len(ids) * len(options.token_ids)),
    )
    if start == 0 and ids:
        block.logprobs[0] = math.nan
    return block
