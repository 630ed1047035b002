"""The reference backend on a GPU gives the CPU's tokens in float32."""

from pathlib import Path

import numpy as np
import pytest
import torch

from services.worker.engine.messages import SamplingParams
from services.worker.engine.options import EngineOptions
from services.worker.engine.runner.build import build_runner
from services.worker.engine.sampling import philox
from tests.fakes.checkpoints import VOCAB_SIZE, write_checkpoint
from tests.fakes.step_driver import GREEDY, StepDriver

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

PROMPT = [(7 * i * i + 3 * i) % VOCAB_SIZE for i in range(37)]


def generate(path: Path, device: str) -> list[list[int]]:
    options = EngineOptions(
        model_path=path,
        tokenizer_path=path,
        device=device,
        dtype="float32",
        num_pages=256,
        attention_backend="torch",
    )
    runner, plan = build_runner(options, lambda fraction, what: None)
    driver = StepDriver(runner, page_size=plan.page_size)
    driver.names_last_sampled = True
    samplings = [
        GREEDY,
        SamplingParams(temperature=0.8, seed=5, top_p=0.9),
        SamplingParams(temperature=1.0, seed=6, frequency_penalty=0.5, logit_bias=((4, 1.0),)),
    ]
    sequences = [driver.start(PROMPT[i:], kind) for i, kind in enumerate(samplings)]
    tokens = driver.generate(sequences, 24, chunk=11)
    runner.close()
    return tokens


@pytest.mark.parametrize("family", ["Llama", "Qwen3"])
def test_tokens_equal_the_cpus(family: str, tmp_path: Path) -> None:
    write_checkpoint(tmp_path, family)
    assert generate(tmp_path, "cuda") == generate(tmp_path, "cpu")


def test_noise_equals_the_cpus() -> None:
    seeds = np.array([1, 2**64 - 1, 77], np.uint64)
    choices, positions = np.array([0, 1, 2]), np.array([5, 0, 2**20])
    cpu, gpu = (
        philox.sampling_noise(seeds, choices, positions, 128_256, torch.device(device)).cpu()
        for device in ("cpu", "cuda")
    )
    torch.testing.assert_close(cpu, gpu, atol=1e-5, rtol=1e-5)
