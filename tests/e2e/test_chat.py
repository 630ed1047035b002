"""The whole road with a real client: answers, streams, usage, equality."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

from openai.types.chat import ChatCompletionMessageParam

from tests.e2e.system import System

QUESTION: list[ChatCompletionMessageParam] = [
    {"role": "user", "content": "What is the capital of France?"}
]


def ask(system: System, **options: object) -> str:
    reply = system.openai.chat.completions.create(  # type: ignore[call-overload]
        model="default", messages=QUESTION, **{"temperature": 0, "max_tokens": 64, **options}
    )
    return str(reply.choices[0].message.content)


def test_the_built_in_model_knows_its_capitals(system: System) -> None:
    assert "Paris" in ask(system)


def test_a_stream_says_what_the_whole_reply_says(system: System) -> None:
    stream = system.openai.chat.completions.create(
        model="default",
        messages=QUESTION,
        temperature=0,
        max_tokens=64,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == ask(system)
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "stop"
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens > 0


def test_a_conversation_remembers_a_name(system: System) -> None:
    messages: list[ChatCompletionMessageParam] = [
        {"role": "user", "content": "My name is Emma."},
    ]
    first = system.openai.chat.completions.create(
        model="default", messages=messages, temperature=0, max_tokens=64
    )
    # A message that came from us goes back as it is.
    messages.append(first.choices[0].message.model_dump())  # type: ignore[arg-type]
    messages.append({"role": "user", "content": "What is my name?"})
    second = system.openai.chat.completions.create(
        model="default", messages=messages, temperature=0, max_tokens=64
    )
    assert "Emma" in str(second.choices[0].message.content)
    assert second.usage is not None
    assert second.usage.prompt_tokens_details is not None
    assert (second.usage.prompt_tokens_details.cached_tokens or 0) > 0


def test_four_identical_concurrent_requests_give_identical_text(system: System) -> None:
    with ThreadPoolExecutor(4) as pool:
        texts = set(pool.map(lambda _: ask(system), range(4)))
    assert len(texts) == 1


def test_a_seed_reproduces_and_choices_differ(system: System) -> None:
    def sample() -> list[str]:
        reply = system.openai.chat.completions.create(
            model="default",
            messages=[{"role": "user", "content": "Tell me something."}],
            temperature=2.0,
            max_tokens=96,
            seed=7,
            n=3,
            extra_body={"ignore_eos": True},
        )
        return [str(choice.message.content) for choice in reply.choices]

    first = sample()
    assert len(set(first)) == 3
    assert sample() == first


def test_alone_and_in_a_crowd_the_answer_is_the_same(system: System) -> None:
    questions = [f"What is {a} plus {b}?" for a in range(1, 9) for b in range(1, 5)]

    def answer(question: str) -> str:
        reply = system.openai.chat.completions.create(
            model="default",
            messages=[{"role": "user", "content": question}],
            temperature=0,
            max_tokens=48,
        )
        return str(reply.choices[0].message.content)

    alone = [answer(question) for question in questions[:4]]
    with ThreadPoolExecutor(32) as pool:
        crowd = list(pool.map(answer, questions))
    assert crowd[:4] == alone
