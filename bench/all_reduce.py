"""One-shot all-reduce against NCCL between the GPUs of one host.

`python -m bench.all_reduce` starts a process for each GPU and prints one JSON object: for each
message size, microseconds of an all-reduce inside a CUDA graph of many, by implementation, and
whether both gave the same sums.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys

import torch

from services.common.nodes import HostPort
from services.worker.engine.distributed.group import NcclGroup
from services.worker.engine.distributed.nccl import Communicator
from services.worker.engine.distributed.peer_memory import PeerMemory
from services.worker.engine.distributed.rendezvous import create_store, join_store
from services.worker.engine.kernels.one_shot import OneShotAllReduce, memory_bytes, reference

_SIZES = tuple(1 << power for power in range(12, 27))
_CALLS = 65
_REPLAYS = 20


def main() -> None:
    """Rank 0, which starts the others and prints the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=int, default=torch.cuda.device_count())
    parser.add_argument("--join", type=int, nargs=2, metavar=("RANK", "PORT"))
    arguments = parser.parse_args()
    size = arguments.size
    if arguments.join is not None:
        rank, port = arguments.join
        measure(rank, size, join_store(HostPort("127.0.0.1", port), size))
        return
    store, address = create_store(size)
    command = (sys.executable, "-m", "bench.all_reduce", "--size", str(size), "--join")
    others = [subprocess.Popen((*command, str(rank), str(address.port))) for rank in range(1, size)]
    figures = measure(0, size, store)
    for other in others:
        other.wait()
    settings = {"device": torch.cuda.get_device_name(), "size": size, "torch": torch.__version__}
    print(json.dumps({"benchmark": "all_reduce", "settings": settings, "microseconds": figures}))


def measure(rank: int, size: int, store: object) -> dict[str, object]:
    """Figures by message size in bytes of bfloat16."""
    torch.cuda.set_device(rank)
    communicator = Communicator(store, rank, size)  # type: ignore[arg-type]
    most = max(_SIZES) * (size - 1)
    memory = PeerMemory(store, rank, list(range(size)), memory_bytes(size, most), checked=True)  # type: ignore[arg-type]
    nccl = NcclGroup(store, communicator)  # type: ignore[arg-type]
    one_shot = OneShotAllReduce(memory.addresses, rank, torch.bfloat16, most)
    figures: dict[str, object] = {}
    for num_bytes in _SIZES:
        generators = [torch.Generator("cuda").manual_seed(each) for each in range(size)]
        tensors = [
            torch.randn(num_bytes // 2, generator=each, device="cuda").bfloat16()
            for each in generators
        ]
        expected = reference(tensors)
        line: dict[str, object] = {"nccl": _time(nccl, tensors[rank])}
        summed = one_shot.all_reduce(tensors[rank].clone())
        line["equal"] = bool(torch.equal(summed, expected))
        line["one_shot"] = _time(one_shot, tensors[rank])
        figures[str(num_bytes)] = line
    torch.cuda.synchronize()
    communicator.abort()
    return figures


def _time(group: NcclGroup | OneShotAllReduce, tensor: torch.Tensor) -> float:
    """Microseconds of one call among `_CALLS` in a graph; the median of several replays."""
    work = torch.zeros_like(tensor)
    group.all_reduce(work)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(_CALLS):
            group.all_reduce(work)
    times = []
    for _ in range(_REPLAYS):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1000 / _CALLS)
    return round(sorted(times)[_REPLAYS // 2], 2)


if __name__ == "__main__":
    main()
