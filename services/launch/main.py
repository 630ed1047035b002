"""The `rhizome` command: its subcommands and what each prints."""

from __future__ import annotations

import os
import sys

from services.common.config import parse_config
from services.common.logs import configure_logging
from services.common.process import exit_for, run
from services.launch.config import OfflineConfig, ServeConfig
from services.launch.hosts import HostUnreachableError
from services.launch.offline import BenchFailedError, check_bench_flags, offline
from services.launch.serve import serve
from services.launch.supervisor import ServiceGaveUpError
from services.launch.warm import warm

# Commands that are programs of their own. They are named, as services are, never imported.
_PROGRAMS = {"bench": "services.bench"}

_USAGE = """usage: rhizome COMMAND [--help]

commands:
  bench     measure a server, or the engine alone
  offline   start all services, measure them, report, and end; takes serve's flags
  serve     start all services on this host and serve one model
  warm      compile the kernels of a model into --kernel-cache-dir; takes serve's flags
"""


def main() -> None:
    """Run one subcommand; exits with 2 on bad arguments, 1 when a service cannot be kept up."""
    command, arguments = (sys.argv[1] if len(sys.argv) > 1 else None), sys.argv[2:]
    if command in _PROGRAMS:
        os.execv(sys.executable, [sys.executable, "-m", _PROGRAMS[command], *arguments])
    if command == "serve":
        config = parse_config(ServeConfig, "serve", arguments, program="rhizome serve")
        configure_logging("launch", config.log_level, config.telemetry.log_format)
        try:
            run(serve(config))
        except (ServiceGaveUpError, HostUnreachableError) as error:
            sys.exit(f"rhizome serve: giving up. {error}")
        except ValueError as error:
            exit_for("serve", error)
    elif command == "offline":
        _offline(arguments)
    elif command == "warm":
        warm(parse_config(ServeConfig, "serve", arguments, program="rhizome warm"))
    elif command in ("--help", "-h"):
        print(_USAGE, end="")
    else:
        print(_USAGE, end="", file=sys.stderr)
        sys.exit(2)


def _offline(arguments: list[str]) -> None:
    """What follows `--` is for the benchmark."""
    place = arguments.index("--") if "--" in arguments else len(arguments)
    flags, bench_flags = arguments[:place], arguments[place + 1 :]
    config = parse_config(OfflineConfig, "serve", flags, program="rhizome offline")
    try:
        check_bench_flags(bench_flags)
    except ValueError as error:
        print(f"offline: {error}", file=sys.stderr)
        sys.exit(2)
    configure_logging("launch", config.log_level, config.telemetry.log_format)
    try:
        run(offline(config, bench_flags) if config.node_rank == 0 else serve(config))
    except (ServiceGaveUpError, HostUnreachableError, BenchFailedError) as error:
        sys.exit(f"rhizome offline: {error}")
    except ValueError as error:
        exit_for("offline", error)
