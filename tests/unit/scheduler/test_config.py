import math
from pathlib import Path
from typing import Any

import pytest

from services.common.config import parse_config
from services.scheduler.config import SchedulerConfig


def test_every_flag_is_read() -> None:
    flags = ["--listen", "unix:/a", "--cache-index", "unix:/b", "--policy", "round_robin"]
    config = parse_config(SchedulerConfig, "scheduler", flags)
    assert (config.listen, config.cache_index) == ("unix:/a", "unix:/b")
    assert config.policy == "round_robin"


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"max_queued_requests": 0}, "max_queued_requests"),
        ({"max_queue_wait_s": 0.0}, "max_queue_wait_s"),
        ({"max_queue_wait_s": math.nan}, "max_queue_wait_s"),
        ({"lease_s": 1.0}, "lease_s"),
        ({"worker_wait_s": -1.0}, "worker_wait_s"),
        ({"load_weight": -0.1}, "load_weight"),
        ({"redis_url": "localhost:6379"}, "redis_url"),
        ({"redis_url": "redis://localhost", "leader_lease": "leader"}, "give one of them"),
        ({"leader_lease": ""}, "leader_lease"),
        ({"kubeconfig": Path("x")}, "leader_lease"),
    ],
)
def test_values_that_cannot_work_are_refused_by_name(changes: dict[str, Any], name: str) -> None:
    with pytest.raises(ValueError, match=name):
        SchedulerConfig(**changes)


def test_waits_are_bounded_unless_the_operator_wants_none() -> None:
    assert SchedulerConfig().max_queue_wait_s == 60.0
    config = parse_config(SchedulerConfig, "scheduler", ["--max-queue-wait-s", "inf"])
    assert config.max_queue_wait_s == math.inf


def test_an_unknown_policy_ends_with_status_2(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parse_config(SchedulerConfig, "scheduler", ["--policy", "psychic"])
    assert caught.value.code == 2
