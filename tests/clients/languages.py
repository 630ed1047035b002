"""How each language's client is built and its examples are run."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
CLIENTS = ROOT / "clients"

Command = tuple[str | Path, ...]


@dataclass(frozen=True)
class Language:
    """One client: what it needs, and the commands, which run in its folder."""

    name: str
    # A program, how it is asked for its version, and the oldest that will do.
    tools: tuple[tuple[str, str, tuple[int, int]], ...]
    build: tuple[Command, ...]
    quickstart: Command
    calls: Command

    @property
    def folder(self) -> Path:
        return CLIENTS / self.name

    def missing(self) -> str | None:
        """What is not there to build it, or None."""
        for tool, question, oldest in self.tools:
            path = shutil.which(tool)
            if path is None:
                return f"there is no {tool} on the path"
            found = _version(path, question)
            if found < oldest:
                return f"{tool} {_text(found)} is older than {_text(oldest)}"
        return None

    def compile(self) -> None:
        for command in self.build:
            run = subprocess.run(
                command, cwd=self.folder, capture_output=True, text=True, timeout=840, check=False
            )
            assert run.returncode == 0, f"{command}:\n{run.stdout}{run.stderr}"

    def run(self, program: Command, arguments: Sequence[str]) -> subprocess.CompletedProcess[str]:
        """An example's run to its end."""
        return subprocess.run(
            (*program, *arguments),
            cwd=self.folder,
            capture_output=True,
            text=True,
            timeout=90,
            check=False,
        )


def _version(path: str, question: str) -> tuple[int, int]:
    answer = subprocess.run([path, question], capture_output=True, text=True, check=False)
    numbers = re.search(r"(\d+)\.(\d+)", answer.stdout + answer.stderr)
    assert numbers is not None, f"{path} {question} answers {answer.stdout}{answer.stderr}"
    return int(numbers[1]), int(numbers[2])


def _text(version: tuple[int, int]) -> str:
    return ".".join(map(str, version))


_JAVA = (
    "sh",
    "-c",
    'exec java -cp "target/classes:target/test-classes:$(cat target/classpath)" "$@"',
    "java",
)

LANGUAGES = (
    Language(
        "go",
        (("go", "version", (1, 26)),),
        (("go", "vet", "./..."), ("go", "build", "-o", "target/", "./examples/...")),
        ("target/quickstart",),
        ("target/calls",),
    ),
    Language(
        "java",
        (("javac", "-version", (17, 0)), ("mvn", "--version", (3, 8))),
        (("mvn", "-B", "-q", "test-compile", "dependency:build-classpath"),),
        (*_JAVA, "Quickstart"),
        (*_JAVA, "Calls"),
    ),
    Language(
        "typescript",
        (("node", "--version", (20, 0)), ("npm", "--version", (9, 0))),
        (
            ("npm", "ci", "--prefer-offline", "--no-audit", "--no-fund", "--loglevel=error"),
            ("npm", "run", "build"),
        ),
        ("node", "dist/examples/quickstart.js"),
        ("node", "dist/examples/calls.js"),
    ),
    Language(
        "rust",
        (("cargo", "--version", (1, 88)),),
        (("cargo", "build", "--locked", "--examples"),),
        ("target/debug/examples/quickstart",),
        ("target/debug/examples/calls",),
    ),
)
