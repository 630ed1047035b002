"""Piece tables: exact bytes, holes, special tokens, decoders that cannot be streamed."""

from __future__ import annotations

import pytest

from services.tokenizer.pieces import build_piece_tables
from tests.unit.tokenizer import vocabularies


def test_pieces_are_the_exact_bytes_also_of_parts_of_characters() -> None:
    tokenizer = vocabularies.byte_level()
    table = build_piece_tables(tokenizer).with_special
    text = "Köln 今日 👩‍👧 plain added x"
    ids = tokenizer.encode(text).ids
    assert b"".join(table.raws[i] for i in ids) == text.encode()
    llama = build_piece_tables(vocabularies.llama_style()).with_special
    assert llama.raws[vocabularies.llama_style().token_to_id("<0xE2>")] == b"\xe2"
    assert llama.raws[vocabularies.llama_style().token_to_id("▁the")] == b" the"


def test_special_tokens_are_in_one_table_only() -> None:
    tokenizer = vocabularies.byte_level()
    tables = build_piece_tables(tokenizer)
    end = tokenizer.token_to_id("<｜end｜>")
    assert tables.select(False).texts[end] == "<｜end｜>"
    assert tables.select(True).texts[end] == ""
    plain = tokenizer.token_to_id("plain added")
    assert tables.select(True).texts[plain] == "plain added"


def test_ids_up_to_the_models_width_decode_to_nothing() -> None:
    tables = build_piece_tables(vocabularies.byte_level(), min_vocab_size=1000)
    assert tables.vocab_size == 1000
    assert tables.with_special.texts[999] == ""
    assert 999 in tables.with_special.skipped


@pytest.mark.parametrize(
    ("decoder", "named"),
    [
        ({"type": "BPEDecoder", "suffix": "</w>"}, "BPEDecoder"),
        (
            {"type": "CTC", "pad_token": "<pad>", "word_delimiter_token": "|", "cleanup": True},
            "CTC",
        ),
        (
            {
                "type": "Sequence",
                "decoders": [
                    {"type": "Fuse"},
                    {"type": "Strip", "content": " ", "start": 0, "stop": 1},
                ],
            },
            "Strip",
        ),
    ],
)
def test_a_decoder_that_looks_ahead_is_refused_by_name(decoder: dict, named: str) -> None:
    with pytest.raises(ValueError, match=f"cannot be streamed: {named} is not supported"):
        build_piece_tables(vocabularies.with_decoder(decoder))
