"""Finding the processes of a running system, so that a drill can kill or stop one."""

from __future__ import annotations

import psutil


def service_process(launcher_pid: int, module: str, *arguments: str) -> psutil.Process:
    """The launcher's child that runs `module` with `arguments` on its command line."""
    for child in psutil.Process(launcher_pid).children():
        command = child.cmdline()
        if module in command and all(argument in command for argument in arguments):
            return child
    raise AssertionError(f"no process of {module} {arguments}")


def engine_process(worker: psutil.Process) -> psutil.Process:
    """The engine of a worker: its child that uses the most memory."""
    return max(worker.children(), key=lambda child: child.memory_info().rss)
