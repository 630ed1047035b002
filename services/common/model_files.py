"""What a model directory says about itself: digests that must agree across services.

Reads only small files and safetensors headers, so every service can afford it.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

# Files that define encoding and decoding, in the order they are digested.
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
)
_SAMPLE_BYTES = 64 * 1024


def builtin_model_path() -> Path:
    """The model that ships with the project, from a checkout or from an installed wheel."""
    here = Path(__file__).resolve()
    checkout = here.parents[2] / "models" / "builtin"
    return checkout if checkout.is_dir() else here.parent / "builtin_model"


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in `path`; empty without such a file. Raises ValueError if malformed."""
    if not path.is_file():
        return {}
    try:
        loaded = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(loaded, dict):
        raise ValueError(f"{path} does not hold a JSON object")
    return loaded


def tokenizer_digest(tokenizer_path: Path) -> str:
    """Digest of the files that define encoding and decoding. Raises FileNotFoundError."""
    found = [path for name in _TOKENIZER_FILES if (path := tokenizer_path / name).is_file()]
    if not found:
        raise FileNotFoundError(f"no tokenizer files in {tokenizer_path}")
    digest = hashlib.sha256()
    for path in found:
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:32]


def chat_template_digest(tokenizer_path: Path, override: str | None) -> str:
    """Digest of where chat templates come from; empty when there is none.

    `override` is what the operator gave as `--chat-template`: a file, digested by content, or the
    name of a built-in template. Without it, the tokenizer's own template counts.
    """
    if override is not None:
        path = Path(override)
        source = path.read_bytes() if path.is_file() else override.encode()
    elif (path := tokenizer_path / "chat_template.jinja").is_file():
        source = path.read_bytes()
    else:
        template = read_json(tokenizer_path / "tokenizer_config.json").get("chat_template")
        if not template:
            return ""
        source = json.dumps(template, sort_keys=True).encode()
    return hashlib.sha256(source).hexdigest()[:32]


def model_revision(model_path: Path) -> str:
    """Digest of the configuration and of each weight file's size, head and tail.

    The head of a safetensors file holds every tensor's name, type, shape and place, so two
    different models differ here without reading all their weights. Raises FileNotFoundError.
    """
    config = model_path / "config.json"
    if not config.is_file():
        raise FileNotFoundError(f"no config.json in {model_path}")
    digest = hashlib.sha256(config.read_bytes())
    for path in sorted(model_path.glob("*.safetensors")):
        size = path.stat().st_size
        digest.update(f"{path.name}\0{size}\0".encode())
        with path.open("rb") as file:
            digest.update(file.read(_SAMPLE_BYTES))
            file.seek(max(0, size - _SAMPLE_BYTES))
            digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()[:32]


def eos_token_ids(model_path: Path, tokenizer_path: Path) -> list[int]:
    """Ids that end a sequence, by the generation config, the config and the tokenizer.

    Raises ValueError for what are no ids.
    """
    ids: set[int] = set()
    for name in ("generation_config.json", "config.json"):
        value = read_json(model_path / name).get("eos_token_id")
        if value is not None:
            given = value if isinstance(value, list) else [value]
            if not all(type(item) is int for item in given):
                raise ValueError(f"{model_path / name}: eos_token_id must be ids, got {value!r}")
            ids.update(given)
    token = read_json(tokenizer_path / "tokenizer_config.json").get("eos_token")
    content = token.get("content") if isinstance(token, dict) else token
    for entry in read_json(tokenizer_path / "tokenizer.json").get("added_tokens", []):
        if entry["content"] == content:
            ids.add(int(entry["id"]))
    return sorted(ids)
