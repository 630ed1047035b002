"""Two ranks over gloo: the same tokens as one, and prompt ends."""

import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch

from services.worker.engine.batch import PromptLogprobRequest, Runner, SlotAssignment, StepPlan
from services.worker.engine.distributed import group
from services.worker.engine.distributed.channel import RankLostError
from services.worker.engine.distributed.plan_codec import decode_plan, encode_plan
from services.worker.engine.distributed.rendezvous import create_store, join_store
from services.worker.engine.layers.embedding import VocabularyShard, compute_largest
from services.worker.engine.layers.parameters import Placement
from services.worker.engine.messages import LogprobSpec, SamplingParams
from services.worker.engine.models.registry import load_model_config
from services.worker.engine.options import EngineOptions
from services.worker.engine.runner.profile import run_largest_steps
from services.worker.engine.runner.ranks import RankProcesses
from services.worker.engine.runner.setup import decide_plan, load_model, make_runner
from services.worker.engine.runner.watch import RankWatch
from tests.fakes.checkpoints import VOCAB_SIZE, write_checkpoint
from tests.fakes.engines import PAGE_SIZE, open_driver, open_runner
from tests.fakes.step_driver import GREEDY, StepDriver

PROMPT = [(7 * i * i + 3 * i) % VOCAB_SIZE for i in range(37)]
SAMPLINGS = (
    GREEDY,
    SamplingParams(temperature=0.9, seed=3, top_p=0.9),
    SamplingParams(temperature=0.7, seed=4, frequency_penalty=0.5, logit_bias=((3, 1.0),)),
)
# Rank 0 of two, which then waits to be killed.
_LEADER = """
import sys, time
from pathlib import Path
from services.worker.engine.options import EngineOptions
from services.worker.engine.runner.build import build_runner

path = Path(sys.argv[1])
options = EngineOptions(model_path=path, tokenizer_path=path, device="cpu", tp_size=2)
runner = build_runner(options, lambda fraction, what: None)
print("ready", flush=True)
time.sleep(60)
"""
LOGPROBS = LogprobSpec(output=True, num_top=2, prompt_start=1)


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    # An odd vocabulary: the last rank's share of it is padded.
    write_checkpoint(path, "Qwen2", vocab_size=VOCAB_SIZE + 1)
    return path


@pytest.fixture
def pair(model_path: Path) -> Iterator[Runner]:
    runner = open_runner(model_path, tp_size=2)
    yield runner
    runner.close()


def other_rank() -> psutil.Process:
    (process,) = [
        child
        for child in psutil.Process().children()
        if any("runner.follower" in part for part in child.cmdline())
    ]
    return process


def run(driver: StepDriver) -> tuple[list[list[int]], list[float]]:
    """Tokens of some sequences together, and log-probabilities of one."""
    sequences = [driver.start(PROMPT[i:], kind) for i, kind in enumerate(SAMPLINGS)]
    tokens = driver.generate(sequences, 16, chunk=20)
    request = PromptLogprobRequest(
        row=0, start=1, stop=len(PROMPT), token_ids=PROMPT[1:], spec=LOGPROBS
    )
    sequence = driver.start(PROMPT, logprobs=LOGPROBS)
    result = driver.step([(sequence, len(PROMPT))], [request])
    return tokens, result.prompt_logprobs[0].logprobs + result.output_logprobs[0].top_logprobs


def test_two_ranks_give_the_tokens_of_one(model_path: Path, pair: Runner) -> None:
    tokens, logprobs = run(open_driver(model_path))
    pair_tokens, pair_logprobs = run(StepDriver(pair, page_size=PAGE_SIZE))
    assert pair_tokens == tokens
    assert pair_logprobs == pytest.approx(logprobs, abs=1e-4)
    process = other_rank()
    pair.close()
    assert not process.is_running()


def test_a_killed_rank_is_an_error_at_the_next_step(pair: Runner) -> None:
    driver = StepDriver(pair, page_size=PAGE_SIZE)
    sequence = driver.start(PROMPT)
    driver.generate([sequence], 2)
    process = other_rank()
    process.kill()
    started = time.monotonic()
    with pytest.raises(RankLostError):
        driver.generate([sequence], 50)
    assert time.monotonic() - started < 15


