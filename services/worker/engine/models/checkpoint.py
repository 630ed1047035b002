"""Safetensors files as tensors that are read slice by slice, straight to the device.

The format (https://github.com/huggingface/safetensors#format): eight bytes with the length of a
JSON header, the header with each tensor's type, shape and place, then the tensors in row order.

Nothing of a tensor is read before it is indexed, and then only the bytes of the slice asked for,
so a rank reads its shard alone. On a GPU they pass through a thread's two pinned blocks, one being
read while the other is copied; on a CPU they are read into the tensor that is returned.
"""

from __future__ import annotations

import contextlib
import math
import os
import stat
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import EllipsisType

import msgspec
import torch

_LENGTH_BYTES = 8
_MAX_HEADER_BYTES = 100_000_000
_STAGING_BYTES = 16 * 1024**2

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}

# What indexes a CheckpointTensor.
Index = slice | EllipsisType | tuple[slice, slice]


class _Entry(msgspec.Struct):
    """A tensor in the header; offsets count from the header's end."""

    dtype: str
    shape: tuple[int, ...]
    data_offsets: tuple[int, int]


class CheckpointFile:
    """Owns an open safetensors file; `tensors` by name. Reading it from several threads is fine."""

    def __init__(self, path: Path, device: torch.device, reader: SliceReader) -> None:
        """Raises ValueError when the file cannot be opened, is damaged or has an unknown type."""
        try:
            self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise ValueError(f"cannot read {path}: {error.strerror}") from error
        try:
            first, entries = _read_header(self._fd, path)
            self.tensors = {
                name: CheckpointTensor(
                    name=name,
                    fd=self._fd,
                    offset=first + entry.data_offsets[0],
                    shape=entry.shape,
                    dtype=_DTYPES[entry.dtype],
                    device=device,
                    reader=reader,
                )
                for name, entry in entries.items()
            }
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """No tensor of the file can be read from here on."""
        os.close(self._fd)


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointTensor:
    """One tensor of a file; indexing it as a torch tensor reads it, to `device`."""

    name: str
    fd: int
    offset: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    reader: SliceReader

    @property
    def ndim(self) -> int:
        """Number of dimensions."""
        return len(self.shape)

    @property
    def num_bytes(self) -> int:
        """Its size in the file."""
        return math.prod(self.shape) * self.dtype.itemsize

    def __getitem__(self, index: Index) -> torch.Tensor:
        """Rows `[a:b]`, columns `[:, a:b]` of a matrix, or all: `[...]`.

        Raises OSError when the file cannot be read, ValueError when it ends too early.
        """
        if not self.shape:
            size = self.dtype.itemsize
            return self._read(1, size, self.offset, size).view(())
        rows, columns = _slices(index, self.shape)
        row_bytes = math.prod(self.shape[1:]) * self.dtype.itemsize
        if columns is None:
            first, size, shape = 0, row_bytes, self.shape[1:]
        else:
            first = columns.start * self.dtype.itemsize
            size = (columns.stop - columns.start) * self.dtype.itemsize
            shape = (columns.stop - columns.start,)
        read = self._read(
            rows.stop - rows.start, row_bytes, self.offset + rows.start * row_bytes + first, size
        )
        return read.view(rows.stop - rows.start, *shape)

    def _read(self, num_rows: int, row_bytes: int, offset: int, size: int) -> torch.Tensor:
        """`size` bytes at `offset` and at every `row_bytes` after it, packed; flat."""
        out = torch.empty(num_rows * size, dtype=torch.uint8, device=self.device)
        self.reader.note(len(out))
        if self.device.type == "cpu":
            self._read_rows(out, row_bytes, offset, size)
            return out.view(self.dtype)
        if size == row_bytes:
            # Rows that follow each other can be cut anywhere.
            row_bytes = size = 1
            num_rows = len(out)
        block = max(1, self.reader.block_bytes // max(size, 1))
        for start in range(0, num_rows, block):
            target = out[start * size : min(num_rows, start + block) * size]
            with self.reader.pinned(len(target)) as pinned:
                self._read_rows(pinned, row_bytes, offset + start * row_bytes, size)
                target.copy_(pinned, non_blocking=True)
        return out.view(self.dtype)

    def _read_rows(self, out: torch.Tensor, row_bytes: int, offset: int, size: int) -> None:
        """Fill `out`, on the host, with rows of `size` bytes that lie `row_bytes` apart."""
        if not len(out):
            return
        view = out.numpy().data
        if size == row_bytes or size == len(out):
            self._read_into(view, offset)
            return
        for start in range(0, len(out), size):
            self._read_into(view[start : start + size], offset)
            offset += row_bytes

    def _read_into(self, view: memoryview, offset: int) -> None:
        done = 0
        while done < len(view):
            count = os.preadv(self.fd, [view[done:]], offset + done)
            if not count:
                raise ValueError(f"the file of tensor {self.name} ends before it")
            done += count


class SliceReader:
    """Owns two pinned blocks for each thread that reads, and counts the bytes read.

    A block is filled again only once the copy from it is done. Copies go through the current
    stream, as does what is done with the tensors, so their memory can be taken again at once.
    """

    def __init__(self, block_bytes: int = _STAGING_BYTES) -> None:
        self.block_bytes = block_bytes
        self.num_bytes = 0
        self._threads = threading.local()
        self._lock = threading.Lock()

    def note(self, num_bytes: int) -> None:
        """So many bytes were read."""
        with self._lock:
            self.num_bytes += num_bytes

    @contextlib.contextmanager
    def pinned(self, num_bytes: int) -> Iterator[torch.Tensor]:
        """The block that was not used last, to be filled and copied from; uint8 [num_bytes]."""
        if not hasattr(self._threads, "blocks"):
            self._threads.blocks = [_Block(), _Block()]
        blocks: list[_Block] = self._threads.blocks
        blocks.reverse()
        block = blocks[0]
        block.copied.synchronize()
        if len(block.memory) < num_bytes:
            size = max(num_bytes, self.block_bytes)
            block.memory = torch.empty(size, dtype=torch.uint8, pin_memory=True)
        yield block.memory[:num_bytes]
        block.copied.record()


class _Block:
    """Pinned memory and the event after the newest copy from it."""

    def __init__(self) -> None:
        self.memory = torch.empty(0, dtype=torch.uint8)
        self.copied: torch.cuda.Event = torch.cuda.Event()  # type: ignore[no-untyped-call]


def _read_header(fd: int, path: Path) -> tuple[int, dict[str, _Entry]]:
    """Where the tensors start, and what the header says of each. Raises ValueError."""
    status = os.fstat(fd)
    if not stat.S_ISREG(status.st_mode):
        raise ValueError(f"cannot read {path}: it is no file")
    size = status.st_size
    prefix = os.pread(fd, _LENGTH_BYTES, 0)
    length = int.from_bytes(prefix, "little")
    first = _LENGTH_BYTES + length
    if len(prefix) < _LENGTH_BYTES or length > _MAX_HEADER_BYTES or first > size:
        raise ValueError(f"cannot read {path}: it is no safetensors file or is incomplete")
    try:
        header = msgspec.json.decode(
            os.pread(fd, length, _LENGTH_BYTES), type=dict[str, msgspec.Raw]
        )
        header.pop("__metadata__", None)
        entries = {name: msgspec.json.decode(raw, type=_Entry) for name, raw in header.items()}
    except msgspec.DecodeError as error:
        raise ValueError(f"cannot read {path}: its header is damaged: {error}") from error
    for name, entry in entries.items():
        begin, end = entry.data_offsets
        if entry.dtype not in _DTYPES:
            raise ValueError(f"cannot read {path}: type {entry.dtype} of {name} is not known")
        if min(entry.shape, default=0) < 0:
            raise ValueError(f"cannot read {path}: {name} has the shape {entry.shape}")
        if end - begin != math.prod(entry.shape) * _DTYPES[entry.dtype].itemsize:
            raise ValueError(f"cannot read {path}: {name} has not the size of its shape")
        if not 0 <= begin <= end <= size - first:
            raise ValueError(f"cannot read {path}: it ends before tensor {name}")
    return first, entries


def _slices(index: Index, shape: tuple[int, ...]) -> tuple[slice, slice | None]:
    """The rows, and the columns where not all are wanted."""
    if index is ...:
        return slice(0, shape[0]), None
    if isinstance(index, slice):
        return _within(index, shape[0]), None
    rows, columns = index
    assert len(shape) == 2, "only matrices have columns"
    return _within(rows, shape[0]), _within(columns, shape[1])


def _within(wanted: slice, size: int) -> slice:
    start, stop, step = wanted.indices(size)
    assert step == 1, "slices are consecutive"
    return slice(start, max(start, stop))
