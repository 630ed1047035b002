"""The error tree: every leaf has its own status and comes back from its code."""

import pytest

from services.common import errors
from services.common.errors import InternalError, RhizomeError, error_from_code

LEAVES = [leaf for leaf in RhizomeError.__subclasses__() if leaf is not InternalError]


@pytest.mark.parametrize("leaf", LEAVES)
def test_a_leaf_comes_back_from_its_code(leaf: type[RhizomeError]) -> None:
    error = error_from_code(leaf("why").code, "why")
    assert type(error) is leaf
    assert error.message == "why"


def test_statuses_are_distinct() -> None:
    assert len({leaf.status for leaf in LEAVES}) == len(LEAVES)


def test_the_drawn_tree_names_every_leaf_with_its_status() -> None:
    drawn = dict(
        line.split("->")[0:2] for line in (errors.__doc__ or "").splitlines() if "->" in line
    )
    tree = {name.strip(" x"): status.split()[0] for name, status in drawn.items()}
    assert tree == {leaf.__name__: leaf.status.name for leaf in LEAVES}


def test_an_unknown_code_is_internal() -> None:
    assert type(error_from_code(2, "odd")) is InternalError
