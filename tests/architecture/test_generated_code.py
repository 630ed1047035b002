"""The committed stubs are what the protos generate, byte for byte."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from services.common.config import child_environment

_ROOT = Path(__file__).resolve().parents[2]
_BIN = Path(sys.executable).parent


def _stubs(package: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(package)): path.read_bytes()
        for path in package.glob("*/v1/*")
        if path.suffix in (".py", ".pyi")
    }


def test_the_committed_stubs_are_current(tmp_path: Path) -> None:
    target = tmp_path / "rhizome"
    result = subprocess.run(
        [_ROOT / "protos" / "generate.sh", target],
        env=child_environment({"PATH": f"{_BIN}:/usr/local/bin:/usr/bin:/bin"}),
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    generated, committed = _stubs(target), _stubs(_ROOT / "rhizome")
    assert len(generated) > 20
    assert generated.keys() == committed.keys(), "run `make protos`"
    stale = [name for name, content in generated.items() if committed[name] != content]
    assert not stale, "run `make protos`"
