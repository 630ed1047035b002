"""SGLang's conversation templates: built-in names and the JSON format."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from services.common.errors import InvalidRequestError
from services.tokenizer.builtin_templates import BUILTIN_TEMPLATES
from services.tokenizer.chat import Chat, ChatTemplate, load_chat_template
from services.tokenizer.conversation import SEPARATOR_STYLES, Conversation

SYSTEM = {"role": "system", "content": "Be brief."}
TURNS = [
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello."},
    {"role": "user", "content": "Bye"},
]
VICUNA_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives "
    "helpful, detailed, and polite answers to the user's questions."
)
# What SGLang's Conversation.get_prompt gives for SYSTEM + TURNS.
PROMPTS = {
    "chatml": (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
        "<|im_start|>assistant\nHello.<|im_end|>\n<|im_start|>user\nBye<|im_end|>\n"
        "<|im_start|>assistant\n"
    ),
    "llama-2": (
        "[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nHi [/INST] Hello. </s><s>[INST] Bye [/INST]"
    ),
    "mistral": (
        "[SYSTEM_PROMPT]\nBe brief.\n[/SYSTEM_PROMPT]\n\nHi [/INST] Hello. </s><s>"
        "[INST] Bye [/INST]"
    ),
    "llama-4": (
        "<|header_start|>system<|header_end|>\n\nBe brief.<|eot|>"
        "<|header_start|>user<|header_end|>\n\nHi<|eot|>"
        "<|header_start|>assistant<|header_end|>\n\nHello.<|eot|>"
        "<|header_start|>user<|header_end|>\n\nBye<|eot|>"
        "<|header_start|>assistant<|header_end|>\n\n"
    ),
    "vicuna_v1.1": "Be brief. USER: Hi ASSISTANT: Hello.</s>USER: Bye ASSISTANT:",
    "gemma-it": (
        "<start_of_turn>user\nBe brief.\n\nHi<end_of_turn>\n<start_of_turn>model\nHello."
        "<end_of_turn>\n<start_of_turn>user\nBye<end_of_turn>\n<start_of_turn>model\n"
    ),
    "qwen": (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
        "<|im_start|>assistant\nHello.<|im_end|>\n<|im_start|>user\nBye<|im_end|>\n"
        "<|im_start|>assistant\n"
    ),
    "llama-3-instruct": (
        "<|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nHello.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nBye<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    ),
    "claude": "Be brief.\n\nHuman: Hi\n\nAssistant:Hello.\n\nHuman: Bye\n\nAssistant:",
}


def builtin(name: str) -> ChatTemplate:
    loaded = load_chat_template(Path("unused"), name, {})
    assert loaded is not None
    return loaded


@pytest.mark.parametrize("name", list(PROMPTS))
def test_builtin_names_give_sglangs_prompts(name: str) -> None:
    assert builtin(name).render(Chat(messages=[SYSTEM, *TURNS])) == PROMPTS[name]


@pytest.mark.parametrize(
    ("name", "start"),
    [
        ("chatml", "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user"),
        ("vicuna_v1.1", f"{VICUNA_SYSTEM} USER: Hi"),
        ("llama-2", "[INST] Hi [/INST]"),
        ("llama-4", "<|header_start|>user"),
        ("llama-3-instruct", "<|start_header_id|>user"),
        ("gemma-it", "<start_of_turn>user\nYou are a helpful assistant.\n\nHi"),
    ],
)
def test_a_chat_without_system_message_gets_the_templates_own_or_none(
    name: str, start: str
) -> None:
    assert builtin(name).render(Chat(messages=TURNS)).startswith(start)


@pytest.mark.parametrize("name", sorted(BUILTIN_TEMPLATES))
def test_an_answer_left_open_is_the_prompt_up_to_its_text(name: str) -> None:
    template = builtin(name)
    messages = TURNS[:2]
    closed = template.render(Chat(messages=messages, add_generation_prompt=False))
    left_open = template.render(
        Chat(messages=messages, add_generation_prompt=False, continue_final_message=True)
    )
    assert left_open.endswith("Hello.")
    assert closed.startswith(left_open)


def test_only_an_answer_can_be_continued() -> None:
    chat = Chat(messages=TURNS, add_generation_prompt=False, continue_final_message=True)
    with pytest.raises(InvalidRequestError, match="assistant message at the end"):
        builtin("chatml").render(chat)


def test_a_role_that_the_format_lacks_is_refused_by_place() -> None:
    chat = Chat(messages=[*TURNS, {"role": "tool", "content": "7"}])
    with pytest.raises(InvalidRequestError, match=r"messages\[3\].*no role 'tool'") as caught:
        builtin("llama-2").render(chat)
    assert caught.value.param == "messages"


@pytest.mark.parametrize(("field", "value"), [("tools", [{}]), ("variables", {"x": 1})])
def test_tools_and_variables_are_refused(field: str, value: Any) -> None:
    with pytest.raises(InvalidRequestError, match="takes no"):
        builtin("chatml").render(Chat(messages=TURNS, **{field: value}))


@pytest.mark.parametrize("style", SEPARATOR_STYLES)
def test_every_style_writes_all_texts_in_order(style: str) -> None:
    conversation = Conversation(
        name="x", system_message="S0", user="U", assistant="A", sep_style=style, sep="|", sep2="#"
    )
    prompt = conversation.render(TURNS, open_turn=True, leave_last_open=False)
    places = [prompt.index(text) for text in ("S0", "Hi", "Hello.", "Bye")]
    assert places == sorted(places)
    assert "A" in prompt[places[-1] :]


def write_json(tmp_path: Path, **changes: Any) -> str:
    fields = {
        "name": "mine",
        "system": "<|im_start|>system",
        "user": "<|im_start|>user",
        "assistant": "<|im_start|>assistant",
        "sep_style": "CHATML",
        "sep": "<|im_end|>",
        "stop_str": ["<|im_end|>", "<|im_start|>"],
        **changes,
    }
    path = tmp_path / "mine.json"
    path.write_text(json.dumps({name: v for name, v in fields.items() if v is not None}))
    return str(path)


def test_sglangs_json_format_is_loaded_with_its_stop_strings(tmp_path: Path) -> None:
    template = load_chat_template(tmp_path, write_json(tmp_path), {})
    assert template is not None
    assert template.render(Chat(messages=[SYSTEM, *TURNS])) == PROMPTS["chatml"]
    assert list(template.stop) == ["<|im_end|>", "<|im_start|>"]
    one = load_chat_template(tmp_path, write_json(tmp_path, stop_str="###"), {})
    assert one is not None
    assert list(one.stop) == ["###"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"user": None, "stop_str": None}, "missing: user, stop_str"),
        ({"sep_style": "NO_SUCH"}, "unknown sep_style 'NO_SUCH'; known are .*CHATML"),
        ({"sep": 5}, "must be strings"),
        ({"system": 5}, "must be strings"),
        ({"stop_str": [5]}, "must be strings"),
    ],
)
def test_a_malformed_json_template_says_what_is_wrong(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        load_chat_template(tmp_path, write_json(tmp_path, **changes), {})


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"'lama-2' is neither a file nor one of .*llama-2"):
        load_chat_template(Path("unused"), "lama-2", {})
