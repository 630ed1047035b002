"""What the processes of ranks are told when they start; no torch, for those who only start them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec

from services.worker.engine.options import EngineOptions

FOLLOWER_MODULE = "services.worker.engine.runner.follower"


class FollowerSpec(msgspec.Struct, frozen=True, kw_only=True):
    """The one argument of a rank's process."""

    rank: int
    # Whose death ends it.
    parent_pid: int
    # Of rank 0's host: the rank's end of a socket pair. Of other hosts: None.
    channel_fd: int | None = None
    # Of other hosts: that host's options, and a pipe that gets a byte when the rank takes steps.
    options: EngineOptions | None = None
    ready_fd: int | None = None


class RankStart(msgspec.Struct, frozen=True, kw_only=True):
    """What a rank must know to load its shard."""

    size: int
    # Of the store.
    host: str
    port: int
    options: EngineOptions


class RankLoaded(msgspec.Struct, frozen=True, kw_only=True):
    """A rank's answer once its shard is loaded."""

    pool_budget_bytes: int


def encode_message(message: msgspec.Struct) -> bytes:
    """JSON, paths as text."""
    return msgspec.json.encode(message, enc_hook=str)


def decode_path(kind: type, value: Any) -> Any:
    """msgspec's hook for what `encode_message` made text."""
    return Path(value) if kind is Path else kind(value)
