"""Messages waiting for a multiplexed stream."""

from __future__ import annotations

from rhizome.worker.v1.worker_service_pb2 import ConnectRequest
from services.common.outbox import MAX_MESSAGE_IDS, Outbox


def test_small_additions_share_a_message_until_it_is_full() -> None:
    outbox: Outbox[ConnectRequest] = Outbox(ConnectRequest)
    first = outbox.tail(MAX_MESSAGE_IDS - 1)
    assert outbox.tail(1) is first
    assert outbox.tail(0) is first
    second = outbox.tail(1)
    assert second is not first
    pushed = ConnectRequest()
    outbox.push(pushed)
    assert outbox.tail(5) is pushed
