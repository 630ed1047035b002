"""Sampling on a GPU gives the CPU's tokens for any mix of parameters, and never waits."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch

from services.worker.engine.messages import LogprobSpec, SamplingParams
from services.worker.engine.sampling import philox

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


@pytest.fixture(scope="module")
def mixes():
    pytest.importorskip("triton")
    from tests.fakes import sampling_mixes

    return sampling_mixes


@pytest.fixture
def never_waits() -> Iterator[None]:
    yield
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize(
    ("vocab_size", "rows", "dtype"),
    [
        (17, 5, torch.float32),
        (1000, 64, torch.float32),
        (32_003, 48, torch.bfloat16),
        (50_257, 33, torch.float16),
        (128_256, 40, torch.float32),
        (128_256, 1, torch.float32),
        (151_936, 24, torch.bfloat16),
        (262_144, 7, torch.float32),
    ],
)
def test_tokens_and_logprobs_equal_the_references(
    mixes, vocab_size: int, rows: int, dtype: torch.dtype
) -> None:
    random = np.random.default_rng(vocab_size + rows)
    pair = mixes.SamplerPair(vocab_size, rows, torch.device("cuda"), logits_dtypes=(dtype,))
    ties = 0
    for _ in range(3):
        logits = mixes.random_logits(random, rows, vocab_size).to(dtype).to("cuda")
        for slot in range(rows):
            ids = random.integers(0, vocab_size, 60).tolist()
            spec = LogprobSpec(output=slot % 3 == 0, num_top=slot % 21, token_ids=tuple(ids[:9]))
            pair.assign(slot, mixes.random_params(random, vocab_size), spec, ids, 50)
        slots = random.permutation(rows).tolist()
        for position in (60, 61):
            got, expected = pair.step(logits, slots, [position] * rows)
            torch.cuda.synchronize()
            for row, *ids in zip(range(rows), got.token_ids, expected.token_ids, strict=True):
                if ids[0] != ids[1]:
                    # A count that differs would tell in the next step.
                    params = pair.params[slots[row]]
                    assert pair.is_near_tie(logits[row], slots[row], position, ids), (ids, params)
                    ties += 1
            same = [
                row for row in got.logprob_rows if got.token_ids[row] == expected.token_ids[row]
            ]
            if len(same) == len(got.logprob_rows) and same:
                mixes.assert_same_logprobs(got.logprobs, expected.logprobs, got.logprob_specs)
    assert ties <= 1


def test_extreme_rows_equal_the_references(mixes) -> None:
    random = np.random.default_rng(11)
    vocab_size = 50_001
    kinds = [{"temperature": 0.0}, {"top_p": 0.9}, {"top_k": 50, "top_p": 0.8}, {"min_p": 0.1}]
    pair = mixes.SamplerPair(vocab_size, len(kinds), torch.device("cuda"))
    for slot, kind in enumerate(kinds):
        pair.assign(slot, SamplingParams(seed=slot, **kind), LogprobSpec(), [], 0)
    slots = list(range(len(kinds)))
    for name, row in mixes.extreme_rows(random, vocab_size).items():
        got, expected = pair.step(row.repeat(len(kinds), 1), slots, [4] * len(kinds))
        torch.cuda.synchronize()
        for slot, *ids in zip(slots, got.token_ids, expected.token_ids, strict=True):
            same = ids[0] == ids[1]
            assert same or (slot > 0 and pair.is_near_tie(row[0], slot, 4, ids)), (name, slot, ids)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_need_not_be_aligned(mixes, dtype: torch.dtype) -> None:
    random = np.random.default_rng(12)
    vocab_size = 32_003
    pair = mixes.SamplerPair(vocab_size, 3, torch.device("cuda"))
    logits = mixes.random_logits(random, 4, vocab_size).to(dtype).cuda()[1:]
    assert logits.data_ptr() % 16
    penalised, plain = {"presence_penalty": 1.5}, {}
    for kind in (penalised, plain, penalised):
        for slot in range(3):
            params = SamplingParams(temperature=0.0, **kind)
            ids = [1, int(logits[slot].argmax())]
            pair.assign(slot, params, LogprobSpec(), ids, 1)
        step = pair.sampler.sample(
            logits, np.arange(3, dtype=np.int32), np.full(3, 5), [], reports=True
        )
        expected = pair.reference.sample(
            logits.cpu(), np.arange(3, dtype=np.int32), np.full(3, 5), [], reports=True
        )
        torch.cuda.synchronize()
        assert step.token_ids.tolist() == expected.token_ids.tolist()


def test_a_row_samples_the_same_alone_and_among_others_and_in_float32(mixes) -> None:
    random = np.random.default_rng(7)
    rows, vocab_size = 32, 128_256
    pair = mixes.SamplerPair(vocab_size, rows, torch.device("cuda"))
    logits = mixes.random_logits(random, rows, vocab_size).bfloat16().cuda()
    kinds = [{}, {"top_p": 0.95}, {"top_k": 40, "top_p": 0.8}, {"min_p": 0.05}]
    for slot in range(rows):
        params = SamplingParams(temperature=0.9, seed=slot, **kinds[slot % 4])
        pair.assign(slot, params, LogprobSpec(), [], 0)
    one = np.array([9])
    together = pair.sampler.sample(
        logits, np.arange(rows, dtype=np.int32), np.full(rows, 9), [], reports=True
    ).device_ids
    for row in range(rows):
        slot = np.array([row], np.int32)
        for alone in (logits[row : row + 1], logits[row : row + 1].float()):
            step = pair.sampler.sample(alone, slot, one, [], reports=True)
            assert step.device_ids.tolist() == together[row : row + 1].tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_prompt_logprobs_equal_the_references(mixes, dtype: torch.dtype) -> None:
    random = np.random.default_rng(3)
    pair = mixes.SamplerPair(32_000, 2, torch.device("cuda"))
    logits = mixes.random_logits(random, 100, 32_000).to(dtype)
    spec = LogprobSpec(num_top=5, token_ids=(7, 31_999))
    following = random.integers(0, 32_000, 100).tolist()
    expected = pair.reference.prompt_logprobs(logits, following, spec)
    prompt = pair.sampler.prompt_logprobs(logits.cuda(), following, spec)
    pair.assign(0, SamplingParams(temperature=0.0), LogprobSpec(output=True), [], 0)
    step = pair.sampler.sample(
        logits[:1].cuda(), np.zeros(1, np.int32), np.ones(1, np.int64), [prompt], reports=True
    )
    torch.cuda.synchronize()
    mixes.assert_same_logprobs(step.prompt_logprobs[0], expected, [spec] * 100)
    assert step.token_ids.tolist() == [int(logits[0].argmax())]


@pytest.mark.usefixtures("never_waits")
def test_a_step_never_waits_for_the_device(mixes) -> None:
    random = np.random.default_rng(5)
    pair = mixes.SamplerPair(4096, 16, torch.device("cuda"))
    logits = mixes.random_logits(random, 16, 4096).cuda()
    torch.cuda.set_sync_debug_mode("error")
    for slot in range(16):
        spec = LogprobSpec(output=slot % 2 == 0, num_top=4, token_ids=(3, 4))
        pair.assign_device(slot, mixes.random_params(random, 4096), spec, [5, 6, 7], 2)
    slots, positions = np.arange(16, dtype=np.int32), np.full(16, 9)
    prompt = pair.sampler.prompt_logprobs(logits, [4] * 16, LogprobSpec(num_top=2))
    step = pair.sampler.sample(logits, slots, positions, [prompt], reports=True)
    torch.cuda.set_sync_debug_mode("default")
    assert step.is_filled is not None
    step.is_filled.synchronize()
    assert step.token_ids.tolist() == step.device_ids.tolist()


def test_logits_that_are_no_numbers_end(mixes) -> None:
    pair = mixes.SamplerPair(20_000, 4, torch.device("cuda"))
    logits = torch.full((4, 20_000), float("nan"), device="cuda")
    logits[1, ::2] = 0.5
    logits[2] = float("-inf")
    logits[3, 5] = float("inf")
    for slot in range(4):
        pair.assign(slot, SamplingParams(top_p=0.9), LogprobSpec(), [], 0)
    step = pair.sampler.sample(
        logits, np.arange(4, dtype=np.int32), np.full(4, 3), [], reports=True
    )
    assert all(0 <= token_id < 20_000 for token_id in step.device_ids.tolist())


def test_noise_equals_the_cpus() -> None:
    pytest.importorskip("triton")
    from services.worker.engine.kernels import sampling_math
    from tests.fakes.noise_kernel import noise_of

    record = np.zeros(sampling_math.RECORD_WORDS, np.int32)
    seeds = np.array([2**64 - 77], np.uint64)
    record[7:9] = philox.seed_key(seeds)[0].view(np.int32)
    record[9], record[10] = 2, 2**20
    words, noise = noise_of(torch.from_numpy(record).cuda(), 2**17)
    expected = philox.sampling_words_numpy(seeds, np.array([2]), np.array([2**20]), 2**17)[0]
    assert (words.cpu().numpy() == expected).all()
    uniform = words.cpu().float().add(0.5).mul(2.0**-32).clamp(max=1 - 2.0**-24)
    exact = -torch.log(-torch.log1p(-uniform.double()))
    # Two units in the last place of each logarithm.
    assert ((noise.cpu() - exact).abs() < 5e-7 + 2.5e-7 * exact.abs()).all()
