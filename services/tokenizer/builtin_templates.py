"""Conversation templates that `--chat-template` knows by name.

Names, texts and stop strings are those of SGLang's registries (`srt/parser/conversation.py` for
the server, `lang/chat_template.py` for its frontend language).
"""

from __future__ import annotations

from collections.abc import Mapping

from services.tokenizer.conversation import Conversation

_ASSISTANT = "You are a helpful assistant."


def _prefix_suffix(
    name: str,
    turns: Mapping[str, tuple[str, str]],
    *,
    system_message: str = "",
    stop: tuple[str, ...] = (),
) -> Conversation:
    """A template that puts fixed strings before and after each role's text."""
    before, after = turns.get("system", ("", ""))
    return Conversation(
        name=name,
        system_template=before + "{system_message}" + after,
        system_message=system_message,
        user=turns["user"][0],
        assistant=turns["assistant"][0],
        sep_style="PREFIX_SUFFIX",
        sep=turns["user"][1],
        sep2=turns["assistant"][1],
        stop=stop,
    )


_CHATML_TURNS = {
    "system": ("<|im_start|>system\n", "<|im_end|>\n"),
    "user": ("<|im_start|>user\n", "<|im_end|>\n"),
    "assistant": ("<|im_start|>assistant\n", "<|im_end|>\n"),
}
_LLAMA3_TURNS = {
    role: (f"<|start_header_id|>{role}<|end_header_id|>\n\n", "<|eot_id|>")
    for role in ("system", "user", "assistant")
}
_GRANITE_TURNS = {
    role: (f"<|start_of_role|>{role}<|end_of_role|>", "<|end_of_text|>")
    for role in ("system", "user", "assistant")
}

_DEEPSEEK_END = "<\uff5cend\u2581of\u2581sentence\uff5c>"

_TEMPLATES = (
    Conversation(
        name="chatml",
        system_template="<|im_start|>system\n{system_message}",
        system_message=_ASSISTANT,
        user="<|im_start|>user",
        assistant="<|im_start|>assistant",
        sep_style="CHATML",
        sep="<|im_end|>",
        stop=("<|endoftext|>", "<|im_end|>"),
    ),
    Conversation(
        name="llama-2",
        system_template="[INST] <<SYS>>\n{system_message}\n<</SYS>>\n\n",
        user="[INST]",
        assistant="[/INST]",
        sep_style="LLAMA2",
        sep=" ",
        sep2=" </s><s>",
        stop=("[INST]", "[/INST]", "<<SYS>>", "<</SYS>>"),
    ),
    Conversation(
        name="mistral",
        system_template="[SYSTEM_PROMPT]\n{system_message}\n[/SYSTEM_PROMPT]\n\n",
        user="[INST]",
        assistant="[/INST]",
        sep_style="LLAMA2",
        sep=" ",
        sep2=" </s><s>",
        stop=("[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]"),
    ),
    Conversation(
        name="llama-4",
        system_template="<|header_start|>system<|header_end|>\n\n{system_message}<|eot|>",
        user="user",
        assistant="assistant",
        sep_style="LLAMA4",
        sep="",
        stop=("<|end_of_text|>", "<|eot|>", "<|eom|>"),
    ),
    Conversation(
        name="vicuna_v1.1",
        system_message=(
            "A chat between a curious user and an artificial intelligence assistant. "
            "The assistant gives helpful, detailed, and polite answers to the user's questions."
        ),
        user="USER",
        assistant="ASSISTANT",
        sep_style="ADD_COLON_TWO",
        sep=" ",
        sep2="</s>",
    ),
    Conversation(
        name="gemma-it",
        system_template="<start_of_turn>user\n{system_message}\n\n",
        system_message=_ASSISTANT,
        user="<start_of_turn>user\n",
        assistant="<start_of_turn>model\n",
        sep_style="GEMMA3",
        sep="<end_of_turn>\n",
        stop=("<end_of_turn>",),
    ),
    _prefix_suffix("qwen", _CHATML_TURNS, system_message=_ASSISTANT, stop=("<|im_end|>",)),
    _prefix_suffix("llama-3-instruct", _LLAMA3_TURNS, stop=("<|eot_id|>",)),
    _prefix_suffix("granite-3-instruct", _GRANITE_TURNS, stop=("<|end_of_text|>",)),
    _prefix_suffix(
        "c4ai-command-r",
        {
            "system": ("<|START_OF_TURN_TOKEN|><|SYSTEM_TOKEN|>", "<|END_OF_TURN_TOKEN|>"),
            "user": ("<|START_OF_TURN_TOKEN|><|USER_TOKEN|>", "<|END_OF_TURN_TOKEN|>"),
            "assistant": ("<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>", "<|END_OF_TURN_TOKEN|>"),
        },
    ),
    _prefix_suffix(
        "deepseek-v3",
        {
            "user": ("<\uff5cUser\uff5c>", ""),
            "assistant": ("<\uff5cAssistant\uff5c>", _DEEPSEEK_END),
        },
        stop=(_DEEPSEEK_END,),
    ),
    _prefix_suffix(
        "yi-1.5",
        {
            "user": ("<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n"),
            "assistant": ("", "<|im_end|>\n"),
        },
        stop=("<|im_end|>",),
    ),
    _prefix_suffix(
        "claude",
        {"user": ("\n\nHuman: ", ""), "assistant": ("\n\nAssistant:", "")},
    ),
)

BUILTIN_TEMPLATES = {template.name: template for template in _TEMPLATES}
