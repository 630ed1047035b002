"""The flags of replicas across hosts."""

import pytest

from services.common.nodes import check_nodes, check_p2p, parse_host_port


def test_an_address_is_a_host_and_a_port():
    assert parse_host_port("node-0.group:5000") == ("node-0.group", 5000)
    assert parse_host_port("[fd00::1]:5000") == ("fd00::1", 5000)


@pytest.mark.parametrize("text", ["node-0", "node-0:", ":5000", "node-0:port", "node-0:70000"])
def test_an_address_that_is_none_is_refused(text):
    with pytest.raises(ValueError, match="nccl-init-addr must be host:port"):
        parse_host_port(text)


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        ({"nnodes": 0}, "nnodes must be >= 1, got 0"),
        ({"nnodes": 2, "node_rank": 2}, r"node-rank must be within 0\.\.1"),
        ({"tp": 3, "nnodes": 2}, "nnodes 2 does not divide the 3 ranks"),
        ({"nnodes": 2, "nccl_init_addr": None}, "nnodes > 1 needs --nccl-init-addr"),
        ({"nccl_init_addr": "nowhere"}, "nccl-init-addr must be host:port"),
    ],
)
def test_nodes_that_cannot_be_are_refused(flags, reason):
    given = {"tp": 4, "nnodes": 1, "node_rank": 0, "nccl_init_addr": "node-0:5000", **flags}
    with pytest.raises(ValueError, match=reason):
        check_nodes(**given)


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        ({"tp": 1}, "needs several GPUs"),
        ({"device": "cpu"}, "needs GPUs, but the device is cpu"),
        ({"disable_custom_all_reduce": True}, "what disable-custom-all-reduce turns off"),
        ({"nnodes": 2}, "for the GPUs of one host, but nnodes > 1"),
    ],
)
def test_a_check_of_what_nothing_uses_is_refused(flags, reason):
    given = {"tp": 2, "device": "auto", "nnodes": 1, "disable_custom_all_reduce": False, **flags}
    with pytest.raises(ValueError, match=reason):
        check_p2p(enabled=True, **given)
    check_p2p(enabled=False, **given)
