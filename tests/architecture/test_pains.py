"""CONTRIBUTING.md names the tests of known pains, all of them and no others."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_every_test_of_a_known_pain_is_in_the_table() -> None:
    named = re.findall(
        r"^\| (\d+) ([PKSHQM]) \|.*\|(.*)\|$", (ROOT / "CONTRIBUTING.md").read_text(), re.M
    )
    listed = {
        (int(number), kind.lower(), test)
        for number, kind, tests in named
        for test in re.findall(r"`(.+?)`", tests)
    }
    found = {
        (int(number), kind, f"{path.relative_to(ROOT / 'tests')}::{name}")
        for path in (ROOT / "tests").rglob("test_*.py")
        for name, number, kind in re.findall(
            r"^(?:async )?def (test_pain_(\d\d)_([a-z])_\w+)\(", path.read_text(), re.M
        )
    }
    assert listed == found
    assert {number for number, _, _ in found} >= {1, 30}
