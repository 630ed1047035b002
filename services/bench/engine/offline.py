"""`rhizome bench offline`: a serving workload through the engine alone, all of it at once."""

from __future__ import annotations

import gc
import json
import time
from dataclasses import asdict, dataclass

from services.bench.engine.config import OfflineConfig
from services.bench.engine.session import EncodingOutbox, ListInbox, make_request
from services.bench.engine.startup import BuiltEngine, build_engine, describe_engine
from services.bench.figures import median_and_spread, number, table
from services.bench.progress import ProgressBar
from services.bench.workloads import Conversation, Turn, Workload
from services.worker.engine.loop import EngineLoop, build_loop
from services.worker.engine.messages import EngineLoad, FlushCache, StepOutput


class RequestFailedError(Exception):
    """The engine refused or failed a request; the message is the engine's."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OfflineFigures:
    """One run. Tokens are counted over all requests, which all succeeded."""

    num_requests: int
    duration_s: float
    requests_per_s: float
    input_tokens_per_s: float
    output_tokens_per_s: float
    total_tokens_per_s: float
    # Of prompt tokens, those that the prefix cache held.
    cached_share: float
    num_outputs: int
    num_preemptions: int


def bench_offline(config: OfflineConfig) -> None:
    """Measure, print, write JSON. Raises ValueError for a workload that does not fit."""
    engine = build_engine(config.engine, config.engine.engine_options())
    try:
        workload = config.flags.resolve(engine.plan.vocab_size)
        if workload.longest > engine.plan.context_length:
            raise ValueError(
                f"sequences of up to {workload.longest} tokens exceed the context length "
                f"{engine.plan.context_length}"
            )
        session = _Session(engine)
        conversations = workload.conversations()
        session.run(_warmup(workload), ProgressBar("warm-up", 1, is_disabled=True))
        runs = []
        for index in range(config.repeat):
            bar = ProgressBar(
                f"run {index + 1}/{config.repeat}",
                workload.num_requests,
                is_disabled=config.disable_progress,
            )
            runs.append(session.run(conversations, bar))
            bar.close()
    finally:
        engine.runner.close()
    print(_format(workload, runs))
    if config.output_file is not None:
        report = {
            "benchmark": "offline",
            "engine": describe_engine(engine, config.engine),
            "workload": asdict(workload),
            "runs": [asdict(run) for run in runs],
        }
        config.output_file.write_text(json.dumps(report, indent=1) + "\n")


class _Session:
    """One engine loop over several runs, each from an empty prefix cache."""

    def __init__(self, engine: BuiltEngine) -> None:
        self._inbox = ListInbox()
        self._outbox = EncodingOutbox()
        self._loop: EngineLoop = build_loop(engine.runner, engine.plan, self._inbox, self._outbox)
        self._next_key = 1
        self._load = EngineLoad()

    def run(self, conversations: list[Conversation], bar: ProgressBar) -> OfflineFigures:
        """Send the first turn of all, each other turn when the one before is finished."""
        self._flush()
        before = self._load
        # Turns left of each running conversation, by the key of its running request.
        waiting: dict[int, list[Turn]] = {}
        num_done = num_outputs = 0
        gc.collect()
        gc.disable()
        started_s = time.perf_counter()
        try:
            for conversation in conversations:
                self._send(waiting, conversation)
            while waiting:
                self._loop.step()
                for output in self._outbox.take():
                    num_outputs += 1
                    num_done += self._finish(waiting, output)
                bar.update(num_done)
            duration_s = time.perf_counter() - started_s
        finally:
            gc.enable()
        num_input = sum(len(turn.token_ids) for turns in conversations for turn in turns)
        num_output = sum(turn.output_len for turns in conversations for turn in turns)
        return OfflineFigures(
            num_requests=num_done,
            duration_s=duration_s,
            requests_per_s=num_done / duration_s,
            input_tokens_per_s=num_input / duration_s,
            output_tokens_per_s=num_output / duration_s,
            total_tokens_per_s=(num_input + num_output) / duration_s,
            cached_share=(self._load.num_cached_tokens - before.num_cached_tokens) / num_input,
            num_outputs=num_outputs,
            num_preemptions=self._load.num_preemptions - before.num_preemptions,
        )

    def _send(self, waiting: dict[int, list[Turn]], turns: list[Turn]) -> None:
        key, self._next_key = self._next_key, self._next_key + 1
        waiting[key] = turns[1:]
        self._inbox.put([make_request(key, turns[0])])

    def _finish(self, waiting: dict[int, list[Turn]], output: StepOutput) -> int:
        """Requests that ended in this output; the next turns of their users are sent."""
        self._load = output.load
        for error in output.errors:
            raise RequestFailedError(error.message)
        for finish in output.finishes:
            turns = waiting.pop(finish.key)
            if turns:
                self._send(waiting, turns)
        return len(output.finishes)

    def _flush(self) -> None:
        self._inbox.put([FlushCache()])
        is_flushed = False
        while not is_flushed:
            self._loop.step()
            for output in self._outbox.take():
                self._load = output.load
                is_flushed = is_flushed or output.flushed_pages is not None


def _warmup(workload: Workload) -> list[Conversation]:
    """A few prompts of the workload's longest length, which it does not contain."""
    prompt = [index % 7 for index in range(workload.input_len[1])]
    return [[Turn([row, *prompt[1:]], min(8, workload.output_len[1]))] for row in range(8)]


def _format(workload: Workload, runs: list[OfflineFigures]) -> str:
    names = (
        "requests_per_s",
        "output_tokens_per_s",
        "input_tokens_per_s",
        "total_tokens_per_s",
        "duration_s",
        "cached_share",
        "num_preemptions",
    )
    rows = []
    for name in names:
        values = [float(getattr(run, name)) for run in runs]
        median, spread = median_and_spread(values)
        cells = [number(median), f"{100 * spread:.1f} %", ", ".join(map(number, values))]
        rows.append([name.replace("_per_s", "/s").replace("_", " "), *cells])
    title = f"offline {workload.kind}: {runs[0].num_requests} requests, seed {workload.seed}"
    return f"\n{title}\n\n" + table(["figure", "median", "spread", "runs"], rows)
