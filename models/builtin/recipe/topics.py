"""One function per kind of question: each draws a question and its one right answer.

Every function takes a `Draw`. With `held` false it never returns what is held back for the
evaluation; with `held` true it returns only that. What is held back is decided by a hash of
what identifies the question (the pair of numbers, the thing with its colour and size, ...),
so no list has to be kept and the two sides can never meet.
"""

from __future__ import annotations

import json
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


Turn = tuple[str, str]
Topic = Callable[[Draw], Turn]


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
        return name, ("name", name)

    return draw.until_side(make)


def capital(draw: Draw) -> Turn:
    """The capital of a country, or the country of a capital."""

    def make() -> tuple[tuple[str, str, str], tuple[object, ...]]:
        country, city = draw.pick(facts.CAPITALS)
        way = draw.rng.random()
        if way < 0.25 and draw.after_capital and not draw.held:
            forms, answer = phrases.CAPITAL_FOLLOW_UP, f"The capital of {country} is {city}."
        elif way < 0.8:
            forms, answer = phrases.CAPITAL, f"The capital of {country} is {city}."
        else:
            forms, answer = phrases.COUNTRY_OF, f"{city} is the capital of {country}."
        form = draw.pick(forms)
        return (form, answer, country), ("capital", form, country)

    form, answer, country = draw.until_side(make)
    city = dict(facts.CAPITALS)[country]
    return dressed(draw, form.format(c=country, k=city)), answer


def capital_new_words(draw: Draw) -> Turn:
    """The capital of a country, asked in words that training never uses. Held back as a whole."""
    country, city = draw.pick(facts.CAPITALS)
    question = draw.pick(phrases.CAPITAL_HELD).format(c=country)
    return question, f"The capital of {country} is {city}."


def unknown_capital(draw: Draw) -> Turn:
    """The capital of a country that does not exist."""
    country = person(draw)
    while country in facts.NAMES:
        country = person(draw)
    question = draw.pick(phrases.CAPITAL).format(c=country)
    return dressed(draw, question, keep_case=True), f"I do not know the capital of {country}."


def _operands(draw: Draw, kind: str) -> tuple[int, int]:
    def make() -> tuple[tuple[int, int], tuple[object, ...]]:
        top = 20 if draw.chance(0.4) else 99
        a, b = draw.rng.randint(0, top), draw.rng.randint(0, top)
        return (a, b), (kind, min(a, b), max(a, b))

    return draw.until_side(make)


def arithmetic(draw: Draw) -> Turn:
    """A sum or a difference of two numbers below a hundred."""
    if draw.chance(0.5):
        a, b = _operands(draw, "sum")
        question = draw.pick(phrases.SUM).format(a=a, b=b)
        return dressed(draw, question), f"{a} + {b} = {a + b}."
    a, b = _operands(draw, "difference")
    if a < b and draw.chance(0.6):
        a, b = b, a
    question = draw.pick(phrases.DIFFERENCE).format(a=a, b=b)
    return dressed(draw, question), f"{a} - {b} = {a - b}."


def comparison(draw: Draw) -> Turn:
    """Which of two different numbers is larger."""
    a, b = _operands(draw, "compare")
    while a == b:
        a, b = _operands(draw, "compare")
    question = draw.pick(phrases.COMPARE).format(a=a, b=b)
    return dressed(draw, question), f"{max(a, b)} is larger than {min(a, b)}."


def product(draw: Draw) -> Turn:
    """A product out of the tables up to twelve; held back by pair and wording together."""

    def make() -> tuple[tuple[int, int, str], tuple[object, ...]]:
        a, b = draw.rng.randint(0, 12), draw.rng.randint(0, 12)
        form = draw.pick(phrases.PRODUCT)
        return (a, b, form), ("product", a, b, form)

    a, b, form = draw.until_side(make)
    return dressed(draw, form.format(a=a, b=b)), f"{a} * {b} = {a * b}."


