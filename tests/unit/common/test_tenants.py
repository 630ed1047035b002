from pathlib import Path

import pytest

from services.common.errors import InvalidRequestError
from services.common.tenants import TenantSet, read_tenants


def _write(path: Path, text: str) -> Path:
    file = path / "tenants.json"
    file.write_text(text)
    return file


def test_listed_tenants_have_their_own_policy_and_the_rest_the_stars(tmp_path: Path) -> None:
    text = '{"a": {"weight": 4, "max_queued": 7}, "*": {"weight": 0.5}, "": {"max_queued": 1}}'
    tenants = read_tenants(_write(tmp_path, text))
    assert (tenants.weight("a"), tenants.of("a").max_queued) == (4.0, 7)
    assert (tenants.weight("stranger"), tenants.of("stranger").max_queued) == (0.5, None)
    assert (tenants.weight(""), tenants.of("").max_queued) == (1.0, 1)


def test_metrics_tell_only_listed_tenants_apart(tmp_path: Path) -> None:
    tenants = read_tenants(_write(tmp_path, '{"a": {}, "*": {"weight": 2}}'))
    assert [tenants.label(name) for name in ("a", "b", "c", "")] == ["a", "other", "other", "none"]
    assert TenantSet().label("a") == "other"


def test_a_tenant_may_not_ask_for_a_higher_priority_than_its_own(tmp_path: Path) -> None:
    tenants = read_tenants(_write(tmp_path, '{"a": {"max_priority": 5}, "*": {"max_priority": 0}}'))
    for tenant, priority in (("a", 5), ("a", -7), ("b", 0), ("", -1)):
        tenants.check_priority(tenant, priority)
    for tenant, priority in (("a", 6), ("b", 1), ("", 1)):
        with pytest.raises(InvalidRequestError, match=f"priority is {priority}"):
            tenants.check_priority(tenant, priority)
    TenantSet().check_priority("a", 2**31 - 1)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[", "cannot read tenants"),
        ("[]", "must hold an object"),
        ('{"a": 1}', "tenant 'a' must be an object"),
        ('{"a": {"wait": 1}}', "tenant 'a' has an unknown field 'wait'"),
        ('{"a": {"weight": "2"}}', "tenant 'a': weight must be a number"),
        ('{"a": {"weight": true}}', "tenant 'a': weight must be a number"),
        ('{"a": {"weight": 0}}', "tenant 'a': weight must be in"),
        ('{"a": {"max_queued": 1.5}}', "tenant 'a': max_queued must be a whole number"),
        ('{"a": {"max_queued": 0}}', "tenant 'a': max_queued must be >= 1"),
        ('{"a": {"requests_per_minute": "9"}}', "requests_per_minute must be a whole number"),
        ('{"a": {"tokens_per_minute": 0}}', "tokens_per_minute must be >= 1"),
        ('{"a": {"max_priority": -1}}', "tenant 'a': max_priority must be in"),
        ('{"a": {"max_priority": 2147483648}}', "max_priority must be in"),
        ('{"a": {"max_priority": true}}', "max_priority must be a whole number"),
    ],
)
def test_a_bad_file_is_refused_by_name(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_tenants(_write(tmp_path, text))
