"""Sweeps over seeds, and what is said of them."""

from typing import Any

import pytest

from bench.simulator.judge import judge, table
from bench.simulator.sweep import Case, Plan, run_plans


def run(policy: str, mean: list[float], p99: list[float], load: int = 70) -> dict[str, Any]:
    return {
        "policy": policy,
        "load_percent": load,
        "mean_s": sum(mean) / len(mean),
        "p99_s": sum(p99) / len(p99),
        "by_seed": {"mean_s": mean, "p99_s": p99},
    }


def test_a_case_names_a_policy_and_weights() -> None:
    case = Case.parse("prefix_load:stall_weight=1+prefix_weight=2.5")
    assert case.policy == "prefix_load"
    assert dict(case.weights) == {"stall_weight": 1.0, "prefix_weight": 2.5}
    with pytest.raises(ValueError, match="'nobody' is not one of"):
        Case.parse("nobody")


def test_a_policy_is_judged_by_the_best_other_one_and_not_by_its_variants() -> None:
    result = {
        "workload": "w",
        "runs": [
            run("prefix_load", [1.0, 1.2], [2.0, 2.0]),
            run("prefix_load:stall_weight=1", [0.5, 0.5], [0.5, 0.5]),
            run("e2", [1.0, 1.0], [4.0, 4.0]),
            run("round_robin", [2.0, 2.0], [2.5, 2.5]),
        ],
    }
    mean, p99 = judge(result, "prefix_load")
    assert (mean.best_other, p99.best_other) == ("e2", "round_robin")
    assert mean.ratio == pytest.approx(1.1)
    assert (mean.least, mean.greatest) == (1.0, 1.2)
    assert p99.ratio == pytest.approx(0.8)
    text = table([mean, p99], 1.03)
    assert "1.100 (1.00 to 1.20, e2) **over**" in text
    assert "mean_s: 1 of 1 settings over 1.03" in text
    assert "p99_s: 0 of 1 settings over 1.03" in text


def test_a_sweep_has_every_seed_and_their_mean() -> None:
    plan = Plan(
        workload="zipf",
        cases=(Case.parse("prefix_load"), Case.parse("round_robin")),
        loads=(50, 90),
        seeds=(3, 4),
        num_workers=2,
        num_requests=30,
        lose_worker_at=0.5,
    )
    said: list[str] = []
    (result,) = run_plans([plan], 1, said.append)
    assert [(r["policy"], r["load_percent"]) for r in result["runs"]] == [
        ("prefix_load", 50),
        ("round_robin", 50),
        ("prefix_load", 90),
        ("round_robin", 90),
    ]
    assert len(said) == 4
    for entry in result["runs"]:
        first, second = entry["by_seed"]["mean_s"]
        assert first != second
        assert entry["mean_s"] == pytest.approx((first + second) / 2, abs=1e-4)
        assert entry["num_served"] == 30
