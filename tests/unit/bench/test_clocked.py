"""Workers whose device is a clock."""

import json
import time
from pathlib import Path

from bench.clocked.engine import ClockedRunner
from bench.other_engine import with_engine
from bench.simulator.device import StepTimes
from services.launch.config import ServeConfig
from services.launch.topology import build_topology
from tests.unit.bench.test_reality import a_plan

TIMES = StepTimes(
    prefill_base_ns=0.0,
    prefill_token_ns=1e6,
    prefill_context_ns=0.0,
    decode_base_ns=2e6,
    decode_sequence_ns=1e6,
    shared_reads=None,
)


def test_steps_in_flight_run_one_after_the_other() -> None:
    runner = ClockedRunner(TIMES)
    began_ns = time.monotonic_ns()
    for plan in (a_plan([1, 1], [30, 40]), a_plan([5], [0])):
        runner.forward(plan)
        runner.sample()
    first, second = runner.result(), runner.result()
    assert (first.device_ns, second.device_ns) == (4_000_000, 5_000_000)
    assert time.monotonic_ns() - began_ns >= 9_000_000
    assert len(first.token_ids) == len(a_plan([1, 1], [30, 40]).sample_rows)


def test_only_workers_get_the_engine() -> None:
    specs = build_topology(ServeConfig(dp=2), Path("/private"), 1)
    changed = with_engine(specs, "some.engine", "7")
    for before, after in zip(specs, changed, strict=True):
        if before.name.startswith("worker"):
            assert after.argv[2:4] == ("bench.other_engine", json.dumps(["some.engine", "7"]))
            assert after.argv[4:] == before.argv[3:]
        else:
            assert after == before
