"""Fills a model's layers from a checkpoint, or with random numbers."""

from __future__ import annotations

import contextlib
import logging
import os
import time
import zlib
from collections.abc import Callable, Iterable, Set
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

import torch

from services.common.model_files import read_json
from services.worker.engine.layers.parameters import Layer
from services.worker.engine.models.checkpoint import CheckpointFile, CheckpointTensor, SliceReader
from services.worker.engine.models.decoder import Decoder

logger = logging.getLogger(__name__)

Progress = Callable[[float], None]
# A layer that takes a tensor, the tensor's name in it, and its full shape.
_Taker = tuple[Layer, str, tuple[int, ...]]

_INDEX_FILE = "model.safetensors.index.json"
# Buffers of old checkpoints that are computed here.
_IGNORED_SUFFIXES = (".rotary_emb.inv_freq",)
# Static scales of FP8 checkpoints: activations get a scale a token, keys and values have none.
_UNUSED_SCALES = (".input_scale", ".k_scale", ".v_scale", ".output_scale")
_DUMMY_STD = 0.02
# Threads that read; more than this gain nothing from one disk, or from memory.
_MAX_READERS = 8


def load_weights(
    model: Decoder, model_path: Path, device: torch.device, on_progress: Progress
) -> None:
    """Read what this rank needs of every safetensors file, several tensors at a time.

    Raises ValueError naming tensors that are missing, unexpected or of the wrong shape.
    """
    started = time.monotonic()
    expected = _expected(model)
    reader = SliceReader()
    with contextlib.ExitStack() as stack:
        files = []
        for path in _files(model_path):
            files.append(CheckpointFile(path, device, reader))
            stack.callback(files[-1].close)
        stored = {
            _scale_name(name): tensor for file in files for name, tensor in file.tensors.items()
        }
        unused_scales = _unused_scales(stored.keys() - expected, model)
        unexpected = [
            name
            for name in stored.keys() - expected - unused_scales
            if not _is_ignored(name, model)
        ]
        if missing := expected.keys() - stored:
            raise ValueError(f"{model_path} lacks tensors: {_listed(missing)}")
        if unexpected:
            raise ValueError(f"{model_path} has tensors this model does not: {_listed(unexpected)}")
        # In the order of the files, so that disks read ahead.
        work = [(stored[name], expected[name]) for name in stored if name in expected]
        for tensor, _ in work:
            _check_type(tensor, model)
        _load_all(work, on_progress)
    if unused_scales:
        logger.warning(
            "event=checkpoint_scales_unused count=%s reason=%s",
            len(unused_scales),
            "activations are scaled per token at run time, keys and values not at all",
        )
    _log_speed(reader.num_bytes, time.monotonic() - started)


def load_dummy_weights(model: Decoder, device: torch.device, on_progress: Progress) -> None:
    """Random weights in the checkpoint's shapes, the same on any number of ranks."""
    expected = _expected(model)
    for index, (name, takers) in enumerate(expected.items()):
        shape = takers[0][2]
        generator = torch.Generator(device).manual_seed(zlib.crc32(name.encode()))
        tensor = torch.empty(shape, device=device)
        if len(shape) == 1 and name.endswith("weight"):
            tensor.fill_(1.0)
        else:
            tensor.normal_(std=_DUMMY_STD, generator=generator)
        for layer, local_name, _ in takers:
            layer.load(local_name, tensor)
        on_progress((index + 1) / len(expected))


def _expected(model: Decoder) -> dict[str, list[_Taker]]:
    """By checkpoint name: the layers that take the tensor, its name in each, and its shape."""
    expected: dict[str, list[_Taker]] = {}
    for prefix, layer in model.layers():
        for name, shape in layer.tensors().items():
            expected.setdefault(prefix + name, []).append((layer, name, shape))
    return expected


def _same_shape(stored: tuple[int, ...], expected: tuple[int, ...]) -> bool:
    """Scales come as [O, 1] or [O], and as [1] or []."""
    return [size for size in stored if size != 1] == [size for size in expected if size != 1]


def _files(model_path: Path) -> list[Path]:
    index = read_json(model_path / _INDEX_FILE)
    if index:
        places = index.get("weight_map")
        if not isinstance(places, dict) or not all(type(name) is str for name in places.values()):
            raise ValueError(
                f"{model_path / _INDEX_FILE} has no weight_map from tensors to names of files"
            )
        files = sorted({model_path / name for name in places.values()})
        absent = [path.name for path in files if not path.is_file()]
        if absent:
            raise ValueError(f"{model_path} lacks files of its index: {_listed(absent)}")
        return files
    files = sorted(model_path.glob("*.safetensors"))
    if not files:
        raise ValueError(f"no safetensors files in {model_path}")
    return files


def _check_type(tensor: CheckpointTensor, model: Decoder) -> None:
    """Raise ValueError for numbers that mean something else than what the model computes with."""
    if not tensor.dtype.is_floating_point:
        raise ValueError(f"tensor {tensor.name} has type {tensor.dtype}, not one of floats")
    if tensor.dtype.itemsize == 1 and model.config.fp8 is None:
        raise ValueError(
            f"tensor {tensor.name} has type {tensor.dtype}, but config.json has no "
            "quantization_config that says how it is scaled"
        )


def _load_all(work: list[tuple[CheckpointTensor, list[_Taker]]], on_progress: Progress) -> None:
    total = sum(tensor.num_bytes for tensor, _ in work)
    done = 0
    with ThreadPoolExecutor(min(_MAX_READERS, os.cpu_count() or 1)) as pool:
        futures = {pool.submit(_load, *item): item[0].num_bytes for item in work}
        try:
            for future in as_completed(futures):
                future.result()
                done += futures[future]
                on_progress(done / total)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _load(tensor: CheckpointTensor, takers: list[_Taker]) -> None:
    for layer, local_name, shape in takers:
        if not _same_shape(tensor.shape, shape):
            raise ValueError(f"tensor {tensor.name} has shape {tensor.shape}, expected {shape}")
        layer.load(local_name, tensor)


def _log_speed(num_bytes: int, seconds: float) -> None:
    gib = num_bytes / 1024**3
    logger.info(
        "event=weights_loaded gib=%.2f seconds=%.1f gib_per_s=%.2f",
        *(gib, seconds, gib / max(seconds, 1e-9)),
    )


def _scale_name(name: str) -> str:
    """Some FP8 checkpoints say "inv" of scales that multiply all the same."""
    return name.replace(".weight_scale_inv", ".weight_scale")


def _unused_scales(names: Set[str], model: Decoder) -> set[str]:
    """An FP8 checkpoint's static scales of activations and of keys and values."""
    if model.config.fp8 is None:
        return set()
    return {name for name in names if name.endswith(_UNUSED_SCALES)}


def _is_ignored(name: str, model: Decoder) -> bool:
    tied_head = model.config.tied_embeddings and name == "lm_head.weight"
    return tied_head or name.endswith(_IGNORED_SUFFIXES)


def _listed(names: Iterable[str], limit: int = 8) -> str:
    shown = sorted(names)
    more = f" and {len(shown) - limit} more" if len(shown) > limit else ""
    return ", ".join(shown[:limit]) + more
