"""A rank above 0, as a process: loads its shard, then mirrors rank 0's calls until told to stop.

`python -m services.worker.engine.runner.follower SPEC`, with a FollowerSpec. On rank 0's host it
inherits one end of a socket pair; on another it meets rank 0 at the options' `nccl_init_addr`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import signal
import socket
import sys
from collections.abc import Callable

import msgspec
import torch

from services.common.logs import configure_logging
from services.common.nodes import HostPort, parse_host_port
from services.common.process import EXIT_CANNOT_START, die_with_parent
from services.worker.engine.distributed.channel import Channel, Kind, RankLostError
from services.worker.engine.distributed.plan_codec import decode_plan
from services.worker.engine.distributed.rendezvous import (
    RankHello,
    connect_to_rank_0,
    join_store,
)
from services.worker.engine.models.registry import load_model_config
from services.worker.engine.options import EngineOptions, EnginePlan
from services.worker.engine.runner.groups import make_group, take_gpu
from services.worker.engine.runner.model_runner import ModelRunner
from services.worker.engine.runner.profile import memory_at_start, pool_budget
from services.worker.engine.runner.setup import decide_device, decide_dtype, load_model, make_runner
from services.worker.engine.runner.watch import LeaderWatch
from services.worker.engine.spec import (
    PERMANENT_FAILURES,
    FollowerSpec,
    RankFailed,
    RankLoaded,
    RankStart,
    decode_path,
    encode_message,
    failure_reason,
)

logger = logging.getLogger(__name__)

# What may differ between the nodes of a group.
_OWN_OPTIONS = (
    *("model_path", "tokenizer_path", "node_rank", "nccl_init_addr", "base_gpu_id"),
    "log_format",
)


def main() -> None:
    """The process: 0 when rank 0 ended it, 3 or 1 when this rank failed."""
    spec = msgspec.json.decode(sys.argv[1], type=FollowerSpec, dec_hook=decode_path)
    # Ctrl-C reaches the whole group; rank 0 decides when the ranks stop.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    die_with_parent(spec.parent_pid)
    configure_logging(f"worker-rank{spec.rank}", "warning", spec.log_format)
    try:
        channel = _open_channel(spec)
    except RankLostError:
        logger.exception("event=rank_0_not_found")
        sys.exit(1)
    try:
        _, payload = channel.receive()
        start = msgspec.json.decode(payload, type=RankStart, dec_hook=decode_path)
        options = start.options if spec.options is None else merged_options(start, spec.options)
        channel.send(Kind.STARTED)
        _serve(channel, spec, start, options)
    except RankLostError as error:
        # Rank 0 is gone: nobody is left to tell.
        logger.warning("event=rank_0_lost reason=%s", error)
        sys.exit(1)
    except Exception as error:
        is_permanent = isinstance(error, PERMANENT_FAILURES)
        reason = failure_reason(error)
        logger.error("event=rank_failed reason=%s", reason, exc_info=not is_permanent)
        failed = RankFailed(reason=reason, is_permanent=is_permanent)
        # Rank 0 may be gone, too; the status below says the same.
        with contextlib.suppress(RankLostError):
            channel.send(Kind.FAILED, encode_message(failed))
        sys.exit(EXIT_CANNOT_START if is_permanent else 1)


def merged_options(start: RankStart, own: EngineOptions) -> EngineOptions:
    """Rank 0's options with this node's own paths and GPUs.

    Raises ValueError when the nodes were told different things.
    """
    kept = {name: getattr(own, name) for name in _OWN_OPTIONS}
    merged = dataclasses.replace(start.options, **kept)
    differing = [
        field.name
        for field in dataclasses.fields(EngineOptions)
        if getattr(merged, field.name) != getattr(own, field.name)
    ]
    if differing:
        raise ValueError(f"node {own.node_rank} and node 0 differ in: {', '.join(differing)}")
    return merged


def _open_channel(spec: FollowerSpec) -> Channel:
    if spec.channel_fd is not None:
        channel = Channel(socket.socket(fileno=spec.channel_fd))
        channel.send(Kind.HELLO, msgspec.json.encode(RankHello(spec.rank)))
        return channel
    options = spec.options
    assert options is not None, "a rank of another host has options of its own"
    assert options.nccl_init_addr is not None, "several nodes have an address to meet at"
    address = parse_host_port(options.nccl_init_addr)
    store = join_store(address, options.tp_size)
    return Channel(connect_to_rank_0(store, address.host, spec.rank))


def _serve(channel: Channel, spec: FollowerSpec, start: RankStart, options: EngineOptions) -> None:
    watch = LeaderWatch(channel)
    config = load_model_config(options.model_path)
    device = decide_device(options)
    take_gpu(options, device, spec.rank)
    address = HostPort(start.host, start.port)
    store = join_store(address, start.size)
    dtype = getattr(torch, decide_dtype(options, config, device))
    group = make_group(options, device, dtype, store, address, spec.rank)
    free = memory_at_start(device)
    model = load_model(options, config, device=device, group=group, on_progress=lambda _: None)
    budget = pool_budget(model, options, group, device=device, free_at_start=free)
    channel.send(Kind.LOADED, encode_message(RankLoaded(pool_budget_bytes=budget.num_bytes)))
    kind, payload = channel.receive()
    if kind is Kind.READY:
        plan = msgspec.json.decode(payload, type=EnginePlan)
        runner = make_runner(model, plan, group, reports=False)
        try:
            _mirror(channel, runner, lambda: _tell_ready(spec))
        except PERMANENT_FAILURES as error:
            # Loading went well, so nothing that was asked for is wrong: a new start may help.
            raise RuntimeError(f"a step failed: {failure_reason(error)}") from error
        runner.close()
    watch.close()
    group.close()


def _mirror(channel: Channel, runner: ModelRunner, on_first_step: Callable[[], None]) -> None:
    is_first = True
    while True:
        kind, payload = channel.receive()
        if kind is Kind.FORWARD:
            runner.forward(decode_plan(payload))
        elif kind is Kind.SAMPLE:
            runner.sample()
            if is_first:
                on_first_step()
                is_first = False
        else:
            assert kind is Kind.STOP, f"rank 0 sent {kind.name}"
            return


def _tell_ready(spec: FollowerSpec) -> None:
    if spec.ready_fd is not None:
        os.write(spec.ready_fd, b"1")
        os.close(spec.ready_fd)


if __name__ == "__main__":
    main()
