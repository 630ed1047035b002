"""TLS between services: who is let in, and certificates that change while calls run."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path

import grpc
import pytest
from grpc import aio
from grpc_health.v1 import health_pb2, health_pb2_grpc

from services.common.peer_tls import peer_tls
from services.common.rotating_channel import RotatingChannel
from services.common.rpc import open_channel
from services.common.tls import TlsFlags
from tests.fakes.certificates import Authority, TlsFiles, files_of
from tests.fakes.gateway_stack import until
from tests.fakes.peers import LOOK_S, calling, echo, refusal, running_peer, shown_expiry_s, who

AUTHORITY = Authority()


@pytest.fixture
def server_files(tmp_path: Path) -> TlsFiles:
    return files_of(tmp_path / "server", AUTHORITY)


@pytest.fixture
def client_files(tmp_path: Path) -> TlsFiles:
    return files_of(tmp_path / "client", AUTHORITY, AUTHORITY.issue("caller"))


async def shown(port: int, client: TlsFiles, expires_s: float) -> None:
    """Wait until the server shows the certificate that ends then."""
    async with asyncio.timeout(10):
        while await shown_expiry_s(port, client.flags()) != expires_s:
            await asyncio.sleep(LOOK_S)


async def test_pain_26_h_services_know_each_other_by_certificates(
    server_files: TlsFiles, client_files: TlsFiles
) -> None:
    async with running_peer(server_files.flags()) as server:
        async with calling(client_files.flags(), server.port) as (channel, _):
            assert await who(channel) == "caller"


async def test_an_address_found_by_a_name_must_show_a_certificate_of_that_name(
    tmp_path: Path, client_files: TlsFiles
) -> None:
    named = files_of(tmp_path / "named", AUTHORITY, AUTHORITY.issue("x", dns_names=["tokenizer"]))
    async with running_peer(named.flags()) as server, peer_tls(client_files.flags()) as tls:
        address = f"127.0.0.1:{server.port}"
        async with open_channel(address, tls, "tokenizer") as channel:
            assert await who(channel) == "caller"
        async with open_channel(address, tls, "another") as channel:
            assert await refusal(channel)


async def test_pain_26_h_who_shows_no_certificate_is_refused(
    server_files: TlsFiles,
) -> None:
    async with running_peer(server_files.flags()) as server:
        credentials = grpc.ssl_channel_credentials(AUTHORITY.certificate)
        async with aio.secure_channel(f"localhost:{server.port}", credentials) as channel:
            assert await refusal(channel)


async def test_pain_26_h_who_speaks_plain_text_is_refused(server_files: TlsFiles) -> None:
    async with running_peer(server_files.flags()) as server:
        async with calling(TlsFlags(), server.port) as (channel, _):
            assert await refusal(channel)


async def test_a_server_in_plain_text_is_not_spoken_to(client_files: TlsFiles) -> None:
    async with running_peer(TlsFlags()) as server:
        async with calling(client_files.flags(), server.port) as (channel, _):
            assert await refusal(channel)


async def test_pain_26_h_a_client_of_another_authority_is_refused(
    server_files: TlsFiles, tmp_path: Path
) -> None:
    strange = TlsFiles(tmp_path / "strange")
    # It would trust the server; the server must not trust it.
    strange.write(Authority("another CA").issue(), AUTHORITY.certificate)
    async with running_peer(server_files.flags()) as server:
        async with calling(strange.flags(), server.port) as (channel, _):
            assert await refusal(channel)


async def test_pain_26_h_a_server_of_another_authority_is_refused(
    client_files: TlsFiles, tmp_path: Path
) -> None:
    strange = TlsFiles(tmp_path / "strange")
    strange.write(Authority("another CA").issue(), AUTHORITY.certificate)
    async with running_peer(strange.flags()) as server:
        async with calling(client_files.flags(), server.port) as (channel, _):
            assert "CERTIFICATE_VERIFY_FAILED" in await refusal(channel)


async def test_pain_26_h_a_server_by_another_name_is_refused(
    client_files: TlsFiles, tmp_path: Path
) -> None:
    named = files_of(tmp_path / "s", AUTHORITY, AUTHORITY.issue(dns_names=["rhizome.internal"]))
    async with running_peer(named.flags()) as server:
        async with calling(client_files.flags(), server.port) as (channel, _):
            assert "Hostname" in await refusal(channel)
        # The name that all services have instead of the address.
        async with calling(client_files.flags("rhizome.internal"), server.port) as (channel, _):
            assert await who(channel) == "caller"
        async with calling(client_files.flags("other.internal"), server.port) as (channel, _):
            assert "Hostname" in await refusal(channel)


async def test_unix_sockets_speak_tls_too(
    server_files: TlsFiles, client_files: TlsFiles, tmp_path: Path
) -> None:
    address = f"unix:{tmp_path}/s"
    async with running_peer(server_files.flags(), address):
        async with (
            peer_tls(client_files.flags()) as tls,
            open_channel(address, tls) as channel,
            open_channel(address) as plain,
        ):
            assert await who(channel) == "caller"
            assert await refusal(plain)


async def test_a_rotation_keeps_streams_and_new_calls_use_the_new_pairs(
    server_files: TlsFiles, client_files: TlsFiles
) -> None:
    async with (
        running_peer(server_files.flags()) as server,
        calling(client_files.flags(), server.port) as (channel, tls),
    ):
        assert tls is not None
        stream = echo(channel)
        await stream.write(b"1")
        assert await stream.read() == b"1"
        newer = AUTHORITY.issue(days=90)
        server_files.write(newer, AUTHORITY.certificate)
        client_files.write(AUTHORITY.issue("caller two"), AUTHORITY.certificate)
        before = tls.identity
        await until(lambda: tls.identity is not before)
        assert await who(channel) == "caller two"
        await shown(server.port, client_files, newer.expires_s)
        await stream.write(b"2")
        assert await stream.read() == b"2"
        await stream.done_writing()
        assert await stream.read() is aio.EOF
        assert await stream.code() is grpc.StatusCode.OK


async def test_a_rotated_channel_closes_its_old_connection_after_the_last_call(
    server_files: TlsFiles, client_files: TlsFiles
) -> None:
    async with (
        running_peer(server_files.flags()) as server,
        calling(client_files.flags(), server.port) as (channel, tls),
    ):
        assert isinstance(channel, RotatingChannel)
        assert tls is not None
        stream = echo(channel)
        await stream.write(b"1")
        assert await stream.read() == b"1"
        client_files.write(AUTHORITY.issue("caller two"), AUTHORITY.certificate)
        before = tls.identity
        await until(lambda: tls.identity is not before)
        await who(channel)
        assert channel.num_retired == 1
        await stream.done_writing()
        assert await stream.read() is aio.EOF
        await until(lambda: channel.num_retired == 0)


async def test_closing_a_rotated_channel_ends_its_old_calls_too(
    server_files: TlsFiles, client_files: TlsFiles
) -> None:
    async with running_peer(server_files.flags()) as server:
        async with calling(client_files.flags(), server.port) as (channel, tls):
            assert tls is not None
            stream = echo(channel)
            await stream.write(b"1")
            client_files.write(AUTHORITY.issue("caller two"), AUTHORITY.certificate)
            before = tls.identity
            await until(lambda: tls.identity is not before)
            await who(channel)
        assert await stream.code() is grpc.StatusCode.CANCELLED


async def test_a_closed_channel_opens_no_new_connection() -> None:
    keys = [b"old"]
    opened: list[bytes] = []

    def connect(key: bytes) -> aio.Channel:
        opened.append(key)
        return aio.insecure_channel("localhost:1")

    async with RotatingChannel(lambda: keys[-1], connect) as channel:
        pass
    keys.append(b"new")
    with pytest.raises(aio.UsageError):
        await who(channel)
    assert opened == [b"old"]


async def test_pairs_that_have_ended_are_replaced_on_both_sides(tmp_path: Path) -> None:
    server_files = files_of(tmp_path / "server", AUTHORITY, AUTHORITY.issue(days=-1))
    client_files = files_of(tmp_path / "client", AUTHORITY, AUTHORITY.issue("caller", days=-1))
    async with (
        running_peer(server_files.flags()) as server,
        calling(client_files.flags(), server.port) as (channel, tls),
    ):
        assert tls is not None
        assert "expired" in await refusal(channel)
        newer = AUTHORITY.issue()
        server_files.write(newer, AUTHORITY.certificate)
        # The server's alone does not help: the client's has ended too.
        await shown(server.port, client_files, newer.expires_s)
        assert await refusal(channel)
        waiting = asyncio.create_task(channel.channel_ready())
        client_files.write(AUTHORITY.issue("caller"), AUTHORITY.certificate)
        async with asyncio.timeout(20):
            await waiting
        assert await who(channel) == "caller"


async def test_a_change_of_the_authority_needs_no_restart(
    server_files: TlsFiles, client_files: TlsFiles
) -> None:
    other = Authority("the next CA")
    both = AUTHORITY.certificate + other.certificate
    async with (
        running_peer(server_files.flags()) as server,
        calling(client_files.flags(), server.port) as (channel, tls),
    ):
        assert tls is not None
        # First all trust both, then all get new certificates, then the old CA goes.
        for issued, trusted in ((None, both), (other, both), (other, other.certificate)):
            for files in (server_files, client_files):
                source = issued or AUTHORITY
                before = tls.identity
                newer = source.issue("caller")
                files.write(newer, trusted)
                if files is server_files:
                    await shown(server.port, client_files, newer.expires_s)
                else:
                    await until(lambda before=before: tls.identity is not before)
                assert await who(channel) == "caller"


async def test_a_broken_pair_is_not_taken(
    server_files: TlsFiles, client_files: TlsFiles, caplog: pytest.LogCaptureFixture
) -> None:
    async with (
        running_peer(server_files.flags()) as server,
        calling(client_files.flags(), server.port) as (channel, _),
    ):
        expires_s = await shown_expiry_s(server.port)
        for files in (server_files, client_files):
            files.cert.write_bytes(AUTHORITY.issue().certificate)
            await until(lambda files=files: f"error={files.cert}" in caplog.text)
        assert await who(channel) == "caller"
        assert await shown_expiry_s(server.port) == expires_s
    assert {r.levelno for r in caplog.records if "files_refused" in r.message} == {logging.ERROR}
    assert "PRIVATE" not in caplog.text


async def test_health_is_told_in_plain_text_beside_a_server_with_tls(
    server_files: TlsFiles,
) -> None:
    async with running_peer(server_files.flags(), health_port=0) as server:
        assert server.health_port
        async with open_channel(f"127.0.0.1:{server.health_port}") as channel:
            stub = health_pb2_grpc.HealthStub(channel)
            request = health_pb2.HealthCheckRequest()
            serving = health_pb2.HealthCheckResponse.SERVING
            assert (await stub.Check(request)).status == serving
            await server.set_ready(False)
            assert (await stub.Check(request)).status != serving
            # Nothing else is told there.
            with pytest.raises(aio.AioRpcError) as refused:
                await who(channel)
            assert refused.value.code() is grpc.StatusCode.UNIMPLEMENTED


async def test_a_health_port_that_is_taken_is_named() -> None:
    async with running_peer(TlsFlags(), health_port=0) as server:
        with pytest.raises(OSError, match=f"{server.health_port}"):
            async with running_peer(TlsFlags(), health_port=server.health_port):
                pass


async def test_files_that_are_no_pair_end_the_start(tmp_path: Path) -> None:
    files = files_of(tmp_path, AUTHORITY)
    files.ca.write_bytes(b"")
    with pytest.raises(ValueError, match="holds no certificates"):
        async with peer_tls(files.flags()):
            pass
    files.key.unlink()
    with pytest.raises(ValueError, match=f"cannot read {files.key}"):
        async with peer_tls(files.flags()):
            pass
