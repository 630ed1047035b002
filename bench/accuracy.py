"""What FP8 costs in accuracy: the built-in model's answers, and layers in real shapes.

`python -m bench.accuracy` computes on the CPU with the reference's arithmetic, which rounds as the
kernels do, and prints Markdown. The built-in model reads its held-back questions and the right
answers (teacher-forced), so every format is asked for the same tokens.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoTokenizer

from services.common.model_files import builtin_model_path
from services.worker.engine.attention.backend import AttentionInputs
from services.worker.engine.attention.torch_backend import TorchAttention
from services.worker.engine.distributed.group import SoloGroup
from services.worker.engine.kv.pool import PagePool, StepPlaces
from services.worker.engine.layers.fp8 import quantize_rows
from services.worker.engine.models.registry import load_model_config
from services.worker.engine.options import EngineOptions
from services.worker.engine.runner.precision import decide_kv_cache_dtype
from services.worker.engine.runner.setup import decide_dtype, load_model

FORMATS: dict[str, dict[str, str]] = {
    "bf16": {"dtype": "bfloat16"},
    "fp8 weights": {"quantization": "fp8"},
    "fp8_e4m3 keys and values": {"kv_cache_dtype": "fp8_e4m3"},
    "fp8_e5m2 keys and values": {"kv_cache_dtype": "fp8_e5m2"},
    "fp8 weights, fp8_e4m3 keys and values": {
        "quantization": "fp8",
        "kv_cache_dtype": "fp8_e4m3",
    },
    "fp8 weights, fp8_e5m2 keys and values": {
        "quantization": "fp8",
        "kv_cache_dtype": "fp8_e5m2",
    },
    "fp8 weights, fp8_e4m3 keys and values, bf16": {
        "dtype": "bfloat16",
        "quantization": "fp8",
        "kv_cache_dtype": "fp8_e4m3",
    },
}

# Input features of the linear layers of an 8B and of a 70B Llama.
IN_FEATURES = {
    "8B qkv, o, gate, up": 4096,
    "8B down": 14336,
    "70B qkv, o, gate, up": 8192,
    "70B down": 28672,
}
# Outputs computed of each: their errors do not depend on how many there are.
_OUTPUTS = 1024
_TOKENS = 64
# Activations with outliers: one channel in so many is so much larger.
_OUTLIER_EVERY, _OUTLIER_FACTOR = 256, 30.0
_PAGE_SIZE = 16


@dataclass(frozen=True, slots=True)
class Case:
    """A held-back question with its answer."""

    token_ids: list[int]
    # Where the answer begins.
    start: int


class Reader:
    """One format of the built-in model: logits of a whole sequence, from an empty pool."""

    def __init__(self, model_path: Path, max_len: int, **wishes: str) -> None:
        options = EngineOptions(
            model_path=model_path, tokenizer_path=model_path, device="cpu", **wishes
        )
        config = load_model_config(model_path)
        device = torch.device("cpu")
        dtype = decide_dtype(options, config, device)
        self._num_pages = -(-max_len // _PAGE_SIZE)
        self._model = load_model(
            options, config, device=device, group=SoloGroup(), on_progress=lambda _: None
        )
        self._pool = PagePool(
            num_layers=config.num_layers,
            num_pages=self._num_pages,
            page_size=_PAGE_SIZE,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            dtype=getattr(torch, decide_kv_cache_dtype(options, dtype)),
            device=device,
        )
        self._attention = TorchAttention(self._pool, getattr(torch, dtype))

    @torch.inference_mode()
    def logits(self, case: Case) -> torch.Tensor:
        """[answer's tokens, V] in float32: what is said of each of them."""
        length = len(case.token_ids)
        pages = np.arange(self._num_pages, dtype=np.int32)[None]
        positions = torch.arange(length)
        self._attention.plan(
            AttentionInputs(
                slots=np.zeros(1, np.int32),
                num_tokens=np.array([length], np.int32),
                start_positions=np.zeros(1, np.int32),
                host_page_table=pages,
                page_table=torch.from_numpy(pages),
            )
        )
        token_ids, places = torch.tensor(case.token_ids), StepPlaces(self._pool, positions)
        hidden = self._model.forward(token_ids, positions, places, self._attention)
        return self._model.logits(hidden[case.start - 1 : length - 1]).float()


def read_cases(model_path: Path) -> list[Case]:
    """The held-back questions, each followed by its answer and the end of the turn."""
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    cases = []
    for line in (model_path / "heldback.jsonl").read_text().splitlines():
        case = json.loads(line)
        prompt = tokenizer.apply_chat_template(
            case["messages"], tokenize=False, add_generation_prompt=True
        )
        start = len(tokenizer(prompt, add_special_tokens=False)["input_ids"])
        whole = tokenizer(prompt + case["answer"] + "<|im_end|>", add_special_tokens=False)
        cases.append(Case(whole["input_ids"], start))
    return cases


@dataclass(slots=True)
class Errors:
    """Sums over all answers of one format, against float32's logits."""

    nll: float = 0.0
    num_tokens: int = 0
    num_right: int = 0
    max_error: float = 0.0
    squares: float = 0.0
    num_logits: int = 0
    divergence: float = 0.0

    def add(self, case: Case, logits: torch.Tensor, exact: torch.Tensor) -> None:
        """One answer."""
        answer = torch.tensor(case.token_ids[case.start :])
        logprobs, exact_logprobs = logits.log_softmax(-1), exact.log_softmax(-1)
        self.nll -= float(logprobs.gather(1, answer[:, None]).sum())
        self.num_tokens += len(answer)
        self.num_right += bool((logits.argmax(-1) == answer).all())
        error = (logits - exact).double()
        self.max_error = max(self.max_error, float(error.abs().max()))
        self.squares += float(error.square().sum())
        self.num_logits += error.numel()
        self.divergence += float((exact_logprobs.exp() * (exact_logprobs - logprobs)).sum())

    def row(self, name: str, num_cases: int) -> str:
        """A line of the table."""
        return (
            f"| {name} | {math.exp(self.nll / self.num_tokens):.5f} "
            f"| {self.num_right} of {num_cases} "
            f"| {self.divergence / self.num_tokens:.1e} "
            f"| {math.sqrt(self.squares / self.num_logits):.3f} | {self.max_error:.2f} |"
        )


def built_in(model_path: Path, every: int) -> Iterator[str]:
    """The table of the built-in model."""
    cases = read_cases(model_path)[::every]
    max_len = max(len(case.token_ids) for case in cases)
    reference = Reader(model_path, max_len, dtype="float32")
    exact = [reference.logits(case) for case in cases]
    yield "| format | perplexity | right answers | KL | logit error, RMS | largest |"
    yield "|---|---|---|---|---|---|"
    for name, wishes in {"float32": {"dtype": "float32"}, **FORMATS}.items():
        reader = Reader(model_path, max_len, **wishes)
        errors = Errors()
        for case, logits in zip(cases, exact, strict=True):
            errors.add(case, reader.logits(case), logits)
        yield errors.row(name, len(cases))


def layers() -> Iterator[str]:
    """The table of single layers: relative RMS error of a product's outputs."""
    yield "| layer | activations | bf16 | weights | weights and activations | one scale a tensor |"
    yield "|---|---|---|---|---|---|"
    torch.manual_seed(0)
    for name, in_features in IN_FEATURES.items():
        weight = torch.randn(_OUTPUTS, in_features) * 0.02
        normal = torch.randn(_TOKENS, in_features)
        outliers = normal.clone()
        outliers[:, ::_OUTLIER_EVERY] *= _OUTLIER_FACTOR
        for kind, x in (("normal", normal), ("outliers", outliers)):
            figures = " | ".join(f"{100 * error:.2f} %" for error in _layer_errors(weight, x))
            yield f"| {name} | {kind} | {figures} |"


def _layer_errors(weight: torch.Tensor, x: torch.Tensor) -> Sequence[float]:
    exact = x.double() @ weight.double().t()
    rounded_weight = _rounded(weight)
    products = (
        x.bfloat16().double() @ weight.bfloat16().double().t(),
        x.double() @ rounded_weight.t(),
        _rounded(x) @ rounded_weight.t(),
        _rounded(x.view(1, -1)).view_as(x) @ _rounded(weight.view(1, -1)).view_as(weight).t(),
    )
    norm = exact.square().mean().sqrt()
    return [float((product - exact).square().mean().sqrt() / norm) for product in products]


def _rounded(rows: torch.Tensor) -> torch.Tensor:
    values, scales = quantize_rows(rows)
    return values.double() * scales


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--every", type=int, default=1, help="ask every n-th question only")
    arguments: Any = parser.parse_args()
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, {platform.machine()}\n")
    for line in built_in(builtin_model_path(), arguments.every):
        print(line, flush=True)
    print()
    for line in layers():
        print(line, flush=True)


if __name__ == "__main__":
    main()
