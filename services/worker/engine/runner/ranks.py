"""Rank 0's side of tensor parallelism: starts the other ranks and has them mirror its calls.

Every call of the Runner protocol that computes is sent to the other ranks before rank 0 makes it,
so all ranks issue the same collectives in the same order. Samples are not sent: each rank draws
the same ones from the same logits and the same noise.
"""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import time

from torch._C._distributed_c10d import TCPStore

from services.common.logs import LogFormat
from services.common.nodes import HostPort
from services.worker.engine.batch import StepPlan, StepResult
from services.worker.engine.distributed.channel import Channel, Kind, RankLostError
from services.worker.engine.distributed.group import TpGroup
from services.worker.engine.distributed.plan_codec import encode_plan
from services.worker.engine.distributed.rendezvous import JOIN_TIMEOUT_S, accept_ranks
from services.worker.engine.options import EngineOptions
from services.worker.engine.runner.model_runner import ModelRunner
from services.worker.engine.runner.watch import RankWatch, rank_failure
from services.worker.engine.spec import (
    FOLLOWER_MODULE,
    FollowerSpec,
    RankStart,
    encode_message,
)

# How long a rank may take to import torch, to take a frame, and to end when asked.
_HELLO_TIMEOUT_S = 120.0
_SEND_TIMEOUT_S = 20.0
_STOP_TIMEOUT_S = 5.0
# Longest step. A rank whose process runs but whose device never ends a step shows by nothing else.
_STEP_TIMEOUT_S = 60.0
# How often a wait for the device looks for lost ranks.
_CHECK_EVERY_S = 0.02


class RankProcesses:
    """Owns a channel to each other rank, and the processes of those on this host.

    Ranks 1 to `num_local` - 1 are of this host; their processes die with this one, and with the
    thread that started them.
    """

    def __init__(self, num_local: int, log_format: LogFormat = "text") -> None:
        self._processes: list[subprocess.Popen[bytes]] = []
        self.channels: dict[int, Channel] = {}
        for rank in range(1, num_local):
            ours, theirs = socket.socketpair()
            with theirs:
                spec = FollowerSpec(
                    rank=rank,
                    parent_pid=os.getpid(),
                    log_format=log_format,
                    channel_fd=theirs.fileno(),
                )
                command = (sys.executable, "-m", FOLLOWER_MODULE, encode_message(spec).decode())
                self._processes.append(
                    subprocess.Popen(command, pass_fds=(theirs.fileno(),), stdin=subprocess.DEVNULL)
                )
            self.channels[rank] = Channel(ours, _SEND_TIMEOUT_S)

    def start(self, options: EngineOptions, store: TCPStore, address: HostPort) -> None:
        """Wait until all are up, those of other hosts included, then have them load.

        Raises RankLostError, with a rank's own reason; ValueError when a new start cannot help.
        """
        for rank, channel in self.channels.items():
            if not channel.wait(_HELLO_TIMEOUT_S):
                raise RankLostError(f"rank {rank} did not start within {_HELLO_TIMEOUT_S:.0f} s")
            _expect(Kind.HELLO, rank, channel)
        if options.nnodes > 1:
            remote = range(options.ranks_per_node, options.tp_size)
            for rank, channel in accept_ranks(store, remote, JOIN_TIMEOUT_S).items():
                self.channels[rank] = channel
        start = RankStart(
            size=options.tp_size, host=address.host, port=address.port, options=options
        )
        self.send(Kind.START, encode_message(start))
        for rank, channel in self.channels.items():
            _expect(Kind.STARTED, rank, channel)

    def send(self, kind: Kind, payload: bytes = b"") -> None:
        """To every rank."""
        for channel in self.channels.values():
            channel.send(kind, payload)

    def close(self) -> None:
        """Stop all; those of this host that do not end in time are killed."""
        for channel in self.channels.values():
            with contextlib.suppress(RankLostError):
                channel.send(Kind.STOP)
            channel.close()
        deadline = time.monotonic() + _STOP_TIMEOUT_S
        for process in self._processes:
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _expect(kind: Kind, rank: int, channel: Channel) -> None:
    received, payload = channel.receive()
    if received is Kind.FAILED:
        raise rank_failure(rank, payload)
    assert received is kind, f"rank {rank} sent {received.name}, not {kind.name}"


class LeadingRunner:
    """Runner of a whole group: rank 0's own, with its calls mirrored by the other ranks.

    A rank that died or hangs raises RankLostError from the call that notices: at once when it is
    dead, after a timeout when it hangs.
    """

    def __init__(
        self, local: ModelRunner, ranks: RankProcesses, watch: RankWatch, group: TpGroup
    ) -> None:
        self.num_in_flight = local.num_in_flight
        self._local = local
        self._ranks = ranks
        self._watch = watch
        self._group = group
        watch.expect_steps()

    def forward(self, plan: StepPlan) -> None:
        self.check()
        with self._watch.calling():
            self._ranks.send(Kind.FORWARD, encode_plan(plan))
            self._local.forward(plan)

    def sample(self) -> None:
        with self._watch.calling():
            self._ranks.send(Kind.SAMPLE)
            self._local.sample()

    def result(self) -> StepResult:
        with self._watch.calling():
            self._wait_for_result()
            return self._local.result()

    def check(self) -> None:
        """Raise RankLostError when a rank is gone."""
        self._watch.check()

    def close(self) -> None:
        self._local.close()
        self._watch.close()
        self._ranks.close()
        self._group.close()

    def _wait_for_result(self) -> None:
        """An event of the device cannot be waited for while a rank may be lost: look at both."""
        started = checked = time.monotonic()
        while not self._local.has_result():
            now = time.monotonic()
            if now - checked < _CHECK_EVERY_S:
                continue
            checked = now
            self._watch.check()
            if now - started > _STEP_TIMEOUT_S:
                raise RankLostError(f"a step did not end within {_STEP_TIMEOUT_S:.0f} s")
