"""The `rhizome` command: its subcommands and what each prints."""

from __future__ import annotations

import json
import logging
import os
import sys

from services.common.config import parse_config
from services.common.logs import configure_logging
from services.common.process import run, stop_event
from services.launch.config import ServeConfig
from services.launch.supervisor import ServiceGaveUpError, Supervisor, private_directory
from services.launch.topology import build_topology
from services.launch.warm import warm

logger = logging.getLogger(__name__)

# Commands that are programs of their own. They are named, as services are, never imported.
_PROGRAMS = {"bench": "services.bench"}

_USAGE = """usage: rhizome COMMAND [--help]

commands:
  bench   measure a server, or the engine alone
  serve   start all services on this host and serve one model
  warm    compile the kernels of a model into --kernel-cache-dir; takes serve's flags
"""


def main() -> None:
    """Run one subcommand; exits with 2 on bad arguments, 1 when a service cannot be kept up."""
    command, arguments = (sys.argv[1] if len(sys.argv) > 1 else None), sys.argv[2:]
    if command in _PROGRAMS:
        os.execv(sys.executable, [sys.executable, "-m", _PROGRAMS[command], *arguments])
    if command == "serve":
        config = parse_config(ServeConfig, "serve", arguments, program="rhizome serve")
        configure_logging("launch", config.log_level)
        try:
            run(serve(config))
        except ServiceGaveUpError as error:
            sys.exit(f"rhizome serve: giving up. {error}")
    elif command == "warm":
        warm(parse_config(ServeConfig, "serve", arguments, program="rhizome warm"))
    elif command in ("--help", "-h"):
        print(_USAGE, end="")
    else:
        print(_USAGE, end="", file=sys.stderr)
        sys.exit(2)


async def serve(config: ServeConfig) -> None:
    """Serve until SIGINT or SIGTERM. Raises ServiceGaveUpError."""
    stop = stop_event()
    async with private_directory() as directory:
        supervisor = Supervisor(build_topology(config, directory, os.getpid()), directory, _echo)
        logger.info("event=starting model=%s", config.model_path)
        await supervisor.run(lambda: print(ready_message(config), flush=True), stop)
    logger.info("event=stopped")


def ready_message(config: ServeConfig) -> str:
    """What a newcomer needs next: where it listens, and a request to paste."""
    if config.node_rank > 0:
        return f"\nNode {config.node_rank} has joined; node 0 serves.\n"
    scheme = "http" if config.edge.ssl_files is None else "https"
    base = f"{scheme}://{config.host}:{config.port}"
    key = "    -H 'Authorization: Bearer YOUR_KEY' \\\n" if config.edge.asks_for_keys else ""
    body = {
        "model": "default",
        "messages": [{"role": "user", "content": "What is the capital of France?"}],
        "stream": True,
    }
    return (
        f"\nRhizome is ready: {base} (OpenAI API: {base}/v1)\n\nTry:\n"
        f"  curl -N {base}/v1/chat/completions -H 'Content-Type: application/json' \\\n"
        f"{key}    -d '{json.dumps(body)}'\n"
    )


def _echo(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
