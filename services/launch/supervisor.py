"""Starts services, restarts what dies, gives up on what cannot start, stops everything cleanly.

Every child dies with this process (PR_SET_PDEATHSIG), and a janitor removes the private directory
even after kill -9, so nothing is left behind whatever ends the launcher.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import shutil
import signal
import tempfile
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path

from services.common.config import child_environment
from services.common.peer_tls import PeerTls
from services.common.process import EXIT_CANNOT_START
from services.launch.health import health_check
from services.launch.topology import ServiceSpec

logger = logging.getLogger(__name__)

# Statuses after which starting again cannot help; 2 is that of flags that are refused.
_PERMANENT_FAILURES = (2, EXIT_CANNOT_START)

_MAX_START_FAILURES = 3
_FIRST_BACKOFF_S = 0.5
_MAX_BACKOFF_S = 10.0
# A service that was ready this long starts with a clean record.
_STEADY_S = 60.0
_POLL_S = 0.1
_NUM_LAST_LINES = 20


class ServiceGaveUpError(Exception):
    """A service cannot be kept running; the message has the reason and its last log lines."""


class _Service:
    """One child process over all its restarts."""

    def __init__(
        self,
        spec: ServiceSpec,
        environment: dict[str, str],
        echo: Callable[[str], None],
        tls: PeerTls | None,
    ):
        self.spec = spec
        self.ready = asyncio.Event()
        self._environment = environment
        self._echo = echo
        self._tls = None if spec.is_public else tls
        self._process: asyncio.subprocess.Process | None = None
        self._last_lines: deque[str] = deque(maxlen=_NUM_LAST_LINES)
        self._stopping = False

    @property
    def pid(self) -> int | None:
        process = self._process
        return process.pid if process is not None and process.returncode is None else None

    async def keep_running(self) -> None:
        """Run until `stop`; raises ServiceGaveUpError after repeated failures to start."""
        failures = 0
        while not self._stopping:
            started = time.monotonic()
            status = await self._run_once()
            was_ready = self.ready.is_set()
            self.ready.clear()
            if self._stopping:
                return
            steady = was_ready and time.monotonic() - started > _STEADY_S
            failures = 0 if steady else failures + 1
            if status in _PERMANENT_FAILURES or (failures >= _MAX_START_FAILURES and not was_ready):
                raise ServiceGaveUpError(self._obituary(status, failures))
            backoff = min(_MAX_BACKOFF_S, _FIRST_BACKOFF_S * 2 ** max(0, failures - 1))
            logger.warning(
                "event=service_died service=%s status=%s restart_in_s=%.1f",
                *(self.spec.name, status, backoff),
            )
            await asyncio.sleep(backoff)

    async def stop(self) -> None:
        """SIGTERM, then SIGKILL when the grace time has passed."""
        self._stopping = True
        process = self._process
        if process is None or process.returncode is not None:
            return
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(signal.SIGTERM)
        try:
            await asyncio.wait_for(process.wait(), self.spec.grace_s)
        except TimeoutError:
            logger.warning("event=service_killed service=%s", self.spec.name)
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()

    async def _run_once(self) -> int:
        self._last_lines.clear()
        self._process = await asyncio.create_subprocess_exec(
            *self.spec.argv,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            env=self._environment,
            # A terminal's Ctrl-C is for the launcher, which stops the services in order.
            start_new_session=True,
        )
        watch = asyncio.create_task(self._watch_health())
        try:
            await self._forward_output(self._process)
            return await self._process.wait()
        finally:
            watch.cancel()
            if self._process.returncode is None:
                self._process.kill()

    async def _forward_output(self, process: asyncio.subprocess.Process) -> None:
        assert process.stdout is not None, "started with a pipe"
        while line := await _next_line(process.stdout):
            text = line.decode(errors="replace").rstrip("\n")
            self._last_lines.append(text)
            self._echo(text)

    async def _watch_health(self) -> None:
        async with health_check(self.spec.health_target, self._tls) as is_serving:
            while not await is_serving():
                await asyncio.sleep(_POLL_S)
            self.ready.set()

    def _obituary(self, status: int, failures: int) -> str:
        if status in _PERMANENT_FAILURES and self._last_lines:
            return f"{self.spec.name} cannot start: {self._last_lines[-1]}"
        lines = "\n".join(f"    {line}" for line in self._last_lines)
        return (
            f"{self.spec.name} ended with status {status} before it was ready"
            f" ({failures} in a row). Its last lines:\n{lines}"
        )


class Supervisor:
    """Owns the processes of one single-host system."""

    def __init__(
        self,
        specs: Sequence[ServiceSpec],
        directory: Path,
        echo: Callable[[str], None],
        tls: PeerTls | None = None,
    ) -> None:
        """`tls` is what their health is asked with."""
        common = {"TMPDIR": str(directory), "PYTHONUNBUFFERED": "1"}
        self._services = [
            _Service(spec, child_environment({**common, **spec.environment}), echo, tls)
            for spec in specs
        ]

    async def run(self, on_ready: Callable[[], None], stop: asyncio.Event) -> None:
        """Keep everything running until `stop` is set; call `on_ready` once all are up.

        Raises ServiceGaveUpError. Every process has ended when it returns or raises.
        """
        keepers = [asyncio.create_task(service.keep_running()) for service in self._services]
        ready = asyncio.create_task(self._announce(on_ready))
        stopped = asyncio.create_task(stop.wait())
        try:
            await asyncio.wait([*keepers, stopped], return_when=asyncio.FIRST_COMPLETED)
            for keeper in keepers:
                if keeper.done():
                    keeper.result()
        finally:
            ready.cancel()
            stopped.cancel()
            for service in self._services:
                await service.stop()
            for keeper in keepers:
                keeper.cancel()
            await asyncio.gather(*keepers, return_exceptions=True)

    def pids(self) -> dict[str, int]:
        """Process ids of the services that run now."""
        return {s.spec.name: pid for s in self._services if (pid := s.pid) is not None}

    async def _announce(self, on_ready: Callable[[], None]) -> None:
        for service in self._services:
            await service.ready.wait()
        on_ready()


@contextlib.asynccontextmanager
async def private_directory() -> AsyncIterator[Path]:
    """A directory only this user may enter, removed at the end, also after kill -9.

    The janitor is a shell that reads a pipe whose other end only this process holds: however this
    process ends, the shell sees the end of file and removes the directory.
    """
    directory = Path(tempfile.mkdtemp(prefix="rhizome-"))
    janitor = await asyncio.create_subprocess_exec(
        *("sh", "-c", 'cat >/dev/null; sleep 1; rm -rf "$1"', "sh", str(directory)),
        stdin=asyncio.subprocess.PIPE,
        start_new_session=True,
    )
    try:
        yield directory
    finally:
        shutil.rmtree(directory, ignore_errors=True)
        # Whoever ends this process may have ended the shell, too.
        with contextlib.suppress(ProcessLookupError):
            janitor.kill()
        await janitor.wait()


async def _next_line(stream: asyncio.StreamReader) -> bytes:
    """Up to the next line's end, or what is buffered of a line longer than the buffer."""
    try:
        return await stream.readuntil(b"\n")
    except asyncio.IncompleteReadError as end:
        return end.partial
    except asyncio.LimitOverrunError as error:
        # Waiting for its end would take more memory and fail.
        return await stream.read(max(1, error.consumed))
