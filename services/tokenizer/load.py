"""Puts the service's parts together from a model's directory."""

from __future__ import annotations

from pathlib import Path

from rhizome.tokenizer.v1 import tokenizer_service_pb2 as pb
from services.common.model_files import (
    builtin_model_path,
    chat_template_digest,
    eos_token_ids,
    read_json,
    tokenizer_digest,
)
from services.common.prefix_hash import HASH_VERSION
from services.tokenizer.chat import load_chat_template
from services.tokenizer.encode import Encoder
from services.tokenizer.pieces import build_piece_tables
from services.tokenizer.servicer import TokenizerParts
from services.tokenizer.tokenizer_files import load_tokenizer


def load_parts(
    model_path: Path | None = None,
    tokenizer_path: Path | None = None,
    chat_template: str | None = None,
) -> TokenizerParts:
    """Load a tokenizer; paths left out are the built-in model's and the model's own.

    Raises FileNotFoundError for missing files and ValueError for malformed ones.
    """
    model_path = model_path or builtin_model_path()
    tokenizer_path = tokenizer_path or model_path
    loaded = load_tokenizer(tokenizer_path)
    tables = build_piece_tables(loaded.tokenizer, _model_vocab_size(model_path))
    template = load_chat_template(tokenizer_path, chat_template, loaded.special_tokens)
    info = pb.GetTokenizerInfoResponse(
        tokenizer_digest=tokenizer_digest(tokenizer_path),
        template_digest=chat_template_digest(tokenizer_path, chat_template),
        hash_version=HASH_VERSION,
        vocab_size=tables.vocab_size,
        eos_token_ids=eos_token_ids(model_path, tokenizer_path),
        bos_token_id=loaded.bos_token_id,
        has_chat_template=template is not None,
        tokenizer_path=str(tokenizer_path),
    )
    return TokenizerParts(encoder=Encoder(loaded), tables=tables, chat_template=template, info=info)


def _model_vocab_size(model_path: Path) -> int:
    """The width of the model's output, which can be padded beyond the tokenizer's ids."""
    config = read_json(model_path / "config.json")
    size = config.get("vocab_size") or config.get("text_config", {}).get("vocab_size")
    return int(size or 0)
