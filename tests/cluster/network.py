"""Network namespaces as machines: each with an address of its own, on one switch, to be cut off.

Namespaces belong to processes that die with this one, so nothing is left behind, whatever happens.
"""

from __future__ import annotations

import functools
import itertools
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager

from tests.cluster.programs import DIE_WITH_PARENT, until

_numbers = itertools.count()


@functools.cache
def missing_rights() -> str:
    """Why there can be no namespaces here; empty where there can."""
    if os.geteuid() != 0:
        return "network and mount namespaces need root"
    probe = (
        "unshare --mount --net sh -c 'ip link add probe type bridge && mount -t tmpfs none /mnt"
        " && mkdir /mnt/u /mnt/w /mnt/r"
        " && mount -t overlay -o lowerdir=/,upperdir=/mnt/u,workdir=/mnt/w none /mnt/r'"
    )
    result = subprocess.run(["sh", "-c", probe], capture_output=True, text=True, check=False)
    if result.returncode:
        return f"no network and mount namespaces here: {result.stderr.strip()}"
    return ""


class Machine:
    """A network namespace with one address."""

    def __init__(self, name: str, address: str, port: str, network: Network) -> None:
        self.name = name
        self.address = address
        self._port = port
        self._network = network
        self._namespace = _Namespace()
        _ip("link", "add", port, "netns", network.pid, "type", "veth", "peer", "name", "eth0",
            "netns", self._namespace.pid)  # fmt: skip
        self._network.ip("link", "set", port, "master", "switch", "up")
        self._namespace.ip("address", "add", f"{address}/24", "dev", "eth0")
        self._namespace.ip("link", "set", "eth0", "up")

    @property
    def entering(self) -> tuple[str, ...]:
        """What a command that shall run there begins with."""
        return self._namespace.entering

    def ip(self, *arguments: str) -> None:
        """`ip`, there."""
        self._namespace.ip(*arguments)

    def cut(self) -> None:
        """Pull its cable."""
        self._network.ip("link", "set", self._port, "down")

    def mend(self) -> None:
        """Plug it in again."""
        self._network.ip("link", "set", self._port, "up")

    def close(self) -> None:
        self._namespace.close()


class Network:
    """A switch with this host and machines on it."""

    def __init__(self) -> None:
        self._namespace = _Namespace()
        self.machines: list[Machine] = []
        number = next(_numbers)
        # Of addresses that are set aside for tests of networks; other processes have others.
        self._subnet = f"198.18.{(os.getpid() + number) % 250}"
        self._host_device = f"rz{os.getpid()}-{number}"
        self.ip("link", "add", "switch", "type", "bridge")
        self.ip("link", "set", "switch", "up")
        _ip(
            "link",
            "add",
            self._host_device,
            "type",
            "veth",
            "peer",
            "name",
            "host",
            "netns",
            self.pid,
        )
        self.ip("link", "set", "host", "master", "switch", "up")
        _ip("address", "add", f"{self._subnet}.1/24", "dev", self._host_device)
        _ip("link", "set", self._host_device, "up")

    @property
    def pid(self) -> str:
        return self._namespace.pid

    @property
    def host_address(self) -> str:
        """This process's own."""
        return f"{self._subnet}.1"

    def ip(self, *arguments: str) -> None:
        """`ip`, at the switch."""
        self._namespace.ip(*arguments)

    def add(self, name: str) -> Machine:
        """Another machine."""
        number = len(self.machines) + 2
        machine = Machine(name, f"{self._subnet}.{number}", f"port{number}", self)
        self.machines.append(machine)
        return machine

    def close(self) -> None:
        for machine in self.machines:
            machine.close()
        # The host's end goes with the other one.
        self._namespace.close()
        until(lambda: not os.path.exists(f"/sys/class/net/{self._host_device}"))


@contextmanager
def running_network() -> Iterator[Network]:
    network = Network()
    try:
        yield network
    finally:
        network.close()


class _Namespace:
    """A network namespace, and the process that it lives by."""

    def __init__(self) -> None:
        self._holder = subprocess.Popen(
            [*DIE_WITH_PARENT, "unshare", "--net", "sleep", "infinity"], stdin=subprocess.DEVNULL
        )
        self.pid = str(self._holder.pid)
        ours = os.readlink("/proc/self/ns/net")
        until(lambda: os.readlink(f"/proc/{self.pid}/ns/net") != ours, period_s=0.005)
        self.ip("link", "set", "lo", "up")

    @property
    def entering(self) -> tuple[str, ...]:
        return ("nsenter", f"--net=/proc/{self.pid}/ns/net", "--")

    def ip(self, *arguments: str) -> None:
        _run([*self.entering, "ip", *arguments])

    def close(self) -> None:
        self._holder.kill()
        self._holder.wait()


def _ip(*arguments: str) -> None:
    _run(["ip", *arguments])


def _run(command: list[str]) -> None:
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, f"{' '.join(command)}: {result.stderr}"
