"""Text to token ids, and their prefix hashes. Meant for other threads than the event loop's.

The library lets go of the interpreter while it encodes; everything after that goes in slices, so
that the event loop gets its turn between them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from services.common.errors import InvalidRequestError
from services.common.prefix_hash import extend_prefix_hashes, namespace_seed
from services.tokenizer.tokenizer_files import LoadedTokenizer

_IDS_A_SLICE = 8192


class Text(NamedTuple):
    """A text to encode; `special` puts the tokenizer's own special tokens around it."""

    text: str
    special: bool


class Encoder:
    """Encodes batches of texts; may be used from several threads at once."""

    def __init__(self, loaded: LoadedTokenizer) -> None:
        self._tokenizer = loaded.tokenizer
        self._prefix_ids = list(loaded.prefix_ids)
        self._suffix_ids = list(loaded.suffix_ids)

    def encode(self, texts: Sequence[Text]) -> list[list[int]]:
        """Ids of each text. Raises InvalidRequestError for text that is not valid Unicode."""
        for index, (text, _) in enumerate(texts):
            _check_unicode(index, text)
        # NOTE: only the batch calls let other threads run; `encode` holds the interpreter.
        encodings = self._tokenizer.encode_batch_fast(
            [text for text, _ in texts], add_special_tokens=False
        )
        return [
            [*self._prefix_ids, *encoding.ids, *self._suffix_ids] if special else encoding.ids
            for encoding, (_, special) in zip(encodings, texts, strict=True)
        ]


def sliced_prefix_hashes(token_ids: Sequence[int], page_size: int, namespace: str) -> list[int]:
    """`prefix_hash.prefix_hashes`, without holding the interpreter for long prompts' length."""
    parent = namespace_seed(namespace)
    hashes: list[int] = []
    step = max(1, _IDS_A_SLICE // page_size) * page_size
    for ids in id_slices(token_ids, step):
        new = extend_prefix_hashes(parent, ids, page_size)
        hashes += new
        parent = new[-1] if new else parent
    return hashes


def id_slices(token_ids: Sequence[int], step: int = _IDS_A_SLICE) -> Iterator[Sequence[int]]:
    return (token_ids[start : start + step] for start in range(0, len(token_ids), step))


def _check_unicode(index: int, text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InvalidRequestError(
            f"input {index}: not valid Unicode: a lone surrogate at character {error.start}"
        ) from error
