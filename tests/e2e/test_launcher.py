"""`rhizome serve` and `make demo` as their users meet them."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from services.common.model_files import builtin_model_path
from tests.e2e.system import ROOT, free_port, running_system

pytestmark = pytest.mark.timeout(180)


def run(*arguments: str, temp: Path | None = None) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    if temp is not None:
        environment["TMPDIR"] = str(temp)
    return subprocess.run(
        [sys.executable, "-m", *arguments],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=150,
    )


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline, "it did not come true"
        time.sleep(0.05)


def is_listening(port: int) -> bool:
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0


@pytest.fixture
def short_path() -> Iterator[Path]:
    """A place for sockets, whose paths may have 107 bytes."""
    with tempfile.TemporaryDirectory(prefix="rz-") as path:
        yield Path(path)


def test_the_demo_answers_and_says_how(short_path: Path) -> None:
    demo = run("services.launch.demo", temp=short_path)
    assert demo.returncode == 0, demo.stdout + demo.stderr
    assert "The capital of France is Paris." in demo.stdout
    assert "worker-0" in demo.stdout
    assert "tokens came from the cache" in demo.stdout
    assert list(short_path.iterdir()) == []


def test_a_place_whose_sockets_would_have_too_long_names_is_named(tmp_path: Path) -> None:
    deep = tmp_path / ("d" * 60)
    deep.mkdir()
    demo = run("services.launch.demo", temp=deep)
    assert demo.returncode != 0
    assert "TMPDIR" in demo.stderr
    assert "Traceback" not in demo.stderr


def test_a_request_to_paste_is_printed_and_works() -> None:
    with running_system() as system:
        log = "".join(system.log)
        command = log[log.index("  curl") :].strip()
        pasted = subprocess.run(
            command, shell=True, capture_output=True, text=True, timeout=60, check=True
        )
        assert "data: [DONE]" in pasted.stdout


def test_kill_9_of_the_launcher_leaves_no_process_port_or_file(
    short_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(short_path))
    with running_system("--dp", "2") as system:
        descendants = psutil.Process(system.process.pid).children(recursive=True)
        assert len(descendants) >= 8
        assert any(short_path.iterdir())
        system.process.kill()
        until(lambda: not any(child.is_running() for child in descendants))
        until(lambda: not any(short_path.iterdir()))
        assert not is_listening(system.port)
        assert not is_listening(system.port + 1)


def test_a_model_that_cannot_load_is_given_up_with_the_reason(tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(builtin_model_path(), broken)
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[: 1 << 20])
    serve = run("services.launch", "serve", "--model-path", str(broken), "--port", str(free_port()))
    assert serve.returncode == 1
    assert "giving up" in serve.stderr
    assert "model.safetensors" in serve.stderr


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (("--model-path", "/nowhere"), "config.json"),
        (("--tp", "0"), "tp_size must be >= 1"),
        (("--no-such-flag",), "--no-such-flag"),
        (("--context-length", "0"), "context_length must be >= 1"),
    ],
)
def test_bad_flags_are_one_line_and_status_2(flags: tuple[str, ...], named: str) -> None:
    serve = run("services.launch", "serve", *flags)
    assert serve.returncode == 2
    assert named in serve.stdout + serve.stderr
    assert "Traceback" not in serve.stderr


def test_a_port_in_use_is_said() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        serve = run("services.launch", "serve", "--port", port)
    assert serve.returncode == 1
    assert port in serve.stderr
