"""One line per answered request, with what the client said about itself."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence

from services.gateway.exchange import Exchange
from services.gateway.openai.requests import CommonRequest
from services.gateway.pipeline import Generation

logger = logging.getLogger(__name__)


def log_request(
    exchange: Exchange, request: CommonRequest, generations: Sequence[Generation]
) -> None:
    """Log sizes, time, workers, and the client's `user` and `metadata`."""
    logger.info(
        "event=request_done request_id=%s workers=%s prompts=%d prompt_tokens=%d "
        "cached_tokens=%d output_tokens=%d total_ms=%.1f tenant=%s user=%.200r metadata=%.1000r",
        exchange.request_id,
        ",".join(dict.fromkeys(w for g in generations for w in g.hops.worker_ids)),
        len(generations),
        sum(len(g.prompt.token_ids) for g in generations),
        sum(g.cached_tokens for g in generations),
        sum(g.num_output_tokens for g in generations),
        (time.monotonic() - exchange.arrival_s) * 1000,
        exchange.tenant,
        request.user,
        request.metadata,
        extra=exchange.span.log_fields,
    )
