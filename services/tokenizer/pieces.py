"""What each token id stands for: tables computed once from tokenizer.json's decoder.

With them text comes out of ids by table look-up, and equals what the `tokenizers` library's own
one-shot decode gives. Decoders whose result for one token depends on tokens after it have no such
table and are refused when loading.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from tokenizers import Tokenizer

# Decoder stages that look at one token, and at most at whether it is the sequence's first.
_PER_TOKEN_STAGES = frozenset({"Replace", "Strip", "Metaspace", "WordPiece"})
_POSITIONAL_STAGES = frozenset({"Metaspace", "WordPiece"})
_BYTE_TOKEN = re.compile(r"<0x\+?[0-9A-Fa-f]{1,2}>")


@dataclass(frozen=True, slots=True)
class PieceTable:
    """The pieces of all ids from 0 to the vocabulary's size, special tokens either kept or not.

    `is_byte_level` says how bytes become characters. True: pieces are bytes of one UTF-8 stream,
    decoded with replacement characters (GPT-2's byte-level BPE). False: pieces are text but for
    byte tokens, whose unbroken run is text if all of it is valid UTF-8 and one replacement
    character a byte otherwise (SentencePiece's byte fallback).
    """

    # Text of an id that is not the sequence's first; None where its bytes are not whole characters.
    texts: list[str | None]
    # The exact bytes of each id, likewise.
    raws: list[bytes]
    # Where the text differs for the sequence's first token.
    first_texts: Mapping[int, str]
    # Ids that decode to nothing and do not count as tokens: special ones left out, and ids
    # without a token.
    skipped: frozenset[int]
    is_byte_level: bool
    # At most this many of this character are cut from the sequence's start.
    strip_char: str
    strip_count: int

    @property
    def vocab_size(self) -> int:
        return len(self.texts)


@dataclass(frozen=True, slots=True)
class PieceTables:
    """Both tables of a tokenizer: with special tokens in the text, and without."""

    with_special: PieceTable
    without_special: PieceTable

    @property
    def vocab_size(self) -> int:
        return self.with_special.vocab_size

    def select(self, skip_special_tokens: bool) -> PieceTable:
        return self.without_special if skip_special_tokens else self.with_special


def build_piece_tables(tokenizer: Tokenizer, min_vocab_size: int = 0) -> PieceTables:
    """Tables for all ids of `tokenizer`, and for ids without a token up to `min_vocab_size`.

    Raises ValueError for a decoder that cannot be streamed exactly.
    """
    tokens: dict[int, str] = {
        token_id: token for token, token_id in tokenizer.get_vocab(with_added_tokens=True).items()
    }
    size = max(min_vocab_size, max(tokens, default=-1) + 1)
    kept = _table(_decoder_stages(tokenizer), [tokens.get(token_id) for token_id in range(size)])
    special = {
        token_id
        for token_id, added in tokenizer.get_added_tokens_decoder().items()
        if added.special
    }
    return PieceTables(with_special=kept, without_special=_leaving_out(kept, special))


def _decoder_stages(tokenizer: Tokenizer) -> list[dict[str, Any]]:
    """The decoder as a flat list of stages."""
    decoder = json.loads(tokenizer.to_str())["decoder"]
    stages: list[dict[str, Any]] = []
    pending = [] if decoder is None else [decoder]
    while pending:
        stage = pending.pop(0)
        if stage["type"] == "Sequence":
            pending[:0] = stage["decoders"]
        else:
            stages.append(stage)
    return stages


def _table(stages: list[dict[str, Any]], tokens: list[str | None]) -> PieceTable:
    if [stage["type"] for stage in stages] == ["ByteLevel"]:
        return _byte_level_table(tokens)
    return _text_table(stages, tokens)


def _byte_level_table(tokens: list[str | None]) -> PieceTable:
    byte_of_char = _byte_level_alphabet()
    raws = [b"" if token is None else _byte_level_bytes(token, byte_of_char) for token in tokens]
    return PieceTable(
        texts=[_whole_characters(raw) for raw in raws],
        raws=raws,
        first_texts={},
        skipped=_holes(tokens),
        is_byte_level=True,
        strip_char="",
        strip_count=0,
    )


def _text_table(stages: list[dict[str, Any]], tokens: list[str | None]) -> PieceTable:
    per_token, has_byte_fallback, strip = _parse_text_stages(stages)
    first, rest = _per_token_texts(per_token, joined_by_space=not stages)
    texts: list[str | None] = []
    raws: list[bytes] = []
    first_texts: dict[int, str] = {}
    is_positional = not stages or any(stage["type"] in _POSITIONAL_STAGES for stage in per_token)
    for token_id, token in enumerate(tokens):
        text = "" if token is None else rest(token)
        if has_byte_fallback and _BYTE_TOKEN.fullmatch(text) and len(text) == 6:
            texts.append(None)
            raws.append(bytes([int(text[3:5], 16)]))
            continue
        texts.append(text)
        raws.append(text.encode())
        if is_positional and token is not None and (leading := first(token)) != text:
            first_texts[token_id] = leading
    return PieceTable(
        texts=texts,
        raws=raws,
        first_texts=first_texts,
        skipped=_holes(tokens),
        is_byte_level=False,
        strip_char=strip["content"] if strip else "",
        strip_count=strip["start"] if strip else 0,
    )


def _parse_text_stages(
    stages: list[dict[str, Any]],
) -> tuple[list[dict[str, Any]], bool, dict[str, Any] | None]:
    """Split `per-token stages, ByteFallback?, (Fuse, leading Strip?)?`; refuse any other order."""
    rest = list(stages)
    per_token = []
    while rest and rest[0]["type"] in _PER_TOKEN_STAGES:
        per_token.append(rest.pop(0))
    has_byte_fallback = bool(rest) and rest[0]["type"] == "ByteFallback"
    if has_byte_fallback:
        rest.pop(0)
    strip = None
    if rest and rest[0]["type"] == "Fuse":
        rest.pop(0)
        if rest and rest[0]["type"] == "Strip" and rest[0]["stop"] == 0:
            strip = rest.pop(0)
    if rest:
        order = ", ".join(stage["type"] for stage in stages)
        raise ValueError(
            f"the tokenizer's decoder ({order}) cannot be streamed: {rest[0]['type']} is not "
            "supported there; supported are ByteLevel alone, and Replace, Strip, Metaspace or "
            "WordPiece followed by ByteFallback, Fuse and a leading Strip"
        )
    return per_token, has_byte_fallback, strip


def _per_token_texts(
    stages: list[dict[str, Any]], joined_by_space: bool
) -> tuple[Callable[[str], str], Callable[[str], str]]:
    """Functions from a token to its text: as the sequence's first, and after another."""
    if joined_by_space:
        return (lambda token: token), (lambda token: " " + token)
    if not stages:
        return (lambda token: token), (lambda token: token)
    # An empty tokenizer is the way to build a decoder from its JSON.
    shell = {
        "version": "1.0",
        "added_tokens": [],
        "model": {"type": "WordLevel", "vocab": {}, "unk_token": ""},
        "decoder": {"type": "Sequence", "decoders": stages},
    }
    decoder = Tokenizer.from_str(json.dumps(shell)).decoder
    assert decoder is not None, "the shell has a decoder"
    return (lambda token: decoder.decode([token])), (lambda token: decoder.decode(["", token]))


def _leaving_out(table: PieceTable, special: Iterable[int]) -> PieceTable:
    texts, raws = list(table.texts), list(table.raws)
    for token_id in special:
        texts[token_id], raws[token_id] = "", b""
    return replace(table, texts=texts, raws=raws, skipped=table.skipped.union(special))


def _holes(tokens: list[str | None]) -> frozenset[int]:
    return frozenset(token_id for token_id, token in enumerate(tokens) if token is None)


def _whole_characters(raw: bytes) -> str | None:
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return None


def _byte_level_alphabet() -> dict[str, int]:
    """GPT-2's characters for the 256 bytes: printable ones stand for themselves.

    Radford et al., "Language Models are Unsupervised Multitask Learners", `bytes_to_unicode`.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    alphabet = {chr(byte): byte for byte in printable}
    alphabet.update({chr(256 + index): byte for index, byte in enumerate(others)})
    return alphabet


def _byte_level_bytes(token: str, byte_of_char: dict[str, int]) -> bytes:
    try:
        return bytes([byte_of_char[char] for char in token])
    except KeyError:
        # Added tokens are plain text: with one character outside the alphabet, all of it is.
        return token.encode()
