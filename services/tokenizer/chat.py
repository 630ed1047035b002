"""Chat templates: from messages to the prompt's text.

A template is the model's own Jinja source, one given by `--chat-template`, or one of SGLang's
conversation templates (conversation.py). docs/chat-templates.md describes what each can do.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from jinja2 import Template, TemplateError, TemplateSyntaxError, nodes

from services.common.errors import InvalidRequestError
from services.common.model_files import read_json
from services.tokenizer.builtin_templates import BUILTIN_TEMPLATES
from services.tokenizer.conversation import Conversation, conversation_from_json
from services.tokenizer.sandbox import ChatTemplateEnvironment

RENDER_TIME_LIMIT_S = 10.0

# What a template can raise on messages it was not written for.
_TEMPLATE_FAILURES = (
    TemplateError,
    ArithmeticError,
    AttributeError,
    LookupError,
    RuntimeError,
    TypeError,
    ValueError,
)
_CONTINUE_TAG = "CONTINUE_FINAL_MESSAGE_TAG "
_RESERVED_VARIABLES = frozenset({"messages", "tools", "add_generation_prompt"})


@dataclass(frozen=True, kw_only=True, slots=True)
class Chat:
    """What a template is given. Messages are plain JSON objects with `role` and `content`."""

    messages: Sequence[dict[str, Any]]
    tools: Sequence[Any] | None = None
    # Further variables.
    variables: Mapping[str, Any] = field(default_factory=dict)
    add_generation_prompt: bool = True
    continue_final_message: bool = False


class ChatTemplate(Protocol):
    """Renders chats; may be used from several threads at once."""

    @property
    def stop(self) -> Sequence[str]:
        """Strings that end a turn."""

    @property
    def writes_special_tokens(self) -> bool:
        """The text holds the sequence's leading special tokens where the model wants some."""

    def render(self, chat: Chat) -> str:
        """Raises InvalidRequestError when the template refuses the chat."""


class JinjaChatTemplate:
    """A model's own template, or several by name: `tool_use` serves chats with tools."""

    stop: Sequence[str] = ()
    writes_special_tokens = True

    def __init__(
        self,
        sources: Mapping[str, str],
        special_tokens: Mapping[str, Any],
        time_limit_s: float = RENDER_TIME_LIMIT_S,
    ) -> None:
        """`special_tokens` (`bos_token` ...) are variables. Raises ValueError for bad syntax."""
        if "default" not in sources:
            raise ValueError(f"no template is named 'default' among {', '.join(sources)}")
        self._environment = ChatTemplateEnvironment(time_limit_s)
        self._special_tokens = dict(special_tokens)
        self._templates: dict[str, Template] = {}
        self._takes_parts: dict[str, bool] = {}
        for name, source in sources.items():
            try:
                self._templates[name] = self._environment.from_string(source)
                self._takes_parts[name] = loops_over_content(self._environment.parse(source))
            except TemplateSyntaxError as error:
                raise ValueError(
                    f"chat template {name!r}, line {error.lineno}: {error.message}"
                ) from error

    def render(self, chat: Chat) -> str:
        name = "tool_use" if chat.tools and "tool_use" in self._templates else "default"
        takes_parts = self._takes_parts[name]
        messages = [_template_message(i, m, takes_parts) for i, m in enumerate(chat.messages)]
        if chat.continue_final_message:
            return self._continue_final_message(name, messages, chat)
        return self._run(name, messages, chat)

    def _run(self, name: str, messages: Sequence[dict[str, Any]], chat: Chat) -> str:
        if reserved := _RESERVED_VARIABLES.intersection(chat.variables):
            raise InvalidRequestError(
                f"{sorted(reserved)[0]!r} is not a further template variable",
                param="chat_template_kwargs",
            )
        variables = {
            "documents": None,
            **self._special_tokens,
            **chat.variables,
            "messages": messages,
            "tools": chat.tools,
            "add_generation_prompt": chat.add_generation_prompt,
        }
        try:
            return self._environment.run(self._templates[name], variables)
        except _TEMPLATE_FAILURES as error:
            reason = str(error) or type(error).__name__
            raise InvalidRequestError(
                f"the chat template refuses the messages: {reason}", param="messages"
            ) from error

    def _continue_final_message(self, name: str, messages: list[dict[str, Any]], chat: Chat) -> str:
        """Render with a mark at the end of the last message's text, and cut the text there."""
        text = _mark_final_text(messages)
        rendered = self._run(name, messages, chat)
        mark = rendered.rfind(_CONTINUE_TAG.strip())
        if mark < 0 or text.strip() not in rendered:
            raise InvalidRequestError(
                "the chat template leaves out the final message, so it cannot be continued",
                param="messages",
            )
        if rendered.startswith(_CONTINUE_TAG, mark):
            return rendered[:mark]
        # The template trims messages: then spaces at the end of this one are not part of it.
        return rendered[:mark].rstrip()


