"""Jinja chat templates: transformers' behaviour, content parts, refusals, the sandbox."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from services.common.errors import InvalidRequestError
from services.common.model_files import builtin_model_path, chat_template_digest
from services.tokenizer.chat import Chat, JinjaChatTemplate, load_chat_template

CHATML = (
    "{{- bos_token }}{% for message in messages %}\n"
    "    {{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}\n"
    "{% endfor %}\n"
    "{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
TRIMMING = "{% for m in messages %}[{{ m.role }}]{{ m.content | trim }}\n{% endfor %}"
TOOLS = (
    "{% if tools %}{{ tools | tojson(indent=2) }}{% endif %}"
    "{% for m in messages if m.role != 'hidden' %}{% if loop.index0 > 3 %}{% break %}{% endif %}"
    "{% generation %}{{ m.content }}{% endgeneration %}"
    "{% for call in m.tool_calls or [] %}{{ call.function.arguments | tojson }}{% endfor %}"
    "{{ loop.last }}{% endfor %}{{ documents }}{{ enable_thinking }}"
)
PARTS = (
    "{% for message in messages %}{% if message.content is string %}{{ message.content }}"
    "{% else %}{% for part in message.content or [] %}<{{ part.text }}>{% endfor %}{% endif %}"
    "{% endfor %}"
)
USER = {"role": "user", "content": "Hi <b>&</b> 日本"}
ANSWER = {"role": "assistant", "content": "Well, "}
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}


def template(source: str, **options: Any) -> JinjaChatTemplate:
    return JinjaChatTemplate({"default": source}, SPECIAL, **options)


@pytest.mark.parametrize("source", [CHATML, TRIMMING, TOOLS, PARTS])
@pytest.mark.parametrize("add_generation_prompt", [True, False])
def test_templates_render_as_in_transformers(source: str, add_generation_prompt: bool) -> None:
    messages = [{"role": "system", "content": " be nice "}, USER, ANSWER, USER, USER]
    tools = [{"type": "function", "function": {"name": "<f>", "parameters": {}}}]
    variables = {"documents": [{"title": "t"}], "enable_thinking": False}
    [expected], _ = render_jinja_template(
        [messages],
        tools=tools,
        chat_template=source,
        add_generation_prompt=add_generation_prompt,
        **variables,
        **SPECIAL,
    )
    chat = Chat(
        messages=messages,
        tools=tools,
        variables=variables,
        add_generation_prompt=add_generation_prompt,
    )
    assert template(source).render(chat) == expected


@pytest.mark.parametrize("source", [CHATML, TRIMMING, PARTS])
@pytest.mark.parametrize("text", ["The answer", "ends in spaces  ", "Well", "same\nsame"])
def test_the_final_message_is_continued_as_in_transformers(source: str, text: str) -> None:
    messages = [USER, {"role": "assistant", "content": text}]
    [expected], _ = render_jinja_template(
        [messages], chat_template=source, continue_final_message=True, **SPECIAL
    )
    chat = Chat(messages=messages, add_generation_prompt=False, continue_final_message=True)
    assert template(source).render(chat) == expected


def test_a_final_message_of_parts_is_continued_in_its_last_part() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    messages = [{"role": "assistant", "content": parts}]
    chat = Chat(messages=messages, continue_final_message=True)
    assert template(PARTS).render(chat) == "<a><b"
    assert parts[-1]["text"] == "b", "the caller's message is left as it was"


@pytest.mark.parametrize("messages", [[], [{"role": "assistant", "content": []}]])
def test_nothing_to_continue_is_refused(messages: list[dict[str, Any]]) -> None:
    with pytest.raises(InvalidRequestError, match="to continue"):
        template(PARTS).render(Chat(messages=messages, continue_final_message=True))


def test_a_template_that_drops_the_final_message_cannot_continue_it() -> None:
    with pytest.raises(InvalidRequestError, match="cannot be continued"):
        template("{{ messages[0].content }}").render(
            Chat(messages=[USER, ANSWER], continue_final_message=True)
        )


def test_parts_are_joined_for_templates_that_want_strings_and_kept_for_others() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    chat = Chat(messages=[{"role": "user", "content": parts}], add_generation_prompt=False)
    assert template(TRIMMING).render(chat) == "[user]ab\n"
    assert template(PARTS).render(chat) == "<a><b>"


@pytest.mark.parametrize(
    ("source", "kept"),
    [
        ("{% for m in messages %}{% for c in m['content'] %}{{ c }}{% endfor %}{% endfor %}", True),
        ("{% macro f(content) %}{% for c in content %}{{ c }}{% endfor %}{% endmacro %}"
         "{% for m in messages %}{{ f(m.content) }}{% endfor %}", True),
        ("{% for m in messages %}{% for l in m.content.split('x') %}{{ l }}{% endfor %}"
         "{% endfor %}", False),
        ("{% for m in messages if m.content %}{{ m.content }}{% endfor %}", False),
    ],
)  # fmt: skip
def test_templates_that_loop_over_content_get_lists(source: str, kept: bool) -> None:
    parts = [{"type": "text", "text": "a"}]
    rendered = template(source).render(Chat(messages=[{"role": "user", "content": parts}]))
    assert (rendered == "a") is not kept


@pytest.mark.parametrize(
    "part", [{"type": "image_url", "image_url": {}}, "text", {"type": "text"}, {"text": "a"}]
)
def test_parts_other_than_text_are_refused_by_place(part: Any) -> None:
    with pytest.raises(InvalidRequestError, match=r"messages\[1\]\.content") as caught:
        template(CHATML).render(Chat(messages=[USER, {"role": "user", "content": [part]}]))
    assert caught.value.param == "messages"


def test_null_members_are_absent_and_tool_arguments_are_objects() -> None:
    source = (
        "{% for m in messages %}{{ m.refusal is defined }}{{ m.tool_calls is defined }}"
        "[{{ m.content }}]{% for c in m.tool_calls %}{{ c.function.arguments.x }}"
        "{{ c.function.arguments is string }}{% endfor %};{% endfor %}"
    )
    calls = [
        {"function": {"name": "f", "arguments": '{"x": 7}'}},
        {"function": {"name": "f", "arguments": "not JSON"}},
    ]
    rendered = template(source).render(
        Chat(
            messages=[
                {"role": "assistant", "content": "a", "refusal": None, "tool_calls": None},
                {"role": "assistant", "content": None, "tool_calls": calls},
            ]
        )
    )
    assert rendered == "FalseFalse[a];FalseTrue[]7FalseTrue;"


def test_a_template_that_refuses_says_why() -> None:
    source = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(InvalidRequestError, match="roles must alternate") as caught:
        template(source).render(Chat(messages=[USER]))
    assert caught.value.param == "messages"


@pytest.mark.parametrize(
    "source",
    ["{{ messages[9].content.x }}", "{{ 1 / 0 }}", "{{ messages + 1 }}", "{{ undefined_name() }}"],
)
def test_a_template_that_fails_on_its_messages_refuses_them(source: str) -> None:
    with pytest.raises(InvalidRequestError, match="refuses the messages"):
        template(source).render(Chat(messages=[USER]))


@pytest.mark.parametrize("name", ["messages", "tools", "add_generation_prompt"])
def test_variables_cannot_replace_the_chat(name: str) -> None:
    with pytest.raises(InvalidRequestError, match=name) as caught:
        template(CHATML).render(Chat(messages=[USER], variables={name: 1}))
    assert caught.value.param == "chat_template_kwargs"


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ raise_exception.__globals__ }}",
        "{{ messages.__init__.__globals__['os'].system('id') }}",
        "{{ messages.append({'role': 'user'}) }}",
        "{{ messages[0].update({'content': ''}) }}",
        "{{ dict.__class__ }}{{ dict.mro() }}",
        "{% set n = namespace(_x=1) %}",
        "{% set n = namespace() %}{% set n.__class__ = 1 %}",
        "{{ 'a' * 100000000000 }}",
        "{{ [0] * 100000000000 }}",
        "{{ 9 ** 9999999 }}",
        "{{ '{0.__class__.__globals__}'.format(raise_exception) }}",
        "{% for i in range(1000000000) %}{% endfor %}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    ],
)
def test_hostile_templates_get_nowhere(source: str) -> None:
    messages = [dict(USER)]
    try:
        rendered = template(source).render(Chat(messages=messages))
    except InvalidRequestError:
        rendered = ""
    assert "<" not in rendered
    assert messages == [USER]


@pytest.mark.parametrize(
    "source",
    [
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}"
        "{{ f(99) }}",
    ],
)
def test_templates_without_end_are_ended(source: str) -> None:
    with pytest.raises(InvalidRequestError, match=r"took longer than 0\.05 s"):
        template(source, time_limit_s=0.05).render(Chat(messages=[USER]))


def test_bad_syntax_is_an_error_when_loading() -> None:
    with pytest.raises(ValueError, match="line 2"):
        template("fine\n{% if %}")


def test_the_tool_use_template_serves_chats_with_tools(tmp_path: Path) -> None:
    named = [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "tools"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}))
    loaded = load_chat_template(tmp_path, None, {})
    assert loaded is not None
    assert loaded.render(Chat(messages=[USER])) == "plain"
    assert loaded.render(Chat(messages=[USER], tools=[{}])) == "tools"


@pytest.mark.parametrize(
    "found", [[{"name": "default"}], [7], 7, [{"name": "tool_use", "template": "tools"}]]
)
def test_a_malformed_list_of_templates_is_an_error_when_loading(tmp_path: Path, found: Any) -> None:
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": found}))
    with pytest.raises(ValueError, match="malformed chat_template|no template is named 'default'"):
        load_chat_template(tmp_path, None, {})


def test_the_template_file_goes_before_the_configuration(tmp_path: Path) -> None:
    assert load_chat_template(tmp_path, None, {}) is None
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": "config"}))
    (tmp_path / "chat_template.jinja").write_text("file")
    loaded = load_chat_template(tmp_path, None, {})
    assert loaded is not None
    assert loaded.render(Chat(messages=[USER])) == "file"
    override = tmp_path / "other.jinja"
    override.write_text("override\n")
    loaded = load_chat_template(tmp_path, str(override), {})
    assert loaded is not None
    assert loaded.render(Chat(messages=[USER])) == "override"
    digests = {chat_template_digest(tmp_path, o) for o in (None, str(override), "chatml")}
    assert len(digests) == 3


def test_the_builtin_models_template_renders_as_in_transformers() -> None:
    config = json.loads((builtin_model_path() / "tokenizer_config.json").read_text())
    loaded = load_chat_template(builtin_model_path(), None, {"bos_token": config["bos_token"]})
    assert loaded is not None
    source_file = builtin_model_path() / "chat_template.jinja"
    source = source_file.read_text() if source_file.is_file() else config["chat_template"]
    messages = [{"role": "system", "content": "be nice"}, USER]
    [expected], _ = render_jinja_template(
        [messages],
        chat_template=source,
        add_generation_prompt=True,
        bos_token=config["bos_token"],
    )
    assert loaded.render(Chat(messages=messages)) == expected
