"""The arithmetic of sampling's kernels, in Triton's interpreter, against the reference."""

import subprocess
import sys

import pytest

WORDS = """
import json
from pathlib import Path
import numpy as np, torch, triton, triton.language as tl
from services.worker.engine.kernels import sampling_math as math
from services.worker.engine.sampling import philox

@triton.jit
def draw(records, token_ids, words, noise, bound, exponentials, first, SIZE: tl.constexpr):
    index = tl.arange(0, SIZE)
    of_tile = math.tile_words(first, records, 0, SIZE)
    of_ids = math.words_of(first + index, records, 0)
    tl.store(words + index, of_tile.to(tl.int64))
    tl.store(words + SIZE + index, of_ids.to(tl.int64))
    tl.store(noise + index, math.gumbel(of_tile))
    tl.store(bound + index, math.gumbel_bound(of_tile))
    tl.store(exponentials + index, math.exp_rn(index.to(tl.float32) * -0.1))

SIZE = 256
vectors = json.loads(Path(philox.__file__).with_name("vectors.json").read_text())["words"]
assert vectors
for case in vectors:
    record = np.zeros(math.RECORD_WORDS, np.int32)
    halves = philox.seed_key(np.array([case["seed"]], np.uint64))[0]
    record[7:9] = halves.view(np.int32)
    record[9:11] = case["choice_index"], case["position"]
    for token_id, word in zip(case["token_ids"], case["words"], strict=True):
        first = token_id // SIZE * SIZE
        words, values = torch.zeros(2, SIZE, dtype=torch.int64), torch.zeros(3, SIZE)
        draw[(1,)](torch.from_numpy(record), words, words, *values, first, SIZE=SIZE)
        assert words[:, token_id - first].tolist() == [word, word]
        expected = philox.gumbel(words[0])
        assert (values[0] - expected).abs().max() < 2e-6
        slack = values[1] - expected
        assert slack.min() > -1e-4 and slack[expected > 3].max() < 0.1
        exact = torch.exp(torch.arange(SIZE).float().mul(-0.1).double())
        assert (values[2] / exact - 1).abs().max() < 5e-6
"""

MIXES = """
import numpy as np, torch
from services.worker.engine.kernels import sampling_choose
from services.worker.engine.messages import LogprobSpec
from tests.fakes.sampling_mixes import (
    CPU, SamplerPair, assert_same_logprobs, random_logits, random_params,
)

torch.set_num_threads(1)
# So small that gathered candidates do not always fit.
sampling_choose._CANDIDATES, sampling_choose._FEW = 512, 64
for vocab_size, rows, rounds in ((64, 24, 2), (3001, 24, 2), (8192, 8, 1)):
    random = np.random.default_rng(vocab_size)
    pair = SamplerPair(vocab_size, rows, CPU)
    for _ in range(rounds):
        logits = random_logits(random, rows, vocab_size)
        for slot in range(rows):
            ids = random.integers(0, vocab_size, 30).tolist()
            spec = LogprobSpec(
                output=bool(slot % 3 == 0), num_top=slot % 7, token_ids=tuple(ids[: slot % 5])
            )
            pair.assign(slot, random_params(random, vocab_size), spec, ids, 20)
        slots = random.permutation(rows).tolist()
        for position, dtype in ((30, torch.float32), (31, torch.bfloat16), (32, torch.float16)):
            narrow = logits.to(dtype)
            got, expected = pair.step(narrow, slots, [position] * rows)
            for slot, *ids in zip(slots, got.token_ids, expected.token_ids, strict=True):
                assert ids[0] == ids[1], (vocab_size, ids, pair.params[slot])
            assert got.logprob_rows == expected.logprob_rows
            assert_same_logprobs(got.logprobs, expected.logprobs, got.logprob_specs)
    spec = LogprobSpec(num_top=3, token_ids=(4, 2))
    following = random.integers(0, vocab_size, rows).tolist()
    assert_same_logprobs(
        pair.sampler.prompt_logprobs(narrow, following, spec),
        pair.reference.prompt_logprobs(narrow.float(), following, spec),
        [spec] * rows,
    )
"""

EXTREMES = """
import sys
import numpy as np, torch
from services.worker.engine.kernels import sampling_choose
from services.worker.engine.messages import LogprobSpec, SamplingParams
from tests.fakes.sampling_mixes import CPU, SamplerPair, assert_same_logprobs, extreme_rows

torch.set_num_threads(1)
sampling_choose._CANDIDATES, sampling_choose._FEW = 64, 16
V = int(sys.argv[1])
half = max(1, V // 2)
KINDS = [
    {"temperature": 0.0}, {"temperature": 1e-5}, {"temperature": 1e20}, {"temperature": 1.0},
    {"top_k": 1}, {"top_k": V}, {"top_k": max(1, V - 1), "min_p": 0.9}, {"top_k": half},
    {"top_p": 0.0}, {"top_p": 1e-9}, {"top_p": 1 - 1e-7}, {"top_p": 0.5}, {"min_p": 1.0},
    {"top_k": half, "top_p": 0.9}, {"top_k": 20, "top_p": 0.8, "min_p": 1e-30},
    {"repetition_penalty": 0.5, "presence_penalty": -2.0, "temperature": 0.0},
    {"logit_bias": tuple((i, (-100.0, 100.0)[i % 2]) for i in range(min(V, 300))), "top_p": 0.9},
    {"min_new_tokens": 9, "stop_token_ids": (V + 5, -1, *range(min(V - 1, 20))), "top_k": 5},
]
SEEDS = [0, 2**63, 2**64 - 1, -1]
pair = SamplerPair(V, len(KINDS), CPU)
for slot, kind in enumerate(KINDS):
    params = SamplingParams(seed=SEEDS[slot % 4], **kind)
    spec = LogprobSpec(output=slot % 6 == 0, num_top=slot, token_ids=(0,) * (slot % 4))
    pair.assign(slot, params, spec, [0, V - 1, 0], 1)
random = np.random.default_rng(V)
for name, row in extreme_rows(random, V).items():
    slots = random.permutation(len(KINDS)).tolist()
    got, expected = pair.step(row.repeat(len(KINDS), 1), slots, [9] * len(KINDS))
    for slot, *ids in zip(slots, got.token_ids, expected.token_ids, strict=True):
        assert ids[0] == ids[1], (name, ids, KINDS[slot])
    assert_same_logprobs(got.logprobs, expected.logprobs, got.logprob_specs)
"""


@pytest.mark.parametrize("vocab_size", [1, 5, 1003])
def test_extreme_rows_and_parameters_equal_the_reference(vocab_size: int) -> None:
    _interpret(EXTREMES, str(vocab_size))


@pytest.mark.parametrize("program", [WORDS, MIXES], ids=["words", "mixes"])
def test_kernels_equal_the_reference(program: str) -> None:
    _interpret(program)


def _interpret(program: str, *arguments: str) -> None:
    pytest.importorskip("triton")
    # The interpreter must be chosen before the kernels' modules are imported.
    done = subprocess.run(
        ["env", "TRITON_INTERPRET=1", sys.executable, "-c", program, *arguments],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