class ConversationTemplate:
    """One of SGLang's conversation templates. They write no leading BOS and take no tools."""

    writes_special_tokens = False

    def __init__(self, conversation: Conversation) -> None:
        self._conversation = conversation
        self.stop: Sequence[str] = conversation.stop

    def render(self, chat: Chat) -> str:
        name = self._conversation.name
        if chat.tools:
            raise InvalidRequestError(f"chat template {name!r} takes no tools", param="tools")
        if chat.variables:
            raise InvalidRequestError(
                f"chat template {name!r} takes no variables", param="chat_template_kwargs"
            )
        return self._conversation.render(
            [_template_message(i, m, False) for i, m in enumerate(chat.messages)],
            open_turn=chat.add_generation_prompt,
            leave_last_open=chat.continue_final_message,
        )


def load_chat_template(
    tokenizer_path: Path, override: str | None, special_tokens: Mapping[str, Any]
) -> ChatTemplate | None:
    """The template that services.common.model_files.chat_template_digest digests; None if none.

    `override` is a .jinja file, a .json file in SGLang's format or a built-in name. Raises
    ValueError for one that is none of these or malformed.
    """
    if override is not None:
        return _load_override(override, special_tokens)
    path = tokenizer_path / "chat_template.jinja"
    if path.is_file():
        return JinjaChatTemplate({"default": path.read_text(encoding="utf-8")}, special_tokens)
    found = read_json(tokenizer_path / "tokenizer_config.json").get("chat_template")
    if not found:
        return None
    if isinstance(found, str):
        return JinjaChatTemplate({"default": found}, special_tokens)
    try:
        named = {entry["name"]: entry["template"] for entry in found}
    except (KeyError, TypeError) as error:
        raise ValueError(f"malformed chat_template in {tokenizer_path}") from error
    return JinjaChatTemplate(named, special_tokens)


def _load_override(override: str, special_tokens: Mapping[str, Any]) -> ChatTemplate:
    path = Path(override)
    if not path.is_file():
        if override in BUILTIN_TEMPLATES:
            return ConversationTemplate(BUILTIN_TEMPLATES[override])
        raise ValueError(
            f"chat template {override!r} is neither a file nor one of "
            f"{', '.join(sorted(BUILTIN_TEMPLATES))}"
        )
    if path.suffix == ".json":
        try:
            return ConversationTemplate(conversation_from_json(read_json(path)))
        except ValueError as error:
            raise ValueError(f"chat template {override}: {error}") from error
    source = path.read_text(encoding="utf-8").strip("\n")
    return JinjaChatTemplate({"default": source}, special_tokens)


def loops_over_content(tree: nodes.Template) -> bool:
    """Whether a template handles lists of content parts: it loops over something's `content`.

    `message['content']`, `message.content` and a variable or macro argument named `content` count.
    """
    return any(_mentions_content(loop.iter) for loop in tree.find_all(nodes.For))


def _mentions_content(node: nodes.Node) -> bool:
    if isinstance(node, nodes.Call):
        # Such as `content.split(...)`: a string's parts.
        return False
    return (
        (isinstance(node, nodes.Getattr) and node.attr == "content")
        or (isinstance(node, nodes.Const) and node.value == "content")
        or (isinstance(node, nodes.Name) and node.name == "content")
        or any(map(_mentions_content, node.iter_child_nodes()))
    )


def _template_message(index: int, message: Mapping[str, Any], takes_parts: bool) -> dict[str, Any]:
    """A message as templates expect it.

    Null members are left out and null content is empty, as templates test for presence; tool
    calls' arguments are objects, where OpenAI's API has JSON text.
    """
    plain = {name: value for name, value in message.items() if value is not None}
    plain["content"] = _content(index, plain.get("content", ""), takes_parts)
    if plain["role"] == "assistant" and isinstance(plain.get("tool_calls"), list):
        plain["tool_calls"] = [_with_parsed_arguments(call) for call in plain["tool_calls"]]
    return plain


def _content(index: int, content: Any, takes_parts: bool) -> str | list[Any]:
    if isinstance(content, str):
        return content
    where = f"messages[{index}].content"
    if not isinstance(content, list):
        raise InvalidRequestError(f"{where}: must be a string or a list of parts", param="messages")
    texts = []
    for part in content:
        if not isinstance(part, dict) or part.get("type") != "text":
            kind = part.get("type") if isinstance(part, dict) else part
            raise InvalidRequestError(
                f"{where}: parts of type {kind!r} are not supported", param="messages"
            )
        if not isinstance(part.get("text"), str):
            raise InvalidRequestError(f"{where}: a text part has no text", param="messages")
        texts.append(part["text"])
    # A copy: continuing the final message changes its last part.
    return [dict(part) for part in content] if takes_parts else "".join(texts)


def _with_parsed_arguments(call: Any) -> Any:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("arguments"), str):
        return call
    try:
        arguments = json.loads(function["arguments"])
    except ValueError:
        return call
    return {**call, "function": {**function, "arguments": arguments}}


def _mark_final_text(messages: list[dict[str, Any]]) -> str:
    """Put the mark at the end of the last message's last text; that text."""
    if not messages:
        raise InvalidRequestError("there is no final message to continue", param="messages")
    content = messages[-1]["content"]
    if isinstance(content, str):
        messages[-1]["content"] = content + _CONTINUE_TAG
        return content
    if not content:
        raise InvalidRequestError("the final message has no text to continue", param="messages")
    text: str = content[-1]["text"]
    content[-1]["text"] = text + _CONTINUE_TAG
    return text
