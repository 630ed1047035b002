"""Small tokenizers of every kind that the service streams, built in memory."""

from __future__ import annotations

import json
from functools import cache
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

_CORPUS = [
    "Grüße aus Köln, it's a fine day.\n",
    "今日は良い天気ですね。",
    "emoji 👩‍👩‍👧 and \N{SNOWMAN} and 🇫🇷 flags",
    "def f(x):\n    return x ** 2\n",
    "Привет, мир! नमस्ते दुनिया",
] * 4
LLAMA_DECODER = {
    "type": "Sequence",
    "decoders": [
        {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
        {"type": "Strip", "content": " ", "start": 1, "stop": 0},
    ],
}
_WORDS = ["▁", "▁▁", "▁a", "a", "b", "▁the", "é", "▁日", "本", "x▁y", "<0x", "0x41>", "\n"]


@cache
def byte_level() -> Tokenizer:
    """Byte-level BPE, with added tokens that hold spaces and characters outside its alphabet."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=["<|bos|>", "<|eos|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_CORPUS, trainer)
    tokenizer.add_tokens([AddedToken("plain added"), AddedToken("｜日本｜")])
    tokenizer.add_special_tokens([AddedToken("<｜end｜>")])
    return tokenizer


@cache
def llama_style() -> Tokenizer:
    """As Llama 2's tokenizer.json: byte fallback, one leading space stripped."""
    return _from_pieces(LLAMA_DECODER, ["<unk>", "<s>", "</s>"], _byte_tokens() + _WORDS)


@cache
def gemma_style() -> Tokenizer:
    """As Gemma's: byte fallback, nothing stripped."""
    decoder = {"type": "Sequence", "decoders": LLAMA_DECODER["decoders"][:3]}
    return _from_pieces(decoder, ["<pad>", "<eos>", "<bos>"], _byte_tokens() + _WORDS)


@cache
def unigram(prepend_scheme: str = "always") -> Tokenizer:
    pieces = ["<unk>", "</s>", *_WORDS]
    model = models.Unigram([(piece, -float(i)) for i, piece in enumerate(pieces)], unk_id=0)
    tokenizer = Tokenizer(model)
    tokenizer.decoder = decoders.Metaspace(prepend_scheme=prepend_scheme)
    tokenizer.add_special_tokens(["<unk>", "</s>"])
    return tokenizer


@cache
def wordpiece() -> Tokenizer:
    pieces = ["[UNK]", "[CLS]", "play", "##ing", "##", ".", "'s", "do", "n't", "##'re", "!"]
    model = models.WordPiece({piece: i for i, piece in enumerate(pieces)}, unk_token="[UNK]")
    tokenizer = Tokenizer(model)
    tokenizer.decoder = decoders.WordPiece(cleanup=True)
    tokenizer.add_special_tokens(["[UNK]", "[CLS]"])
    return tokenizer


@cache
def without_decoder() -> Tokenizer:
    return _from_pieces(None, ["<unk>"], ["a", "b ", "é", ""])


ALL = {
    "byte-level": byte_level,
    "llama": llama_style,
    "gemma": gemma_style,
    "unigram": unigram,
    "unigram-never": lambda: unigram("never"),
    "wordpiece": wordpiece,
    "no-decoder": without_decoder,
}


def with_decoder(decoder: dict[str, Any]) -> Tokenizer:
    return _from_pieces(decoder, ["<unk>"], ["a</w>", "b"])


def _byte_tokens() -> list[str]:
    return [f"<0x{byte:02X}>" for byte in range(256)]


def _from_pieces(
    decoder: dict[str, Any] | None, special: list[str], pieces: list[str]
) -> Tokenizer:
    vocab = {piece: index for index, piece in enumerate([*special, *pieces])}
    added = [
        {
            "id": vocab[token],
            "content": token,
            "special": True,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
        }
        for token in special
    ]
    return Tokenizer.from_str(
        json.dumps(
            {
                "version": "1.0",
                "added_tokens": added,
                "decoder": decoder,
                "model": {"type": "BPE", "vocab": vocab, "merges": [], "byte_fallback": True},
            }
        )
    )
