"""How a service's process lives and dies: signals, its parent's death, uvloop."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import gc
import os
import signal
import sys
from collections.abc import AsyncIterator, Coroutine
from typing import Any, NoReturn

import uvloop

# Exit status of a process that starting again cannot help: a wrong flag or file, not bad luck.
EXIT_CANNOT_START = 3
# That of a command which Ctrl-C ended, as shells have it.
EXIT_INTERRUPTED = 130

_PR_SET_PDEATHSIG = 1


def die_with_parent(parent_pid: int) -> None:
    """Have the kernel kill this process when `parent_pid`, its parent, dies.

    Exits at once when that has happened already. Linux only; elsewhere it does nothing.
    """
    if not sys.platform.startswith("linux"):
        return
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent_pid:
        sys.exit(1)


def stop_event() -> asyncio.Event:
    """An event of the running loop that SIGINT and SIGTERM set."""
    event = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, event.set)
    return event


def freeze_what_is_there() -> None:
    """Keep the collector from walking modules and tables, which live as long as the process.

    To be called once a service is put together: full collections then take as long as what
    requests have made since.
    """
    gc.collect()
    gc.freeze()


@contextlib.asynccontextmanager
async def background(*jobs: Coroutine[Any, Any, None]) -> AsyncIterator[None]:
    """Run these beside the block; its end cancels them and waits for their ends."""
    tasks = [asyncio.create_task(job) for job in jobs]
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def run(main: Coroutine[Any, Any, None]) -> None:
    """Run a service's main coroutine on uvloop."""
    uvloop.run(main)


def exit_for(service: str, error: OSError | ValueError) -> NoReturn:
    """End a service that cannot start, with the reason as its last line.

    The status is EXIT_CANNOT_START for a wrong flag or file (ValueError, or a file that is not
    there), 1 for what may pass, such as an address that is taken.
    """
    print(f"{service}: {error}", file=sys.stderr, flush=True)
    is_permanent = isinstance(error, ValueError | FileNotFoundError)
    sys.exit(EXIT_CANNOT_START if is_permanent else 1)
