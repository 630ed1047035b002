"""All-reduce of small messages in one kernel: every rank writes its tensor to all others and sums.

One trip over the link instead of NCCL's several; each rank sends (size - 1) times the message, so
it is for messages whose time is the trip's and not the transfer's. The kernel is divided into
blocks of consecutive elements, and each block is a protocol of its own with its twins on the other
ranks: write the elements to every peer, raise the flag there, wait for the peers' flags, add up.

A rank's memory, by block: the number of times that the block ran, a flag from every rank, and
twice a place for every rank's elements, used in turn. Twice suffices: a peer writes a place again
two turns later, for which it must have seen this rank's flag of the turn between, which this rank
raises only after it has read. All messages are of one type, so that a block's places are its own.

Sums are taken in float32 in the order of ranks, so all ranks have the same bits.

(After the one-shot kernels of NVIDIA's FasterTransformer and TensorRT-LLM, custom all-reduce.)
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

# Elements of a block; threads handle 16 bytes of 16-bit types each.
_BLOCK = 1024
_NUM_WARPS = 4
_INT_BYTES = 4
# Bytes that a rank sends to all others together, above which NCCL takes over. Two H200s gain by
# the kernel far beyond that, but its memory grows with the limit; this holds every message that
# is captured in a graph (1,024 tokens) of two ranks with 8,192 features.
MAX_SENT_BYTES = 16 * 1024 * 1024


def memory_bytes(size: int, max_sent_bytes: int = MAX_SENT_BYTES) -> int:
    """What each rank of `size` must make writable for the others, zeroed."""
    # Of the type with the most blocks.
    num_blocks = _num_blocks(size, torch.float16, max_sent_bytes)
    places = 2 * size * num_blocks * _BLOCK * torch.float16.itemsize
    return (1 + size) * num_blocks * _INT_BYTES + places


def reference(tensors: list[torch.Tensor]) -> torch.Tensor:
    """The sum of the ranks' tensors as the kernel rounds it."""
    total = torch.zeros_like(tensors[0], dtype=torch.float32)
    for tensor in tensors:
        total += tensor.float()
    return total.to(tensors[0].dtype)


class OneShotAllReduce:
    """All-reduce over memory that the ranks write for each other.

    `addresses` are of each rank's `memory_bytes`, by rank; messages are of `dtype`. Every rank
    must make the same calls in the same order, of which CUDA graphs may be made.
    """

    def __init__(
        self,
        addresses: list[int],
        rank: int,
        dtype: torch.dtype,
        max_sent_bytes: int = MAX_SENT_BYTES,
    ) -> None:
        self._rank = rank
        self._size = len(addresses)
        self._dtype = dtype
        self._num_blocks = _num_blocks(self._size, dtype, max_sent_bytes)
        self._max_bytes = max_sent_bytes // (self._size - 1)
        self._addresses = torch.tensor(addresses, dtype=torch.int64, device="cuda")

    def takes(self, tensor: torch.Tensor) -> bool:
        """Whether a message is small enough, by its size and type alone."""
        return tensor.dtype == self._dtype and tensor.nbytes <= self._max_bytes

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum over ranks, in place; contiguous, and one that `takes` is true for."""
        assert tensor.is_contiguous(), "blocks are of consecutive elements"
        num_elements = tensor.numel()
        if num_elements:
            _all_reduce_kernel[(triton.cdiv(num_elements, _BLOCK),)](
                tensor,
                self._addresses,
                num_elements,
                RANK=self._rank,
                SIZE=self._size,
                BLOCK=_BLOCK,
                BLOCK_BYTES=_BLOCK * self._dtype.itemsize,
                NUM_BLOCKS=self._num_blocks,
                num_warps=_NUM_WARPS,
            )
        return tensor


def _num_blocks(size: int, dtype: torch.dtype, max_sent_bytes: int) -> int:
    """Of the largest message; a multiple of 4, so that places are aligned."""
    return -(-max_sent_bytes // ((size - 1) * _BLOCK * dtype.itemsize * 4)) * 4


@triton.jit
def _all_reduce_kernel(
    x,
    addresses,
    num_elements,
    RANK: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_BYTES: tl.constexpr,
    NUM_BLOCKS: tl.constexpr,
):
    # From the start of a rank's memory: epochs, flags, then places by turn, rank and block.
    PLACES: tl.constexpr = (1 + SIZE) * NUM_BLOCKS * 4
    PLACE_BYTES: tl.constexpr = NUM_BLOCKS * BLOCK_BYTES
    block = tl.program_id(0)
    element = tl.arange(0, BLOCK)
    offsets = block * BLOCK + element
    inside = offsets < num_elements
    own = tl.load(addresses + RANK)
    epochs = own.to(tl.pointer_type(tl.int32))
    epoch = tl.load(epochs + block) + 1
    turn = epoch & 1
    value = tl.load(x + offsets, inside)

    places = PLACES + turn.to(tl.int64) * (SIZE * PLACE_BYTES) + block * BLOCK_BYTES
    for peer in tl.static_range(SIZE):
        if peer != RANK:
            address = tl.load(addresses + peer) + places + RANK * PLACE_BYTES
            place = tl.multiple_of(address.to(tl.pointer_type(x.dtype.element_ty)), 16)
            tl.store(place + element, value, inside)
    # All threads have written before one of them raises the flags, and with them what all wrote.
    tl.debug_barrier()
    for peer in tl.static_range(SIZE):
        if peer != RANK:
            flags = tl.load(addresses + peer).to(tl.pointer_type(tl.int32)) + NUM_BLOCKS
            tl.atomic_xchg(flags + RANK * NUM_BLOCKS + block, epoch, sem="release", scope="sys")
    own_flags = epochs + NUM_BLOCKS
    for peer in tl.static_range(SIZE):
        if peer != RANK:
            # A peer may be a turn ahead, so its flag may show more.
            flag = own_flags + peer * NUM_BLOCKS + block
            while tl.atomic_add(flag, 0, sem="acquire", scope="sys") - epoch < 0:
                pass
    tl.debug_barrier()

    total = tl.zeros((BLOCK,), tl.float32)
    for peer in tl.static_range(SIZE):
        if peer == RANK:
            total += value.to(tl.float32)
        else:
            address = own + places + peer * PLACE_BYTES
            place = tl.multiple_of(address.to(tl.pointer_type(x.dtype.element_ty)), 16)
            total += tl.load(place + element, inside, cache_modifier=".cg").to(tl.float32)
    tl.store(x + offsets, total.to(x.dtype.element_ty), inside)
    tl.store(epochs + block, epoch)
