"""Random traffic over the built-in model on a CPU: nothing leaks, and every token is right."""

import random
from typing import Any

import pytest

from services.common.model_files import builtin_model_path
from services.worker.engine.batch import Runner
from services.worker.engine.options import EngineOptions, EnginePlan
from services.worker.engine.runner.build import build_runner
from tests.fakes.soak import Soak, soak_seconds

SECONDS = soak_seconds(4.0)


def build(**changes: Any) -> tuple[Runner, EnginePlan]:
    path = builtin_model_path()
    options = EngineOptions(model_path=path, tokenizer_path=path, device="cpu", **changes)
    return build_runner(options, lambda fraction, what: None)


@pytest.mark.timeout(60 + 10 * SECONDS)
@pytest.mark.parametrize("policy", ["lpm", "fcfs"])
def test_random_traffic_leaks_nothing_and_changes_no_token(policy: str) -> None:
    runner, plan = build(
        num_pages=30, chunked_prefill_size=40, max_running_sequences=12, schedule_policy=policy
    )
    soak = Soak(runner, plan, random.Random(policy))
    soak.run(SECONDS)
    soak.check()
    soak.check_against_alone(build(num_pages=64)[0], plan.page_size)
