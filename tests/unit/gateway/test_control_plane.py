"""The worker table: models by name."""

from __future__ import annotations

import pytest

from rhizome.common.v1.pool_identity_pb2 import PoolIdentity
from rhizome.scheduler.v1.scheduler_service_pb2 import (
    WORKER_STATE_READY,
    WORKER_STATE_SUSPECT,
    Pool,
    WorkerEntry,
)
from services.common.errors import InvalidRequestError, NotFoundError, UnavailableError
from services.gateway.control_plane import WorkerTable


def pool(name: str, *states: int) -> Pool:
    made = Pool(identity=PoolIdentity(served_model_name=name), context_length=10, vocab_size=5)
    for state in states:
        made.workers.add(state=state)  # type: ignore[arg-type]
    return made


def test_default_means_the_only_model() -> None:
    table = WorkerTable()
    with pytest.raises(UnavailableError):
        table.model("default")
    table.update([pool("a")])
    for name in ("a", "default", ""):
        assert table.model(name).name == "a"
    with pytest.raises(NotFoundError):
        table.model("b")
    table.update([pool("a"), pool("b")])
    assert table.model("b").name == "b"
    with pytest.raises(InvalidRequestError):
        table.model("default")


def test_a_scheduler_that_knows_nobody_yet_takes_no_model_away() -> None:
    table = WorkerTable()
    table.update([pool("a", WORKER_STATE_READY)])
    table.update([])
    assert table.model("a").name == "a"
    assert table.has_ready_worker()
    table.update([pool("a")])
    assert not table.has_ready_worker()


def test_a_scheduler_that_awaits_a_model_does_not_take_it_away() -> None:
    table = WorkerTable()
    table.update([pool("a"), pool("b", WORKER_STATE_READY)])
    table.update([pool("a", WORKER_STATE_READY)], ["b"])
    assert table.model("b").name == "b"
    assert len(table.workers("a")) == len(table.workers("b")) == 1
    table.update([], ["a", "b"])
    assert [model.name for model in table.models] == ["a", "b"]
    # Its workers are back, and others than they were.
    table.update([pool("b", WORKER_STATE_READY, WORKER_STATE_READY)], ["a"])
    assert len(table.workers("b")) == 2


def test_a_model_that_nobody_awaits_is_served_no_more() -> None:
    table = WorkerTable()
    table.update([pool("a"), pool("b")])
    table.update([pool("a")], ["c"])
    with pytest.raises(NotFoundError):
        table.model("b")


def test_an_awaited_model_that_was_never_seen_is_unavailable_and_not_unknown() -> None:
    table = WorkerTable()
    table.update([], ["a", "b"])
    with pytest.raises(UnavailableError, match="`b`"):
        table.model("b")
    table.update([pool("a")], ["b"])
    with pytest.raises(UnavailableError, match="`b`"):
        table.model("b")
    with pytest.raises(InvalidRequestError, match="one of a, b"):
        table.model("default")


def test_pain_22_h_a_table_is_ready_with_one_ready_worker() -> None:
    table = WorkerTable()
    table.update([pool("a", WORKER_STATE_SUSPECT)])
    assert not table.has_ready_worker()
    table.update([pool("a", WORKER_STATE_SUSPECT, WORKER_STATE_READY)])
    assert table.has_ready_worker()
    assert [type(worker) for worker in table.workers("a")] == [WorkerEntry] * 2
