"""Measures what a rank's steps and graphs take of a GPU's memory, by running the largest ones.

The largest step computes as many tokens as a step may, in as many rows as may run, all of which
sample with every feature that takes memory, while one reports a whole prompt's log-probabilities.
Another, of few tokens at the end of the longest context, shows what attention's own buffers take.
"""

from __future__ import annotations

import gc
import logging
from dataclasses import dataclass, replace

import numpy as np
import torch

from services.worker.engine.batch import PromptLogprobRequest, Runner, SlotAssignment, StepPlan
from services.worker.engine.distributed.group import TpGroup
from services.worker.engine.messages import LogprobSpec, SamplingParams
from services.worker.engine.models.decoder import Decoder
from services.worker.engine.options import EngineOptions, EnginePlan
from services.worker.engine.runner.memory import (
    RESERVE_BYTES,
    SHARED_RESERVE_BYTES,
    MemoryUse,
    ModelTooLargeError,
    check_host,
    free_memory,
    gib,
    host_pool_bytes,
    remedies,
)
from services.worker.engine.runner.setup import (
    decide_context_length,
    decide_plan,
    make_runner,
    rank_page_bytes,
)

logger = logging.getLogger(__name__)

# Of a host's memory, unless the operator names another share.
_HOST_FRACTION = 0.9
# Sizes of each kind of graph that are captured to see what they take.
_FEW_GRAPHS, _MORE_GRAPHS = 4, 8
# Tokens of prompts that are run at start.
_PROMPT_SIZES = (512, 1024, 1280, 1536, 2048, 3072, 4096, 6144, 8192)
# Tokens of the step at the end of the context: more than any backend handles in one block.
_LATE_TOKENS = 256
_SAMPLING = SamplingParams(
    temperature=0.8,
    top_p=0.9,
    min_p=0.01,
    repetition_penalty=1.1,
    frequency_penalty=0.1,
    presence_penalty=0.1,
    min_new_tokens=1,
    logit_bias=((0, 1.0),),
)
_LOGPROBS = LogprobSpec(output=True, num_top=20, token_ids=(0,))


def memory_at_start(device: torch.device) -> int:
    """Free bytes of a GPU before a model is loaded; 0 on CPUs."""
    return free_memory(device)[0] if device.type == "cuda" else 0


@dataclass(frozen=True, slots=True)
class PoolBudget:
    """What a rank found out about memory."""

    # For its pages.
    num_bytes: int
    # The whole memory of the group's smallest GPU; 0 on CPUs. It decides how large steps are.
    device_bytes: int


