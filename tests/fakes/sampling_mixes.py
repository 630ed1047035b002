"""Random rows with any mix of sampling parameters, sampled by two samplers side by side.

Shapes: R rows, V vocabulary.
"""

from __future__ import annotations

import numpy as np
import torch

from services.worker.engine.batch import SlotAssignment
from services.worker.engine.messages import LogprobSpec, SamplingParams
from services.worker.engine.sampling.device_sampler import DeviceSampler
from services.worker.engine.sampling.filters import FilterRows, thresholds
from services.worker.engine.sampling.logprobs import PositionLogprobs, logprob_rows
from services.worker.engine.sampling.philox import sampling_noise
from services.worker.engine.sampling.steps import SampledStep, StepSampler, TorchSampler

EOS = (1, 3)
CPU = torch.device("cpu")


def random_params(random: np.random.Generator, vocab_size: int) -> SamplingParams:
    """Each feature with a probability of its own."""

    def some(probability: float, value: object, other: object) -> object:
        return value if random.random() < probability else other

    ids = random.choice(vocab_size, min(vocab_size, int(random.integers(1, 400))), replace=False)
    biases = tuple((int(i), float(v)) for i, v in zip(ids, random.normal(0, 4, 400), strict=False))
    top_k = int(random.choice([1, 5, 50, 600, vocab_size + 5]))
    return SamplingParams(
        temperature=float(some(0.8, random.choice([0.3, 0.8, 1.0, 1.7]), 0.0)),  # type: ignore[arg-type]
        top_k=int(some(0.4, top_k, -1)),  # type: ignore[call-overload]
        top_p=float(some(0.4, random.choice([0.0, 0.1, 0.5, 0.9, 0.99]), 1.0)),  # type: ignore[arg-type]
        min_p=float(some(0.2, random.choice([0.01, 0.2, 1.0]), 0.0)),  # type: ignore[arg-type]
        repetition_penalty=float(some(0.2, 1.3, 1.0)),  # type: ignore[arg-type]
        frequency_penalty=float(some(0.2, 0.7, 0.0)),  # type: ignore[arg-type]
        presence_penalty=float(some(0.2, -0.4, 0.0)),  # type: ignore[arg-type]
        logit_bias=biases if random.random() < 0.2 else (),
        min_new_tokens=int(some(0.2, 2, 0)),  # type: ignore[call-overload]
        stop_token_ids=(5, 9),
        seed=int(random.integers(0, 2**63)) * 2 + 1,
    )


class SamplerPair:
    """A device's sampler and the reference on the CPU, given the same slots."""

    def __init__(
        self,
        vocab_size: int,
        num_slots: int,
        device: torch.device,
        *,
        logits_dtypes: tuple[torch.dtype, ...] = (torch.float32,),
    ) -> None:
        self.device = device
        self.vocab_size = vocab_size
        both = {"num_slots": num_slots, "vocab_size": vocab_size, "eos_token_ids": EOS}
        self.sampler = DeviceSampler(device=device, logits_dtypes=logits_dtypes, **both)  # type: ignore[arg-type]
        self.reference = TorchSampler(device=CPU, **both)  # type: ignore[arg-type]
        self.params: dict[int, SamplingParams] = {}
        self.choices: dict[int, int] = {}

    def assign(
        self, slot: int, params: SamplingParams, logprobs: LogprobSpec, ids: list[int], prompt: int
    ) -> None:
        """Both learn of a slot."""
        assignment = self._assignment(slot, params, logprobs, ids, prompt)
        self.sampler.assign(assignment)
        self.reference.assign(assignment)

    def assign_device(
        self, slot: int, params: SamplingParams, logprobs: LogprobSpec, ids: list[int], prompt: int
    ) -> None:
        """The device's sampler alone learns of a slot."""
        self.sampler.assign(self._assignment(slot, params, logprobs, ids, prompt))

    def _assignment(
        self, slot: int, params: SamplingParams, logprobs: LogprobSpec, ids: list[int], prompt: int
    ) -> SlotAssignment:
        self.params[slot], self.choices[slot] = params, slot % 3
        return SlotAssignment(
            slot=slot,
            sampling=params,
            logprobs=logprobs,
            choice_index=slot % 3,
            prompt_len=prompt,
            token_ids=ids,
        )

    def step(
        self, logits: torch.Tensor, slots: list[int], positions: list[int]
    ) -> tuple[SampledStep, SampledStep]:
        """One step of both, from the same logits [R, V]."""
        return (
            _sample(self.sampler, logits.to(self.device), slots, positions),
            _sample(self.reference, logits.to(CPU), slots, positions),
        )

    def is_near_tie(
        self, logits: torch.Tensor, slot: int, position: int, ids: tuple[int, int]
    ) -> bool:
        """Whether an unpenalised, unbiased row's two tokens could change places by rounding.

        Either their scores are within 1e-5 of each other, or one of them is the last that top-p
        keeps or the first that it does not, with a cumulative mass within 1e-6 of top-p.
        """
        params, values = self.params[slot], logits.cpu().float()
        seed = np.array([params.seed & 2**64 - 1], np.uint64)
        choice, at = np.array([self.choices[slot]]), np.array([position])
        scaled = values / np.float32(params.temperature)
        noise = sampling_noise(seed, choice, at, self.vocab_size, CPU)[0]
        scores = (scaled + noise)[list(ids)]
        if float((scores[0] - scores[1]).abs()) <= 1e-5:
            return True
        top_k = params.top_k if 0 < params.top_k < self.vocab_size else self.vocab_size
        filters = FilterRows(
            top_k=torch.tensor([top_k]),
            top_p=torch.tensor([params.top_p]),
            min_p=torch.tensor([params.min_p]),
            largest_k=top_k,
            any_open_top_p=True,
        )
        threshold = thresholds(scaled[None], filters)[0, 0]
        outside = [token_id for token_id in ids if scaled[token_id] < threshold]
        weights = scaled.double().softmax(-1)
        return any(
            abs(float(weights[scaled > scaled[token_id]].sum()) - params.top_p) < 1e-6
            for token_id in outside
        )


