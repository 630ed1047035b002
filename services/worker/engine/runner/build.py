"""Makes an engine's runner from the operator's wishes, with the other ranks if there are any."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace

import msgspec
import torch

from services.common.model_files import eos_token_ids
from services.common.nodes import parse_host_port
from services.worker.engine.batch import Runner
from services.worker.engine.distributed.channel import Kind
from services.worker.engine.distributed.group import SoloGroup
from services.worker.engine.distributed.rendezvous import create_store
from services.worker.engine.models.config import ModelConfig
from services.worker.engine.models.registry import load_model_config
from services.worker.engine.options import EngineOptions, EnginePlan
from services.worker.engine.runner.groups import make_group, take_gpu
from services.worker.engine.runner.profile import (
    PoolBudget,
    largest_step,
    memory_at_start,
    pool_budget,
    run_largest_steps,
    run_prompts,
)
from services.worker.engine.runner.ranks import LeadingRunner, RankProcesses
from services.worker.engine.runner.setup import (
    check_tp_size,
    decide_context_length,
    decide_device,
    decide_dtype,
    decide_plan,
    load_model,
    make_runner,
)
from services.worker.engine.runner.watch import RankWatch
from services.worker.engine.spec import RankLoaded

logger = logging.getLogger(__name__)

OnProgress = Callable[[float, str], None]

# Share of a start that loading weights takes.
_WEIGHTS_SHARE = 0.9


def build_runner(options: EngineOptions, on_progress: OnProgress) -> tuple[Runner, EnginePlan]:
    """Load the model on all ranks and run one step, so that what returns is known to work.

    For tp_size > 1 this process is rank 0; it starts the others of this host, which die with this
    thread, and waits for those of other hosts.
    On CPUs, torch's threads (OMP_NUM_THREADS, by default the cores) are divided among the ranks,
    and small models take fewer.
    Raises ValueError when the model or the options cannot work, RankLostError when a rank died.
    """
    config = load_model_config(options.model_path)
    device = decide_device(options)
    check_tp_size(options.tp_size, config)
    take_gpu(options, device, rank=0)
    build = _build_solo if options.tp_size == 1 else _build_ranked
    runner, plan = build(options, config, device, on_progress)
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
    ranks = RankProcesses(options.ranks_per_node, options.log_format)
    watch: RankWatch | None = None
    try:
        meeting = (
            None if options.nccl_init_addr is None else parse_host_port(options.nccl_init_addr)
        )
        store, address = create_store(options.tp_size, meeting)
        ranks.start(options, store, address)
        watch = RankWatch(ranks.channels, ends_process=device.type == "cuda")
        with watch.calling():
            dtype = getattr(torch, decide_dtype(options, config, device))
            group = make_group(options, device, dtype, store, address, rank=0)
        free = memory_at_start(device)
        model = load_model(
            options,
            config,
            device=device,
            group=group,
            on_progress=lambda fraction: on_progress(_WEIGHTS_SHARE * fraction, "weights"),
        )
        with watch.calling():
            budget = pool_budget(model, options, group, device=device, free_at_start=free)
        others = [
            msgspec.json.decode(payload, type=RankLoaded).pool_budget_bytes
            for payload in watch.wait_until_loaded()
        ]
        budget = replace(budget, num_bytes=min(budget.num_bytes, *others))
        plan = _plan(options, config, device, budget)
        ranks.send(Kind.READY, msgspec.json.encode(plan))
        with watch.calling():
            local = make_runner(model, plan, group)
        return LeadingRunner(local, ranks, watch, group), plan
    except BaseException:
        if watch is not None:
            watch.close()
        ranks.close()
        raise


def _plan(
    options: EngineOptions, config: ModelConfig, device: torch.device, budget: PoolBudget
) -> EnginePlan:
    return decide_plan(
        options,
        config,
        device=device,
        eos_token_ids=tuple(eos_token_ids(options.model_path, options.tokenizer_path)),
        pool_budget_bytes=budget.num_bytes,
        device_bytes=budget.device_bytes,
    )


def _run_first_step(runner: Runner, plan: EnginePlan) -> None:
    """Warms up, and passes every collective.

    On a GPU the largest steps: what they need is taken now, beside everything else there is. And
    prompts of the sizes between them and those that graphs hold: libraries load kernels by size.
    """
    if plan.device == "cuda":
        run_largest_steps(runner, plan)
        run_prompts(runner, plan)
        return
    runner.forward(largest_step(replace(plan, max_running_sequences=1, max_step_tokens=1)))
    runner.sample()
    runner.result()
