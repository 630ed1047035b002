"""A worker whose engine is another program; everything else of it is the real one.

python -m bench.other_engine ENGINE [flags of a worker]: ENGINE is a JSON list of the module that
runs in place of `services.worker.engine.process`, and of its arguments before the engine's spec.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import replace

from services.common.config import parse_config
from services.common.logs import configure_logging
from services.common.process import die_with_parent, run
from services.launch.topology import ServiceSpec
from services.worker.config import WorkerConfig
from services.worker.lifetime import serve

_WORKER = "services.worker"


def with_engine(specs: Sequence[ServiceSpec], module: str, *arguments: str) -> list[ServiceSpec]:
    """The same services, their workers with the engine that `module` runs."""
    program = engine_program(module, *arguments)
    changed = []
    for spec in specs:
        python, minus_m, service, *flags = spec.argv
        if service == _WORKER:
            spec = replace(spec, argv=(python, minus_m, *program, *flags))
        changed.append(spec)
    return changed


def engine_program(module: str, *arguments: str) -> tuple[str, str]:
    """What to run in place of `services.worker`: this module and its first argument."""
    return "bench.other_engine", json.dumps([module, *arguments])


def main() -> None:
    """Run one worker until SIGTERM."""
    module, *arguments = json.loads(sys.argv[1])
    config = parse_config(WorkerConfig, "worker", sys.argv[2:])
    configure_logging("worker", config.log_level, config.telemetry.log_format)
    if config.parent_pid is not None:
        die_with_parent(config.parent_pid)
    run(serve(config, (sys.executable, "-m", module, *arguments)))


if __name__ == "__main__":
    main()
