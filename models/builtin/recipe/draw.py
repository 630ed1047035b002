"""What every question is drawn with: chance, what is held back, names and senseless text."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random
from typing import Final, TypeVar

from . import facts, phrases

T = TypeVar("T")
HELD_PERCENT: Final = 10


def is_held(*key: object) -> bool:
    """Whether the question with this key is held back from training."""
    text = "|".join(map(str, key))
    return zlib.crc32(text.encode()) % 1000 < HELD_PERCENT * 10


@dataclass
class Draw:
    """One conversation's random source and what its user has told so far."""

    rng: Random
    held: bool = False
    name: str | None = None
    colour: str | None = None
    after_capital: bool = False

    def pick(self, items: Sequence[T]) -> T:
        """Any one of the items."""
        return items[int(self.rng.random() * len(items))]

    def chance(self, probability: float) -> bool:
        """True with this probability."""
        return self.rng.random() < probability

    def until_side(self, make: Callable[[], tuple[T, tuple[object, ...]]]) -> T:
        """Draw (value, key) pairs until the key lies on this draw's side."""
        while True:
            value, key = make()
            if is_held(*key) == self.held:
                return value


def dressed(draw: Draw, question: str, *, keep_case: bool = False) -> str:
    """Sometimes put a lead-in before a question, or write it carelessly."""
    if draw.chance(0.12) and question[-1] in ".?!":
        question = question[:-1]
    elif draw.chance(0.1):
        question += draw.pick(phrases.SUFFIXES)
    if draw.chance(0.2):
        question = draw.pick(phrases.PREFIXES) + question
    if not keep_case and draw.chance(0.12):
        question = question.lower()
    return question


def made_up_name(draw: Draw) -> str:
    """A name of two to four syllables."""
    count = draw.pick((2, 2, 3, 3, 4))
    return "".join(draw.pick(facts.SYLLABLES) for _ in range(count)).capitalize()


def person(draw: Draw) -> str:
    """A name, known or made up."""

    def make() -> tuple[str, tuple[object, ...]]:
        name = draw.pick(facts.NAMES) if draw.chance(0.5) else made_up_name(draw)
        way = draw.rng.random()
        if way < 0.05:
            name = f"{name}-{made_up_name(draw)}"
        elif way < 0.1:
            name = f"{name} {made_up_name(draw)}"
        elif way < 0.12:
            name = f"O'{name}"
        elif way < 0.16:
            letters = "".join(draw.pick("abcdefghijklmnoprstuvwxyz") for _ in "1234")
            name = f"{letters.capitalize()}{draw.pick(('', str(draw.rng.randint(0, 999))))}"
        return name, ("name", name)

    return draw.until_side(make)


def copy_text(draw: Draw) -> str:
    """Words, letters, numbers or characters of any script, to be copied."""
    length = draw.pick((1, 2, 3, 5, 8, 12, 20))
    way = draw.rng.random()
    if way < 0.4:
        return " ".join(draw.pick(facts.WORDS) for _ in range(length))
    if way < 0.55:
        return " ".join(made_up_name(draw) for _ in range(length))
    if way < 0.7:
        return " ".join(str(draw.rng.randint(0, 9999)) for _ in range(length))
    if way < 0.8:
        return " ".join(
            "".join(
                draw.pick("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ") for _ in "12345"
            )
            for _ in range(length)
        )
    blocks = ((0xC0, 0x17F), (0x391, 0x3C9), (0x410, 0x44F), (0x4E00, 0x9FA5), (0x1F600, 0x1F64F))
    low, high = draw.pick(blocks)
    text = "".join(chr(draw.rng.randint(low, high)) for _ in range(length))
    return text + draw.pick(("", "!", " end", "?"))


def noise(draw: Draw, words: int) -> str:
    """Sentences without sense, about this many words long."""
    if draw.chance(0.15):
        unit = draw.pick((draw.pick(facts.WORDS), made_up_name(draw), copy_text(draw), "x", "."))
        return draw.pick((" ", "", "\n")).join([unit] * max(1, words // len(unit.split())))
    out: list[str] = []
    while words > 0:
        size = min(words, draw.rng.randint(4, 14))
        sentence = [
            draw.pick(facts.WORDS) if draw.chance(0.85) else made_up_name(draw).lower()
            for _ in range(size)
        ]
        out.append(" ".join(sentence).capitalize() + draw.pick((".", ".", ".", "?", "!")))
        words -= size
    return draw.pick((" ", " ", "\n")).join(out)
