"""How each API is asked for a stream, and what the events of its stream say."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from services.bench.serving.config import Backend
from services.bench.workloads import Turn

# Common English words: most vocabularies hold each as one token with its space.
_WORDS = (
    "the of and to in that is was for on are with they be at one have this from or had by word "
    "but not what all were we when your can said there use an each which she do how their if will "
    "up other about out many then them these so some her would make like him into time has look "
    "two more write go see number no way could people my than first water been call who oil its "
    "now find long down day did get come made may part over new sound take only little work know "
    "place year live me back give most very after thing our just name good sentence man think say "
    "great where help through much before line right too mean old any same tell boy follow came "
    "want show also around form three small set put end does another well large must big even such"
).split()


class StreamFailedError(Exception):
    """The server said in its stream that the request failed."""


@dataclass(slots=True)
class StreamEvent:
    """What one event tells."""

    # It follows at least one new token.
    has_tokens: bool = False
    num_output_tokens: int | None = None
    num_prompt_tokens: int | None = None
    num_cached_tokens: int | None = None


class Api(Protocol):
    """One API's requests and events."""

    path: str

    def body(self, turn: Turn) -> dict[str, Any]:
        """The JSON body that asks for exactly `turn.output_len` tokens, greedily, streamed."""

    def read(self, event: dict[str, Any]) -> StreamEvent:
        """Raises StreamFailedError for an event that reports a failure."""


class CompletionsApi:
    """OpenAI's `/v1/completions`."""

    path = "/v1/completions"

    def __init__(self, model: str, sends_ids: bool) -> None:
        self._model = model
        self._sends_ids = sends_ids

    def body(self, turn: Turn) -> dict[str, Any]:
        prompt = turn.token_ids if self._sends_ids else text_of(turn.token_ids)
        return {"prompt": prompt, **_openai_options(self._model, turn)}

    def read(self, event: dict[str, Any]) -> StreamEvent:
        choices = _openai_choices(event)
        # Servers send an event with each token, also where it completes no character.
        return _with_usage(StreamEvent(has_tokens=bool(choices)), event)


class ChatApi:
    """OpenAI's `/v1/chat/completions`."""

    path = "/v1/chat/completions"

    def __init__(self, model: str) -> None:
        self._model = model

    def body(self, turn: Turn) -> dict[str, Any]:
        messages = [{"role": "user", "content": text_of(turn.token_ids)}]
        return {"messages": messages, **_openai_options(self._model, turn)}

    def read(self, event: dict[str, Any]) -> StreamEvent:
        # The first event carries the role before any token was sampled: only text counts.
        has_text = any(
            choice["delta"].get("content") or choice["delta"].get("reasoning_content")
            for choice in _openai_choices(event)
        )
        return _with_usage(StreamEvent(has_tokens=has_text), event)


class GenerateApi:
    """SGLang's native `/generate`: each event holds the whole reply so far."""

    path = "/generate"

    def __init__(self, sends_ids: bool) -> None:
        self._sends_ids = sends_ids

    def body(self, turn: Turn) -> dict[str, Any]:
        sampling = {"max_new_tokens": turn.output_len, "temperature": 0.0, "ignore_eos": True}
        name = "input_ids" if self._sends_ids else "text"
        prompt = turn.token_ids if self._sends_ids else text_of(turn.token_ids)
        return {name: prompt, "sampling_params": sampling, "stream": True}

    def read(self, event: dict[str, Any]) -> StreamEvent:
        _check_error(event)
        meta = event["meta_info"]
        reason = meta.get("finish_reason")
        if isinstance(reason, dict) and reason.get("type") == "abort":
            raise StreamFailedError(str(reason.get("message", "aborted")))
        return StreamEvent(
            has_tokens=meta["completion_tokens"] > 0,
            num_output_tokens=meta["completion_tokens"],
            num_prompt_tokens=meta.get("prompt_tokens"),
            num_cached_tokens=meta.get("cached_tokens"),
        )


def make_api(backend: Backend, model: str, sends_ids: bool) -> Api:
    """The API of `backend`."""
    match backend:
        case "completions":
            return CompletionsApi(model, sends_ids)
        case "chat":
            return ChatApi(model)
        case "generate":
            return GenerateApi(sends_ids)


def text_of(token_ids: list[int]) -> str:
    """A text of as many words as there are ids; equal ids give equal words."""
    return " ".join(_WORDS[token_id % len(_WORDS)] for token_id in token_ids)


def _openai_options(model: str, turn: Turn) -> dict[str, Any]:
    return {
        "model": model,
        "max_tokens": turn.output_len,
        "temperature": 0.0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }


def _openai_choices(event: dict[str, Any]) -> list[dict[str, Any]]:
    _check_error(event)
    choices: list[dict[str, Any]] = event.get("choices") or []
    for choice in choices:
        if choice.get("finish_reason") in ("abort", "error"):
            raise StreamFailedError(f"finish_reason {choice['finish_reason']}")
    return choices


def _check_error(event: dict[str, Any]) -> None:
    error = event.get("error")
    if error:
        raise StreamFailedError(str(error.get("message", error) if type(error) is dict else error))


def _with_usage(event: StreamEvent, raw: dict[str, Any]) -> StreamEvent:
    usage = raw.get("usage")
    if usage:
        event.num_output_tokens = usage["completion_tokens"]
        event.num_prompt_tokens = usage.get("prompt_tokens")
        details = usage.get("prompt_tokens_details") or {}
        event.num_cached_tokens = details.get("cached_tokens")
    return event
