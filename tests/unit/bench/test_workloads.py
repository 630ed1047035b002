import hashlib
import json
import random

import pytest

from services.bench.presets import PRESETS, WorkloadFlags
from services.bench.serving.config import ServingConfig
from services.bench.serving.load import Target, _jobs
from services.bench.workloads import Workload

# Of the prompts and lengths that the peers' published figures were taken with.
DIGESTS = {
    "bs1": "8d908282898b6ba3",
    "batch512": "9ccd27c175a23e89",
    "batch256": "f783aa8dcd23fb6a",
    "poisson16": "dab086890f7e8a83",
    "shared32x16": "b4a96b29dac96ac7",
    "multiturn64x6": "95bb4578b9d2b245",
}

TARGET = Target(
    base_url="http://x",
    backend="completions",
    model="m",
    sends_ids=True,
    api_key="",
    timeout_s=1.0,
)


def small(**changes) -> Workload:
    values = {
        "kind": "random",
        "num_prompts": 4,
        "input_len": (3, 9),
        "output_len": (1, 5),
        "vocab_size": 1200,
        "seed": 1,
    }
    return Workload(**{**values, **changes})


@pytest.mark.parametrize("name", DIGESTS)
def test_a_presets_prompts_never_change(name):
    conversations = PRESETS[name].workload.conversations()
    plain = [[[turn.token_ids, turn.output_len] for turn in turns] for turns in conversations]
    assert hashlib.sha256(json.dumps(plain).encode()).hexdigest()[:16] == DIGESTS[name]


def test_every_preset_has_its_prompts_pinned():
    assert set(PRESETS) == set(DIGESTS)


def test_equal_seeds_give_equal_prompts_and_others_do_not():
    assert small().conversations() == small().conversations()
    assert small().conversations() != small(seed=2).conversations()


def test_requests_of_a_group_share_its_prefix_and_nothing_more():
    shared = small(kind="shared", num_groups=3, prompts_per_group=4, prefix_len=20)
    prefixes = [tuple(turns[0].token_ids[:20]) for turns in shared.conversations()]
    assert sorted(prefixes.count(prefix) for prefix in set(prefixes)) == [4, 4, 4]
    tails = {tuple(turns[0].token_ids[20:]) for turns in shared.conversations()}
    assert len(tails) == 12


def test_a_turn_begins_with_the_whole_history():
    users = small(kind="multiturn", num_groups=2, prompts_per_group=3, prefix_len=7)
    for first, second, third in users.conversations():
        assert second.token_ids[: len(first.token_ids)] == first.token_ids
        answer = len(second.token_ids) - len(first.token_ids)
        assert answer >= first.output_len + 3
        assert third.token_ids[: len(second.token_ids)] == second.token_ids
        assert len(third.token_ids) + third.output_len <= users.longest


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"input_len": (5, 4)}, "input_len"),
        ({"output_len": (0, 4)}, "output_len"),
        ({"vocab_size": 1000}, "vocab_size"),
        ({"num_prompts": 0}, "at least one request"),
        ({"kind": "shared", "prefix_len": -1, "num_groups": 1, "prompts_per_group": 1}, "prefix"),
    ],
)
def test_values_that_make_no_workload_are_refused(changes, reason):
    with pytest.raises(ValueError, match=reason):
        small(**changes)


def test_flags_change_parts_of_a_preset():
    workload = WorkloadFlags(preset="batch256", num_prompts=16, output_len=(32,)).resolve()
    assert (workload.num_prompts, workload.output_len) == (16, (32, 32))
    assert (workload.input_len, workload.seed) == ((100, 1024), 2)


def test_a_small_models_vocabulary_bounds_the_ids():
    assert WorkloadFlags().resolve(1536).vocab_size == 1536
    assert WorkloadFlags().resolve(200_000).vocab_size == 127_000
    with pytest.raises(ValueError, match="exceeds the model's 1536"):
        WorkloadFlags(vocab_size=2000).resolve(1536)


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        ({"preset": "bs1", "workload": "shared"}, "preset bs1 is a random workload"),
        ({"num_groups": 4}, "num_groups has no meaning in a random workload"),
        ({"workload": "shared", "num_prompts": 4}, "num_prompts has no meaning"),
        ({"input_len": (1, 2, 3)}, "one or two numbers"),
        ({"input_len": (9, 3)}, "shortest <= longest"),
    ],
)
def test_flags_without_meaning_are_refused(flags, reason):
    with pytest.raises(ValueError, match=reason):
        WorkloadFlags(**flags)


def test_processes_take_every_nth_conversation_with_seeds_of_their_own():
    config = ServingConfig(flags=WorkloadFlags(preset="poisson16"))
    conversations = config.flags.resolve().conversations()
    jobs = _jobs(TARGET, conversations, config.arrival, 3)
    assert [job.seed for job in jobs] == [3, 4, 5, 6]
    assert jobs[1].conversations == conversations[1::4]
    assert {job.request_rate for job in jobs} == {4.0}
    # The arrivals of the second process in the published figures.
    arrivals = random.Random(jobs[1].seed)
    assert arrivals.expovariate(jobs[1].request_rate) == pytest.approx(0.06731260912)


def test_a_limit_of_concurrency_is_divided_without_loss():
    config = ServingConfig(flags=WorkloadFlags(num_prompts=64), max_concurrency=10)
    jobs = _jobs(TARGET, config.flags.resolve().conversations(), config.arrival, 0)
    assert [job.max_concurrency for job in jobs] == [3, 3, 2, 2]


def test_there_are_never_more_processes_than_conversations_that_run():
    assert ServingConfig(flags=WorkloadFlags(preset="bs1")).arrival.num_processes == 1
    assert ServingConfig(max_concurrency=2, num_processes=8).arrival.num_processes == 2
    flags = WorkloadFlags(workload="multiturn", num_groups=3)
    assert ServingConfig(flags=flags).arrival.num_processes == 3
