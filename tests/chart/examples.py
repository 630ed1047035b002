"""`python -m tests.chart.examples` renders every example again, for a look at the difference."""

from __future__ import annotations

from tests.chart.rendering import EXAMPLES, masked, scenarios, template


def rendered(scenario: str) -> str:
    return masked(template(EXAMPLES / scenario / "values.yaml"))


def main() -> None:
    for scenario in scenarios():
        (EXAMPLES / scenario / "rendered.yaml").write_text(rendered(scenario))


if __name__ == "__main__":
    main()
