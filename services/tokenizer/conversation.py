"""SGLang's conversation templates: a system prompt, two roles and a separator style.

The format and the styles are those of SGLang's `--chat-template` files and registered names
(`sglang.srt.parser.conversation`, itself after FastChat's), so that prompts come out the same.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from services.common.errors import InvalidRequestError


class Turn(NamedTuple):
    """One message: its role's tag and its text; None is an open turn, for the model to fill."""

    tag: str
    text: str | None


class _Style(NamedTuple):
    """A separator style that only puts fixed strings between the parts."""

    # Between tag and text, and after the tag of an open turn.
    joiner: str
    open_joiner: str
    # After the system prompt: "" nothing, "always" `sep`, "present" `sep` if there is a prompt.
    head: str = "always"
    # Every other turn ends in `sep2`.
    alternates: bool = False
    after_head: str = ""
    after_sep: str = ""
    after_sep2: str = ""


_STYLES = {
    "ADD_COLON_SINGLE": _Style(": ", ":"),
    "ADD_COLON_TWO": _Style(": ", ":", alternates=True),
    "ADD_COLON_SPACE_SINGLE": _Style(": ", ": "),
    "NO_COLON_SINGLE": _Style("", "", head=""),
    "NO_COLON_TWO": _Style("", "", head="", alternates=True),
    "ADD_NEW_LINE_SINGLE": _Style("\n", "\n", head="present"),
    "CHATML": _Style("\n", "\n", head="present", after_head="\n", after_sep="\n"),
    "DOLLY": _Style(":\n", ":\n", head="", alternates=True, after_sep2="\n\n"),
    "ROBIN": _Style(":\n", ":\n"),
    "FALCON_CHAT": _Style(": ", ":", head="present"),
    "DEEPSEEK_CHAT": _Style(": ", ":", head="", alternates=True),
    "DeepSeekVL2": _Style(": ", ":", head="present", alternates=True),
    "MPT": _Style("", ""),
    # Not SGLang's name: `sep` ends every user turn and `sep2` every assistant turn.
    "PREFIX_SUFFIX": _Style("", "", head=""),
}
_HEADER_TAGS = {
    "LLAMA3": ("<|start_header_id|>", "<|end_header_id|>\n\n", "<|eot_id|>"),
    "LLAMA4": ("<|header_start|>", "<|header_end|>\n\n", "<|eot|>"),
}
SEPARATOR_STYLES = tuple(sorted([*_STYLES, *_HEADER_TAGS, "LLAMA2", "GEMMA3"]))


