"""The engine process: builds the runner, then runs the loop between two ZeroMQ sockets.

Rank 0's process. It has no event loop and no second busy Python thread (ZeroMQ's own thread is
native); it dies with the front that started it.
"""

from __future__ import annotations

import gc
import logging
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import msgspec
import zmq

from services.common.logs import configure_logging
from services.common.process import die_with_parent
from services.worker.engine.batch import Runner
from services.worker.engine.loop import StepRecorder, build_loop
from services.worker.engine.messages import (
    EngineFailed,
    EngineInput,
    EngineOutput,
    EngineReady,
    LoadProgress,
)
from services.worker.engine.options import EngineOptions, EnginePlan
from services.worker.engine.progress import ProgressBar
from services.worker.engine.spec import (
    PERMANENT_FAILURES,
    EngineSpec,
    decode_path,
    failure_reason,
)

logger = logging.getLogger(__name__)

# How long the last messages may take to leave when the process ends.
_LINGER_MS = 2000


class ZmqInbox:
    """What the front sends, decoded. Owns the receiving socket."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], address: str) -> None:
        self._socket = context.socket(zmq.PULL)
        self._socket.setsockopt(zmq.RCVHWM, 0)
        self._socket.bind(address)
        self._decoder = msgspec.msgpack.Decoder(list[EngineInput])

    def receive(self, block: bool, timeout_s: float | None = None) -> list[EngineInput]:
        """All messages that have come; with `block`, waits for one, at most `timeout_s`."""
        messages: list[EngineInput] = []
        if block:
            self._socket.poll(None if timeout_s is None else max(1, int(timeout_s * 1000)))
        while True:
            try:
                messages += self._decoder.decode(self._socket.recv(zmq.NOBLOCK))
            except zmq.Again:
                return messages

    def close(self) -> None:
        """Close the socket."""
        self._socket.close(linger=0)


class ZmqOutbox:
    """What the front receives. Owns the sending socket; a send never blocks."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], address: str) -> None:
        self._socket = context.socket(zmq.PUSH)
        self._socket.setsockopt(zmq.SNDHWM, 0)
        self._socket.connect(address)
        self._encoder = msgspec.msgpack.Encoder()

    def send(self, message: EngineOutput) -> None:
        """Send one message."""
        self._socket.send(self._encoder.encode(message))

    def close(self) -> None:
        """Close the socket after what was sent has left."""
        self._socket.close(linger=_LINGER_MS)


def main(wrap: Callable[[Runner], Runner] = lambda runner: runner) -> None:
    """Run one engine, on the runner as `wrap` gives it back, until it is told to stop or fails."""
    spec = msgspec.json.decode(sys.argv[1], type=EngineSpec, dec_hook=decode_path)
    # Ctrl-C reaches the whole group; the front decides when the engine stops.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    die_with_parent(spec.parent_pid)
    configure_logging("engine", spec.log_level, spec.options.log_format)
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    inbox = ZmqInbox(context, spec.input_address)
    outbox = ZmqOutbox(context, spec.output_address)
    try:
        succeeded = run_engine(spec.options, inbox, outbox, wrap)
    finally:
        inbox.close()
        outbox.close()
        context.term()
    sys.exit(0 if succeeded else 1)


def run_engine(
    options: EngineOptions,
    inbox: ZmqInbox,
    outbox: ZmqOutbox,
    wrap: Callable[[Runner], Runner] = lambda runner: runner,
) -> bool:
    """Load, then serve until told to stop; False after a failure, which the front was told."""
    try:
        loaded, plan = _load(options, outbox)
        runner = wrap(loaded)
    except Exception as error:
        # A wrong wish or a model that does not fit is explained by its message alone.
        is_explained = isinstance(error, ValueError | MemoryError)
        logger.error("event=engine_load_failed reason=%s", error, exc_info=not is_explained)
        outbox.send(
            EngineFailed(failure_reason(error), permanent=isinstance(error, PERMANENT_FAILURES))
        )
        return False
    try:
        loop = build_loop(
            runner, plan, inbox, outbox, recorder=_recorder(options.profile_dir, plan.device)
        )
        # What loading made lives as long as the process; the collector need not look at it again.
        gc.collect()
        gc.freeze()
        outbox.send(ready_message(plan))
        loop.run()
    except Exception as error:
        logger.exception("event=engine_failed")
        outbox.send(EngineFailed(failure_reason(error), permanent=False))
        return False
    finally:
        runner.close()
    return True


def _load(options: EngineOptions, outbox: ZmqOutbox) -> tuple[Runner, EnginePlan]:
    outbox.send(LoadProgress(0.0, "starting"))
    # Imported late: torch takes seconds, before which the front has heard of this process.
    from services.worker.engine.runner.build import build_runner

    started = time.monotonic()
    bar = ProgressBar(sys.stderr)

    def report(fraction: float, what: str) -> None:
        outbox.send(LoadProgress(fraction, what))
        bar.show(fraction, what)

    built = build_runner(options, report)
    logger.info("event=engine_loaded seconds=%.1f", time.monotonic() - started)
    return built


def _recorder(directory: Path | None, device: str) -> StepRecorder | None:
    if directory is None:
        return None
    # Imported late, as the runner is.
    from services.worker.engine.runner.profiling import TorchRecorder

    return TorchRecorder(directory, has_gpu=device == "cuda")


def ready_message(plan: EnginePlan) -> EngineReady:
    """The plan as the front gets it."""
    return EngineReady(
        device=plan.device,
        dtype=plan.dtype,
        attention_backend=plan.attention_backend,
        page_size=plan.page_size,
        num_pages=plan.num_pages,
        context_length=plan.context_length,
        vocab_size=plan.vocab_size,
        eos_token_ids=list(plan.eos_token_ids),
        max_running_sequences=plan.max_running_sequences,
        max_step_tokens=plan.max_step_tokens,
        pair_work=plan.pair_work,
        tp_size=plan.tp_size,
    )


if __name__ == "__main__":
    main()
