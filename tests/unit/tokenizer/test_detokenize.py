"""Incremental text equals the library's one-shot decode, however the ids are portioned."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings, strategies as st

from services.tokenizer.detokenize import open_detokenizer
from services.tokenizer.pieces import build_piece_tables
from tests.unit.tokenizer import vocabularies

TABLES = {name: build_piece_tables(build()) for name, build in vocabularies.ALL.items()}
KINDS = pytest.mark.parametrize("kind", list(vocabularies.ALL))


def ids_of(kind: str, max_size: int = 12) -> st.SearchStrategy[list[int]]:
    """Ids of a vocabulary, half of them bytes so that characters complete and break often."""
    tokenizer = vocabularies.ALL[kind]()
    anything = st.integers(0, tokenizer.get_vocab_size() - 1)
    whole = st.sampled_from(["é", "日", "👩‍👧", "\n", " a", "▁"]).map(
        lambda text: _byte_ids(kind, text.encode())
    )
    torn = st.sampled_from([b"\xe2", b"\x82", b"\xf0\x9f", b"\xff", b"\xac", b"\xed\xa0"]).map(
        lambda raw: _byte_ids(kind, raw)
    )
    parts = st.lists(st.one_of(anything.map(lambda i: [i]), whole, torn), max_size=max_size)
    return parts.map(lambda lists: list(itertools.chain(*lists)))


def _byte_ids(kind: str, raw: bytes) -> list[int]:
    table = TABLES[kind].with_special
    singles = {table.raws[i]: i for i in range(table.vocab_size) if len(table.raws[i]) == 1}
    return [singles[bytes([b])] for b in raw if bytes([b]) in singles]


def stream(kind: str, portions: list[list[int]], skip: bool, context: list[int]) -> list[str]:
    detokenizer = open_detokenizer(TABLES[kind].select(skip))
    detokenizer.prime(context)
    return [*(detokenizer.push(portion) for portion in portions), detokenizer.flush()]


@KINDS
@settings(max_examples=40, deadline=None)
@given(data=st.data(), skip=st.booleans())
def test_pain_15_s_every_split_gives_the_one_shot_text(
    kind: str, data: st.DataObject, skip: bool
) -> None:
    ids = data.draw(ids_of(kind))
    whole = vocabularies.ALL[kind]().decode(ids, skip_special_tokens=skip)
    assert "".join(stream(kind, [[i] for i in ids], skip, [])) == whole
    for split in range(len(ids) + 1):
        assert "".join(stream(kind, [ids[:split], ids[split:]], skip, [])) == whole


@KINDS
@settings(max_examples=50, deadline=None)
@given(data=st.data())
def test_emitted_text_is_never_taken_back_and_never_half_a_character(
    kind: str, data: st.DataObject
) -> None:
    ids, later = data.draw(ids_of(kind)), data.draw(ids_of(kind))
    emitted = "".join(stream(kind, [[i] for i in ids], True, [])[:-1])
    assert vocabularies.ALL[kind]().decode(ids + later).startswith(emitted)


@KINDS
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_context_gives_what_the_output_adds_to_its_text(kind: str, data: st.DataObject) -> None:
    tokenizer = vocabularies.ALL[kind]()
    context, ids = data.draw(ids_of(kind, 4)), data.draw(ids_of(kind))
    before, both = tokenizer.decode(context), tokenizer.decode(context + ids)
    if before.endswith("\N{REPLACEMENT CHARACTER}") or not both.startswith(before):
        return
    expected = both[len(before) :]
    for split in range(len(ids) + 1):
        assert "".join(stream(kind, [ids[:split], ids[split:]], True, context)) == expected


@pytest.mark.parametrize("kind", ["byte-level", "llama", "gemma"])
def test_a_character_begun_by_the_context_comes_out_whole(kind: str) -> None:
    first, *rest = _byte_ids(kind, "日".encode())
    assert "".join(stream(kind, [rest], True, [first])) == "日"
    assert "".join(stream(kind, [], True, [first])) == ""


@pytest.mark.parametrize("kind", ["byte-level", "llama", "gemma"])
def test_a_torn_character_comes_out_as_replacement_at_the_end_only(kind: str) -> None:
    torn = _byte_ids(kind, "日".encode()[:2])
    *pushed, flushed = stream(kind, [[i] for i in torn], True, [])
    assert pushed == ["", ""]
    assert flushed == vocabularies.ALL[kind]().decode(torn)


def test_the_leading_space_is_stripped_only_at_the_start_of_the_sequence() -> None:
    the = vocabularies.llama_style().token_to_id("▁the")
    assert "".join(stream("llama", [[the], [the]], True, [])) == "the the"
    assert "".join(stream("llama", [[the], [the]], True, [the])) == " the the"


@pytest.mark.parametrize("length", [1, 2, 3])
def test_broken_utf8_of_every_shape_reads_as_the_library_reads_it(length: int) -> None:
    tokenizer, table = vocabularies.byte_level(), TABLES["byte-level"].with_special
    byte_ids = {table.raws[i]: i for i in range(table.vocab_size) if len(table.raws[i]) == 1}
    edges = [b"A", b"\x80", b"\x8f", b"\x90", b"\xa0", b"\xbf", b"\xc2", b"\xe0", b"\xe2"]
    edges += [b"\xed", b"\xf0", b"\xf4", b"\xf5", b"\xff"]
    for raws in itertools.product(edges, repeat=length):
        ids = [byte_ids[raw] for raw in raws]
        assert "".join(stream("byte-level", [[i] for i in ids], False, [])) == tokenizer.decode(ids)
