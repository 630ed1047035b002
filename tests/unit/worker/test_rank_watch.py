"""How rank 0 notices that another rank is gone, over real sockets."""

import socket
import threading
from collections.abc import Iterator

import pytest

from services.worker.engine.distributed.channel import Channel, Kind, RankLostError
from services.worker.engine.distributed.rendezvous import (
    accept_ranks,
    connect_to_rank_0,
    create_store,
    join_store,
)
from services.worker.engine.runner import watch as watch_module
from services.worker.engine.runner.watch import LeaderWatch, RankWatch
from services.worker.engine.spec import RankFailed, encode_message

SOON_S = 10.0


@pytest.fixture
def ends() -> Iterator[tuple[Channel, Channel]]:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        yield Channel(ours), Channel(theirs)


@pytest.fixture
def watch(ends: tuple[Channel, Channel]) -> Iterator[RankWatch]:
    watch = RankWatch({1: ends[0]}, ends_process=False)
    yield watch
    watch.close()


def test_a_rank_that_loaded_and_lives_is_not_lost(
    ends: tuple[Channel, Channel], watch: RankWatch
) -> None:
    ends[1].send(Kind.ALIVE)
    ends[1].send(Kind.LOADED, b"loaded")
    assert watch.wait_until_loaded() == [b"loaded"]
    watch.check()


def test_a_closed_channel_is_a_lost_rank(ends: tuple[Channel, Channel], watch: RankWatch) -> None:
    ends[1].close()
    with pytest.raises(RankLostError, match="rank 1 is gone"):
        watch.wait_for_loss(SOON_S)


def test_a_failed_rank_says_why(ends: tuple[Channel, Channel], watch: RankWatch) -> None:
    ends[1].send(
        Kind.FAILED, encode_message(RankFailed(reason="out of memory", is_permanent=False))
    )
    with pytest.raises(RankLostError, match="rank 1 failed: out of memory"):
        watch.wait_until_loaded()


def test_a_rank_that_can_never_load_is_an_error_of_what_was_asked(
    ends: tuple[Channel, Channel], watch: RankWatch
) -> None:
    ends[1].send(Kind.FAILED, encode_message(RankFailed(reason="no weights", is_permanent=True)))
    with pytest.raises(ValueError, match="rank 1 failed: no weights"):
        watch.wait_until_loaded()


def test_a_silent_rank_is_lost_once_it_should_take_steps(
    ends: tuple[Channel, Channel], watch: RankWatch, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watch_module, "_SILENCE_S", 0.2)
    watch.wait_for_loss(0.5)
    watch.expect_steps()
    with pytest.raises(RankLostError, match="rank 1 was silent"):
        watch.wait_for_loss(SOON_S)


def test_a_rank_tells_that_it_lives(
    ends: tuple[Channel, Channel], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watch_module, "ALIVE_EVERY_S", 0.02)
    leader = LeaderWatch(ends[1])
    assert [ends[0].receive()[0] for _ in range(3)] == [Kind.ALIVE] * 3
    leader.close()


def test_a_channel_knows_that_its_peer_left_behind_what_it_sent(
    ends: tuple[Channel, Channel],
) -> None:
    ends[0].send(Kind.STOP)
    assert not ends[1].is_broken()
    ends[0].close()
    assert ends[1].is_broken()
    assert ends[1].receive() == (Kind.STOP, b"")


def test_ranks_of_other_hosts_are_told_apart_and_strangers_refused() -> None:
    store, address = create_store(3)
    accepted: dict[int, Channel] = {}
    thread = threading.Thread(
        target=lambda: accepted.update(accept_ranks(store, range(1, 3), SOON_S))
    )
    thread.start()
    other = join_store(address, 3)
    port = int(other.get("rhizome/channel_port"))
    with socket.create_connection((address.host, port)) as stranger:
        stranger.sendall(b"GET / HTTP/1.1\r\n\r\n" * 8)
        ends = {rank: connect_to_rank_0(other, address.host, rank) for rank in (2, 1)}
        thread.join(SOON_S)
    for rank, channel in sorted(accepted.items()):
        channel.send(Kind.START, str(rank).encode())
        assert Channel(ends[rank]).receive() == (Kind.START, str(rank).encode())
        ends[rank].close()
        channel.close()
    assert sorted(accepted) == [1, 2]


def test_ranks_that_do_not_join_are_named() -> None:
    store, _ = create_store(2)
    with pytest.raises(RankLostError, match=r"ranks \[1\] of other nodes did not join"):
        accept_ranks(store, range(1, 2), 0.1)


def test_the_store_of_one_host_is_not_on_the_network() -> None:
    store, address = create_store(2)
    assert address == ("127.0.0.1", store.port)
    join_store(address, 2).set("key", "value")
    with pytest.raises(ConnectionRefusedError):
        # Another of this host's addresses.
        socket.create_connection(("127.0.0.2", store.port))
