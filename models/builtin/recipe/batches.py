"""Training batches: conversations as token ids, with a mark on what the assistant says."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random
from typing import Final

import torch
from tokenizers import Tokenizer
from torch.utils.data import Dataset

from . import corpus
from .corpus import BOS, EOS, START
from .draw import Draw
from .tokenizer import token_id

# sequence length and how often a batch has it: most chats are short, some fill the context
LENGTHS: Final = ((192, 0.40), (512, 0.36), (2048, 0.18), (4096, 0.06))
PLAIN_SHARE: Final = 0.05
IGNORED: Final = -100


@dataclass(frozen=True)
class Shape:
    """One batch: so many sequences of so many tokens."""

    rows: int
    length: int


def shape_of(rng: Random, tokens: int) -> Shape:
    """Draw the shape of a batch of about this many tokens."""
    length = rng.choices([n for n, _ in LENGTHS], [share for _, share in LENGTHS])[0]
    return Shape(max(1, tokens // length), length)


class Encoder:
    """Turns conversations into ids and targets."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._bos, self._eos = token_id(tokenizer, BOS), token_id(tokenizer, EOS)
        self._cache: dict[str, list[int]] = {}

    def _ids(self, text: str) -> list[int]:
        known = self._cache.get(text)
        if known is None:
            known = self._tokenizer.encode(text, add_special_tokens=False).ids
            if len(self._cache) < 200_000:
                self._cache[text] = known
        return known

    def _chat(self, draw: Draw, length: int) -> tuple[list[int], list[int]]:
        ids: list[int] = [self._bos]
        targets: list[int] = [IGNORED]
        for item in corpus.conversation(draw):
            spoken = item["role"] == "assistant"
            if spoken:
                head = self._ids(f"{START}assistant\n")
                body = self._ids(f"{item['content']}{corpus.END}")
            else:
                head, body = self._ids(corpus.rendered(item)), []
            gap = self._ids("\n")
            ids += head + body + gap
            targets += [IGNORED] * len(head) + body + [IGNORED] * len(gap)
            if len(ids) > length:
                break
        return ids, targets

    def _plain(self, draw: Draw, length: int) -> tuple[list[int], list[int]]:
        ids: list[int] = []
        targets: list[int] = []
        while len(ids) <= length:
            given, rest = corpus.plain_text(draw)
            head, body = [self._bos, *self._ids(given)], [*self._ids(rest), self._eos]
            ids += head + body
            targets += [IGNORED] * len(head) + body
        return ids, targets

    def row(self, rng: Random, length: int) -> tuple[list[int], list[int]]:
        """One training sequence: ids, and for each the id to predict for the next."""
        draw = Draw(rng)
        plain = length <= 512 and draw.chance(PLAIN_SHARE)
        ids, targets = self._plain(draw, length) if plain else self._chat(draw, length)
        return ids[:length], targets[1 : length + 1]


class Batches(Dataset[tuple[torch.Tensor, torch.Tensor]]):
    """Batch number i is always the same for a seed, whichever worker makes it."""

    def __init__(self, tokenizer: Tokenizer, seed: int, steps: int, tokens: int) -> None:
        self._encoder = Encoder(tokenizer)
        self._seed, self._steps, self._tokens = seed, steps, tokens

    def __len__(self) -> int:
        return self._steps

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        if index >= self._steps:
            raise IndexError(index)
        rng = Random(f"{self._seed} batch {index}")
        shape = shape_of(rng, self._tokens)
        rows = [self._encoder.row(rng, shape.length) for _ in range(shape.rows)]
        ids, targets = zip(*rows, strict=True)
        return torch.tensor(ids, dtype=torch.int16), torch.tensor(targets, dtype=torch.int16)
