"""Chat messages as clients send them, into what the tokenizer's templates read."""

from __future__ import annotations

from typing import Any

import msgspec

from rhizome.common.v1.chat_message_pb2 import ChatMessage
from services.common.errors import InvalidRequestError

_ROLES = ("system", "developer", "user", "assistant", "tool")
# Members that a template may read.
_TEMPLATE_MEMBERS = ("name", "tool_calls", "tool_call_id", "reasoning_content")
# Members of the messages that we (and OpenAI) answer with, sent back without content.
_EMPTY_MEMBERS = ("refusal", "audio", "function_call", "annotations")
_encode = msgspec.json.Encoder().encode
_decode = msgspec.json.Decoder().decode


def chat_messages(messages: list[dict[str, Any]]) -> list[ChatMessage]:
    """Raises InvalidRequestError naming the message and the member that is wrong."""
    if not messages:
        raise InvalidRequestError("messages must not be empty", "messages")
    return [_message(message, f"messages[{i}]") for i, message in enumerate(messages)]


def _message(message: dict[str, Any], where: str) -> ChatMessage:
    role = message.get("role")
    if role not in _ROLES:
        raise InvalidRequestError(
            f"{where}.role must be one of {', '.join(_ROLES)}, got {role!r:.60}", f"{where}.role"
        )
    extra: dict[str, Any] = {}
    for name, value in message.items():
        if value is None or name in ("role", "content"):
            continue
        if name in _EMPTY_MEMBERS:
            if value not in ([], {}, ""):
                raise InvalidRequestError(
                    f"{where}.{name} is not supported with a value", f"{where}.{name}"
                )
        elif name in _TEMPLATE_MEMBERS:
            extra[name] = _member(name, value, where)
        else:
            raise InvalidRequestError(
                f"Unknown or unsupported parameter: `{where}.{name}`", f"{where}.{name}"
            )
    if not extra.get("tool_calls"):
        extra.pop("tool_calls", None)
    content = _content(message.get("content"), role, where)
    return ChatMessage(
        role="system" if role == "developer" else role,
        content=content,
        extra_json=_encode(extra).decode() if extra else "",
    )


def _content(content: Any, role: str, where: str) -> str:
    if isinstance(content, str):
        return content
    if content is None:
        if role == "assistant":
            return ""
        raise InvalidRequestError(f"{where}.content is required", f"{where}.content")
    if not isinstance(content, list):
        raise InvalidRequestError(
            f"{where}.content must be a string or a list of text parts", f"{where}.content"
        )
    texts = []
    for index, part in enumerate(content):
        at = f"{where}.content[{index}]"
        if not isinstance(part, dict):
            raise InvalidRequestError(f"{at} must be an object", at)
        if part.get("type") != "text":
            raise InvalidRequestError(
                f"{at}.type {part.get('type')!r:.60} is not supported; only text parts are",
                f"{at}.type",
            )
        if not isinstance(part.get("text"), str) or _has_more(part):
            raise InvalidRequestError(f'{at} must be {{"type": "text", "text": string}}', at)
        texts.append(part["text"])
    return "".join(texts)


def _has_more(part: dict[str, Any]) -> bool:
    """Whether a text part has members that nobody would read; null is absent."""
    return any(value is not None for name, value in part.items() if name not in ("type", "text"))


def _member(name: str, value: Any, where: str) -> Any:
    if name != "tool_calls":
        if not isinstance(value, str):
            raise InvalidRequestError(f"{where}.{name} must be a string", f"{where}.{name}")
        return value
    if not isinstance(value, list):
        raise InvalidRequestError(f"{where}.tool_calls must be a list", f"{where}.tool_calls")
    return [_tool_call(call, f"{where}.tool_calls[{i}]") for i, call in enumerate(value)]


def _tool_call(call: Any, where: str) -> dict[str, Any]:
    """Templates read `arguments` as an object; clients send it as JSON text."""
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise InvalidRequestError(f"{where} must hold a function with a name", where)
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = _decode(arguments or "{}")
        except msgspec.DecodeError:
            # What a model wrote need not be JSON; the template gets it as text.
            arguments = function["arguments"]
    return {**call, "function": {**function, "arguments": arguments}}