def _thing(draw: Draw) -> tuple[str, str, str]:
    def make() -> tuple[tuple[str, str, str], tuple[object, ...]]:
        it = draw.pick(facts.OBJECTS), draw.pick(facts.COLOURS), draw.pick(facts.SIZES)
        return it, ("thing", *it)

    return draw.until_side(make)


def _worded(draw: Draw, it: tuple[str, str, str]) -> str:
    text = draw.pick(phrases.THING).format(thing=it[0], colour=it[1], size=it[2])
    return text.replace("a orange", "an orange")


def json_object(draw: Draw) -> Turn:
    """A thing with its colour and size as a JSON object, or two of them as a list."""
    thing, colour, size = it = _thing(draw)
    whole = {"object": thing, "colour": colour, "size": size}
    way = draw.rng.random()
    if way < 0.55:
        question = draw.pick(phrases.JSON_WHOLE).format(x=_worded(draw, it))
        return dressed(draw, question), json.dumps(whole)
    if way < 0.8:
        named = draw.pick(phrases.THING[:2]).format(thing=thing, colour=colour, size=size)
        key = draw.pick(("colour", "size"))
        forms = phrases.JSON_COLOUR if key == "colour" else phrases.JSON_SIZE
        return dressed(draw, draw.pick(forms).format(x=named)), json.dumps({key: whole[key]})
    other = _thing(draw)
    second = {"object": other[0], "colour": other[1], "size": other[2]}
    question = draw.pick(phrases.JSON_PAIR).format(x=_worded(draw, it), y=_worded(draw, other))
    return dressed(draw, question), json.dumps([whole, second])


def tell_name(draw: Draw) -> Turn:
    """The user gives a name, which is remembered."""
    draw.name = person(draw)
    if draw.chance(0.05):
        draw.name = draw.name.lower()
    question = draw.pick(phrases.TELL_NAME).format(n=draw.name)
    if draw.chance(0.1):
        question = question[:-1]
    return question, f"Nice to meet you, {draw.name}."


def ask_name(draw: Draw) -> Turn:
    """The user asks for the name given before, if any was."""
    answer = f"Your name is {draw.name}." if draw.name else "You have not told me your name."
    return dressed(draw, draw.pick(phrases.ASK_NAME)), answer


def tell_colour(draw: Draw) -> Turn:
    """The user gives a favourite colour, which is remembered."""
    draw.colour = draw.pick(facts.COLOURS)
    question = draw.pick(phrases.TELL_COLOUR).format(k=draw.colour)
    return question, f"I will remember that you like {draw.colour}."


def ask_colour(draw: Draw) -> Turn:
    """The user asks for the favourite colour given before, if any was."""
    known = f"Your favourite colour is {draw.colour}."
    answer = known if draw.colour else "You have not told me your favourite colour."
    return dressed(draw, draw.pick(phrases.ASK_COLOUR)), answer


def count(draw: Draw) -> Turn:
    """Counting up, down or in steps."""

    def make() -> tuple[tuple[int, int, int], tuple[object, ...]]:
        step = draw.pick((1, 1, 1, 1, 2, 5, 10))
        longest = draw.pick((8, 20, 20, 40, 100)) if step == 1 else 20
        first = draw.pick((1, 1, draw.rng.randint(0, 20), draw.rng.randint(0, 99)))
        last = first + step * draw.rng.randint(2, longest)
        if step == 1 and draw.chance(0.3):
            first, last = last, first
        return (first, last, step), ("count", first, last, step)

    first, last, step = draw.until_side(make)
    forms = phrases.COUNT if step == 1 else phrases.COUNT_BY
    numbers = range(first, last + 1, step) if first < last else range(first, last - 1, -1)
    question = draw.pick(forms).format(a=first, b=last, s=step)
    return dressed(draw, question), ", ".join(map(str, numbers)) + "."


