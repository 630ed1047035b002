"""CPU time of the engine loop per step, with a device that takes no time.

Planning, applying, page events, and encoding the output for the front are all included; the
model is not. `python -m bench.engine_loop` prints one JSON object.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import time
from collections import deque

import msgspec
import numpy as np

from services.worker.engine.batch import StepPlan, StepResult
from services.worker.engine.batching.scheduler import BatchScheduler
from services.worker.engine.loop import EngineLoop
from services.worker.engine.messages import (
    EngineInput,
    Request,
    SamplingParams,
    StepOutput,
)

_VOCAB_SIZE = 32_000
_PAGE_SIZE = 16
# Steps over which the least disturbed mean is taken.
_WINDOW = 100


class NullRunner:
    """Samples ids out of a table; does nothing else."""

    def __init__(self, num_in_flight: int) -> None:
        self.num_in_flight = num_in_flight
        self._ids = np.random.default_rng(0).integers(0, _VOCAB_SIZE, 1 << 16, np.int32)
        self._steps: deque[tuple[int, int]] = deque()

    def forward(self, plan: StepPlan) -> None:
        """Remember how many rows sample."""
        self._steps.append((plan.step_number, len(plan.sample_rows)))

    def sample(self) -> None:
        """Nothing to issue."""

    def result(self) -> StepResult:
        """Ids of the oldest step."""
        number, num_rows = self._steps.popleft()
        first = number * 257 % (len(self._ids) - num_rows)
        return StepResult(step_number=number, token_ids=self._ids[first : first + num_rows])

    def check(self) -> None:
        """Nothing that could fail."""

    def close(self) -> None:
        """Nothing to release."""


class ListInbox:
    """Hands out what was put in."""

    def __init__(self) -> None:
        self.messages: list[EngineInput] = []

    def receive(self, block: bool, timeout_s: float | None = None) -> list[EngineInput]:
        """Everything put in since the last call."""
        messages, self.messages = self.messages, []
        return messages


class EncodingOutbox:
    """Encodes outputs as the socket would send them."""

    def __init__(self) -> None:
        self._encoder = msgspec.msgpack.Encoder()
        self.num_tokens = 0
        self.num_bytes = 0

    def send(self, message: StepOutput) -> None:
        """Encode and count."""
        self.num_tokens += len(message.token_ids)
        self.num_bytes += len(self._encoder.encode(message))


def measure(
    *, num_sequences: int, num_in_flight: int, num_steps: int, prompt_len: int, output_len: int
) -> dict[str, float]:
    """Keep `num_sequences` decoding, replacing each that ends, for `num_steps` steps."""
    inbox, outbox = ListInbox(), EncodingOutbox()
    scheduler = BatchScheduler(
        num_pages=num_sequences * 2 * (prompt_len + output_len) // _PAGE_SIZE,
        page_size=_PAGE_SIZE,
        context_length=prompt_len + output_len + 1,
        vocab_size=_VOCAB_SIZE,
        eos_token_ids=(),
        max_running_sequences=num_sequences,
        max_step_tokens=8192,
        num_in_flight=num_in_flight,
    )
    loop = EngineLoop(
        runner=NullRunner(num_in_flight), scheduler=scheduler, inbox=inbox, outbox=outbox
    )
    random = np.random.default_rng(1)
    num_started = 0

    def top_up() -> None:
        nonlocal num_started
        for _ in range(num_sequences - scheduler.num_live):
            num_started += 1
            # The first ones end at different times, so that steps are alike.
            share = 1.0 if num_started > num_sequences else num_started / num_sequences
            inbox.messages.append(
                Request(
                    key=num_started,
                    request_id=f"request-{num_started}",
                    token_ids=random.integers(0, _VOCAB_SIZE, prompt_len).tolist(),
                    prompt_len=prompt_len,
                    sampling=SamplingParams(max_new_tokens=max(1, int(share * output_len))),
                    namespace="bench//",
                )
            )

    while num_started < 2 * num_sequences:
        top_up()
        loop.step()
    gc.collect()
    gc.freeze()
    gc.disable()
    step_ns = []
    first_tokens, first_bytes, first_started = outbox.num_tokens, outbox.num_bytes, num_started
    for _ in range(num_steps):
        top_up()
        started = time.thread_time_ns()
        loop.step()
        step_ns.append(time.thread_time_ns() - started)
    gc.enable()
    gc.unfreeze()
    scheduler.check()
    times = np.array(step_ns) / 1000
    windows = times[: len(times) // _WINDOW * _WINDOW].reshape(-1, _WINDOW).mean(axis=1)
    return {
        # On a machine that others use too, the figure least disturbed by them.
        "best_window_us": round(float(windows.min()), 1),
        "mean_us": round(float(times.mean()), 1),
        "p50_us": round(float(np.percentile(times, 50)), 1),
        "p99_us": round(float(np.percentile(times, 99)), 1),
        "tokens_per_step": round((outbox.num_tokens - first_tokens) / num_steps, 1),
        "bytes_per_step": round((outbox.num_bytes - first_bytes) / num_steps, 1),
        "requests_started": num_started - first_started,
    }


def main() -> None:
    """Measure both depths of pipelining and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sequences", type=int, default=256)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--prompt-len", type=int, default=512)
    parser.add_argument("--output-len", type=int, default=512)
    arguments = parser.parse_args()
    figures = {
        f"in_flight_{depth}": measure(
            num_sequences=arguments.sequences,
            num_in_flight=depth,
            num_steps=arguments.steps,
            prompt_len=arguments.prompt_len,
            output_len=arguments.output_len,
        )
        for depth in (1, 2)
    }
    settings = {**vars(arguments), "page_size": _PAGE_SIZE, "python": platform.python_version()}
    print(json.dumps({"benchmark": "engine_loop", "settings": settings, **figures}, indent=2))


if __name__ == "__main__":
    main()
