"""Loads a tokenizer directory in Hugging Face's layout, without transformers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from services.common.model_files import read_json

_CONVERT = (
    'save it once with transformers, which writes one: python -c "from transformers import '
    "AutoTokenizer as A; A.from_pretrained('{path}').save_pretrained('{path}')\""
)


@dataclass(frozen=True, slots=True)
class LoadedTokenizer:
    """A tokenizer and what its configuration adds.

    `prefix_ids` and `suffix_ids` are the special ids put around a text on request (such as BOS).
    """

    tokenizer: Tokenizer
    prefix_ids: tuple[int, ...]
    suffix_ids: tuple[int, ...]
    # Variables for chat templates: `bos_token`, `eos_token` ...
    special_tokens: Mapping[str, Any]
    bos_token_id: int | None


def load_tokenizer(path: Path) -> LoadedTokenizer:
    """Load `tokenizer.json` and what `tokenizer_config.json` says of special tokens.

    Raises FileNotFoundError without tokenizer.json, naming what to do; ValueError if malformed.
    """
    file = path / "tokenizer.json"
    if not file.is_file():
        others = [name for name in ("tokenizer.model", "vocab.json") if (path / name).is_file()]
        if not others:
            raise FileNotFoundError(f"no tokenizer.json in {path}")
        raise FileNotFoundError(
            f"{path} has {others[0]} but no tokenizer.json; {_CONVERT.format(path=path)}"
        )
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises bare Exception
        raise ValueError(f"{file} cannot be loaded: {error}") from error
    # A saved file can carry limits of somebody's training run.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    config = {**read_json(path / "special_tokens_map.json")}
    config.update(read_json(path / "tokenizer_config.json"))
    special_tokens = _special_tokens(config)
    prefix_ids, suffix_ids = _surrounding_ids(tokenizer)
    bos_token = special_tokens.get("bos_token")
    return LoadedTokenizer(
        tokenizer=tokenizer,
        prefix_ids=prefix_ids,
        suffix_ids=suffix_ids,
        special_tokens=special_tokens,
        bos_token_id=None if bos_token is None else tokenizer.token_to_id(bos_token),
    )


def _special_tokens(config: Mapping[str, Any]) -> dict[str, Any]:
    """`*_token` members as strings, and the list of additional ones."""
    tokens: dict[str, Any] = {}
    for name, value in config.items():
        if name.endswith("_token") and (content := _content(value)) is not None:
            tokens[name] = content
        elif name == "additional_special_tokens" and isinstance(value, list):
            tokens[name] = [_content(entry) for entry in value]
    return tokens


def _content(token: Any) -> str | None:
    """A token's text: written as itself or as an object."""
    content = token.get("content") if isinstance(token, dict) else token
    return content if isinstance(content, str) else None


def _surrounding_ids(tokenizer: Tokenizer) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The special ids that tokenizer.json's post-processor puts before and after a text.

    As in transformers, a tokenizer_config.json's add_bos_token does not override that file.
    """
    encoding = tokenizer.encode("a", add_special_tokens=True)
    is_special = encoding.special_tokens_mask
    texts = [index for index, special in enumerate(is_special) if not special]
    first, last = (texts[0], texts[-1]) if texts else (len(is_special), len(is_special))
    return tuple(encoding.ids[:first]), tuple(encoding.ids[last + 1 :])
