"""Objectives, how fast their error budgets burn, and what is left of them.

Read from the recording rules of deploy/helm/rhizome/rules. Burn rates and windows are those of the
SRE Workbook, chapter "Alerting on SLOs".
"""

from __future__ import annotations

from deploy.grafana.panels import Dashboard, Panel, Query, Row

_WINDOWS = ("5m", "30m", "1h", "2h", "6h", "1d", "3d")


def _burn(record: str, objective: str, window: str) -> str:
    return (
        f"max(rhizome:{record}:ratio_rate{window}{{*}}) "
        f"/ (1 - scalar(rhizome:{objective}:objective))"
    )


def _left(record: str, objective: str) -> str:
    return (
        f"1 - max(avg_over_time(rhizome:{record}:ratio_rate1h{{*}}[28d])) "
        f"/ (1 - scalar(rhizome:{objective}:objective))"
    )


def _row(title: str, record: str, objective: str, what: str) -> Row:
    return Row(
        title,
        [
            Panel(
                title=f"Objective: {what}",
                description="Set in rules/recording.yaml.",
                queries=[Query(f"rhizome:{objective}:objective", "objective")],
                unit="percentunit",
                decimals=2,
                kind="stat",
                width=4,
            ),
            Panel(
                title="Bad in the last hour",
                description="Share of requests that missed the objective.",
                queries=[Query(f"max(rhizome:{record}:ratio_rate1h{{*}})", "bad")],
                unit="percentunit",
                decimals=2,
                kind="stat",
                width=4,
            ),
            Panel(
                title="Budget left, of 28 days",
                description="1 is untouched; below 0 the objective was missed. Hours weigh alike, "
                "however many requests they had. Little left: put off risky changes.",
                queries=[Query(_left(record, objective), "left")],
                unit="percentunit",
                kind="stat",
                falls=True,
                warn=0.5,
                bad=0.0,
                width=4,
            ),
            Panel(
                title="Burn rate",
                description="1 uses up a month's budget in a month. Pages are sent at 14.4 in an "
                "hour and 6 in six hours, tickets at 3 in a day and 1 in three days, each only "
                "while the shorter window agrees.",
                queries=[Query(_burn(record, objective, each), each) for each in _WINDOWS],
                warn=1,
                bad=14.4,
                width=12,
            ),
        ],
    )


SLO = Dashboard(
    slug="slo",
    title="Rhizome / SLO",
    description="Objectives, how fast their error budgets burn, and what is left.",
    rows=[
        _row("Availability", "request_errors", "availability", "requests that do not fail"),
        _row("First token", "ttft_slow", "ttft", "first tokens within 3 s"),
        Row(
            "Alerts",
            [
                Panel(
                    title="Alerts that fire",
                    description="docs/alerts.md says what each means and what to do.",
                    queries=[
                        Query(
                            'sum by (alertname, severity) (ALERTS{alertname=~"Rhizome.*",'
                            'alertstate="firing"}) or vector(0)',
                            "{{alertname}} {{severity}}",
                        )
                    ],
                    stacked=True,
                    width=12,
                ),
                Panel(
                    title="Behind the objectives",
                    description="Requests that wait, and ready workers.",
                    queries=[
                        Query("sum(rhizome:queued_requests:sum{*})", "waiting"),
                        Query("sum(rhizome:ready_workers:sum{*})", "ready workers"),
                    ],
                    width=12,
                ),
            ],
        ),
    ],
    span="now-24h",
)
