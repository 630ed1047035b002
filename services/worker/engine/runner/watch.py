"""Notices that another rank is gone, in a thread that sleeps between looks.

The thread that makes steps may be unable to notice by itself: a collective on a GPU waits for ever
for a rank that died, and then so does every launch behind it.
"""

from __future__ import annotations

import logging
import os
import select
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import msgspec

from services.worker.engine.distributed.channel import Channel, Kind, RankLostError
from services.worker.engine.spec import RankFailed

logger = logging.getLogger(__name__)

# A rank's process says that it runs once in this time, and is lost when silent for so long. While
# it loads, imports and files may keep its threads from speaking.
ALIVE_EVERY_S = 1.0
_SILENCE_S = 8.0
_LOADING_SILENCE_S = 60.0
# How long a call may go on after a rank was lost.
_GRACE_S = 5.0
_LOOK_EVERY_S = 0.5
# How long the cause of a failed collective may take to be seen.
_CAUSE_TIMEOUT_S = 1.0
_EXIT_STATUS = 1


class RankWatch:
    """Rank 0's: owns what the other ranks say from its construction to `close`.

    `check` raises RankLostError once one of them ended, failed or fell silent; ValueError when one
    cannot load, however often it is started. With `ends_process`,
    a call within `calling` that goes on long after that ends this process, which its front takes
    for the engine's failure.
    """

    def __init__(self, channels: dict[int, Channel], *, ends_process: bool) -> None:
        self._channels = channels
        self._ends_process = ends_process
        self._silence_s = _LOADING_SILENCE_S
        # What ranks said when they had loaded.
        self._loaded: dict[int, bytes] = {}
        self._lost: RankLostError | ValueError | None = None
        self._news = threading.Condition()
        self._is_calling = False
        self._is_closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="rank-watch", daemon=True)
        self._thread.start()

    def wait_until_loaded(self) -> list[bytes]:
        """Every rank's payload of LOADED. Raises what `check` does."""
        with self._news:
            self._news.wait_for(
                lambda: self._lost is not None or len(self._loaded) == len(self._channels)
            )
        self.check()
        return list(self._loaded.values())

    def expect_steps(self) -> None:
        """All have loaded and captured: from here on, silence is short."""
        self._silence_s = _SILENCE_S

    def check(self) -> None:
        """Raise when a rank is lost; costs nothing."""
        if self._lost is not None:
            # A new one each time: a traceback grows with each raise.
            raise type(self._lost)(str(self._lost))

    def wait_for_loss(self, timeout_s: float) -> None:
        """`check`, after giving a loss that others saw first time to be seen here."""
        with self._news:
            self._news.wait_for(lambda: self._lost is not None, timeout_s)
        self.check()

    @contextmanager
    def calling(self) -> Iterator[None]:
        """Around what may wait for other ranks: raises RankLostError where that fails."""
        self._is_calling = True
        try:
            yield
        except RankLostError:
            raise
        except RuntimeError as error:
            # A collective's error says little; the rank itself may have said why it went.
            self.wait_for_loss(_CAUSE_TIMEOUT_S)
            raise RankLostError(f"rank 0 failed: {error}") from error
        finally:
            self._is_calling = False

    def close(self) -> None:
        """Stop looking; to be called before the channels close."""
        self._is_closing.set()
        self._thread.join()

    def _run(self) -> None:
        heard = dict.fromkeys(self._channels, time.monotonic())
        lost = None
        while lost is None:
            if self._is_closing.is_set():
                return
            lost = self._listen(heard)
        logger.error("event=rank_lost reason=%s", lost)
        with self._news:
            self._lost = lost
            self._news.notify_all()
        while self._ends_process and not self._is_closing.wait(_GRACE_S):
            if self._is_calling:
                logger.critical("event=stuck_without_a_rank reason=%s", lost)
                os._exit(_EXIT_STATUS)

    def _listen(self, heard: dict[int, float]) -> RankLostError | ValueError | None:
        """Take in what ranks say for a while -> how one is lost, if so."""
        ranks = {channel.fileno(): rank for rank, channel in self._channels.items()}
        readable, _, _ = select.select(list(ranks), [], [], _LOOK_EVERY_S)
        now = time.monotonic()
        for descriptor in readable:
            rank = ranks[descriptor]
            try:
                kind, payload = self._channels[rank].receive()
            except RankLostError as error:
                return RankLostError(f"rank {rank} is gone: {error}")
            if kind is Kind.FAILED:
                return rank_failure(rank, payload)
            if kind is Kind.LOADED:
                with self._news:
                    self._loaded[rank] = payload
                    self._news.notify_all()
            heard[rank] = now
        for rank, heard_at in heard.items():
            if now - heard_at > self._silence_s:
                return RankLostError(f"rank {rank} was silent for {self._silence_s:.0f} s")
        return None


def rank_failure(rank: int, payload: bytes) -> RankLostError | ValueError:
    """What a rank's FAILED means: a ValueError is what starting again cannot mend."""
    failed = msgspec.json.decode(payload, type=RankFailed)
    kind = ValueError if failed.is_permanent else RankLostError
    return kind(f"rank {rank} failed: {failed.reason}")


class LeaderWatch:
    """Another rank's: tells rank 0 that this process runs, and ends it soon after rank 0's.

    The thread that makes steps normally ends the process by itself, when its channel closes.
    """

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._is_closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="leader-watch", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop; to be called before the channel closes."""
        self._is_closing.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._is_closing.wait(ALIVE_EVERY_S):
            try:
                if not self._channel.is_broken():
                    self._channel.send(Kind.ALIVE)
                    continue
            except RankLostError:
                pass
            if not self._is_closing.wait(_GRACE_S):
                logger.critical("event=stuck_without_rank_0")
                os._exit(_EXIT_STATUS)
            return
