"""What an engine's processes are told when they start; no torch, for those who only start them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec

from services.common.logs import LogFormat
from services.worker.engine.options import EngineOptions

FOLLOWER_MODULE = "services.worker.engine.runner.follower"

# Failures to load that starting again cannot mend: a wrong model, a wrong wish, a host too small.
PERMANENT_FAILURES = (
    *(ValueError, TypeError, KeyError, MemoryError),
    *(FileNotFoundError, NotImplementedError),
)


class EngineSpec(msgspec.Struct, frozen=True, kw_only=True):
    """The one argument of an engine's process, which is rank 0's."""

    input_address: str
    output_address: str
    parent_pid: int
    log_level: str
    options: EngineOptions


class FollowerSpec(msgspec.Struct, frozen=True, kw_only=True):
    """The one argument of a rank's process."""

    rank: int
    # Whose death ends it.
    parent_pid: int
    log_format: LogFormat = "text"
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


class RankFailed(msgspec.Struct, frozen=True, kw_only=True):
    """Why a rank cannot go on, and whether starting again cannot help."""

    reason: str
    is_permanent: bool


def failure_reason(error: Exception) -> str:
    """What the operator is told: a wrong wish explains itself, a bug needs its type."""
    if isinstance(error, ValueError):
        return str(error)
    if isinstance(error, MemoryError):
        return f"this host has too little memory: {error}"
    return f"{type(error).__name__}: {error}"


def encode_message(message: msgspec.Struct) -> bytes:
    """JSON, paths as text."""
    return msgspec.json.encode(message, enc_hook=str)


def decode_path(kind: type, value: Any) -> Any:
    """msgspec's hook for what `encode_message` made text."""
    return Path(value) if kind is Path else kind(value)
