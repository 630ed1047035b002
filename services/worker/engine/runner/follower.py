"""A rank above 0, as a process: loads its shard, then mirrors rank 0's calls until told to stop.

`python -m services.worker.engine.runner.follower FD PARENT_PID`: FD is its end of the socket pair
that rank 0 made; PARENT_PID is rank 0's process, whose death ends this one.
"""

from __future__ import annotations

import logging
import socket
import sys
from pathlib import Path
from typing import Any

import msgspec

from services.common.logs import configure_logging
from services.common.process import die_with_parent
from services.worker.engine.distributed.channel import Channel, Kind, RankLostError
from services.worker.engine.distributed.group import GlooGroup, join_store
from services.worker.engine.distributed.plan_codec import decode_plan
from services.worker.engine.models.registry import load_model_config
from services.worker.engine.options import EnginePlan
from services.worker.engine.runner.model_runner import ModelRunner
from services.worker.engine.runner.profile import memory_at_start, pool_budget
from services.worker.engine.runner.ranks import RankLoaded, RankStart
from services.worker.engine.runner.setup import decide_device, load_model, make_runner

logger = logging.getLogger(__name__)


def main() -> None:
    """The process: 0 when rank 0 ended it, 1 when this rank failed."""
    channel = Channel(socket.socket(fileno=int(sys.argv[1])))
    die_with_parent(int(sys.argv[2]))
    channel.send(Kind.HELLO)
    try:
        _, payload = channel.receive()
        start = msgspec.json.decode(payload, type=RankStart, dec_hook=_decode_path)
        configure_logging(f"worker-rank{start.rank}", "warning")
        _serve(channel, start)
    except RankLostError:
        # Rank 0 is gone: nobody is left to tell.
        sys.exit(1)
    except Exception as error:
        logger.exception("event=rank_failed")
        channel.send(Kind.FAILED, str(error).encode())
        sys.exit(1)


def _serve(channel: Channel, start: RankStart) -> None:
    options = start.options
    config = load_model_config(options.model_path)
    device = decide_device(options)
    group = GlooGroup(join_store(start.store_port, start.size), start.rank, start.size)
    free = memory_at_start(device)
    model = load_model(options, config, device=device, group=group, on_progress=lambda _: None)
    budget = pool_budget(model, options, group, device=device, free_at_start=free)
    channel.send(Kind.LOADED, msgspec.json.encode(RankLoaded(pool_budget_bytes=budget)))
    kind, payload = channel.receive()
    if kind is Kind.READY:
        plan = msgspec.json.decode(payload, type=EnginePlan)
        _mirror(channel, make_runner(model, plan, group))
    group.close()


def _mirror(channel: Channel, runner: ModelRunner) -> None:
    while True:
        kind, payload = channel.receive()
        if kind is Kind.FORWARD:
            runner.forward(decode_plan(payload))
        elif kind is Kind.SAMPLE:
            runner.sample()
        else:
            assert kind is Kind.STOP, f"rank 0 sent {kind.name}"
            return


def _decode_path(kind: type, value: Any) -> Any:
    return Path(value) if kind is Path else kind(value)


if __name__ == "__main__":
    main()
