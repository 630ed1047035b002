import json
from dataclasses import fields
from pathlib import Path

import pytest

from services.scheduler.pools import (
    Pool,
    PoolIdentity,
    PoolSet,
    ProtocolRange,
    protocol_mismatch,
    read_declarations,
)
from tests.unit.scheduler.build import make_identity


def test_pain_07_p_every_differing_field_is_named_with_both_values() -> None:
    pool = Pool({})
    pool.identity = make_identity()
    other = PoolIdentity(
        served_model_name="other",
        model_revision="r2",
        tokenizer_digest="t2",
        template_digest="c2",
        page_size=32,
        hash_version=2,
    )
    mismatches = pool.mismatches(other, has_workers=True)
    assert [mismatch.field for mismatch in mismatches] == [
        field.name for field in fields(PoolIdentity)
    ]
    page_size = next(mismatch for mismatch in mismatches if mismatch.field == "page_size")
    assert (page_size.worker_value, page_size.pool_value) == ("32", "16")


def test_an_undeclared_pool_takes_whoever_comes_first() -> None:
    assert Pool({}).mismatches(make_identity(), has_workers=False) == []


def test_a_pool_without_workers_keeps_only_what_the_operator_declared() -> None:
    pool = Pool({"served_model_name": "model"})
    pool.identity = make_identity()
    assert pool.mismatches(make_identity(model_revision="r2"), has_workers=False) == []
    renamed = pool.mismatches(make_identity(served_model_name="other"), has_workers=False)
    assert [mismatch.field for mismatch in renamed] == ["served_model_name"]


def test_a_worker_goes_to_the_pool_of_its_model() -> None:
    pools = PoolSet([{"served_model_name": "a"}, {"served_model_name": "b"}])
    assert pools.for_worker(make_identity(served_model_name="b")) is pools.pools[1]
    assert pools.for_worker(make_identity(served_model_name="c")) is None


def test_pain_15_s_protocol_ranges_must_overlap() -> None:
    assert protocol_mismatch(ProtocolRange(1, 3)) == []
    assert [mismatch.field for mismatch in protocol_mismatch(ProtocolRange(2, 3))] == ["protocol"]
    assert ProtocolRange(1, 4).highest_common(ProtocolRange(2, 3)) == 3


def test_declarations_are_read_from_json(tmp_path: Path) -> None:
    path = tmp_path / "pools.json"
    declared = [{"served_model_name": "a", "page_size": 16}, {"served_model_name": "b"}]
    path.write_text(json.dumps(declared))
    assert read_declarations(path) == declared


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{", "cannot read"),
        ("{}", "must hold a list"),
        ("[]", "must hold a list"),
        ('[{"page_size": 16}]', "served_model_name"),
        ('[{"served_model_name": "a", "colour": 1}]', "colour"),
        ('[{"served_model_name": "a", "page_size": "16"}]', "page_size must be int"),
        ('[{"served_model_name": "a"}, {"served_model_name": "a"}]', "twice"),
    ],
)
def test_bad_declarations_are_refused_with_the_reason(
    tmp_path: Path, text: str, reason: str
) -> None:
    path = tmp_path / "pools.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=reason):
        read_declarations(path)
