"""What the operator can set on the tokenizer service."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

from services.common.telemetry import TelemetryFlags
from services.common.tls import TlsFlags


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenizerConfig:
    """Turns text into token ids and back: chat templates, encoding, text streams."""

    model_path: Path | None = None
    """Model directory; the built-in model when not given."""

    tokenizer_path: Path | None = None
    """Directory with tokenizer.json; the model's when not given."""

    chat_template: str | None = None
    """A .jinja file, a .json file in SGLang's format or a built-in name (docs/chat-templates.md)
    instead of the tokenizer's own template."""

    listen: str = "localhost:30010"
    """Where to serve gRPC: host:port or unix:/path."""

    num_encode_threads: int = 2
    """Threads for templates and encoding; one long prompt keeps one busy."""

    metrics_port: int | None = None
    """Port that serves Prometheus metrics at /metrics. Default: none."""

    health_port: int | None = None
    """Port of health checks (grpc.health.v1) in plain text, on all addresses, for probes that speak
    no TLS. Default: none."""

    tls: Annotated[TlsFlags, Parameter(name="*")] = TlsFlags()

    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """How much to log."""

    telemetry: Annotated[TelemetryFlags, Parameter(name="*")] = TelemetryFlags()
    """Traces and the form of logs."""

    parent_pid: int | None = None
    """End when this process, the parent, ends."""

    def __post_init__(self) -> None:
        if self.num_encode_threads < 1:
            raise ValueError(f"num_encode_threads must be >= 1, got {self.num_encode_threads}")
