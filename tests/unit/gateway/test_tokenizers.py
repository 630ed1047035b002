"""The tokenizer replicas: what is not even sent to them."""

from __future__ import annotations

import pytest

from rhizome.tokenizer.v1.tokenizer_service_pb2 import TokenizeInput
from services.common.errors import InvalidRequestError
from services.common.rpc import MAX_MESSAGE_BYTES
from services.gateway.tokenizers import TokenizerPool


async def test_text_beyond_a_message_is_too_long_and_not_an_overload() -> None:
    pool = TokenizerPool((), lambda: None)
    text = "x" * MAX_MESSAGE_BYTES
    with pytest.raises(InvalidRequestError, match="too long"):
        await pool.tokenize([TokenizeInput(text=text)], "", 16)
