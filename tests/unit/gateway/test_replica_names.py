"""Targets that stand for all addresses of a name."""

from __future__ import annotations

import asyncio

import pytest

from services.gateway.replica_names import follow_name, names_all, resolve


class Names:
    """Answers in turn: addresses, or an error; says when it has none left."""

    def __init__(self, *answers: frozenset[str] | OSError) -> None:
        self.asked: list[tuple[str, int]] = []
        self.over = asyncio.Event()
        self._answers = list(answers)

    async def resolve(self, host: str, port: int) -> frozenset[str]:
        self.asked.append((host, port))
        if not self._answers:
            self.over.set()
            await asyncio.Event().wait()
        answer = self._answers.pop(0)
        if isinstance(answer, OSError):
            raise answer
        return answer


async def told(*answers: frozenset[str] | OSError) -> list[frozenset[str]]:
    names = Names(*answers)
    changes: list[frozenset[str]] = []
    following = asyncio.create_task(
        follow_name(
            "dns+all:tokenizer.ns.svc:30010",
            changes.append,
            names.resolve,
            interval_s=0.0,
            unknown_interval_s=0.0,
        )
    )
    await names.over.wait()
    following.cancel()
    await asyncio.gather(following, return_exceptions=True)
    assert set(names.asked) == {("tokenizer.ns.svc", 30010)}
    return changes


ONE, TWO = frozenset({"10.0.0.1:1"}), frozenset({"10.0.0.1:1", "10.0.0.2:1"})


async def test_each_change_of_a_names_addresses_is_told_once() -> None:
    assert await told(ONE, ONE, TWO, TWO, ONE) == [ONE, TWO, ONE]


async def test_known_addresses_stand_while_the_name_has_none() -> None:
    lost = OSError("no such name")
    assert await told(lost, frozenset(), TWO, lost, frozenset(), TWO, ONE) == [TWO, ONE]


async def test_a_hosts_addresses_are_grpc_targets() -> None:
    assert await resolve("127.0.0.1", 30010) == {"127.0.0.1:30010"}
    assert await resolve("::1", 30010) == {"[::1]:30010"}


def test_only_the_prefix_makes_a_target_a_name_of_many() -> None:
    assert names_all("dns+all:tokenizer:30010")
    assert not any(map(names_all, ("tokenizer:30010", "unix:/t", "dns:///tokenizer:30010")))


@pytest.mark.parametrize("target", ["dns+all:", "dns+all:host", "dns+all:host:0", "dns+all::1"])
def test_a_name_without_host_or_port_is_refused(target: str) -> None:
    with pytest.raises(ValueError, match="host:port"):
        names_all(target)
