"""The committed code of the Go and TypeScript clients is what the protos generate, byte for byte.

`tests/architecture/test_client_code.py` sees most of what can be wrong without any tools.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from services.common.config import child_environment
from tests.clients.languages import CLIENTS, LANGUAGES

pytestmark = [pytest.mark.clients, pytest.mark.timeout(900)]

_BIN = Path(sys.executable).parent


def _generated(clients: Path) -> dict[str, bytes]:
    folders = (clients / "go", clients / "typescript" / "src" / "gen")
    files = [path for folder in folders for path in folder.rglob("*") if _is_generated(path)]
    return {str(path.relative_to(clients)): path.read_bytes() for path in files}


def _is_generated(path: Path) -> bool:
    return path.name.endswith((".pb.go", "_pb.ts"))


def test_the_committed_code_is_current(tmp_path: Path) -> None:
    for language in LANGUAGES:
        if language.name in ("go", "typescript") and (reason := language.missing()) is not None:
            pytest.skip(reason)
    path = child_environment({})["PATH"]
    run = subprocess.run(
        [CLIENTS / "generate.sh", tmp_path],
        env=child_environment({"PATH": f"{_BIN}:{path}"}),
        capture_output=True,
        text=True,
        timeout=800,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    generated, committed = _generated(tmp_path), _generated(CLIENTS)
    assert len(generated) > 10
    assert generated.keys() == committed.keys(), "run `make clients`"
    stale = [name for name, content in generated.items() if committed[name] != content]
    assert not stale, "run `make clients`"
