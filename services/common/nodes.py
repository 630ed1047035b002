"""A replica across several hosts: what its flags may say, for the launcher and the worker alike."""

from __future__ import annotations

from typing import NamedTuple


class HostPort(NamedTuple):
    """Where rank 0 is met."""

    host: str
    port: int


def parse_host_port(text: str) -> HostPort:
    """`host:port`, with brackets around an IPv6 address. Raises ValueError."""
    host, separator, port = text.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not separator or not host or not port.isdecimal() or not 0 < int(port) <= 65535:
        raise ValueError(f"nccl-init-addr must be host:port, got {text!r}")
    return HostPort(host, int(port))


def check_nodes(*, tp: int, nnodes: int, node_rank: int, nccl_init_addr: str | None) -> None:
    """Raises ValueError when `tp` ranks cannot be spread over the nodes as asked."""
    if nnodes < 1:
        raise ValueError(f"nnodes must be >= 1, got {nnodes}")
    if not 0 <= node_rank < nnodes:
        raise ValueError(f"node-rank must be within 0..{nnodes - 1} (nnodes - 1), got {node_rank}")
    if nccl_init_addr is not None and tp < 2:
        raise ValueError(f"nccl-init-addr is where several ranks meet, but --tp is {tp}")
    if tp % nnodes:
        raise ValueError(f"nnodes {nnodes} does not divide the {tp} ranks of --tp")
    if nccl_init_addr is not None:
        parse_host_port(nccl_init_addr)
    elif nnodes > 1:
        raise ValueError("nnodes > 1 needs --nccl-init-addr, the host:port of node 0")


def check_p2p(
    *, enabled: bool, tp: int, device: str, nnodes: int, disable_custom_all_reduce: bool
) -> None:
    """Raises ValueError when a check of writes between GPUs would check what nothing uses."""
    if not enabled:
        return
    if tp < 2:
        raise ValueError(f"enable-p2p-check needs several GPUs, but --tp is {tp}")
    if device == "cpu":
        raise ValueError("enable-p2p-check needs GPUs, but the device is cpu")
    if disable_custom_all_reduce:
        raise ValueError("enable-p2p-check checks what disable-custom-all-reduce turns off")
    if nnodes > 1:
        raise ValueError("enable-p2p-check is for the GPUs of one host, but nnodes > 1")