@dataclass(frozen=True, kw_only=True, slots=True)
class Conversation:
    """A conversation template. Text only; user and assistant are expected to take turns."""

    name: str
    # Holds `{system_message}`.
    system_template: str = "{system_message}"
    system_message: str = ""
    user: str
    assistant: str
    sep_style: str
    sep: str = "\n"
    sep2: str = ""
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.sep_style not in SEPARATOR_STYLES:
            raise ValueError(
                f"unknown sep_style {self.sep_style!r}; known are {', '.join(SEPARATOR_STYLES)}"
            )

    def render(
        self, messages: Sequence[Mapping[str, Any]], *, open_turn: bool, leave_last_open: bool
    ) -> str:
        """The prompt. Raises InvalidRequestError for a role that the format does not have."""
        system, turns = self._turns(messages)
        if leave_last_open and (not turns or turns[-1].tag != self.assistant):
            raise InvalidRequestError(
                "continue_final_message needs an assistant message at the end", param="messages"
            )
        if open_turn:
            turns.append(Turn(self.assistant, None))
        head = self.system_template.replace("{system_message}", system)
        parts = self._parts(head if system or self._has_fixed_head else "", system, turns)
        if leave_last_open:
            parts[-1] = parts[-1].removesuffix(self._end_of_turn(len(turns) - 1, turns[-1]))
        return "".join(parts)

    @property
    def _has_fixed_head(self) -> bool:
        """Styles that write the system template also around an empty system message."""
        return self.sep_style not in {"LLAMA2", "FALCON_CHAT", "PREFIX_SUFFIX", *_HEADER_TAGS}

    def _turns(self, messages: Sequence[Mapping[str, Any]]) -> tuple[str, list[Turn]]:
        system = self.system_message
        turns = []
        for index, message in enumerate(messages):
            text = message["content"]
            if not isinstance(text, str):
                text = ""
            if message["role"] == "system":
                system = text
            elif message["role"] == "user":
                turns.append(Turn(self.user, text))
            elif message["role"] == "assistant":
                turns.append(Turn(self.assistant, text))
            else:
                raise InvalidRequestError(
                    f"messages[{index}]: template {self.name!r} has no role {message['role']!r}",
                    param="messages",
                )
        return system, turns

    def _parts(self, head: str, system: str, turns: Sequence[Turn]) -> list[str]:
        if self.sep_style == "LLAMA2":
            return self._llama2_parts(head or "[INST] ", turns)
        if self.sep_style in _HEADER_TAGS:
            return [head, *(self._header_turn(turn) for turn in turns)]
        if self.sep_style == "GEMMA3":
            return [head, *self._gemma_turns(turns)]
        style = _STYLES[self.sep_style]
        if style.head == "always" or (style.head == "present" and head):
            head += self.sep + style.after_head
        return [head, *(self._plain_turn(style, i, turn) for i, turn in enumerate(turns))]

    def _plain_turn(self, style: _Style, index: int, turn: Turn) -> str:
        # NOTE: an empty message reads as an open turn, as in SGLang.
        if not turn.text:
            return turn.tag + style.open_joiner
        return turn.tag + style.joiner + turn.text + self._end_of_turn(index, turn)

    def _header_turn(self, turn: Turn) -> str:
        before, after, end = _HEADER_TAGS[self.sep_style]
        header = before + turn.tag + after
        return header + turn.text.strip() + end if turn.text else header

    def _gemma_turns(self, turns: Sequence[Turn]) -> list[str]:
        # The system template has opened the first turn already.
        tags = ["", *(turn.tag for turn in turns[1:])]
        return [
            tag + turn.text + self.sep if turn.text else turn.tag
            for tag, turn in zip(tags, turns, strict=False)
        ]

    def _llama2_parts(self, head: str, turns: Sequence[Turn]) -> list[str]:
        parts = [head]
        for index, turn in enumerate(turns):
            tag = (self.user, self.assistant)[index % 2]
            if not turn.text:
                parts.append(tag)
            elif index == 0:
                parts.append(turn.text + " ")
            else:
                parts.append(f"{tag} {turn.text}{self._end_of_turn(index, turn)}")
        return parts

    def _end_of_turn(self, index: int, turn: Turn) -> str:
        """What follows the text of turn `index`."""
        if self.sep_style in _HEADER_TAGS:
            return _HEADER_TAGS[self.sep_style][2]
        if self.sep_style == "LLAMA2":
            return self.sep2 if index % 2 else self.sep
        if self.sep_style == "GEMMA3":
            return self.sep
        if self.sep_style == "PREFIX_SUFFIX":
            return self.sep2 if turn.tag == self.assistant else self.sep
        style = _STYLES[self.sep_style]
        if style.alternates and index % 2:
            return self.sep2 + style.after_sep2
        return self.sep + style.after_sep


def conversation_from_json(fields: Mapping[str, Any]) -> Conversation:
    """A template from SGLang's JSON format. Raises ValueError naming what is missing or wrong."""
    required = ("name", "system", "user", "assistant", "sep_style", "stop_str")
    if missing := [name for name in required if name not in fields]:
        raise ValueError(f"missing: {', '.join(missing)}")
    stop = fields["stop_str"] or []
    stops = [stop] if isinstance(stop, str) else list(stop)
    texts = [value for name, value in fields.items() if name != "stop_str"]
    if not all(isinstance(text, str) for text in (*texts, *stops)):
        raise ValueError("all members must be strings, and stop_str a string or a list of strings")
    return Conversation(
        name=fields["name"],
        system_template=fields["system"] + "\n{system_message}",
        system_message=fields.get("system_message", ""),
        user=fields["user"],
        assistant=fields["assistant"],
        sep_style=fields["sep_style"],
        sep=fields.get("sep", "\n"),
        sep2=fields.get("sep2", ""),
        stop=tuple(stops),
    )
