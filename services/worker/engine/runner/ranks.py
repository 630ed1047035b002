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
from collections.abc import Iterator

import msgspec

from services.worker.engine.batch import StepPlan, StepResult
from services.worker.engine.distributed.channel import Channel, Kind, RankLostError
from services.worker.engine.distributed.group import TpGroup
from services.worker.engine.distributed.plan_codec import encode_plan
from services.worker.engine.options import EngineOptions
from services.worker.engine.runner.model_runner import ModelRunner

# How long a rank may take to import torch, to take a frame, and to end when asked.
_HELLO_TIMEOUT_S = 120.0
_SEND_TIMEOUT_S = 20.0
_STOP_TIMEOUT_S = 5.0


class RankStart(msgspec.Struct, frozen=True, kw_only=True):
    """What a rank must know to load its shard."""

    rank: int
    size: int
    store_port: int
    options: EngineOptions


class RankLoaded(msgspec.Struct, frozen=True, kw_only=True):
    """A rank's answer once its shard is loaded."""

    pool_budget_bytes: int


class RankProcesses:
    """Owns the processes of ranks 1 to size - 1 and a channel to each.

    The processes die with this one, and with the thread that started them.
    """

    def __init__(self, size: int) -> None:
        self._processes: list[subprocess.Popen[bytes]] = []
        self._channels: list[Channel] = []
        for _ in range(1, size):
            ours, theirs = socket.socketpair()
            with theirs:
                command = (
                    sys.executable,
                    "-m",
                    "services.worker.engine.runner.follower",
                    str(theirs.fileno()),
                    str(os.getpid()),
                )
                self._processes.append(
                    subprocess.Popen(command, pass_fds=(theirs.fileno(),), stdin=subprocess.DEVNULL)
                )
            self._channels.append(Channel(ours, _SEND_TIMEOUT_S))

    def start(self, options: EngineOptions, store_port: int) -> None:
        """Wait until all are up, then have them load."""
        self.expect(Kind.HELLO, _HELLO_TIMEOUT_S)
        for rank, channel in enumerate(self._channels, start=1):
            start = RankStart(
                rank=rank,
                size=len(self._channels) + 1,
                store_port=store_port,
                options=options,
            )
            channel.send(Kind.START, msgspec.json.encode(start, enc_hook=str))

    def expect(self, kind: Kind, timeout_s: float | None = None) -> list[bytes]:
        """One frame of `kind` from every rank. Raises RankLostError, with a rank's own reason."""
        payloads = []
        for rank, channel in enumerate(self._channels, start=1):
            if not channel.wait(timeout_s):
                raise RankLostError(f"rank {rank} did not answer within {timeout_s} s")
            received, payload = channel.receive()
            if received is Kind.FAILED:
                raise RankLostError(f"rank {rank} failed: {payload.decode()}")
            assert received is kind, f"rank {rank} sent {received.name}, not {kind.name}"
            payloads.append(payload)
        return payloads

    def send(self, kind: Kind, payload: bytes = b"") -> None:
        """To every rank."""
        for channel in self._channels:
            channel.send(kind, payload)

    def check(self) -> None:
        """Raise RankLostError when a rank ended or said that it failed."""
        for rank, channel in enumerate(self._channels, start=1):
            # After loading, a rank speaks only to say that it failed.
            if channel.wait(0):
                _, payload = channel.receive()
                raise RankLostError(f"rank {rank} failed: {payload.decode()}")

    def close(self) -> None:
        """Stop all; those that do not end in time are killed."""
        for channel in self._channels:
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


class LeadingRunner:
    """Runner of a whole group: rank 0's own, with its calls mirrored by the other ranks.

    A rank that died or hangs raises RankLostError from the call that notices: at once when it is
    dead, after a collective's timeout when it hangs.
    """

    def __init__(self, local: ModelRunner, ranks: RankProcesses, group: TpGroup) -> None:
        self.num_in_flight = local.num_in_flight
        self._local = local
        self._ranks = ranks
        self._group = group

    def forward(self, plan: StepPlan) -> None:
        self.check()
        with self._noticing_lost_ranks():
            self._ranks.send(Kind.FORWARD, encode_plan(plan))
            self._local.forward(plan)

    def sample(self) -> None:
        with self._noticing_lost_ranks():
            self._ranks.send(Kind.SAMPLE)
            self._local.sample()

    def result(self) -> StepResult:
        with self._noticing_lost_ranks():
            return self._local.result()

    def check(self) -> None:
        """Raise RankLostError when a rank ended; cheap enough for every idle moment."""
        self._ranks.check()

    def close(self) -> None:
        self._local.close()
        self._ranks.close()
        self._group.close()

    @contextlib.contextmanager
    def _noticing_lost_ranks(self) -> Iterator[None]:
        try:
            yield
        except RankLostError:
            raise
        except RuntimeError as error:
            # A collective's error says little; the rank itself may have said why it went.
            self._ranks.check()
            raise RankLostError(f"a step failed on rank 0: {error}") from error
