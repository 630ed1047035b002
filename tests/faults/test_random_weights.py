"""Random fp32 weights at temperature 1: any slip in what a moved sequence takes along shows in its
text, which must equal the undisturbed one byte for byte."""

from __future__ import annotations

import itertools
import shutil
import signal
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import pytest
from openai import OpenAI

from services.common.model_files import builtin_model_path
from tests.fakes.checkpoints import write_checkpoint
from tests.fakes.cluster import Cluster, running_cluster
from tests.faults.processes import engine_process
from tests.faults.settled import assert_nothing_is_left, busiest_worker, until_ready

pytestmark = [pytest.mark.faults, pytest.mark.timeout(600)]

MIGRATIONS = "rhizome_gateway_migrations_total"
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")

NUM_TOKENS = 400
# Requests that are told apart while workers restart, and how many clients send them.
NUM_DISTINCT = 16
NUM_CLIENTS = 8


@dataclass(slots=True)
class Sampled:
    """What one request brought, by choice."""

    texts: dict[int, str] = field(default_factory=lambda: defaultdict(str))
    logprobs: dict[int, list[float]] = field(default_factory=lambda: defaultdict(list))
    # The most likely tokens of each position.
    top: dict[int, list[list[str]]] = field(default_factory=lambda: defaultdict(list))


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Two workers with a model that says anything; they wait for nobody when they drain."""
    path = tmp_path_factory.mktemp("random")
    write_checkpoint(
        path,
        "Llama",
        vocab_size=1536,
        hidden_size=256,
        intermediate_size=512,
        head_dim=64,
        max_position_embeddings=1024,
        initializer_range=0.05,
    )
    for name in _TOKENIZER_FILES:
        shutil.copy(builtin_model_path() / name, path)
    with running_cluster(
        num_schedulers=1,
        num_gateways=1,
        model_arguments=("--model-path", str(path)),
        worker_arguments=("--drain-timeout-s", "0.2"),
    ) as running:
        yield running


def sample(
    client: OpenAI, index: int, num_tokens: int, started: Callable[[], object] = lambda: None
) -> Sampled:
    """Two choices with every kind of state that must travel; calls `started` under way."""
    chunks = client.chat.completions.create(
        model="default",
        messages=[{"role": "user", "content": f"Tell me of {index}."}],
        max_tokens=num_tokens,
        stream=True,
        n=2,
        temperature=1.0,
        seed=index,
        frequency_penalty=0.5,
        presence_penalty=0.3,
        logit_bias={"300": 2, "301": -2},
        logprobs=True,
        top_logprobs=2,
        extra_body={
            "ignore_eos": True,
            "repetition_penalty": 1.1,
            "min_tokens": num_tokens // 2,
            "top_p": 0.95,
            "top_k": 200,
        },
    )
    sampled = Sampled()
    for number, chunk in enumerate(chunks):
        if number == 5:
            started()
        for choice in chunk.choices:
            sampled.texts[choice.index] += choice.delta.content or ""
            if choice.logprobs is not None:
                entries = choice.logprobs.content or ()
                sampled.logprobs[choice.index] += [entry.logprob for entry in entries]
                sampled.top[choice.index] += [
                    [other.token for other in entry.top_logprobs] for entry in entries
                ]
    return sampled


def assert_equal(one: Sampled, other: Sampled, num_tokens: int) -> None:
    assert one.texts == other.texts
    assert one.top == other.top
    assert one.logprobs.keys() == other.logprobs.keys() == {0, 1}
    for choice, logprobs in one.logprobs.items():
        assert len(logprobs) == num_tokens
        assert logprobs == pytest.approx(other.logprobs[choice], abs=1e-4)


def run_all(
    cluster: Cluster, number: int, fault: Callable[[], object] = lambda: None
) -> Sequence[Sampled]:
    """All requests side by side; the fault happens when all are under way."""
    under_way = threading.Barrier(number, action=fault)
    with ThreadPoolExecutor(number) as pool:
        return list(
            pool.map(
                lambda index: sample(
                    cluster.clients[0], index, NUM_TOKENS, lambda: under_way.wait(60)
                ),
                range(number),
            )
        )


@pytest.fixture(scope="module")
def undisturbed(cluster: Cluster, num_streams: int) -> Sequence[Sampled]:
    sampled = run_all(cluster, num_streams)
    # A model that says the same to everybody would show nothing.
    assert len({text for one in sampled for text in one.texts.values()}) == 2 * num_streams
    return sampled


@pytest.mark.parametrize("part", ["worker", "engine"])
def test_text_drawn_at_temperature_1_moves_unchanged(
    cluster: Cluster, undisturbed: Sequence[Sampled], part: str
) -> None:
    before = cluster.metric(0, MIGRATIONS)
    lost: list[str] = []

    def kill() -> None:
        lost.append(f"worker-{busiest_worker(cluster)}")
        front = cluster.process(lost[0])
        (front if part == "worker" else engine_process(front)).kill()

    disturbed = run_all(cluster, len(undisturbed), kill)
    for one, other in zip(disturbed, undisturbed, strict=True):
        assert_equal(one, other, NUM_TOKENS)
    assert cluster.metric(0, MIGRATIONS) > before
    cluster.processes[lost[0]].wait(30)
    cluster.start(lost[0])
    until_ready(cluster, 2)
    assert_nothing_is_left(cluster)


def num_tokens_of(index: int) -> int:
    """Every fourth is too long for a drain."""
    return NUM_TOKENS if index % 4 == 0 else 20


def test_pain_24_h_a_rolling_restart_of_every_worker_fails_no_request(
    cluster: Cluster, fault_scale: float
) -> None:
    client = cluster.clients[0]

    def ask(index: int) -> Sampled:
        return sample(client, index, num_tokens_of(index))

    with ThreadPoolExecutor(NUM_CLIENTS) as pool:
        undisturbed = list(pool.map(ask, range(NUM_DISTINCT)))
        before = cluster.metric(0, MIGRATIONS)
        turns = itertools.count()
        restarted = threading.Event()
        num_wanted = round(1000 * fault_scale)

        def keep_asking() -> int:
            """Requests answered as before, until enough were and every worker is a new one."""
            num_asked = 0
            while (turn := next(turns)) < num_wanted or not restarted.is_set():
                index = turn % NUM_DISTINCT
                assert_equal(ask(index), undisturbed[index], num_tokens_of(index))
                num_asked += 1
            return num_asked

        askers = [pool.submit(keep_asking) for _ in range(NUM_CLIENTS)]
        try:
            for name in ("worker-0", "worker-1"):
                restart(cluster, name)
        finally:
            restarted.set()
        assert sum(asker.result() for asker in askers) >= num_wanted
    assert cluster.metric(0, MIGRATIONS) > before
    assert_nothing_is_left(cluster)


def restart(cluster: Cluster, name: str) -> None:
    """As an orchestrator does it: SIGTERM, and a new one that must be ready before the next."""
    cluster.processes[name].send_signal(signal.SIGTERM)
    assert cluster.processes[name].wait(60) == 0, cluster.log(name)
    cluster.start(name)
    until_ready(cluster, 2)
