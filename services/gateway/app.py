"""The HTTP surface: routes, and what happens around every endpoint."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable

from starlette.exceptions import HTTPException
from starlette.routing import Route, Router

from services.common.errors import RhizomeError
from services.gateway import health
from services.gateway.access import Need
from services.gateway.exchange import ClientGoneError, Exchange, Receive, Scope, Send
from services.gateway.http_errors import HttpError
from services.gateway.native import generate, info, profile
from services.gateway.openai import chat, completions
from services.gateway.serving import Serving
from services.gateway.spans import begin_http, end_http

logger = logging.getLogger(__name__)

# Routes whose requests are traced, and what GenAI conventions call what they do.
_OPERATIONS = {
    "/v1/chat/completions": "chat",
    "/v1/completions": "text_completion",
    "/generate": "text_completion",
}

Handler = Callable[[Serving, Exchange], Awaitable[None]]

_ROUTES: list[tuple[str, list[str], Handler]] = [
    ("/v1/chat/completions", ["POST"], chat.chat_completions),
    ("/v1/completions", ["POST"], completions.completions),
    ("/generate", ["POST", "PUT"], generate.generate),
    ("/v1/models", ["GET"], health.models),
    ("/v1/models/{model:path}", ["GET"], health.model),
    ("/health", ["GET"], health.health),
    ("/health_generate", ["GET"], health.health_generate),
    ("/metrics", ["GET"], health.metrics),
    ("/get_model_info", ["GET"], info.model_info),
    ("/model_info", ["GET"], info.model_info),
    ("/get_server_info", ["GET"], info.server_info),
    ("/server_info", ["GET"], info.server_info),
    ("/flush_cache", ["GET", "POST"], info.flush_cache),
    ("/start_profile", ["GET", "POST"], profile.start_profile),
    ("/stop_profile", ["GET", "POST"], profile.stop_profile),
]
# Open to all, and what changes the workers' state; a key is needed for everything else.
_OPEN = ("/health", "/health_generate", "/metrics")
_ADMIN = ("/flush_cache", "/start_profile", "/stop_profile")
_OTHER = "other"


class GatewayApp:
    """The ASGI application. Every request gets exactly one answer, errors in OpenAI's shape."""

    def __init__(self, serving: Serving) -> None:
        self._serving = serving
        self._router = Router(
            [
                Route(path, _Endpoint(serving, path, handler), methods=methods)
                for path, methods, handler in _ROUTES
            ],
            redirect_slashes=False,
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        # Makes the router raise for wrong paths and methods instead of answering in its own way.
        scope["app"] = self
        try:
            await self._router(scope, receive, send)
        except HTTPException as error:
            exchange = Exchange(scope, receive, send, self._serving.limits.max_body_bytes)
            await exchange.reply_error(_route_error(error, scope))
            self._serving.pipeline.metrics.requests.labels(_OTHER, str(exchange.status)).inc()


class _Endpoint:
    """One route's handler with what all have in common: errors, metrics, the disconnect."""

    def __init__(self, serving: Serving, path: str, handler: Handler) -> None:
        self._serving = serving
        self._path = path
        self._handler = handler
        self._operation = _OPERATIONS.get(path)
        self._need = _need(path)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        exchange = Exchange(scope, receive, send, self._serving.limits.max_body_bytes)
        if self._operation is not None:
            exchange.span = self._serving.tracer.begin(
                f"{scope['method']} {self._path}",
                exchange.traceparent,
                exchange.tracestate,
            )
            if exchange.span.is_recording:
                begin_http(exchange, self._path, self._operation, exchange.span)
        try:
            exchange.check_headers()
            exchange.tenant = self._serving.access.admit(
                self._need, exchange.authorization, exchange.tenant
            )
            await self._handler(self._serving, exchange)
        except ClientGoneError:
            # As nginx logs it; nobody sees it.
            exchange.status = 499
        except (RhizomeError, HttpError) as error:
            await exchange.reply_error(error)
            if exchange.status >= 500:
                exchange.span.fail(error)
            logger.info(
                "event=request_refused request_id=%s path=%s status=%d error=%.1000s",
                exchange.request_id,
                self._path,
                exchange.status,
                error,
                extra=exchange.span.log_fields,
            )
        except Exception as error:
            logger.exception(
                "event=request_failed request_id=%s path=%s",
                exchange.request_id,
                self._path,
                extra=exchange.span.log_fields,
            )
            exchange.span.fail(error)
            if exchange.status:
                raise
            await exchange.reply_error(error)
        finally:
            self._serving.pipeline.metrics.requests.labels(self._path, str(exchange.status)).inc()
            if exchange.span.is_recording:
                end_http(exchange)


def _need(path: str) -> Need:
    if path in _OPEN:
        return Need.NOTHING
    return Need.ADMIN if path in _ADMIN else Need.KEY


def _route_error(error: HTTPException, scope: Scope) -> HttpError:
    path = scope["path"]
    if error.status_code == 405:
        refused = HttpError(405, f"{path} does not take {scope['method']}", "method_not_allowed")
        allowed = (error.headers or {}).get("Allow", "")
        refused.headers.append((b"allow", allowed.encode()))
        return refused
    return HttpError(404, f"There is nothing at {path!r:.200}", "not_found")
