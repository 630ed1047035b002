"""The front's side of the engine: two ZeroMQ sockets, and the process at their other end."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import sys
import tempfile
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path

import msgspec
import zmq

from services.common.config import child_environment, engine_environment
from services.worker.engine.messages import EngineInput, EngineOutput, Stop
from services.worker.engine.options import EngineOptions
from services.worker.engine.spec import EngineSpec, encode_message

logger = logging.getLogger(__name__)

# What runs an engine, but for its spec.
ENGINE_COMMAND = (sys.executable, "-m", "services.worker.engine.process")
# Outputs taken before the event loop's other work gets its turn.
_MAX_OUTPUTS_A_TURN = 16


class EngineLink:
    """Sends inputs in batches and hands over outputs as they come.

    Owns both sockets. The engine binds `input_address` and connects to `output_address`, so what
    is sent before it is up waits here. Neither side's sends ever block. Raises ValueError for a
    directory that can hold no socket, such as one whose path is longer than 100 bytes.
    """

    def __init__(self, directory: Path) -> None:
        self.input_address = f"ipc://{directory}/in"
        self.output_address = f"ipc://{directory}/out"
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._receiver = self._context.socket(zmq.PULL)
        self._receiver.setsockopt(zmq.RCVHWM, 0)
        try:
            self._receiver.bind(self.output_address)
        except zmq.ZMQError as error:
            self._context.destroy(linger=0)
            raise ValueError(f"no socket can be made in {directory} (TMPDIR): {error}") from error
        self._sender = self._context.socket(zmq.PUSH)
        self._sender.setsockopt(zmq.SNDHWM, 0)
        self._sender.setsockopt(zmq.LINGER, 0)
        self._sender.connect(self.input_address)
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder = msgspec.msgpack.Decoder(EngineOutput)
        self._unsent: list[EngineInput] = []

    def send(self, message: EngineInput) -> None:
        """Send with everything else of this turn of the event loop."""
        if not self._unsent:
            asyncio.get_running_loop().call_soon(self._flush)
        self._unsent.append(message)

    async def receive(self, handle: Callable[[EngineOutput], None]) -> None:
        """Give every output to `handle`, in order, for ever.

        Reads when the socket's descriptor speaks, which costs 90 us of CPU less a message than
        zmq.asyncio's futures do.
        """
        loop = asyncio.get_running_loop()
        broken: asyncio.Future[None] = loop.create_future()

        def take() -> None:
            try:
                for _ in range(_MAX_OUTPUTS_A_TURN):
                    handle(self._decoder.decode(self._receiver.recv(zmq.NOBLOCK)))
                # The descriptor speaks again only after everything was taken.
                loop.call_soon(take)
            except zmq.Again:
                return
            except Exception as error:
                if not broken.done():
                    broken.set_exception(error)

        loop.add_reader(self._receiver.FD, take)
        loop.call_soon(take)
        try:
            await broken
        finally:
            loop.remove_reader(self._receiver.FD)

    def close(self) -> None:
        """Close the sockets; what was not received is dropped."""
        self._receiver.close(linger=0)
        self._sender.close(linger=0)
        self._context.term()

    def _flush(self) -> None:
        messages, self._unsent = self._unsent, []
        if not self._sender.closed:
            self._sender.send(self._encoder.encode(messages))


class EngineProcess:
    """The engine's operating-system process. It dies with this one."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process

    @classmethod
    async def start(
        cls,
        link: EngineLink,
        options: EngineOptions,
        log_level: str,
        kernel_cache_dir: Path | None = None,
        command: Sequence[str] = ENGINE_COMMAND,
    ) -> EngineProcess:
        """Start the engine at the other end of `link`; `command` gets its spec as one argument."""
        spec = EngineSpec(
            input_address=link.input_address,
            output_address=link.output_address,
            parent_pid=os.getpid(),
            log_level=log_level,
            options=options,
        )
        process = await asyncio.create_subprocess_exec(
            *command,
            encode_message(spec).decode(),
            env=child_environment(engine_environment(kernel_cache_dir)),
        )
        logger.info("event=engine_started pid=%s", process.pid)
        return cls(process)

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    async def wait(self) -> int:
        """Its exit status once it ended; negative for a signal."""
        return await self._process.wait()

    async def stop(self, link: EngineLink, grace_s: float) -> None:
        """Ask it to stop; kill it after `grace_s`."""
        if self._process.returncode is not None:
            return
        link.send(Stop())
        try:
            await asyncio.wait_for(self._process.wait(), grace_s)
        except TimeoutError:
            logger.warning("event=engine_killed pid=%s", self._process.pid)
            with contextlib.suppress(ProcessLookupError):
                self._process.send_signal(signal.SIGKILL)
            await self._process.wait()


@contextlib.asynccontextmanager
async def engine_link() -> AsyncIterator[EngineLink]:
    """A link whose sockets live in a private directory, gone after the block."""
    with tempfile.TemporaryDirectory(prefix="rhizome-engine-") as directory:
        link = EngineLink(Path(directory))
        try:
            yield link
        finally:
            link.close()
