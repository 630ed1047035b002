"""The launcher's supervisor over real processes: restart, giving up, stopping, leaving nothing."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest

from services.launch.supervisor import ServiceGaveUpError, Supervisor, private_directory
from services.launch.topology import ServiceSpec

TINY_SERVICE = Path(__file__).parents[1] / "fakes" / "tiny_service.py"
ROOT = Path(__file__).parents[2]


def tiny(directory: Path, name: str, mode: str, grace_s: float = 5.0) -> ServiceSpec:
    listen = f"unix:{directory}/{name}.sock"
    return ServiceSpec(
        name=name,
        argv=(sys.executable, str(TINY_SERVICE), listen, mode, str(os.getpid())),
        health_target=listen,
        grace_s=grace_s,
    )


@pytest.fixture(autouse=True)
def _importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return "Z" not in Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(30):
        while not condition():
            await asyncio.sleep(0.02)


async def test_all_ready_then_a_clean_stop(tmp_path: Path) -> None:
    stop, ready = asyncio.Event(), asyncio.Event()
    supervisor = Supervisor([tiny(tmp_path, n, "serve") for n in "ab"], tmp_path, print)
    running = asyncio.create_task(supervisor.run(ready.set, stop))
    await asyncio.wait_for(ready.wait(), 30)
    pids = supervisor.pids()
    assert set(pids) == {"a", "b"}
    stop.set()
    await running
    assert not any(is_alive(pid) for pid in pids.values())


async def test_a_line_of_any_length_is_passed_on(tmp_path: Path) -> None:
    stop, ready = asyncio.Event(), asyncio.Event()
    spec = tiny(tmp_path, "a", "serve")
    talk = "import os, sys; print('x' * 300_000, flush=True); print('after', flush=True); "
    talkative = dataclasses.replace(
        spec, argv=(sys.executable, "-c", f"{talk}os.execv(sys.argv[1], sys.argv[1:])", *spec.argv)
    )
    lines: list[str] = []
    supervisor = Supervisor([talkative], tmp_path, lines.append)
    running = asyncio.create_task(supervisor.run(ready.set, stop))
    await asyncio.wait_for(ready.wait(), 30)
    stop.set()
    await running
    assert "after" in lines
    assert sum(line.count("x") for line in lines if not line.strip("x")) == 300_000


async def test_a_killed_service_is_restarted(tmp_path: Path) -> None:
    stop, ready = asyncio.Event(), asyncio.Event()
    supervisor = Supervisor([tiny(tmp_path, "a", "serve")], tmp_path, print)
    running = asyncio.create_task(supervisor.run(ready.set, stop))
    await asyncio.wait_for(ready.wait(), 30)
    first = supervisor.pids()["a"]
    os.kill(first, signal.SIGKILL)
    await until(lambda: supervisor.pids().get("a", first) != first)
    stop.set()
    await running


async def test_repeated_failures_to_start_give_up_with_the_reason(tmp_path: Path) -> None:
    supervisor = Supervisor(
        [tiny(tmp_path, "good", "serve"), tiny(tmp_path, "bad", "fail")], tmp_path, print
    )
    with pytest.raises(ServiceGaveUpError, match="the disk is full") as gave_up:
        await supervisor.run(lambda: None, asyncio.Event())
    assert "3 in a row" in str(gave_up.value)
    # Of the last try alone.
    assert str(gave_up.value).count("the disk is full") == 1
    assert supervisor.pids() == {}


@pytest.mark.parametrize("mode", ["permanent", "refuse"])
async def test_a_permanent_failure_is_not_tried_again_and_its_last_line_is_the_reason(
    tmp_path: Path, mode: str
) -> None:
    supervisor = Supervisor([tiny(tmp_path, "bad", mode)], tmp_path, print)
    with pytest.raises(
        ServiceGaveUpError, match="^bad cannot start: cannot load: the disk is full$"
    ):
        await supervisor.run(lambda: None, asyncio.Event())


async def test_a_service_deaf_to_sigterm_is_killed(tmp_path: Path) -> None:
    stop, ready = asyncio.Event(), asyncio.Event()
    supervisor = Supervisor([tiny(tmp_path, "a", "deaf", grace_s=0.2)], tmp_path, print)
    running = asyncio.create_task(supervisor.run(ready.set, stop))
    await asyncio.wait_for(ready.wait(), 30)
    pid = supervisor.pids()["a"]
    stop.set()
    await running
    assert not is_alive(pid)


async def test_the_private_directory_is_private_and_goes(tmp_path: Path) -> None:
    async with private_directory() as directory:
        assert directory.stat().st_mode & 0o077 == 0
    assert not directory.exists()


async def test_kill_9_of_the_launcher_leaves_nothing(tmp_path: Path) -> None:
    script = textwrap.dedent(f"""
        import asyncio, os, sys
        sys.path.insert(0, {str(Path(__file__).parent)!r})
        from test_supervisor import *

        async def main():
            async with private_directory() as directory:
                supervisor = Supervisor([tiny(directory, "a", "serve")], directory, lambda _: None)
                def ready():
                    print(directory, supervisor.pids()["a"], flush=True)
                await supervisor.run(ready, asyncio.Event())

        asyncio.run(main())
    """)
    launcher = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, cwd=ROOT
    )
    assert launcher.stdout is not None
    directory, pid = (await asyncio.to_thread(launcher.stdout.readline)).split()
    launcher.kill()
    launcher.communicate()
    await until(lambda: not is_alive(int(pid)))
    await until(lambda: not Path(directory).exists())
