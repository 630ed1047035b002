"""Makes a rank's process group: which GPU it takes, which network address, which collectives."""

from __future__ import annotations

import logging

import torch
from torch._C._distributed_c10d import Store

from services.common.nodes import HostPort
from services.worker.engine.distributed.group import GlooGroup, NcclGroup, TpGroup
from services.worker.engine.distributed.nccl import Communicator
from services.worker.engine.distributed.peer_memory import PeerMemory, PeerMemoryError
from services.worker.engine.distributed.rendezvous import own_address
from services.worker.engine.options import EngineOptions

logger = logging.getLogger(__name__)


def take_gpu(options: EngineOptions, device: torch.device, rank: int) -> None:
    """Make this rank's GPU the process's current one; on CPUs nothing.

    Raises ValueError when the host has too few.
    """
    if device.type != "cuda":
        return
    needed = options.base_gpu_id + options.ranks_per_node
    if needed > torch.cuda.device_count():
        raise ValueError(
            f"{options.ranks_per_node} ranks from GPU {options.base_gpu_id} on need {needed} GPUs, "
            f"but this host has {torch.cuda.device_count()}"
        )
    torch.cuda.set_device(_gpu_id(options, rank))
    # Its heuristics choose faster kernels than cuBLAS's own for 48 to 200 rows: 45 instead of 53 us
    # for 128 rows of an 8B model's down projection on an H100. Engines' environment says so too.
    if torch.backends.cuda.preferred_blas_library() != torch._C._BlasBackend.Cublaslt:
        torch.backends.cuda.preferred_blas_library("cublaslt")


def make_group(
    options: EngineOptions,
    device: torch.device,
    dtype: torch.dtype,
    store: Store,
    address: HostPort,
    rank: int,
) -> TpGroup:
    """This rank's group of `tp_size`; waits for the other ranks. `address` is rank 0's.

    `dtype` is the activations'.
    """
    size = options.tp_size
    if device.type == "cpu":
        return GlooGroup(store, rank, size, own_address(address))
    group = NcclGroup(store, Communicator(store, rank, size))
    if options.nnodes == 1 and not options.disable_custom_all_reduce:
        _add_one_shot(group, store, options, dtype, rank)
    return group


def _add_one_shot(
    group: NcclGroup, store: Store, options: EngineOptions, dtype: torch.dtype, rank: int
) -> None:
    """All ranks decide alike: each of them knows whether one of them cannot."""
    # Imported where there is a GPU: other machines may lack Triton.
    from services.worker.engine.kernels.one_shot import OneShotAllReduce, memory_bytes

    size = options.tp_size
    gpu_ids = [_gpu_id(options, each) for each in range(size)]
    try:
        memory = PeerMemory(
            store, rank, gpu_ids, memory_bytes(size), checked=options.enable_p2p_check
        )
    except PeerMemoryError as error:
        logger.warning("event=one_shot_all_reduce_off reason=%s", error)
        return
    group.reduce_small_with(OneShotAllReduce(memory.addresses, rank, dtype))


def _gpu_id(options: EngineOptions, rank: int) -> int:
    return options.base_gpu_id + rank % options.ranks_per_node
