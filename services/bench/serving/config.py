"""What `rhizome bench serving` is asked: where to send, what to send, how to report."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal
from urllib.parse import urlsplit

from cyclopts import Parameter

from services.bench.output import check_output
from services.bench.presets import Arrival, WorkloadFlags

Backend = Literal["completions", "chat", "generate"]
PromptFormat = Literal["ids", "text"]


@dataclass(frozen=True, kw_only=True, slots=True)
class ServingConfig:
    """Measure a running server: any with OpenAI's API, or SGLang's native one."""

    base_url: str = "http://127.0.0.1:30000"
    """Where the server listens; without `/v1`."""

    backend: Backend = "completions"
    """API to use: `/v1/completions`, `/v1/chat/completions` or the native `/generate`."""

    prompt_format: PromptFormat | None = None
    """Send token `ids`, or `text` of about as many common words. Default: ids; chat: text."""

    model: str | None = None
    """Model to ask for. Default: the first that the server lists."""

    api_key: str = ""
    """Sent as a bearer token."""

    flags: Annotated[WorkloadFlags, Parameter(name="*")] = WorkloadFlags()

    request_rate: float | None = None
    """Mean of Poisson arrivals a second. Default: the preset's, or everything at once."""

    max_concurrency: int | None = None
    """Conversations that run at once. Default: the preset's, or no limit."""

    num_processes: int | None = None
    """Client processes, so that the client is not the limit. Default: the preset's, or 4."""

    repeat: int = 1
    """Runs; their median and spread are reported."""

    warmup_requests: int = 32
    """Requests sent before and not counted; their prompts have another seed."""

    flush_cache: bool = False
    """Have the server drop its prefix cache before each run: the same seeds would hit it."""

    timeout_s: float = 900.0
    """Longest time of one request."""

    server_name: str | None = None
    """Name and version of the server, for the report. Default: what it says, or its URL."""

    output_file: Path | None = None
    """Write the report as JSON here."""

    output_details: bool = False
    """Add every request's times to the JSON."""

    plot_file: Path | None = None
    """Draw the times' distributions and the throughput here, as SVG."""

    disable_progress: bool = False
    """Draw no progress bar."""

    def __post_init__(self) -> None:
        if not self.base_url.startswith(("http://", "https://")):
            raise ValueError(f"base_url must start with http:// or https://, got {self.base_url!r}")
        if self.base_url.rstrip("/").endswith("/v1"):
            raise ValueError(f"base_url is without /v1, got {self.base_url!r}")
        _check_host(self.base_url)
        for name in ("request_rate", "timeout_s"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name} must be above 0, got {value}")
        for name in ("max_concurrency", "num_processes", "repeat"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be >= 1, got {value}")
        if self.warmup_requests < 0:
            raise ValueError(f"warmup_requests must be >= 0, got {self.warmup_requests}")
        if self.backend == "chat" and self.prompt_format == "ids":
            raise ValueError("prompt_format ids has no meaning for chat, which takes text")
        if self.plot_file is not None and self.plot_file.suffix != ".svg":
            raise ValueError(f"plot_file must end in .svg, got {self.plot_file}")
        for name in ("output_file", "plot_file"):
            check_output(name, getattr(self, name))
        if self.output_details and self.output_file is None:
            raise ValueError("output_details adds to output_file, which is not given")

    @property
    def arrival(self) -> Arrival:
        """The preset's with what the flags change; never more processes than conversations."""
        preset = self.flags.arrival
        workload = self.flags.resolve()
        concurrency = self.max_concurrency or preset.max_concurrency
        conversations = workload.num_groups if workload.kind == "multiturn" else None
        limits = (concurrency, conversations or workload.num_requests)
        return Arrival(
            request_rate=self.request_rate or preset.request_rate,
            max_concurrency=concurrency,
            num_processes=min(
                self.num_processes or preset.num_processes,
                *(limit for limit in limits if limit is not None),
            ),
        )

    @property
    def sends_ids(self) -> bool:
        """Whether prompts travel as token ids."""
        return self.backend != "chat" and self.prompt_format != "text"


def _check_host(base_url: str) -> None:
    """Raises ValueError without a host, or for a port that cannot be."""
    try:
        parts = urlsplit(base_url)
        is_address = bool(parts.hostname) and parts.port != 0
    except ValueError:
        is_address = False
    if not is_address:
        raise ValueError(f"base_url must name a host and may name a port, got {base_url!r}")
