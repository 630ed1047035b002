"""SGLang's own frontend language runs against us unmodified."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.e2e.system import ROOT, System

PACKAGES = ROOT / ".venv" / "sglang-frontend"
REQUIREMENTS = ("requests", "pybase64", "ipython")


@pytest.fixture(scope="module")
def packages() -> Path:
    """The sglang package without its GPU dependencies, and what its frontend imports."""
    if not (PACKAGES / "sglang").is_dir():
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--target", str(PACKAGES)]
        subprocess.run([*pip, *REQUIREMENTS], check=True)
        subprocess.run([*pip, "--no-deps", "sglang==0.5.23"], check=True)
    return PACKAGES


@pytest.mark.timeout(300)
def test_frontend_programs_run_unmodified(system: System, packages: Path) -> None:
    program = Path(__file__).with_name("sglang_program.py")
    run = subprocess.run(
        [sys.executable, "-W", "ignore", str(program), str(packages), system.url],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert run.returncode == 0, run.stderr
    gave = json.loads(run.stdout.splitlines()[-1])
    assert "Emma" in gave["answer"]
    assert gave["answer"] in gave["streamed"]
    assert gave["batch"] == [gave["answer"]] * 2
    assert gave["cities"] == [" Paris"] * 3
    assert gave["replies"][1].startswith(gave["replies"][0])
    assert gave["stopped"].strip()
    assert "Par" not in gave["stopped"]
    assert gave["tokens"] > 0
