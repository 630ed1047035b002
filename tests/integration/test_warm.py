"""`rhizome warm` as its user meets it, on a CPU: nothing to compile, everything else the same."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path


def warm(*flags: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "services.launch", "warm", "--device", "cpu", *flags],
        capture_output=True,
        text=True,
        timeout=100,
    )


def test_it_says_where_the_kernels_are(tmp_path: Path) -> None:
    target = tmp_path / "kernels"
    done = warm("--kernel-cache-dir", str(target), "--chunked-prefill-size", "40")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["kernel_cache_dir"] == str(target)
    assert target.is_dir()


def test_without_a_folder_or_with_a_flag_that_cannot_work_it_says_so(tmp_path: Path) -> None:
    nowhere = warm()
    assert nowhere.returncode == 1
    assert "--kernel-cache-dir" in nowhere.stderr
    impossible = warm("--kernel-cache-dir", str(tmp_path), "--tp", "3")
    assert impossible.returncode == 1
    assert "tp_size 3 does not divide" in impossible.stderr
    assert "Traceback" not in impossible.stderr
