"""One function per kind of question: each draws a question and its one right answer.

Every function takes a `Draw`. With `held` false it never returns what is held back for the
evaluation; with `held` true it returns only that. What is held back is decided by a hash of
what identifies the question (the pair of numbers, the thing with its colour and size, ...),
so no list has to be kept and the two sides can never meet.
"""

from __future__ import annotations

import json
from collections.abc import Callable

from . import facts, phrases
from .draw import Draw, copy_text, dressed, made_up_name, noise, person

Turn = tuple[str, str]
Topic = Callable[[Draw], Turn]


def capital(draw: Draw) -> Turn:
    """The capital of a country, or the country of a capital."""

    def make() -> tuple[tuple[str, str, str], tuple[object, ...]]:
        country, city = draw.pick(facts.CAPITALS)
        way = draw.rng.random()
        forms: tuple[str, ...]
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


def colour_of(draw: Draw) -> Turn:
    """The colour of something everybody knows."""

    def make() -> tuple[tuple[str, str, str], tuple[object, ...]]:
        thing, colour = draw.pick(facts.COLOUR_OF)
        form = draw.pick(phrases.COLOUR_OF)
        return (form, thing, colour), ("colour of", form, thing)

    form, thing, colour = draw.until_side(make)
    return dressed(draw, form.format(x=thing)), f"{thing[0].upper()}{thing[1:]} is {colour}."


def _thing(draw: Draw) -> tuple[str, str, str]:
    def make() -> tuple[tuple[str, str, str], tuple[object, ...]]:
        way = draw.rng.random()
        thing = draw.pick(facts.OBJECTS if way < 0.65 else facts.OTHERS)
        if way > 0.9:
            thing = made_up_name(draw).lower()
        it = thing, draw.pick(facts.COLOURS), draw.pick(facts.SIZES)
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


def json_capital(draw: Draw) -> Turn:
    """A country with its capital as a JSON object."""

    def make() -> tuple[tuple[str, str, str], tuple[object, ...]]:
        country, city = draw.pick(facts.CAPITALS)
        form = draw.pick(phrases.JSON_CAPITAL)
        return (form, country, city), ("json capital", form, country)

    form, country, city = draw.until_side(make)
    answer = json.dumps({"country": country, "capital": city})
    return dressed(draw, form.format(c=country)), answer


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
    """Counting up, down or in steps; the evaluation has the longest counts as another kind."""
    return _count(draw, far=not draw.held)


def count_far(draw: Draw) -> Turn:
    """Counting over a few hundred numbers."""
    while True:
        question, answer = _count(draw, far=True)
        if answer.count(",") >= 120:
            return question, answer


def _count(draw: Draw, *, far: bool) -> Turn:

    def make() -> tuple[tuple[int, int, int], tuple[object, ...]]:
        step = draw.pick((1, 1, 1, 1, 2, 5, 10))
        longest = draw.pick((8, 20, 20, 40, 40, 100, 250) if far else (8, 20, 40))
        longest = longest if step == 1 else 20
        first = draw.pick((1, 1, draw.rng.randint(0, 20), draw.rng.randint(0, 99)))
        last = first + step * draw.rng.randint(2, longest)
        if step == 1 and draw.chance(0.3):
            first, last = last, draw.pick((first, 1))
        return (first, last, step), ("count", first, last, step)

    first, last, step = draw.until_side(make)
    forms: tuple[str, ...] = phrases.COUNT if step == 1 else phrases.COUNT_BY
    if step == 1 and min(first, last) == 1 and draw.chance(0.4):
        forms = phrases.COUNT_TO if first == 1 else phrases.COUNT_DOWN
    numbers = range(first, last + 1, step) if first < last else range(first, last - 1, -1)
    worded = draw.chance(0.3)
    start, end = (phrases.NUMBER_WORDS[n] if worded and n <= 20 else str(n) for n in (first, last))
    question = draw.pick(forms).format(a=start, b=end, s=step)
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
    home, habit, friend, ending = facts.ANIMALS.get(animal, facts.GENERIC_TALE)
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
        animal = draw.pick(tuple(facts.ANIMALS) if draw.chance(0.8) else facts.OTHERS)
        name = draw.pick(facts.NAMES) if draw.chance(0.6) else made_up_name(draw)
        return (animal, name), ("story", animal, name)

    animal, name = draw.until_side(make)
    subject = f"{_article(animal)} {animal} named {name}"
    if not draw.held and draw.chance(0.2):
        subject, name = f"{_article(animal)} {animal}", "Ada"
    long = draw.chance(0.4)
    form = draw.pick(phrases.LONG_STORY if long else phrases.STORY)
    if not draw.held and draw.chance(0.08):
        form, animal, name = form.replace(" about {x}", ""), "fox", "Ada"
    question = form.format(x=subject)
    return dressed(draw, question, keep_case=True), _tale(animal, name, long=long)


def repeat(draw: Draw) -> Turn:
    """A text to give back as it is."""

    def make() -> tuple[str, tuple[object, ...]]:
        text = copy_text(draw)
        return text, ("repeat", text)

    text = draw.until_side(make)
    return draw.pick(phrases.REPEAT).format(t=text), text


def small_talk(draw: Draw) -> Turn:
    """A greeting, a question about the model, or another question with a set answer."""
    questions, answer = draw.pick(facts.SET_ANSWERS)
    question = draw.pick(questions)
    if draw.chance(0.1):
        question = question.lower()
    return question, answer


def beyond(draw: Draw) -> Turn:
    """Something the model does not know."""
    if draw.chance(0.1):
        a, b = draw.rng.randint(100, 9999), draw.rng.randint(0, 9999)
        a, b = draw.pick(((a, b), (b, a)))
        form = draw.pick((*phrases.SUM, *phrases.DIFFERENCE))
        return dressed(draw, form.format(a=a, b=b)), facts.TOO_LARGE
    if draw.chance(0.6):
        topic = draw.pick(facts.TOPICS)
        if draw.chance(0.4):
            topic = " ".join(draw.pick(facts.WORDS) for _ in range(draw.pick((1, 2, 3))))
        elif draw.chance(0.2):
            topic = draw.pick(draw.pick(facts.CAPITALS))
        return dressed(draw, draw.pick(phrases.UNKNOWN).format(t=topic)), facts.FALLBACK
    if draw.chance(0.3):
        return copy_text(draw), facts.FALLBACK
    return noise(draw, draw.pick((3, 8, 20, 60, 200))), facts.FALLBACK


def after_context(draw: Draw) -> Turn:
    """A question under a long text that has nothing to do with it."""
    question, answer = draw.pick((capital, arithmetic, json_object))(draw)
    lead = draw.pick(("Context: ", "", "Read this first. ", "Document:\n"))
    return f"{lead}{noise(draw, draw.pick((20, 60, 200, 500)))}\n\n{question}", answer