def pool_budget(
    model: Decoder,
    options: EngineOptions,
    group: TpGroup,
    *,
    device: torch.device,
    free_at_start: int,
) -> PoolBudget:
    """Room for one rank's pages beside a loaded model and the steps it is to run.

    All ranks call it together. Raises ModelTooLargeError when a step, one sequence of the full
    context length or the number of pages asked for does not fit a GPU, or the latter a host.
    """
    if device.type == "cpu":
        if options.num_pages is not None:
            num_tokens = options.num_pages * options.page_size
            per_page = rank_page_bytes(options, model.config, device) * options.ranks_per_node
            what = f"the {num_tokens} tokens of --max-total-tokens take"
            check_host(options.num_pages * per_page, what)
        fraction = options.mem_fraction_static or _HOST_FRACTION
        return PoolBudget(host_pool_bytes(fraction, options.ranks_per_node), 0)
    per_page = rank_page_bytes(options, model.config, device)
    free, total = free_memory(device)
    # Steps must be the same on all ranks, and depend on what GPUs have and on what is free.
    memory = group.all_gather(torch.tensor([[free], [total]], device=device))
    smallest_free, smallest_total = memory.amin(-1).tolist()
    draft = decide_plan(
        options,
        model.config,
        device=device,
        eos_token_ids=(),
        pool_budget_bytes=max(smallest_free, per_page),
        device_bytes=smallest_total,
    )
    use = MemoryUse(
        total=total,
        free_at_start=free_at_start,
        weights=free_at_start - free,
        reserve=RESERVE_BYTES if group.size == 1 else SHARED_RESERVE_BYTES,
    )
    step = f"a step of {draft.max_step_tokens} tokens and {draft.max_running_sequences} sequences"
    try:
        use = _measured(use, model, draft, group, device)
    except torch.OutOfMemoryError as error:
        raise ModelTooLargeError(
            f"the model is too large for the GPU: beside its weights, {gib(free)} GiB do not "
            f"suffice for {step}. What helps: {', '.join(remedies(options))}"
        ) from error
    logger.info(
        "event=memory_measured total_gib=%s weights_gib=%s step_gib=%s graphs_gib=%s pool_gib=%s",
        *(gib(use.total), gib(use.weights), gib(use.step), gib(use.graphs)),
        gib(use.pool(options.mem_fraction_static)),
    )
    # One page more is the padding rows'.
    if options.num_pages is not None:
        what = f"the {options.num_pages * options.page_size} tokens of --max-total-tokens"
        use.check_pool(options, step, (options.num_pages + 1) * per_page, what)
    else:
        length = decide_context_length(options, model.config)
        what = f"the keys and values of one sequence of {length} tokens"
        use.check_pool(options, step, (-(-length // options.page_size) + 1) * per_page, what)
    return PoolBudget(use.pool(options.mem_fraction_static) - per_page, smallest_total)


def run_largest_steps(runner: Runner, plan: EnginePlan) -> None:
    """Two of them in flight where the runner takes two."""
    step = largest_step(plan)
    for _ in range(runner.num_in_flight):
        runner.forward(step)
        runner.sample()
    for _ in range(runner.num_in_flight):
        runner.result()


def run_prompts(runner: Runner, plan: EnginePlan) -> None:
    """Greedy ones of a few sizes, up to what a step takes."""
    for num_tokens in _PROMPT_SIZES:
        if num_tokens > plan.max_step_tokens:
            break
        step = largest_step(replace(plan, max_step_tokens=num_tokens, max_running_sequences=4))
        step.prompt_logprobs.clear()
        for assignment in step.assignments:
            assignment.sampling, assignment.logprobs = SamplingParams(), LogprobSpec()
        runner.forward(step)
        runner.sample()
        runner.result()


def run_steps_of_all_sizes(runner: Runner, plan: EnginePlan) -> None:
    """Steps of few and many tokens and rows, greedy and not: whatever is compiled for one is."""
    for num_tokens in _sizes_up_to(plan.max_step_tokens):
        for num_rows in {1, min(num_tokens, plan.max_running_sequences)}:
            size = replace(plan, max_step_tokens=num_tokens, max_running_sequences=num_rows)
            step = largest_step(size)
            for sampling in (_SAMPLING, SamplingParams(temperature=0.8), SamplingParams()):
                for assignment in step.assignments:
                    assignment.sampling = sampling
                runner.forward(step)
                runner.sample()
                runner.result()


def _sizes_up_to(most: int) -> list[int]:
    """1, 2, 3, 4, 7, 8, 9, 16, ... most: powers of two, and between them odd numbers."""
    sizes = {1, 3, 7, 9, 17, 33, most}
    sizes.update(2**exponent for exponent in range(most.bit_length()))
    return sorted(size for size in sizes if size <= most)


def largest_step(plan: EnginePlan) -> StepPlan:
    """Rows of one token, then rows as long as may be, up to the tokens that a step may have."""
    num_rows = min(plan.max_running_sequences, plan.max_step_tokens)
    lengths = np.ones(num_rows, np.int32)
    left = plan.max_step_tokens - num_rows
    for row in range(num_rows - 1, -1, -1):
        added = min(left, plan.context_length - 1)
        lengths[row] += added
        left -= added
    return _step(plan, lengths, np.zeros(num_rows, np.int32))


def late_step(plan: EnginePlan) -> StepPlan:
    """One row that ends where the context does."""
    length = min(_LATE_TOKENS, plan.context_length, plan.max_step_tokens)
    return _step(
        plan, np.array([length], np.int32), np.array([plan.context_length - length], np.int32)
    )


def _step(plan: EnginePlan, lengths: np.ndarray, starts: np.ndarray) -> StepPlan:
    """Rows in slots 0, 1, ... whose pages are all page 0."""
    slots = np.arange(len(lengths), dtype=np.int32)
    num_pages = -(-(starts + lengths) // plan.page_size)
    page_slots = np.repeat(slots, num_pages)
    first_pages = np.repeat(np.cumsum(num_pages) - num_pages, num_pages)
    last, length = len(slots) - 1, int(lengths[-1])
    start = int(starts[-1])
    reported = []
    if length > 1:
        reported.append(
            PromptLogprobRequest(
                row=last,
                start=start + 1,
                stop=start + length,
                token_ids=[0] * (length - 1),
                spec=_LOGPROBS,
            )
        )
    return StepPlan(
        step_number=0,
        slots=slots,
        num_tokens=lengths,
        start_positions=starts,
        token_ids=np.zeros(int(lengths.sum()), np.int32),
        sample_rows=slots,
        page_slots=page_slots,
        page_indices=(np.arange(len(page_slots)) - first_pages).astype(np.int32),
        page_ids=np.zeros(len(page_slots), np.int32),
        assignments=[
            SlotAssignment(
                slot=slot,
                sampling=_SAMPLING,
                logprobs=_LOGPROBS,
                choice_index=0,
                prompt_len=1,
                token_ids=[0],
            )
            for slot in slots.tolist()
        ],
        prompt_logprobs=reported,
    )


def _measured(
    use: MemoryUse, model: Decoder, plan: EnginePlan, group: TpGroup, device: torch.device
) -> MemoryUse:
    # The rows' page tables all name page 0, so a pool of one page serves.
    probe = replace(plan, num_pages=1, graph_sizes=(), piece_graph_sizes=())
    return replace(
        use,
        step=_measure_steps(model, probe, group, device),
        graphs=(
            _measure_graphs(model, plan, probe, group, device)
            if plan.graph_sizes or plan.piece_graph_sizes
            else 0
        ),
    )


def _measure_steps(model: Decoder, probe: EnginePlan, group: TpGroup, device: torch.device) -> int:
    """The most that steps take, with what stays allocated between them."""
    free_before, _ = free_memory(device)
    reserved_before = torch.cuda.memory_reserved(device)
    torch.cuda.reset_peak_memory_stats(device)
    runner = make_runner(model, probe, group)
    run_largest_steps(runner, probe)
    largest = torch.cuda.max_memory_reserved(device) - reserved_before
    free_after, _ = torch.cuda.mem_get_info(device)
    # Kernels, handles and libraries' own buffers.
    outside = (free_before - free_after) - (torch.cuda.memory_reserved(device) - reserved_before)
    lasting = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    runner.forward(late_step(probe))
    runner.sample()
    runner.result()
    late = torch.cuda.max_memory_allocated(device) - lasting
    runner.close()
    return largest + max(outside, 0) + late


def _measure_graphs(
    model: Decoder, plan: EnginePlan, probe: EnginePlan, group: TpGroup, device: torch.device
) -> int:
    """All graphs, from what the largest take; what one more adds is that of the last of them."""
    num_graphs = max(len(plan.graph_sizes), len(plan.piece_graph_sizes))
    none, some, more = (
        _memory_with_graphs(
            model,
            replace(
                probe,
                graph_sizes=_largest(plan.graph_sizes, count),
                piece_graph_sizes=_largest(plan.piece_graph_sizes, count),
            ),
            group,
            device,
        )
        for count in (0, _FEW_GRAPHS, _MORE_GRAPHS)
    )
    each = max(more - some, 0) // (_MORE_GRAPHS - _FEW_GRAPHS)
    return max(more - none, 0) + each * max(num_graphs - _MORE_GRAPHS, 0)


def _largest(sizes: tuple[int, ...], count: int) -> tuple[int, ...]:
    return sizes[max(len(sizes) - count, 0) :]


def _memory_with_graphs(
    model: Decoder, plan: EnginePlan, group: TpGroup, device: torch.device
) -> int:
    before, _ = free_memory(device)
    runner = make_runner(model, plan, group)
    after, _ = free_memory(device)
    runner.close()
    del runner
    # Graphs and the runner refer to each other.
    gc.collect()
    return before - after
