"""The programs that the documentation shows work when pasted."""

from __future__ import annotations

import re
import subprocess
import sys
import textwrap

from tests.e2e.system import ROOT, System


def run_pasted(system: System, program: str) -> str:
    """What a program prints, with the documented ports replaced by the running system's."""
    program = program.replace("30000", str(system.port)).replace("30001", str(system.port + 1))
    run = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert run.returncode == 0, run.stderr
    return run.stdout


def test_the_readmes_program_answers(system: System) -> None:
    text = (ROOT / "README.md").read_text()
    block = text[text.index("    from openai import OpenAI") :].split("\n\nSGLang's", 1)[0]
    assert "Paris" in run_pasted(system, textwrap.dedent(block))


def test_the_grpc_program_answers(system: System) -> None:
    text = (ROOT / "docs" / "grpc-api.md").read_text()
    (program,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    printed = run_pasted(system, program)
    assert "Paris" in printed
    assert re.search(r"\d+ tokens", printed)
