"""Runs one rank's shard of the model: forward passes, sampling and their results.

Shapes: T tokens of the step, R rows that sample, E hidden size, V vocabulary.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from services.worker.engine.attention.backend import AttentionBackend, CapturableAttention
from services.worker.engine.batch import PromptLogprobRequest, StepPlan, StepResult
from services.worker.engine.kv.pool import PagePool, StepPlaces
from services.worker.engine.models.decoder import Decoder
from services.worker.engine.options import EnginePlan
from services.worker.engine.runner.graphs import DecodeGraphs, decode_graph_sizes
from services.worker.engine.runner.inputs import SlotTables, StepInputs
from services.worker.engine.runner.pieces import PieceGraphs
from services.worker.engine.sampling.logprobs import (
    PositionLogprobs,
    concatenate,
    logprob_rows,
)
from services.worker.engine.sampling.steps import SampledStep, event_now, step_sampler

# Prompt positions whose logits exist at one time.
_PROMPT_LOGPROB_BLOCK = 256


@dataclass(frozen=True, slots=True)
class _Forwarded:
    """A forward pass that was not sampled yet."""

    plan: StepPlan
    inputs: StepInputs
    # When the device begins with it; None on a CPU.
    begins: torch.cuda.Event | None
    # [R, V]; None where `largest`, [R], says all that is wanted.
    logits: torch.Tensor | None
    largest: torch.Tensor | None
    # In the order of StepPlan.prompt_logprobs.
    prompt_logprobs: list[PositionLogprobs]


@dataclass(frozen=True, slots=True)
class _Sampled:
    """A step whose result was not read yet."""

    plan: StepPlan
    sample_positions: npt.NDArray[np.int64]
    begins: torch.cuda.Event | None
    # Its prompt_logprobs are in the order of StepPlan.prompt_logprobs.
    step: SampledStep


class ModelRunner:
    """Runner of one rank. Owns the tables over slots; slots are below `max_running_sequences`.

    Ranks above 0 compute the same tokens for their own tables and report nothing.
    """

    def __init__(
        self,
        *,
        model: Decoder,
        backend: AttentionBackend,
        pool: PagePool,
        plan: EnginePlan,
        device: torch.device,
        reports: bool = True,
    ) -> None:
        # On a CPU nothing runs beside the host, so a second step in flight would gain nothing.
        self.num_in_flight = 1 if device.type == "cpu" else 2
        self._model = model
        self._backend = backend
        self._pool = pool
        self._reports = reports
        self._shares_vocabulary = plan.tp_size > 1
        num_slots = plan.max_running_sequences
        # A GPU's libraries choose and load a kernel for each number of rows at its first use, and
        # wait for all work in flight then. So there are few of them, and `warm_up` uses all.
        self._row_sizes = () if device.type == "cpu" else decode_graph_sizes(num_slots)
        self._tables = SlotTables(
            num_slots=num_slots,
            max_pages=-(-plan.context_length // plan.page_size),
            page_size=plan.page_size,
            padding_page=plan.num_pages,
            device=device,
            row_sizes=self._row_sizes,
        )
        self._sampler = step_sampler(
            num_slots=num_slots,
            vocab_size=plan.vocab_size,
            eos_token_ids=plan.eos_token_ids,
            logits_dtypes=model.logits_dtypes,
            device=device,
        )
        self._device = device
        self._dtype: torch.dtype = getattr(torch, plan.dtype)
        self._forwarded: deque[_Forwarded] = deque()
        self._sampled: deque[_Sampled] = deque()
        self._graphs: DecodeGraphs | None = None
        self._pieces: PieceGraphs | None = None

    def capture_decodes(self, backend: CapturableAttention, sizes: tuple[int, ...]) -> None:
        """Replay graphs of decode steps from here on; `backend` is the one given before."""
        self._graphs = DecodeGraphs(
            model=self._model,
            backend=backend,
            pool=self._pool,
            tables=self._tables,
            sizes=sizes,
            device=self._device,
        )

    def capture_pieces(self, sizes: tuple[int, ...]) -> None:
        """Replay graphs of what lies between attention layers, for other steps, from here on."""
        self._pieces = PieceGraphs(
            model=self._model,
            backend=self._backend,
            pool=self._pool,
            tables=self._tables,
            sizes=sizes,
            num_rows=self._row_sizes[-1],
            device=self._device,
        )

    @torch.inference_mode()
    def warm_up(self) -> None:
        """Compute logits of every number of rows that steps may sample. All ranks call it."""
        for size in self._row_sizes:
            hidden = torch.zeros(
                size, self._model.config.hidden_size, dtype=self._dtype, device=self._device
            )
            self._model.logits(hidden)
            if self._shares_vocabulary:
                self._model.largest(hidden)

    @torch.inference_mode()
    def forward(self, plan: StepPlan) -> None:
        """Issue the step's forward pass."""
        begins = event_now(self._device)
        for assignment in plan.assignments:
            self._sampler.assign(assignment)
        if self._graphs is not None and self._graphs.takes(plan):
            inputs, hidden = self._graphs.forward(plan)
            self._forwarded.append(self._forwarded_with(hidden, plan, inputs, begins, []))
            return
        if self._pieces is not None and self._pieces.takes(plan):
            inputs, hidden = self._pieces.forward(plan)
        else:
            inputs = self._tables.prepare(plan)
            self._backend.plan(inputs.attention)
            places = StepPlaces(self._pool, inputs.locations)
            hidden = self._model.forward(inputs.token_ids, inputs.positions, places, self._backend)
        prompt_logprobs = [
            self._prompt_logprobs(hidden, plan, inputs, request) for request in plan.prompt_logprobs
        ]
        if inputs.sample_tokens is not None:
            hidden = hidden.index_select(0, inputs.sample_tokens)
        self._forwarded.append(self._forwarded_with(hidden, plan, inputs, begins, prompt_logprobs))

    def _forwarded_with(
        self,
        hidden: torch.Tensor,
        plan: StepPlan,
        inputs: StepInputs,
        begins: torch.cuda.Event | None,
        prompt_logprobs: list[PositionLogprobs],
    ) -> _Forwarded:
        """[at least R, E] -> what sampling needs of the step."""
        num_rows = len(plan.sample_rows)
        # All ranks know the same of the rows, so all choose the same collective.
        if self._shares_vocabulary and self._sampler.takes_largest(
            inputs.sample_slots, inputs.sample_positions
        ):
            largest = self._model.largest(hidden)[:num_rows]
            return _Forwarded(plan, inputs, begins, None, largest, prompt_logprobs)
        logits = self._model.logits(hidden)[:num_rows]
        return _Forwarded(plan, inputs, begins, logits, None, prompt_logprobs)

    @torch.inference_mode()
    def sample(self) -> None:
        """Issue sampling for the newest forward pass."""
        forwarded = self._forwarded.pop()
        inputs = forwarded.inputs
        if forwarded.logits is None:
            assert forwarded.largest is not None, "one of the two is known"
            step = self._sampler.chosen(forwarded.largest, forwarded.prompt_logprobs)
        else:
            step = self._sampler.sample(
                forwarded.logits,
                inputs.sample_slots,
                inputs.sample_positions,
                forwarded.prompt_logprobs,
                reports=self._reports,
            )
        self._tables.note_sampled(inputs.sampled_slots, step.device_ids)
        if self._reports:
            self._sampled.append(
                _Sampled(forwarded.plan, inputs.sample_positions, forwarded.begins, step)
            )

    def has_result(self) -> bool:
        """Whether `result` would not wait. Raises RuntimeError when the device failed."""
        is_filled = self._sampled[0].step.is_filled
        if is_filled is None:
            return True
        return bool(is_filled.query())  # type: ignore[no-untyped-call]

    def result(self) -> StepResult:
        """Wait for the oldest sampled step that was not read yet."""
        sampled = self._sampled.popleft()
        step = sampled.step
        device_ns = None
        if step.is_filled is not None:
            step.is_filled.synchronize()
            assert sampled.begins is not None, "whoever has the one event has the other"
            device_ns = int(sampled.begins.elapsed_time(step.is_filled) * 1e6)
        token_ids = step.token_ids.to(torch.int32).numpy()
        result = StepResult(
            step_number=sampled.plan.step_number, token_ids=token_ids, device_ns=device_ns
        )
        if step.logprobs is not None:
            for index, row in enumerate(step.logprob_rows):
                result.output_logprobs[row] = logprob_rows(
                    step.logprobs,
                    slice(index, index + 1),
                    int(sampled.sample_positions[row]),
                    [int(token_ids[row])],
                    step.logprob_specs[index],
                )
        for request, values in zip(sampled.plan.prompt_logprobs, step.prompt_logprobs, strict=True):
            result.prompt_logprobs.append(
                logprob_rows(values, slice(None), request.start, request.token_ids, request.spec)
            )
        return result

    def check(self) -> None:
        """Nothing here fails without a step."""

    def close(self) -> None:
        """Drop what is in flight and the graphs, which keep the group's collectives in use."""
        self._forwarded.clear()
        self._sampled.clear()
        self._graphs = None
        self._pieces = None

    def _prompt_logprobs(
        self,
        hidden: torch.Tensor,
        plan: StepPlan,
        inputs: StepInputs,
        request: PromptLogprobRequest,
    ) -> PositionLogprobs:
        offset = int(inputs.first_tokens[request.row]) - int(plan.start_positions[request.row])
        parts = []
        for start in range(request.start, request.stop, _PROMPT_LOGPROB_BLOCK):
            stop = min(start + _PROMPT_LOGPROB_BLOCK, request.stop)
            # The token at p - 1 predicts the one at p.
            logits = self._model.logits(hidden[offset + start - 1 : offset + stop - 1])
            tokens = request.token_ids[start - request.start : stop - request.start]
            parts.append(self._sampler.prompt_logprobs(logits, tokens, request.spec))
        return concatenate(parts)
