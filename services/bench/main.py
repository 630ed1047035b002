"""`rhizome bench`: its subcommands. Each loads what it needs and nothing more."""

from __future__ import annotations

import sys

from services.common.config import parse_config
from services.common.process import EXIT_INTERRUPTED

_USAGE = """usage: rhizome bench COMMAND [--help]

commands:
  latency   one static batch through the engine alone: prefill and decode times
  offline   throughput of the engine alone on a serving workload
  serving   load on a running server: throughput, TTFT, TPOT, ITL and end-to-end times
"""


def main() -> None:
    """Run one subcommand; exits with 2 on bad arguments, 1 when there is nothing to report."""
    command, arguments = (sys.argv[1] if len(sys.argv) > 1 else None), sys.argv[2:]
    programs = {"latency": _latency, "offline": _offline, "serving": _serving}
    if command in programs:
        try:
            programs[command](arguments)
        except ModuleNotFoundError as error:
            extras = "bench" if command == "serving" else "bench,worker"
            sys.exit(f"rhizome bench {command}: {error}; pip install 'rhizome-llm[{extras}]'")
        except KeyboardInterrupt:
            sys.exit(EXIT_INTERRUPTED)
    elif command in ("--help", "-h"):
        print(_USAGE, end="")
    else:
        print(_USAGE, end="", file=sys.stderr)
        sys.exit(2)


# Configurations are imported where they are parsed: the engine's need its package, serving's does
# not. What runs is imported after that, so that --help and bad flags load no model library.


def _latency(arguments: list[str]) -> None:
    from services.bench.engine.config import LatencyConfig

    config = parse_config(LatencyConfig, "bench", arguments, program="rhizome bench latency")
    from services.bench.engine.latency import bench_latency
    from services.worker.engine.distributed.channel import RankLostError

    try:
        bench_latency(config)
    except (ValueError, RankLostError) as error:
        sys.exit(f"rhizome bench latency: {error}")


def _offline(arguments: list[str]) -> None:
    from services.bench.engine.config import OfflineConfig

    config = parse_config(OfflineConfig, "bench", arguments, program="rhizome bench offline")
    from services.bench.engine.offline import RequestFailedError, bench_offline
    from services.worker.engine.distributed.channel import RankLostError

    try:
        bench_offline(config)
    except (ValueError, RequestFailedError, RankLostError) as error:
        sys.exit(f"rhizome bench offline: {error}")


def _serving(arguments: list[str]) -> None:
    from services.bench.serving.config import ServingConfig

    config = parse_config(ServingConfig, "bench", arguments, program="rhizome bench serving")
    from services.bench.serving.bench import ServerError, bench_serving

    try:
        bench_serving(config)
    except ServerError as error:
        sys.exit(f"rhizome bench serving: {error}")
