"""Reading safetensors files slice by slice gives what safetensors itself gives."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from services.worker.engine.models.checkpoint import CheckpointFile, SliceReader

CPU = torch.device("cpu")
NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
DEVICES = ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, NO_GPU])]


@pytest.fixture
def tensors() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {
        "matrix": torch.randn(37, 24),
        "half": torch.randn(5, 8).bfloat16(),
        "eight": torch.randn(16, 16).to(torch.float8_e4m3fn),
        "vector": torch.arange(9),
        "scalar": torch.tensor(2.5),
        "cube": torch.randn(4, 3, 2),
        "empty": torch.zeros(0, 4),
    }


def open_file(tensors: dict[str, torch.Tensor], folder: Path, device: str, block: int = 64):
    path = folder / "model.safetensors"
    save_file(tensors, path)
    return CheckpointFile(path, torch.device(device), SliceReader(block))


def same(read: torch.Tensor, expected: torch.Tensor) -> bool:
    assert read.dtype == expected.dtype
    assert read.shape == expected.shape
    return torch.equal(read.cpu().float(), expected.float())


@pytest.mark.parametrize("device", DEVICES)
def test_any_slice_is_the_tensors_own(
    tensors: dict[str, torch.Tensor], tmp_path: Path, device: str
) -> None:
    file = open_file(tensors, tmp_path, device)
    for name, expected in tensors.items():
        stored = file.tensors[name]
        assert (stored.shape, stored.ndim, stored.dtype) == (
            tuple(expected.shape),
            expected.ndim,
            expected.dtype,
        )
        assert same(stored[...], expected)
        if expected.ndim:
            assert same(stored[1:3], expected[1:3])
            assert same(stored[3:], expected[3:])
    matrix = tensors["matrix"]
    for rows, columns in [(slice(None), slice(3, 9)), (slice(2, 20), slice(12, 24))]:
        assert same(file.tensors["matrix"][rows, columns], matrix[rows, columns])
    file.close()


@pytest.mark.parametrize("device", DEVICES)
def test_many_threads_read_one_file(tmp_path: Path, device: str) -> None:
    tensors = {str(number): torch.full((50, 40), float(number)) for number in range(40)}
    file = open_file(tensors, tmp_path, device, block=1000)
    with ThreadPoolExecutor(8) as pool:
        read = pool.map(lambda name: file.tensors[name][:, 7:30], tensors)
        for name, part in zip(tensors, read, strict=True):
            assert same(part, tensors[name][:, 7:30])
    file.close()


def test_only_the_slice_is_read(tensors: dict[str, torch.Tensor], tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file(tensors, path)
    reader = SliceReader()
    file = CheckpointFile(path, CPU, reader)
    assert reader.num_bytes == 0
    file.tensors["matrix"][5:7]
    assert reader.num_bytes == 2 * 24 * 4
    file.tensors["matrix"][:, 5:7]
    assert reader.num_bytes == 2 * 24 * 4 + 37 * 2 * 4
    file.close()


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "no safetensors file or is incomplete"),
        (b"\xff" * 100, "no safetensors file or is incomplete"),
        ((4).to_bytes(8, "little") + b"{no}", "header is damaged"),
        (
            (61).to_bytes(8, "little")
            + b'{"a": {"dtype": "I9", "shape": [1], "data_offsets": [0, 4]}}'.ljust(61),
            "type I9 of a is not known",
        ),
        (
            (62).to_bytes(8, "little")
            + b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}'.ljust(62),
            "a has not the size of its shape",
        ),
        (
            (62).to_bytes(8, "little")
            + b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}'.ljust(62),
            "it ends before tensor a",
        ),
    ],
)
def test_a_damaged_file_is_named(tmp_path: Path, content: bytes, reason: str) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=reason):
        CheckpointFile(path, CPU, SliceReader())


def test_what_cannot_be_opened_is_said_with_its_path(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "gone.safetensors"):
        with pytest.raises(ValueError, match=f"cannot read {path}: "):
            CheckpointFile(path, CPU, SliceReader(64))