def assert_same_logprobs(
    one: PositionLogprobs, other: PositionLogprobs, specs: list[LogprobSpec]
) -> None:
    """Both on the host, a spec a position; what a position did not ask for is not looked at."""
    for index, spec in enumerate(specs):
        rows = [logprob_rows(each, slice(index, index + 1), 1, [0], spec) for each in (one, other)]
        for name in ("logprobs", "top_logprobs", "requested_logprobs"):
            got, expected = (torch.tensor(getattr(each, name)) for each in rows)
            torch.testing.assert_close(got, expected, atol=2e-5, rtol=2e-5)
        # Equal values may change places.
        values, ids = np.array(rows[1].top_logprobs), [each.top_token_ids for each in rows]
        is_distinct = np.append(np.diff(values) < -1e-4, False)
        is_distinct[1:] &= is_distinct[:-1]
        assert (np.array(ids[0]) == np.array(ids[1]))[is_distinct[: len(ids[1])]].all()


def random_logits(random: np.random.Generator, rows: int, vocab_size: int) -> torch.Tensor:
    """Rows from nearly flat to nearly certain, some with many equal values."""
    spread = torch.from_numpy(random.choice([0.02, 1.0, 3.0, 9.0], (rows, 1)))
    logits = torch.from_numpy(random.normal(0, 1, (rows, vocab_size))) * spread
    rounded = torch.from_numpy(random.random((rows, 1)) < 0.3)
    return torch.where(rounded, (logits * 2).round() / 2, logits).float()


def extreme_rows(random: np.random.Generator, vocab_size: int) -> dict[str, torch.Tensor]:
    """Logits [1, V] with ties, infinities, and values at the ends of what float32 holds."""
    normal = random.normal(0, 1, vocab_size)
    some = random.random(vocab_size) < 0.1
    some[vocab_size // 2] = True
    smallest = float(np.finfo(np.float32).min)
    rows = {
        "flat": np.full(vocab_size, -7.25),
        "one is not minus infinity": np.where(
            np.arange(vocab_size) == vocab_size // 2, 1.5, -np.inf
        ),
        "few are not minus infinity": np.where(some, normal, -np.inf),
        "few are not the smallest": np.where(some, normal, smallest),
        "huge": normal * 1e30,
        "denormal": normal * 1e-40,
        "ties": random.integers(0, 3, vocab_size) * 1.0,
        "both zeros": np.where(normal > 0, 0.0, -0.0),
        "falling": np.arange(vocab_size) * -1e-3,
    }
    return {name: torch.from_numpy(row).float()[None] for name, row in rows.items()}


def _sample(
    sampler: StepSampler, logits: torch.Tensor, slots: list[int], positions: list[int]
) -> SampledStep:
    return sampler.sample(
        logits.clone(), np.array(slots, np.int32), np.array(positions), [], reports=True
    )
