"""A choice's state and its log-probability rows."""

from __future__ import annotations

from rhizome.common.v1.logprobs_pb2 import LogprobBlock
from services.gateway.generation import LogprobRows


def block(start: int, ids: list[int], num_top: int = 0) -> LogprobBlock:
    return LogprobBlock(
        start_position=start,
        token_ids=ids,
        logprobs=[-float(i) for i in ids],
        num_top=num_top,
        top_token_ids=[i + k for i in ids for k in range(num_top)],
        top_logprobs=[-float(i + k) for i in ids for k in range(num_top)],
        requested_logprobs=[-float(10 * i) for i in ids],
    )


def test_rows_sent_again_are_dropped() -> None:
    rows = LogprobRows(4, 1)
    rows.extend(block(4, [1, 2], 2))
    rows.extend(block(5, [2, 3], 2))
    rows.extend(block(4, [1], 2))
    rows.extend(block(7, [4], 2))
    assert rows.token_ids == [1, 2, 3, 4]
    assert rows.logprobs == [-1, -2, -3, -4]
    assert rows.top(2) == [(3, -3), (4, -4)]
    assert [rows.requested(i) for i in range(4)] == [[-10], [-20], [-30], [-40]]
