"""Makes an engine's runner from the operator's wishes, with the other ranks if there are any."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace

import msgspec
import torch

from services.common.model_files import eos_token_ids
from services.worker.engine.batch import Runner
from services.worker.engine.distributed.channel import Kind
from services.worker.engine.distributed.group import GlooGroup, SoloGroup, create_store
from services.worker.engine.models.config import ModelConfig
from services.worker.engine.models.registry import load_model_config
from services.worker.engine.options import EngineOptions, EnginePlan
from services.worker.engine.runner.profile import (
    largest_step,
    memory_at_start,
    pool_budget,
    run_largest_steps,
)
from services.worker.engine.runner.ranks import LeadingRunner, RankLoaded, RankProcesses
from services.worker.engine.runner.setup import (
    check_tp_size,
    decide_context_length,
    decide_device,
    decide_plan,
    device_memory,
    load_model,
    make_runner,
)

logger = logging.getLogger(__name__)

OnProgress = Callable[[float, str], None]

# Share of a start that loading weights takes.
_WEIGHTS_SHARE = 0.9


def build_runner(options: EngineOptions, on_progress: OnProgress) -> tuple[Runner, EnginePlan]:
    """Load the model on all ranks and run one step, so that what returns is known to work.

    For tp_size > 1 this process is rank 0 and starts the others, which die with this thread.
    On CPUs, torch's threads (OMP_NUM_THREADS, by default the cores) are divided among the ranks,
    and small models take fewer.
    Raises ValueError when the model or the options cannot work, RankLostError when a rank died.
    """
    config = load_model_config(options.model_path)
    device = decide_device(options)
    check_tp_size(options.tp_size, config)
    if options.tp_size == 1:
        runner, plan = _build_solo(options, config, device, on_progress)
    elif device.type == "cpu":
        runner, plan = _build_ranked(options, config, device, on_progress)
    else:
        raise ValueError("tp_size > 1 needs device cpu")
    try:
        _run_first_step(runner, plan)
    except BaseException:
        runner.close()
        raise
    on_progress(1.0, "ready")
    wanted = decide_context_length(options, config)
    if plan.context_length < wanted:
        logger.warning(
            "event=context_limited_by_pool wanted=%s tokens=%s", wanted, plan.context_length
        )
    logger.info("event=engine_plan %s", plan)
    return runner, plan


def _build_solo(
    options: EngineOptions, config: ModelConfig, device: torch.device, on_progress: OnProgress
) -> tuple[Runner, EnginePlan]:
    group = SoloGroup()
    free = memory_at_start(device)
    model = load_model(
        options,
        config,
        device=device,
        group=group,
        on_progress=lambda fraction: on_progress(_WEIGHTS_SHARE * fraction, "weights"),
    )
    budget = pool_budget(model, options, group, device=device, free_at_start=free)
    plan = _plan(options, config, device, budget)
    return make_runner(model, plan, group), plan


def _build_ranked(
    options: EngineOptions, config: ModelConfig, device: torch.device, on_progress: OnProgress
) -> tuple[Runner, EnginePlan]:
    size = options.tp_size
    ranks = RankProcesses(size)
    try:
        store, port = create_store(size)
        ranks.start(options, port)
        group = GlooGroup(store, 0, size)
        free = memory_at_start(device)
        model = load_model(
            options,
            config,
            device=device,
            group=group,
            on_progress=lambda fraction: on_progress(_WEIGHTS_SHARE * fraction, "weights"),
        )
        budgets = [pool_budget(model, options, group, device=device, free_at_start=free)]
        answers = [
            msgspec.json.decode(payload, type=RankLoaded) for payload in ranks.expect(Kind.LOADED)
        ]
        budgets += [answer.pool_budget_bytes for answer in answers]
        plan = _plan(options, config, device, min(budgets))
        ranks.send(Kind.READY, msgspec.json.encode(plan))
        return LeadingRunner(make_runner(model, plan, group), ranks, group), plan
    except BaseException:
        ranks.close()
        raise


def _plan(
    options: EngineOptions, config: ModelConfig, device: torch.device, budget: int
) -> EnginePlan:
    return decide_plan(
        options,
        config,
        device=device,
        eos_token_ids=tuple(eos_token_ids(options.model_path, options.tokenizer_path)),
        pool_budget_bytes=budget,
        device_bytes=device_memory(device),
    )


def _run_first_step(runner: Runner, plan: EnginePlan) -> None:
    """Warms up, and passes every collective.

    On a GPU the largest steps: what they need is taken now, beside everything else there is.
    """
    if plan.device == "cuda":
        run_largest_steps(runner, plan)
        return
    runner.forward(largest_step(replace(plan, max_running_sequences=1, max_step_tokens=1)))
    runner.sample()
    runner.result()
