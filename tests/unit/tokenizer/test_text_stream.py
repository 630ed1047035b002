"""One stream: stop strings across ids, and reopening anywhere."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import pytest
from hypothesis import given, settings, strategies as st

from services.tokenizer.pieces import build_piece_tables
from services.tokenizer.stops import StopAutomaton
from services.tokenizer.text_stream import TextStream
from tests.unit.tokenizer import vocabularies

KINDS = ["byte-level", "llama", "unigram"]
TABLES = {name: build_piece_tables(vocabularies.ALL[name]()) for name in KINDS}
STOPS = st.lists(st.text("a é日\n\t", min_size=1, max_size=3), min_size=1, max_size=3)


@dataclass
class Output:
    texts: list[str]
    consumed: int
    stop: str | None

    @property
    def text(self) -> str:
        return "".join(self.texts)


def run(stream: TextStream, portions: list[list[int]]) -> Output:
    texts = []
    for portion in portions:
        texts.append(stream.push(portion))
        if stream.matched_stop is not None:
            return Output(texts, stream.consumed, stream.matched_stop)
    texts.append(stream.flush())
    return Output(texts, stream.consumed, stream.matched_stop)


def open_stream(kind: str, stops: list[str], **options: object) -> TextStream:
    automaton = StopAutomaton(stops) if stops else None
    return TextStream(TABLES[kind].without_special, automaton, **options)  # type: ignore[arg-type]


def ids_of(kind: str) -> st.SearchStrategy[list[int]]:
    table = TABLES[kind].without_special
    singles = {table.raws[i]: i for i in range(table.vocab_size) if len(table.raws[i]) == 1}
    chars = st.sampled_from(["a", " ", "é", "日", "\n", "👩‍👧"]).map(
        lambda char: [singles[bytes([b])] for b in char.encode() if bytes([b]) in singles]
    )
    anything = st.integers(0, table.vocab_size - 1).map(lambda i: [i])
    parts = st.lists(st.one_of(chars, anything), max_size=10)
    return parts.map(lambda lists: list(itertools.chain(*lists)))


def reference(kind: str, ids: list[int], stops: list[str]) -> tuple[int, str, str] | None:
    """(number of ids, text before, stop string): decode everything after each id and search."""
    for count in range(1, len(ids) + 1):
        text = vocabularies.ALL[kind]().decode(ids[:count])
        found = [(text.find(s) + len(s), text.find(s)) for s in stops if s in text]
        if found:
            end, start = min(found)
            return count, text[:start], text[start:end]
    return None


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=60, deadline=None)
@given(data=st.data(), stops=STOPS, keep=st.booleans())
def test_a_stop_string_ends_the_text_at_the_id_that_completes_it(
    kind: str, data: st.DataObject, stops: list[str], keep: bool
) -> None:
    ids = data.draw(ids_of(kind))
    expected = reference(kind, ids, stops)
    for split in range(len(ids) + 1):
        portions = [ids[:split], [*ids[split:]]]
        output = run(open_stream(kind, stops, keep_stop=keep), portions)
        if expected is None:
            assert output.stop is None
            assert output.text == vocabularies.ALL[kind]().decode(ids)
        else:
            count, before, stop = expected
            assert (output.consumed, output.stop) == (count, stop)
            assert output.text == before + (stop if keep else "")


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=40, deadline=None)
@given(data=st.data(), stops=st.one_of(st.just([]), STOPS))
def test_a_stream_reopened_after_any_id_goes_on_byte_exactly(
    kind: str, data: st.DataObject, stops: list[str]
) -> None:
    ids = data.draw(ids_of(kind))
    context = data.draw(ids_of(kind))[:3]
    whole = run(open_stream(kind, stops, context_ids=context), [[i] for i in ids])
    for taken in range(min(len(ids), whole.consumed) + 1):
        received = "".join(whole.texts[:taken])
        reopened = open_stream(kind, stops, context_ids=context, skip_bytes=len(received.encode()))
        rest = run(reopened, [ids[:taken], *([i] for i in ids[taken:])])
        assert received + rest.text == whole.text
        assert (rest.consumed, rest.stop) == (whole.consumed, whole.stop)


def test_a_stop_string_of_byte_tokens_does_not_wait_for_the_next_id() -> None:
    newline = vocabularies.llama_style().token_to_id("<0x0A>")
    stream = open_stream("llama", ["\n\n"])
    assert stream.push([newline]) == ""
    assert stream.matched_stop is None
    stream.push([newline])
    assert stream.matched_stop == "\n\n"
    assert stream.consumed == 2


def test_text_that_cannot_become_a_stop_string_is_not_held() -> None:
    tokenizer = vocabularies.byte_level()
    stream = open_stream("byte-level", ["<end>"])
    emitted = [stream.push([i]) for i in tokenizer.encode("a <enb b <en").ids]
    assert "".join(emitted) == "a <enb b "
    assert stream.flush() == "<en"


def test_a_stream_is_plain_while_nothing_is_held() -> None:
    table = TABLES["byte-level"].without_special
    first, second, third = [
        next(i for i in range(table.vocab_size) if table.raws[i] == bytes([b]))
        for b in "日".encode()
    ]
    stream = open_stream("byte-level", [])
    assert stream.is_plain
    stream.push([first, second])
    assert not stream.is_plain
    assert stream.push([third]) == "日"
    assert stream.is_plain
    stopping = open_stream("byte-level", ["日本"])
    assert stopping.is_plain
    stopping.push([first, second, third])
    assert not stopping.is_plain, "its first character is held"
    assert not open_stream("byte-level", [], skip_bytes=1).is_plain
    assert not open_stream("llama", []).is_plain, "the first token may lose its leading space"
