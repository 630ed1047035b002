"""Certificates and keys: whether they fit, and until when."""

from __future__ import annotations

import ssl

import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from services.common.certificates import (
    ExpiryMetric,
    check_authorities,
    expiry_s,
    key_pair,
)
from tests.fakes.certificates import Authority, key_text

AUTHORITY = Authority()
ISSUED = AUTHORITY.issue()


@pytest.mark.parametrize("days", [-1.0, 1.0, 365.0, 365 * 40.0])
def test_the_end_of_a_certificate_is_read_also_when_it_has_passed(days: float) -> None:
    # After 2049 the time is written in another type.
    issued = AUTHORITY.issue(days=days)
    assert key_pair(issued.certificate, issued.key).expires_s == issued.expires_s


def test_the_first_certificate_of_a_chain_is_the_one_that_counts() -> None:
    chain = b"a comment\n" + ISSUED.certificate + AUTHORITY.certificate
    assert key_pair(chain, ISSUED.key).expires_s == ISSUED.expires_s


def test_a_key_of_another_certificate_is_refused() -> None:
    with pytest.raises(ValueError, match="do not fit: key values mismatch"):
        key_pair(ISSUED.certificate, AUTHORITY.issue().key)


@pytest.mark.parametrize(
    ("certificate", "key"),
    [
        (b"", ISSUED.key),
        (ISSUED.certificate, b""),
        (ISSUED.certificate[:200], ISSUED.key),
        (ISSUED.certificate, ISSUED.key[:60]),
        (b"no PEM", b"at all"),
    ],
)
def test_files_that_are_half_written_are_refused(certificate: bytes, key: bytes) -> None:
    with pytest.raises(ValueError, match="do not fit"):
        key_pair(certificate, key)


def test_other_forms_of_certificates_are_refused() -> None:
    certificate = ISSUED.certificate.replace(b" CERTIFICATE", b" X509 CERTIFICATE")
    with pytest.raises(ValueError, match="must begin with"):
        key_pair(certificate, ISSUED.key)


def test_an_encrypted_key_is_refused_and_nobody_is_asked_for_its_password() -> None:
    key = key_text(ec.generate_private_key(ec.SECP256R1()), b"secret")
    with pytest.raises(ValueError, match="without a password"):
        key_pair(ISSUED.certificate, key)


def test_a_key_is_not_shown() -> None:
    assert b"PRIVATE" in ISSUED.key
    assert "PRIVATE" not in repr(key_pair(ISSUED.certificate, ISSUED.key))


def test_a_ca_file_without_certificates_is_refused() -> None:
    check_authorities(AUTHORITY.certificate + Authority().certificate)
    for content in (b"", b"none", ISSUED.key, b"\xff\xfe", AUTHORITY.certificate[:300]):
        with pytest.raises(ValueError, match="holds no certificates"):
            check_authorities(content)


def test_a_certificate_cut_off_anywhere_has_no_end() -> None:
    der = ssl.PEM_cert_to_DER_cert(ISSUED.certificate.decode())
    for length in range(0, 120, 7):
        with pytest.raises(ValueError, match="does not say when it ends"):
            expiry_s(der[:length])


def test_the_metric_tells_certificates_apart_and_follows_them() -> None:
    pairs = {"services": key_pair(ISSUED.certificate, ISSUED.key)}
    metric = ExpiryMetric([("services", lambda: pairs["services"])])
    newer = AUTHORITY.issue(days=90)
    before = [sample for family in metric.collect() for sample in family.samples]
    pairs["services"] = key_pair(newer.certificate, newer.key)
    after = [sample for family in metric.collect() for sample in family.samples]
    assert [s.name for s in before] == ["rhizome_tls_certificate_expiry_timestamp_seconds"]
    assert before[0].labels == {"certificate": "services"}
    assert before[0].value == ISSUED.expires_s
    assert after[0].value == newer.expires_s
