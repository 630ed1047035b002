"""Host and GPU time of sampling one step on one GPU, by parameters and rows.

`python -m bench.sampling_gpu [--sampler device|torch] [--dtype bfloat16]` prints one JSON object;
the dtype is that of the logits. Host time is that of `sample()` while the device is idle. GPU time
is taken over steps that were all issued while the device was kept busy, so that it never waits for
the host (with `torch`, which waits for the device, it is the time of a step in all). Logits are
random: `flat` ones spread like those of random weights, `peaked` ones with a head as a trained
model's.

Shapes: R rows, V vocabulary.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from typing import Any

import numpy as np
import torch

from services.worker.engine.batch import SlotAssignment
from services.worker.engine.messages import LogprobSpec, SamplingParams
from services.worker.engine.sampling.device_sampler import DeviceSampler
from services.worker.engine.sampling.steps import StepSampler, TorchSampler

_WARM = {"temperature": 0.8}
_PENALTIES = {"repetition_penalty": 1.1, "frequency_penalty": 0.2, "presence_penalty": 0.1}
_BIAS = {"logit_bias": tuple((37 * i, 0.5) for i in range(100))}
_FIVE = LogprobSpec(output=True, num_top=5)

KINDS: dict[str, tuple[dict[str, Any], LogprobSpec]] = {
    "greedy": ({"temperature": 0.0}, LogprobSpec()),
    "temperature": (_WARM, LogprobSpec()),
    "top_k 50": ({**_WARM, "top_k": 50}, LogprobSpec()),
    "top_p 0.9": ({**_WARM, "top_p": 0.9}, LogprobSpec()),
    "top_k 20, top_p 0.8": ({**_WARM, "top_k": 20, "top_p": 0.8}, LogprobSpec()),
    "min_p 0.05": ({**_WARM, "min_p": 0.05}, LogprobSpec()),
    "greedy, penalties": ({"temperature": 0.0, **_PENALTIES}, LogprobSpec()),
    "greedy, logprobs 5": ({"temperature": 0.0}, _FIVE),
    "everything": ({**_WARM, "top_k": 50, "top_p": 0.9, **_PENALTIES, **_BIAS}, _FIVE),
}


def make_logits(rows: int, vocab_size: int, shape: str) -> torch.Tensor:
    """[R, V] float32."""
    generator = torch.Generator("cuda").manual_seed(rows)
    logits = torch.randn(rows, vocab_size, device="cuda", generator=generator)
    if shape == "peaked":
        head = 16 - 2.0 * torch.arange(1, 201, device="cuda").log()
        places = torch.randperm(vocab_size, device="cuda", generator=generator)[:200]
        logits = 1.5 * logits
        logits[:, places] = head + logits[:, places]
    return logits


def measure(sampler: StepSampler, logits: torch.Tensor, steps: int) -> dict[str, float]:
    """Microseconds a step."""
    slots = np.arange(len(logits), dtype=np.int32)

    def step(position: int) -> None:
        sampler.sample(logits, slots, np.full(len(slots), 100 + position), [], reports=True)

    for position in range(5):
        step(position)
    host_ns = []
    for position in range(steps):
        torch.cuda.synchronize()
        started = time.perf_counter_ns()
        step(position)
        host_ns.append(time.perf_counter_ns() - started)
    host_us = float(np.median(host_ns)) / 1e3
    torch.cuda.synchronize()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    # Cycles for which the device is busy while all steps are issued.
    torch.cuda._sleep(int(steps * host_us * 2 * 2000))
    begin.record()
    for position in range(steps):
        step(position)
    end.record()
    torch.cuda.synchronize()
    return {"host_us": round(host_us, 1), "gpu_us": round(begin.elapsed_time(end) * 1e3 / steps, 1)}


def main() -> None:
    """Measure every kind and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sampler", choices=("device", "torch"), default="device")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 64, 256])
    parser.add_argument("--vocab-size", type=int, default=128_256)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--shapes", nargs="+", default=["flat", "peaked"])
    parser.add_argument("--kinds", nargs="+", default=list(KINDS))
    arguments = parser.parse_args()
    kind_of = {"device": DeviceSampler, "torch": TorchSampler}[arguments.sampler]
    figures: dict[str, dict[str, float]] = {}
    for shape in arguments.shapes:
        for rows in arguments.rows:
            logits = make_logits(rows, arguments.vocab_size, shape)
            logits = logits.to(getattr(torch, arguments.dtype))
            for name in arguments.kinds:
                params, spec = KINDS[name]
                sampler = kind_of(
                    num_slots=rows,
                    vocab_size=arguments.vocab_size,
                    eos_token_ids=(),
                    device=torch.device("cuda"),
                )
                for slot in range(rows):
                    sampler.assign(
                        SlotAssignment(
                            slot=slot,
                            sampling=SamplingParams(seed=slot, **params),
                            logprobs=spec,
                            choice_index=0,
                            prompt_len=100,
                            token_ids=list(range(100)),
                        )
                    )
                with torch.inference_mode():
                    figures[f"{shape}, {rows} rows, {name}"] = measure(
                        sampler, logits, arguments.steps
                    )
    settings = {
        **{name: str(value) for name, value in vars(arguments).items()},
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    print(json.dumps({"benchmark": "sampling_gpu", "settings": settings, **figures}, indent=1))


if __name__ == "__main__":
    main()
