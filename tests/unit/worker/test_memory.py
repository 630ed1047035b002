"""How a GPU's memory is shared out, and what is said where it does not suffice."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from services.common.model_files import builtin_model_path
from services.worker.engine.options import EngineOptions
from services.worker.engine.runner import memory
from services.worker.engine.runner.build import build_runner
from services.worker.engine.runner.memory import GIB, MemoryUse, ModelTooLargeError
from services.worker.engine.runner.profile import (
    largest_step,
    late_step,
    run_largest_steps,
    run_steps_of_all_sizes,
)
from services.worker.engine.runner.setup import decide_max_running, decide_step_tokens

USE = MemoryUse(
    total=80 * GIB,
    free_at_start=78 * GIB,
    weights=15 * GIB,
    step=3 * GIB,
    graphs=GIB,
    reserve=GIB // 2,
)
OPTIONS = EngineOptions(model_path=Path("m"), tokenizer_path=Path("m"))


STEP = "a step of 8192 tokens and 256 sequences"


def test_the_pool_is_what_is_left() -> None:
    assert USE.pool(None) == 78 * GIB - 15 * GIB - 3 * GIB - GIB - GIB // 2


def test_a_fraction_bounds_weights_and_pool_together() -> None:
    assert USE.pool(0.5) == 39 * GIB - 15 * GIB
    # More than fits is not taken.
    assert USE.pool(1.0) == USE.pool(None)
    assert USE.pool(0.1) < 0


def test_enough_memory_is_no_error() -> None:
    USE.check_pool(OPTIONS, STEP, USE.pool(None), "a sequence")


def test_what_is_missing_is_said_with_what_it_was_for_and_what_helps() -> None:
    small = replace(USE, total=24 * GIB, free_at_start=22 * GIB)
    with pytest.raises(ModelTooLargeError) as raised:
        small.check_pool(OPTIONS, STEP, 16 * GIB, "the keys and values of one sequence")
    message = str(raised.value)
    assert "13.50 GiB are missing" in message
    assert "22.00 of 24.00 GiB were free" in message
    assert "15.00 for weights, 3.00 for a step of 8192 tokens and 256 sequences" in message
    assert "1.00 for CUDA graphs" in message
    assert "16.00 for the keys and values of one sequence" in message
    for flag in ("--tp", "--quantization fp8", "--context-length", "--chunked-prefill-size"):
        assert flag in message
    assert "--mem-fraction-static" not in message
    with pytest.raises(ModelTooLargeError, match="a larger --mem-fraction-static"):
        USE.check_pool(replace(OPTIONS, mem_fraction_static=0.2), STEP, 16 * GIB, "a sequence")


@pytest.mark.parametrize(
    ("gib", "tokens"), [(0, 2048), (16, 2048), (24, 2048), (48, 4096), (80, 4096), (180, 8192)]
)
def test_steps_are_larger_on_larger_gpus(gib: int, tokens: int) -> None:
    assert decide_step_tokens(OPTIONS, gib * GIB) == tokens
    assert decide_step_tokens(replace(OPTIONS, chunked_prefill_size=99), gib * GIB) == 99


def test_the_largest_step_has_all_tokens_in_all_rows_and_runs() -> None:
    path = builtin_model_path()
    options = EngineOptions(
        model_path=path,
        tokenizer_path=path,
        device="cpu",
        num_pages=20,
        context_length=100,
        max_running_sequences=9,
        chunked_prefill_size=150,
    )
    runner, plan = build_runner(options, lambda fraction, what: None)
    step = largest_step(plan)
    assert len(step.slots) == 9
    assert len(step.token_ids) == int(step.num_tokens.sum()) == 150
    assert step.num_tokens.max() <= 100
    assert np.array_equal(step.sample_rows, step.slots)
    run_largest_steps(runner, plan)
    late = late_step(plan)
    assert int(late.start_positions[0] + late.num_tokens[0]) == 100
    runner.forward(late)
    runner.sample()
    assert len(runner.result().prompt_logprobs[0].token_ids) == 99
    run_steps_of_all_sizes(runner, replace(plan, max_step_tokens=20))
    runner.close()


def test_large_gpus_run_more_sequences_unless_told_otherwise() -> None:
    assert [decide_max_running(OPTIONS, gib * GIB) for gib in (0, 24, 79)] == [256, 256, 512]
    assert decide_max_running(replace(OPTIONS, max_running_sequences=7), 79 * GIB) == 7


def test_files_that_a_control_group_keeps_cached_are_available(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "memory.max").write_text(f"{GIB}\n")
    (tmp_path / "memory.current").write_text(f"{GIB}\n")
    (tmp_path / "memory.stat").write_text(
        f"anon {GIB // 4}\ninactive_file {GIB // 2}\nactive_file {GIB // 4}\n"
    )
    monkeypatch.setattr(memory, "_CGROUP", tmp_path)
    memory.check_host(GIB * 3 // 4, "the weights take")
    with pytest.raises(ModelTooLargeError, match=r"the weights take 0\.76 GiB, 0\.75 are"):
        memory.check_host(int(GIB * 0.76), "the weights take")


def test_a_cache_larger_than_the_host_is_refused() -> None:
    path = builtin_model_path()
    options = EngineOptions(
        model_path=path, tokenizer_path=path, device="cpu", num_pages=10**12, load_format="dummy"
    )
    with pytest.raises(ModelTooLargeError, match="16000000000000 tokens of --max-total-tokens"):
        build_runner(options, lambda fraction, what: None)