def test_a_hanging_rank_is_an_error_after_a_collectives_timeout(
    model_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(group, "COLLECTIVE_TIMEOUT", timedelta(seconds=2))
    runner = open_runner(model_path, tp_size=2)
    process = other_rank()
    process.suspend()
    driver = StepDriver(runner, page_size=PAGE_SIZE)
    with pytest.raises(RankLostError):
        driver.generate([driver.start(PROMPT)], 1)
    process.kill()
    runner.close()


def test_a_rank_that_fails_says_why(tmp_path: Path) -> None:
    ranks = RankProcesses(2)
    store, address = create_store(2)
    options = EngineOptions(model_path=tmp_path, tokenizer_path=tmp_path, device="cpu", tp_size=2)
    ranks.start(options, store, address)
    watch = RankWatch(ranks.channels, ends_process=False)
    with pytest.raises(ValueError, match="rank 1 failed: no config.json in"):
        watch.wait_until_loaded()
    watch.close()
    ranks.close()


def test_ranks_die_with_rank_0(model_path: Path) -> None:
    leader = subprocess.Popen(
        [sys.executable, "-c", _LEADER, str(model_path)], stdout=subprocess.PIPE, text=True
    )
    with leader:
        assert leader.stdout is not None
        assert leader.stdout.readline() == "ready\n"
        (rank,) = psutil.Process(leader.pid).children()
        leader.kill()
    psutil.wait_procs([rank], timeout=10)
    assert not rank.is_running()


def test_a_plan_survives_packing() -> None:
    def ids(*values: int) -> np.ndarray:
        return np.array(values, np.int32)

    plan = StepPlan(
        step_number=2**40,
        slots=ids(3, 1),
        num_tokens=ids(1, 2),
        start_positions=ids(9, 0),
        token_ids=ids(-1, 5, 6),
        sample_rows=ids(0),
        page_slots=ids(),
        page_indices=ids(),
        page_ids=ids(),
        assignments=[
            SlotAssignment(
                slot=1,
                sampling=SamplingParams(seed=2**64 - 1, logit_bias=((1, -2.5),)),
                logprobs=LOGPROBS,
                choice_index=2,
                prompt_len=2,
                token_ids=[5, 6],
            )
        ],
        prompt_logprobs=[
            PromptLogprobRequest(row=1, start=1, stop=2, token_ids=[6], spec=LOGPROBS)
        ],
    )
    unpacked = decode_plan(encode_plan(plan))
    for name in StepPlan.__slots__:
        before, after = getattr(plan, name), getattr(unpacked, name)
        assert np.array_equal(before, after) if isinstance(before, np.ndarray) else before == after


def test_every_rank_can_measure_the_largest_steps(model_path: Path) -> None:
    options = EngineOptions(
        model_path=model_path,
        tokenizer_path=model_path,
        device="cpu",
        tp_size=2,
        max_running_sequences=4,
        chunked_prefill_size=32,
    )
    config = load_model_config(model_path)
    device = torch.device("cpu")
    store, address = create_store(2)

    def on_rank(rank: int) -> int:
        own = join_store(address, 2)
        tp_group = group.GlooGroup(own, rank, 2, address.host)
        model = load_model(
            options, config, device=device, group=tp_group, on_progress=lambda _: None
        )
        plan = decide_plan(
            options, config, device=device, eos_token_ids=(), pool_budget_bytes=2**20
        )
        runner = make_runner(model, plan, tp_group)
        run_largest_steps(runner, plan)
        runner.close()
        tp_group.close()
        return plan.max_step_tokens

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(on_rank, range(2))) == [32, 32]
    del store


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_largest_of_all_shards_is_the_argmax_of_the_whole(dtype: torch.dtype) -> None:
    vocab_size, hidden_size, num_ranks = 11, 8, 4
    generator = torch.Generator().manual_seed(0)
    # Small integers, so that sums are exact and equal logits are common.
    weight = torch.randint(-2, 3, (vocab_size, hidden_size), generator=generator).float()
    hidden = torch.randint(-2, 3, (64, hidden_size), generator=generator).float()
    # Rows whose logits are all the same, and rows whose logits are all negative.
    hidden[:8] = 0
    weight[:, 0] = 1
    hidden[8:16, 0] = -100
    store, address = create_store(num_ranks)

    def on_rank(rank: int) -> torch.Tensor:
        own = join_store(address, num_ranks)
        tp_group = group.GlooGroup(own, rank, num_ranks, address.host)
        placement = Placement(torch.device("cpu"), dtype, tp_group)
        shard = VocabularyShard("head", vocab_size, hidden_size, placement, is_head=True)
        shard.load("head", weight)
        found = compute_largest(shard, hidden.to(dtype))
        tp_group.close()
        return found

    with ThreadPoolExecutor(num_ranks) as pool:
        results = list(pool.map(on_rank, range(num_ranks)))
    logits = hidden @ weight.T
    # The first of equal ones.
    expected = [row.tolist().index(max(row.tolist())) for row in logits]
    assert [found.tolist() for found in results] == [expected] * num_ranks
    del store
