"""Why a language's client is not tested where it cannot be built."""

from __future__ import annotations

import sys

import pytest

from tests.clients.languages import Language


@pytest.mark.parametrize(
    ("tool", "oldest", "reason"),
    [
        ("no-such-tool", (1, 0), "there is no no-such-tool on the path"),
        (
            sys.executable,
            (99, 1),
            f"{sys.executable} {sys.version_info.major}.{sys.version_info.minor} "
            "is older than 99.1",
        ),
        (sys.executable, (3, 9), None),
    ],
)
def test_what_is_missing_is_named(tool: str, oldest: tuple[int, int], reason: str | None) -> None:
    language = Language("x", ((tool, "--version", oldest),), (), (), ())
    assert language.missing() == reason
