"""The clients in other languages agree with the protos and with the page about them."""

from __future__ import annotations

import base64
import importlib
import re
from pathlib import Path

import pytest
from google.protobuf.descriptor_pb2 import FileDescriptorProto

_ROOT = Path(__file__).resolve().parents[2]
_CLIENTS = _ROOT / "clients"
_GENERATED = _CLIENTS / "typescript" / "src" / "gen"
_MODULES = sorted(_GENERATED.rglob("*_pb.ts"))
_PAGE = (_ROOT / "docs" / "clients.md").read_text()
# A fence's language, and where that language's examples are.
_EXAMPLES = {
    "go": "go/examples/*/*.go",
    "java": "java/examples/*.java",
    "typescript": "typescript/examples/*.ts",
    "rust": "rust/examples/*.rs",
}
_BLOCKS = re.findall(r"```(\w+)\n(.*?)```", _PAGE, re.DOTALL)


@pytest.mark.parametrize("path", _MODULES, ids=lambda path: path.name)
def test_the_committed_code_describes_what_the_protos_say(path: Path) -> None:
    """The Go client's comes from the same run of the same script."""
    (encoded,) = re.findall(r'fileDesc\("([^"]+)"', path.read_text())
    client = FileDescriptorProto.FromString(base64.b64decode(encoded + "=" * (-len(encoded) % 4)))
    noun = str(path.relative_to(_GENERATED)).removesuffix("_pb.ts").replace("/", ".")
    python = FileDescriptorProto()
    importlib.import_module(f"{noun}_pb2").DESCRIPTOR.CopyToProto(python)
    # TypeScript has these as arguments beside the description.
    python.ClearField("dependency")
    assert client == python, "run `make clients`"


def test_there_is_client_code_to_compare() -> None:
    assert len(_MODULES) >= 7


def test_lock_files_name_no_private_registry() -> None:
    allowed = {"registry.npmjs.org", "github.com"}
    for lock in ("go/go.sum", "typescript/package-lock.json", "rust/Cargo.lock"):
        hosts = set(re.findall(r"https?://([^/\"]+)", (_CLIENTS / lock).read_text()))
        assert hosts <= allowed, lock


@pytest.mark.parametrize("language", _EXAMPLES)
def test_the_page_shows_the_examples_as_they_are(language: str) -> None:
    files = [_lines(path.read_text()) for path in _CLIENTS.glob(_EXAMPLES[language])]
    blocks = [_lines(text) for fence, text in _BLOCKS if fence == language]
    assert all(any(_within(block, file) for file in files) for block in blocks)
    (whole,) = [block for block in blocks if block in files]
    assert len(whole) < 60, "the quickstart is short"


def test_every_block_of_code_on_the_page_is_of_an_example() -> None:
    assert {fence for fence, _ in _BLOCKS} == set(_EXAMPLES)


def _lines(text: str) -> list[str]:
    """What the lines say, however far they are indented."""
    return [line.strip() for line in text.strip().splitlines()]


def _within(block: list[str], file: list[str]) -> bool:
    return any(
        file[start : start + len(block)] == block for start in range(len(file) - len(block) + 1)
    )
