"""Fitting the simulator to steps of real workers, and drawing those out."""

import io
import json
from pathlib import Path

import numpy as np
import pytest

from bench.reality.client import model_ids
from bench.reality.compare import markdown
from bench.reality.fit import fit_steps, overhead_ns, read_steps
from bench.reality.setup import Setup
from bench.reality.slowed import SlowedRunner, Slowing
from bench.simulator.device import StepTimes
from bench.simulator.workloads import Segment
from services.worker.engine.batch import StepPlan, StepResult

TRUE = StepTimes(
    prefill_base_ns=70e6,
    prefill_token_ns=1e6,
    prefill_context_ns=500.0,
    decode_base_ns=60e6,
    decode_sequence_ns=2e6,
    decode_context_ns=900.0,
    shared_reads=None,
)


def a_plan(lengths: list[int], starts: list[int]) -> StepPlan:
    empty = np.empty(0, np.int32)
    return StepPlan(
        step_number=1,
        slots=np.arange(len(lengths), dtype=np.int32),
        num_tokens=np.array(lengths, np.int32),
        start_positions=np.array(starts, np.int32),
        token_ids=np.zeros(sum(lengths), np.int32),
        sample_rows=empty,
        page_slots=empty,
        page_indices=empty,
        page_ids=empty,
    )


class InstantRunner:
    """Makes a step of nothing in no time."""

    num_in_flight = 1
    is_closed = False

    def forward(self, plan: StepPlan) -> None:
        pass

    def sample(self) -> None:
        pass

    def result(self) -> StepResult:
        return StepResult(step_number=1, token_ids=np.empty(0, np.int32))

    def check(self) -> None:
        pass

    def close(self) -> None:
        self.is_closed = True


def test_the_fit_finds_the_times_of_the_steps_that_it_was_shown(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    lines, now = [], 0
    for _ in range(300):
        num_decodes = int(rng.integers(0, 12))
        lengths = [1] * num_decodes + [int(rng.integers(2, 900))] * (
            not num_decodes or rng.random() < 0.4
        )
        starts = [int(rng.integers(0, 900)) for _ in lengths]
        lasted = TRUE.of(a_plan(lengths, starts))
        pairs = [n * (s + n / 2) for n, s in zip(lengths, starts, strict=True) if n > 1]
        work = (
            num_decodes,
            sum(s for n, s in zip(lengths, starts, strict=True) if n == 1),
            sum(n for n in lengths if n > 1),
            int(sum(pairs)),
        )
        # The host takes 1 ms of it before the step begins.
        lines.append(" ".join(map(str, (now + 10**6, now + lasted // 2, now + lasted, *work))))
        now += lasted
    log = tmp_path / "steps-1.txt"
    log.write_text("\n".join(lines))
    fitted = fit_steps(read_steps([log])[1:])
    assert fitted.mean_error < 0.01
    assert fitted.total_ratio == pytest.approx(1, abs=0.01)
    for name in ("prefill_base_ns", "prefill_token_ns", "decode_base_ns", "decode_sequence_ns"):
        found = getattr(fitted.step_times, name)
        assert found == pytest.approx(getattr(TRUE, name), rel=0.05), name


def test_a_step_after_a_pause_counts_from_its_own_beginning(tmp_path: Path) -> None:
    log = tmp_path / "steps-1.txt"
    log.write_text("0 5 10 1 1 0 0\n1000 1500 2000 1 1 0 0\n900000000 900000001 900000010 1 1 0 0")
    assert [step.lasted_ns for step in read_steps([log])] == [10, 1990, 10]


def test_the_overhead_is_what_requests_take_beside_their_steps(tmp_path: Path) -> None:
    log = tmp_path / "steps-1.txt"
    log.write_text("0 5 10000000 0 0 40 800\n50000000 5 60000000 0 0 40 800")
    assert overhead_ns([0.013, 0.015], read_steps([log])) == pytest.approx(4_000_000)


def test_a_step_is_drawn_out_and_logged(tmp_path: Path) -> None:
    log, inner = io.StringIO(), InstantRunner()
    slowing = Slowing(floor_ms=5.0, token_ms=0.5, log=tmp_path)
    runner = SlowedRunner(inner, slowing, log)
    runner.forward(a_plan([1, 1, 10], [30, 40, 20]))
    runner.sample()
    runner.result()
    began, computed, ended, *work = map(int, log.getvalue().split())
    assert ended - began >= slowing.least_ns(12) == 11e6
    assert computed < ended
    assert work == [2, 70, 10, 250]
    runner.close()
    assert inner.is_closed


def test_the_same_segment_is_the_same_text_and_another_is_not() -> None:
    assert model_ids(Segment(5, 32)) == model_ids(Segment(5, 32))
    assert model_ids(Segment(5, 32)) != model_ids(Segment(6, 32))


def test_the_setup_survives_its_file(tmp_path: Path) -> None:
    setup = Setup(step_times=TRUE, overhead_ns=30_000_000, floor_ms=60.0, token_ms=1.0)
    path = tmp_path / "fit.json"
    path.write_text(json.dumps(setup.as_dict()))
    assert Setup.read(path) == setup
    delays = setup.setting("small_zipf", 10, 1).delays
    way = 2 * delays.schedule + delays.match + delays.submit + delays.output
    assert way == pytest.approx(30_000_000, rel=0.01)


def test_the_table_counts_what_is_within_the_limit() -> None:
    row = {"workload": "w", "load_percent": 50, "policy": "e2", "late": 0.0}
    real = {"mean_s": 1.0, "p99_s": 2.0, "hit_rate": 0.5}
    simulated = {"mean_s": 1.1, "p99_s": 3.0, "hit_rate": 0.5}
    text = markdown([{**row, "real": real, "simulated": simulated}])
    assert "1.000 / 1.100 (+10%)" in text
    assert "mean_s: 1 of 1 within 15%, worst +10%" in text
    assert "p99_s: 0 of 1 within 15%, worst +50%" in text
