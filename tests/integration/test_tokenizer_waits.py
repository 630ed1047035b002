"""A prompt and the tokenizers that cannot be reached just now."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from rhizome.common.v1.pool_identity_pb2 import PoolIdentity
from rhizome.tokenizer.v1.tokenizer_service_pb2 import TokenizeInput
from services.common.errors import UnavailableError
from services.gateway.tokenizers import TokenizerPool
from tests.fakes.gateway_stack import running_tokenizer

INPUTS = [TokenizeInput(text="Hello")]


async def test_a_prompt_waits_for_a_tokenizer_that_starts_again(tmp_path: Path) -> None:
    address = f"unix:{tmp_path}/tokenizer.sock"
    pool = TokenizerPool((address,), lambda: None, wait_s=30)
    async with pool.following():
        for _ in range(2):
            asked = [asyncio.create_task(pool.tokenize(INPUTS, "", 16)) for _ in range(3)]
            await asyncio.sleep(0.05)
            assert not any(task.done() for task in asked)
            async with running_tokenizer(listen=address):
                results = await asyncio.gather(*asked)
                assert all(result[0].token_ids for result in results)


async def test_a_prompt_that_no_tokenizer_comes_for_is_refused(tmp_path: Path) -> None:
    pool = TokenizerPool((f"unix:{tmp_path}/none.sock",), lambda: None, wait_s=0.1)
    async with pool.following():
        with pytest.raises(UnavailableError, match="no tokenizer can be reached"):
            await pool.tokenize(INPUTS, "", 16)


async def test_nobody_waits_for_a_tokenizer_that_does_not_fit() -> None:
    async with running_tokenizer() as address:
        pool = TokenizerPool((address,), lambda: PoolIdentity(hash_version=99), wait_s=1000)
        async with pool.following():
            with pytest.raises(UnavailableError, match="does not fit the pool"):
                await pool.tokenize(INPUTS, "", 16)
