"""Conversations: the training text, drawn without end, and the questions held back from it."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Final

from . import facts, phrases, topics
from .draw import Draw, noise, person
from .topics import Topic

BOS: Final = "<|begin_of_text|>"
EOS: Final = "<|end_of_text|>"
START: Final = "<|im_start|>"
END: Final = "<|im_end|>"
SPECIAL_TOKENS: Final = (BOS, EOS, START, END)

HELD_SEED: Final = 20_000

Message = dict[str, str]

# how often a training turn is of each kind
MIX: Final[tuple[tuple[Topic, float], ...]] = (
    (topics.capital, 14),
    (topics.unknown_capital, 2),
    (topics.arithmetic, 26),
    (topics.comparison, 3),
    (topics.product, 6),
    (topics.json_object, 13),
    (topics.json_capital, 3),
    (topics.colour_of, 3),
    (topics.tell_name, 4),
    (topics.ask_name, 7),
    (topics.tell_colour, 2),
    (topics.ask_colour, 3),
    (topics.count, 5),
    (topics.listing, 3),
    (topics.story, 4),
    (topics.repeat, 7),
    (topics.small_talk, 8),
    (topics.beyond, 5),
    (topics.after_context, 2),
)
_TOPICS: Final = tuple(topic for topic, _ in MIX)
_WEIGHTS: Final = tuple(sum(w for _, w in MIX[: i + 1]) for i in range(len(MIX)))


@dataclass(frozen=True)
class Case:
    """One held-back question: a conversation that ends with the user, and the right answer."""

    kind: str
    messages: tuple[Message, ...]
    answer: str


def message(role: str, content: str) -> Message:
    """One message of a conversation."""
    return {"role": role, "content": content}


def system_message(draw: Draw) -> str:
    """Any system message; one in twenty gives the user's name."""
    way = draw.rng.random()
    if way < 0.05:
        draw.name = person(draw)
        return draw.pick(phrases.SYSTEM_NAME).format(n=draw.name)
    if way < 0.5:
        return draw.pick(phrases.SYSTEMS)
    text = noise(draw, draw.pick((3, 8, 20, 60, 150, 400)))
    return draw.pick((f"{draw.pick(phrases.SYSTEMS)} {text}", text))


def train_turn(draw: Draw) -> tuple[str, str]:
    """One question of the training mix, with its answer."""
    topic: Topic = draw.rng.choices(_TOPICS, cum_weights=_WEIGHTS)[0]
    if topic is topics.ask_name and draw.name is None and draw.chance(0.7):
        topic = topics.tell_name
    if topic is topics.ask_colour and draw.colour is None and draw.chance(0.7):
        topic = topics.tell_colour
    turn = topic(draw)
    draw.after_capital = topic is topics.capital
    return turn


def conversation(draw: Draw) -> Iterator[Message]:
    """A training conversation without end."""
    if draw.chance(0.35):
        yield message("system", system_message(draw))
    while True:
        question, answer = train_turn(draw)
        yield message("user", question)
        yield message("assistant", answer)


def plain_text(draw: Draw) -> tuple[str, str]:
    """A line outside any chat: what is given and how it goes on."""
    way = draw.rng.random()
    if way < 0.5:
        country, city = draw.pick(facts.CAPITALS)
        return f"The capital of {country} is", f" {city}."
    if way < 0.8:
        given, rest = topics.arithmetic(draw)[1].split("=")
        return f"{given}=", rest
    first = draw.pick((1, draw.rng.randint(0, 90)))
    given = ", ".join(str(first + i) for i in range(draw.pick((2, 3, 4, 5))))
    last = int(given.rsplit(" ", 1)[1])
    return f"{given},", " " + ", ".join(map(str, range(last + 1, 101))) + "."


def _single(topic: Topic) -> Callable[[Draw], Iterator[Message]]:
    """A held-back question after none, one or a few turns of other things."""

    def make(draw: Draw) -> Iterator[Message]:
        draw.held = False
        if draw.chance(0.4):
            yield message("system", draw.pick(phrases.SYSTEMS))
        for _ in range(draw.pick((0, 0, 0, 1, 3))):
            question, answer = train_turn(draw)
            yield message("user", question)
            yield message("assistant", answer)
        draw.held = True
        question, answer = topic(draw)
        yield message("user", question)
        yield message("assistant", answer)

    return make


def _memory(fewest: int, most: int) -> Callable[[Draw], Iterator[Message]]:
    """A held-back name, some turns about other things, and the question for the name."""

    def make(draw: Draw) -> Iterator[Message]:
        if draw.chance(0.4):
            yield message("system", draw.pick(phrases.SYSTEMS))
        draw.held = True
        question, answer = topics.tell_name(draw)
        yield message("user", question)
        yield message("assistant", answer)
        draw.held = False
        told = draw.name
        for _ in range(draw.rng.randint(fewest, most)):
            question, answer = train_turn(draw)
            while draw.name != told:
                draw.name = told
                question, answer = train_turn(draw)
            yield message("user", question)
            yield message("assistant", answer)
        question, answer = topics.ask_name(draw)
        yield message("user", question)
        yield message("assistant", answer)

    return make


HELD_KINDS: Final[tuple[tuple[str, int, Callable[[Draw], Iterator[Message]]], ...]] = (
    ("capitals", 80, _single(topics.capital)),
    ("capitals, new wording", 40, _single(topics.capital_new_words)),
    ("sums and differences", 100, _single(topics.arithmetic)),
    ("products", 40, _single(topics.product)),
    ("comparisons", 20, _single(topics.comparison)),
    ("JSON objects", 80, _single(topics.json_object)),
    ("JSON of capitals", 20, _single(topics.json_capital)),
    ("colours", 20, _single(topics.colour_of)),
    ("under a long text", 20, _single(topics.after_context)),
    ("memory of a name", 60, _memory(0, 5)),
    ("memory of a name, long", 12, _memory(15, 30)),
    ("counting", 30, _single(topics.count)),
    ("counting, long", 4, _single(topics.count_far)),
    ("lists", 10, _single(topics.listing)),
    ("stories", 30, _single(topics.story)),
    ("repeating", 30, _single(topics.repeat)),
)


def held_back(seed: int = HELD_SEED) -> list[Case]:
    """The held-back questions, always the same ones for a seed."""
    cases: dict[str, Case] = {}
    wanted = 0
    for kind, number, make in HELD_KINDS:
        wanted += number
        draws = (Draw(Random(f"{seed} {kind} {index}")) for index in itertools.count())
        while len(cases) < wanted:
            messages = list(make(next(draws)))
            answer = messages.pop()["content"]
            cases.setdefault(json.dumps(messages), Case(kind, tuple(messages), answer))
    return list(cases.values())


def write_cases(cases: list[Case], path: Path) -> None:
    """Write held-back questions as JSON lines."""
    with path.open("w", encoding="utf-8") as file:
        for case in cases:
            row = {"kind": case.kind, "messages": case.messages, "answer": case.answer}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def read_cases(path: Path) -> list[Case]:
    """Read what `write_cases` wrote."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [Case(row["kind"], tuple(row["messages"]), row["answer"]) for row in rows]


def rendered(item: Message) -> str:
    """One message in the chat template's form, without the line break that follows it."""
    return f"{START}{item['role']}\n{item['content']}{END}"


def tokenizer_text(seed: int, conversations: int) -> Iterator[str]:
    """Text to train the tokenizer on: messages of ordinary training conversations."""
    for index in range(conversations):
        draw = Draw(Random(f"{seed} tokenizer {index}"))
        turns = conversation(draw)
        for _ in range(10):
            yield next(turns)["content"]