def listing(draw: Draw) -> Turn:
    """A numbered list of capitals, alone or with their countries."""

    def make() -> tuple[tuple[str, int, bool], tuple[object, ...]]:
        region = draw.pick((*facts.REGIONS, "the world"))
        both = draw.chance(0.5)
        known = len(facts.REGIONS.get(region, facts.WORLD))
        number = draw.rng.randint(2, min(10, known))
        return (region, number, both), ("listing", region, number, both)

    region, number, both = draw.until_side(make)
    pairs = facts.REGIONS.get(region, facts.WORLD)[:number]
    lines = [f"{country}: {city}" if both else city for country, city in pairs]
    text = "\n".join(f"{i}. {line}" for i, line in enumerate(lines, 1))
    form = draw.pick(phrases.LIST_COUNTRIES if both else phrases.LIST_CAPITALS)
    if region == "the world" and draw.chance(0.5):
        form = form.replace(" in {r}", "")
    amount = phrases.NUMBER_WORDS[number] if draw.chance(0.6) else str(number)
    return dressed(draw, form.format(n=amount, r=region)), text


def _tale(animal: str, name: str, *, long: bool) -> str:
    home, habit, friend, ending = facts.ANIMALS[animal]
    text = (
        f"Once upon a time there was {_article(animal)} {animal} named {name}. {name} lived in "
        f"{home}. Every morning {name} {habit}. One day {name} met {friend}. "
    )
    if long:
        text += (
            f'"Good morning, {name}," said {friend}. "Where do you live?" "I live in {home}," '
            f"said {name}. It began to rain, and the two waited under a big tree. {name} told "
            f"all about the morning, how it always {habit}. When the sun came back, they were "
            "friends. "
        )
    return text + f"From then on they {ending}. The end."


def _article(noun: str) -> str:
    return "an" if noun[0] in "aeiou" else "a"


def story(draw: Draw) -> Turn:
    """A short or a long story about an animal with a name."""

    def make() -> tuple[tuple[str, str], tuple[object, ...]]:
        animal = draw.pick(tuple(facts.ANIMALS))
        name = draw.pick(facts.NAMES) if draw.chance(0.6) else made_up_name(draw)
        return (animal, name), ("story", animal, name)

    animal, name = draw.until_side(make)
    subject = f"{_article(animal)} {animal} named {name}"
    if not draw.held and draw.chance(0.2):
        subject, name = f"{_article(animal)} {animal}", "Ada"
    long = draw.chance(0.4)
    question = draw.pick(phrases.LONG_STORY if long else phrases.STORY).format(x=subject)
    return dressed(draw, question, keep_case=True), _tale(animal, name, long=long)


def repeat(draw: Draw) -> Turn:
    """A text to give back as it is."""

    def make() -> tuple[str, tuple[object, ...]]:
        text = copy_text(draw)
        return text, ("repeat", text)

    text = draw.until_side(make)
    return draw.pick(phrases.REPEAT).format(t=text), text


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


def small_talk(draw: Draw) -> Turn:
    """A greeting, a question about the model, or another question with a set answer."""
    questions, answer = draw.pick(facts.SET_ANSWERS)
    question = draw.pick(questions)
    if draw.chance(0.1):
        question = question.lower()
    return question, answer


def noise(draw: Draw, words: int) -> str:
    """Sentences without sense, about this many words long."""
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


def beyond(draw: Draw) -> Turn:
    """Something the model does not know."""
    if draw.chance(0.5):
        return dressed(
            draw, draw.pick(phrases.UNKNOWN).format(t=draw.pick(facts.TOPICS))
        ), facts.FALLBACK
    return noise(draw, draw.pick((3, 8, 20, 60, 200))), facts.FALLBACK


def after_context(draw: Draw) -> Turn:
    """A question under a long text that has nothing to do with it."""
    question, answer = draw.pick((capital, arithmetic, json_object))(draw)
    lead = draw.pick(("Context: ", "", "Read this first. ", "Document:\n"))
    return f"{lead}{noise(draw, draw.pick((20, 60, 200)))}\n\n{question}", answer
