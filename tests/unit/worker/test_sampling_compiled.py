"""What Triton makes of sampling's kernels for a GPU, found out without one."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import numpy as np
import pytest
import torch

from services.worker.engine.batch import SlotAssignment
from services.worker.engine.messages import LogprobSpec, SamplingParams

pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget
from triton.compiler.compiler import ASTSource, compile, make_backend
from triton.runtime.jit import create_function_from_signature

from services.worker.engine.kernels import (
    sampling_changes,
    sampling_choose,
    sampling_report,
    sampling_scan,
)
from services.worker.engine.sampling.device_sampler import DeviceSampler

CPU = torch.device("cpu")
HOPPER = GPUTarget("cuda", 90, 32)
LAUNCHERS = [
    (sampling_changes, "_launch_change", sampling_changes._change),
    (sampling_scan, "_launch_scan", sampling_scan._scan),
    (sampling_choose, "_launch_choose", sampling_choose._choose),
    (sampling_report, "_launch_report", sampling_report._report),
]
FEATURES = (
    {},
    {"temperature": 0.0},
    {"top_k": 1, "presence_penalty": 0.5},
    {"top_p": 0.5, "logit_bias": ((0, 1.0),) * 20},
)

Launch = Callable[..., None]
Seen = Callable[[str, Any, Hashable, tuple[Any, ...]], None]


def record_launches(monkeypatch: pytest.MonkeyPatch, seen: Seen) -> None:
    """Kernels are not run; `seen` gets name, kernel, variant and arguments of each launch."""

    def recorder(name: str, kernel: Any) -> Launch:
        return lambda grid, variant, *arguments: seen(name, kernel, variant, arguments)

    for module, name, kernel in LAUNCHERS:
        monkeypatch.setattr(module, name, recorder(name, kernel))


def specialised(kernel: Any, arguments: tuple[Any, ...]) -> list[tuple[str, Any]]:
    """Type and what is known of the value, of each argument: a binary is made for those."""
    bind = create_function_from_signature(kernel.signature, kernel.params, make_backend(HOPPER))
    return bind(*arguments, debug=False)[1]


def sample_mixes(sampler: DeviceSampler, logits: torch.Tensor) -> None:
    """Steps of few and many rows, each row with every feature in turn; logits [R, V]."""
    num_rows = len(logits)
    for turn in range(len(FEATURES)):
        for slot in range(num_rows):
            params = SamplingParams(**FEATURES[(slot + turn) % len(FEATURES)])
            spec = LogprobSpec(output=slot % 5 == turn, num_top=slot, token_ids=(0,) * slot)
            sampler.assign(
                SlotAssignment(
                    slot=slot,
                    sampling=params,
                    logprobs=spec,
                    choice_index=0,
                    prompt_len=0,
                    token_ids=[0],
                )
            )
        for rows in (1, 2, num_rows):
            slots = np.arange(rows, dtype=np.int32)
            sampler.sample(logits[:rows], slots, np.zeros(rows, np.int64), [], reports=True)
    sampler.prompt_logprobs(logits, [0] * num_rows, LogprobSpec(num_top=3, token_ids=(0,)))


@pytest.mark.parametrize("vocab_size", [1, 16, 17, 2048, 2049, 32_003])
def test_a_variant_names_all_that_triton_specialises_on(
    monkeypatch: pytest.MonkeyPatch, vocab_size: int
) -> None:
    found: dict[tuple[str, Hashable], list[tuple[str, Any]]] = {}
    num_launches = 0

    def seen(name: str, kernel: Any, variant: Hashable, arguments: tuple[Any, ...]) -> None:
        nonlocal num_launches
        num_launches += 1
        now = specialised(kernel, arguments)
        assert found.setdefault((name, variant), now) == now

    record_launches(monkeypatch, seen)
    sampler = DeviceSampler(num_slots=17, vocab_size=vocab_size, eos_token_ids=(), device=CPU)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for padding in (0, 1, 16):
            padded = torch.zeros(20, vocab_size + padding, dtype=dtype)
            for first in (0, 1, 2):
                sample_mixes(sampler, padded[first : first + 17, :vocab_size])
    assert {name for name, _ in found} == {name for _, name, _ in LAUNCHERS}
    assert num_launches > 5 * len(found)


def test_no_step_compiles_what_the_start_did_not(monkeypatch: pytest.MonkeyPatch) -> None:
    found: set[tuple[str, Hashable]] = set()

    def seen(name: str, kernel: Any, variant: Hashable, arguments: tuple[Any, ...]) -> None:
        found.add((name, variant))

    record_launches(monkeypatch, seen)
    dtypes = (torch.bfloat16, torch.float32)
    sampler = DeviceSampler(
        num_slots=17, vocab_size=32_003, eos_token_ids=(), logits_dtypes=dtypes, device=CPU
    )
    at_start = set(found)
    for dtype in dtypes:
        sample_mixes(sampler, torch.zeros(17, 32_003, dtype=dtype))
    assert found == at_start
    assert len(found) == len(LAUNCHERS) * len(dtypes)


def test_the_noise_takes_whole_logarithms(monkeypatch: pytest.MonkeyPatch) -> None:
    made: dict[str, str] = {}

    def seen(name: str, kernel: Any, _: Hashable, arguments: tuple[Any, ...]) -> None:
        if name != "_launch_scan" or made:
            return
        kinds = specialised(kernel, arguments)
        names = kernel.arg_names
        constants = {
            (index,): value for index, (kind, value) in enumerate(kinds) if kind == "constexpr"
        }
        types = {name: kind for name, (kind, _) in zip(names, kinds, strict=True)}
        made.update(compile(ASTSource(kernel, types, constants), target=HOPPER).asm)

    record_launches(monkeypatch, seen)
    DeviceSampler(num_slots=1, vocab_size=4096, eos_token_ids=(), device=CPU)
    # The hardware's log2 is off by many units in the last place near 1; its exp2 is made up for.
    assert "lg2.approx" not in made["ptx"]
    assert "mul.hi.u32" in made["ptx"]
    assert "div.rn.f32" in made["ptx"]
