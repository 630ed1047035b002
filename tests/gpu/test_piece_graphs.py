"""Piecewise graphs against the same steps launched kernel by kernel."""

import pytest
import torch

from services.common.model_files import builtin_model_path
from services.worker.engine.messages import SamplingParams
from services.worker.engine.options import EngineOptions
from services.worker.engine.runner.build import build_runner
from services.worker.engine.runner.model_runner import ModelRunner
from services.worker.engine.runner.pieces import piece_graph_sizes
from tests.fakes.step_driver import GREEDY, StepDriver

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

SAMPLED = SamplingParams(temperature=0.7, seed=5, max_new_tokens=30)
PROMPTS = [list(range(300, 300 + length)) for length in (1, 7, 20, 33, 70, 150)]


def generate(dtype: str, *, in_pieces: bool) -> list[list[int]]:
    path = builtin_model_path()
    options = EngineOptions(
        model_path=path,
        tokenizer_path=path,
        device="cuda",
        dtype=dtype,
        attention_backend="torch",
        num_pages=512,
    )
    runner, plan = build_runner(options, lambda fraction, what: None)
    assert isinstance(runner, ModelRunner)
    if in_pieces:
        runner.capture_pieces(piece_graph_sizes(256))
    driver = StepDriver(runner, page_size=plan.page_size)
    tokens: list[list[int]] = []
    sequences = []
    for index, prompt in enumerate(PROMPTS):
        sequences.append(driver.start(prompt, SAMPLED if index % 2 else GREEDY))
        # Prompts of different lengths beside the rows that decode already.
        step = [(row, len(row.token_ids) - row.num_computed) for row in sequences]
        driver.step(step)
    for row in driver.generate(sequences, 20):
        tokens.append(row)
    runner.close()
    return tokens


def test_tokens_in_float32_are_those_of_single_launches() -> None:
    assert generate("float32", in_pieces=True) == generate("float32", in_pieces=False)
