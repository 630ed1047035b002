"""Who is admitted to what."""

from __future__ import annotations

import hashlib

import pytest

from services.common.edge_flags import EdgeFlags
from services.common.errors import PermissionDeniedError, RhizomeError, UnauthenticatedError
from services.gateway.access import Access, Need
from services.gateway.api_keys import Caller, KeySet
from services.gateway.metrics import GatewayMetrics

_FILE = KeySet(
    (hashlib.sha256(key).digest(), caller)
    for key, caller in (
        (b"file", Caller("file")),
        (b"file-admin", Caller("file-admin", is_admin=True)),
        (b"a", Caller("a", "tenant-a")),
        (b"nobody", Caller("nobody", "")),
    )
)
_ERRORS = {401: UnauthenticatedError, 403: PermissionDeniedError}


def access(**flags: str) -> Access:
    return Access(EdgeFlags(**flags), GatewayMetrics())  # type: ignore[arg-type]


def with_file(tmp_file: str = "f", **flags: str) -> Access:
    given = EdgeFlags(api_keys=tmp_file, **flags)  # type: ignore[arg-type]
    return Access(given, GatewayMetrics(), lambda: _FILE)


def bearer(key: str | None) -> bytes | None:
    return None if key is None else f"Bearer {key}".encode()


def outcome(judge: Access, need: Need, key: str | None, tenant: str = "") -> int:
    """The HTTP status that follows."""
    try:
        judge.admit(need, bearer(key), tenant)
    except RhizomeError as error:
        return next(status for status, kind in _ERRORS.items() if isinstance(error, kind))
    return 200


# What SGLang answers, but that an administrator's key opens ordinary endpoints too.
@pytest.mark.parametrize(
    ("flags", "key", "ordinary", "admin"),
    [
        ({}, None, 200, 200),
        ({}, "any", 200, 200),
        ({"api_key": "k"}, None, 401, 401),
        ({"api_key": "k"}, "x", 401, 401),
        ({"api_key": "k"}, "k", 200, 200),
        ({"admin_api_key": "a"}, None, 200, 401),
        ({"admin_api_key": "a"}, "x", 200, 401),
        ({"admin_api_key": "a"}, "a", 200, 200),
        ({"api_key": "k", "admin_api_key": "a"}, None, 401, 401),
        ({"api_key": "k", "admin_api_key": "a"}, "k", 200, 403),
        ({"api_key": "k", "admin_api_key": "a"}, "a", 200, 200),
        ({"api_key": "k", "admin_api_key": "k"}, "k", 200, 200),
    ],
)
def test_keys_of_the_flags_open_what_they_open_in_sglang(
    flags: dict[str, str], key: str | None, ordinary: int, admin: int
) -> None:
    judge = access(**flags)
    assert outcome(judge, Need.NOTHING, key) == 200
    assert outcome(judge, Need.KEY, key) == ordinary
    assert outcome(judge, Need.ADMIN, key) == admin


@pytest.mark.parametrize(
    ("key", "ordinary", "admin"),
    [
        (None, 401, 401),
        ("file", 200, 403),
        ("file-admin", 200, 200),
        ("k", 200, 403),
        ("other", 401, 401),
    ],
)
def test_with_a_file_only_administrators_administer(
    key: str | None, ordinary: int, admin: int
) -> None:
    judge = with_file(api_key="k")
    assert outcome(judge, Need.KEY, key) == ordinary
    assert outcome(judge, Need.ADMIN, key) == admin


def test_an_empty_file_closes_the_door() -> None:
    judge = Access(
        EdgeFlags(api_keys="f"),  # type: ignore[arg-type]
        GatewayMetrics(),
        KeySet,
    )
    assert outcome(judge, Need.KEY, None) == 401
    assert outcome(judge, Need.KEY, "file") == 401


@pytest.mark.parametrize(
    ("key", "asked", "acts_for"),
    [
        ("a", "", "tenant-a"),
        ("a", "tenant-a", "tenant-a"),
        # The nameless tenant is one, too.
        ("nobody", "", ""),
        ("file", "", ""),
        ("file", "tenant-a", "tenant-a"),
        ("file-admin", "tenant-b", "tenant-b"),
    ],
)
def test_a_key_with_a_tenant_acts_for_it(key: str, asked: str, acts_for: str) -> None:
    assert with_file().admit(Need.KEY, bearer(key), asked) == acts_for


@pytest.mark.parametrize(("key", "asked"), [("a", "tenant-b"), ("nobody", "tenant-a")])
def test_pain_25_h_a_key_of_one_tenant_does_not_act_for_another(key: str, asked: str) -> None:
    assert outcome(with_file(), Need.KEY, key, asked) == 403


@pytest.mark.parametrize("header", [b"bearer k", b"BEARER k", b"Bearer  k "])
def test_the_scheme_may_be_written_in_any_case(header: bytes) -> None:
    assert access(api_key="k").admit(Need.KEY, header, "") == ""


@pytest.mark.parametrize("header", [b"", b"k", b"Bearer", b"Bearer ", b"Basic k", b"Bearerk"])
def test_other_headers_are_no_keys(header: bytes) -> None:
    with pytest.raises(UnauthenticatedError):
        access(api_key="k").admit(Need.KEY, header, "")


def test_refusals_are_counted_by_reason_and_say_no_key() -> None:
    metrics = GatewayMetrics()
    judge = Access(
        EdgeFlags(api_keys="f", api_key="s3cret"),  # type: ignore[arg-type]
        metrics,
        lambda: _FILE,
    )
    tries = [(Need.KEY, None, ""), (Need.KEY, "s3cret2", ""), (Need.ADMIN, "s3cret", "")]
    for need, key, tenant in [*tries, (Need.KEY, "a", "tenant-b")]:
        with pytest.raises(RhizomeError) as refused:
            judge.admit(need, bearer(key), tenant)
        assert "s3cret" not in refused.value.message
    counts = {
        reason: metrics.registry.get_sample_value(
            "rhizome_gateway_refused_keys_total", {"reason": reason}
        )
        for reason in ("missing", "unknown", "not_admin", "other_tenant")
    }
    assert set(counts.values()) == {1.0}


def test_configurations_do_not_show_keys() -> None:
    assert "s3cret" not in repr(EdgeFlags(api_key="s3cret", admin_api_key="s3cret"))


@pytest.mark.parametrize("key", ["", " ", "a ", " a", "a\n", "é"])
def test_keys_that_no_header_can_carry_are_refused(key: str) -> None:
    with pytest.raises(ValueError, match="admin_api_key must") as refused:
        EdgeFlags(admin_api_key=key)
    assert not key.strip() or repr(key) not in str(refused.value)


def test_a_certificate_without_its_key_is_refused() -> None:
    with pytest.raises(ValueError, match="give both or none"):
        EdgeFlags(ssl_certfile="c")  # type: ignore[arg-type]
