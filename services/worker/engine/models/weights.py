"""Streams a checkpoint's tensors into a model's layers."""

from __future__ import annotations

import logging
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from services.common.model_files import read_json
from services.worker.engine.layers.parameters import Layer
from services.worker.engine.models.decoder import Decoder

logger = logging.getLogger(__name__)

Progress = Callable[[float], None]

_INDEX_FILE = "model.safetensors.index.json"
# Buffers of old checkpoints that are computed here.
_IGNORED_SUFFIXES = (".rotary_emb.inv_freq",)
# Static scales of FP8 checkpoints: activations get a scale a token, keys and values have none.
_UNUSED_SCALES = (".input_scale", ".k_scale", ".v_scale", ".output_scale")
_DUMMY_STD = 0.02


def load_weights(model: Decoder, model_path: Path, on_progress: Progress) -> None:
    """Load every safetensors file; each rank takes its shard of each tensor.

    Raises ValueError naming tensors that are missing, unexpected or of the wrong shape.
    """
    expected = _expected(model)
    missing = set(expected)
    unexpected = []
    num_unused_scales = 0
    for stored_name, tensor, fraction in _stream(_files(model_path)):
        # Some checkpoints of the dialect say so of scales that multiply all the same.
        name = stored_name.replace(".weight_scale_inv", ".weight_scale")
        if name not in expected:
            if model.config.fp8 is not None and name.endswith(_UNUSED_SCALES):
                num_unused_scales += 1
            elif not _is_ignored(name, model):
                unexpected.append(stored_name)
            continue
        for layer, local_name, shape in expected[name]:
            if not _same_shape(tuple(tensor.shape), shape):
                raise ValueError(
                    f"tensor {stored_name} has shape {tuple(tensor.shape)}, expected {shape}"
                )
            layer.load(local_name, tensor)
        missing.discard(name)
        on_progress(fraction)
    if missing:
        raise ValueError(f"{model_path} lacks tensors: {_listed(missing)}")
    if unexpected:
        raise ValueError(f"{model_path} has tensors this model does not: {_listed(unexpected)}")
    if num_unused_scales:
        logger.warning(
            "event=checkpoint_scales_unused count=%s reason=%s",
            num_unused_scales,
            "activations are scaled per token at run time, keys and values not at all",
        )


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


def _expected(model: Decoder) -> dict[str, list[tuple[Layer, str, tuple[int, ...]]]]:
    """By checkpoint name: the layers that take the tensor, its name in each, and its shape."""
    expected: dict[str, list[tuple[Layer, str, tuple[int, ...]]]] = {}
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
        files = sorted({model_path / name for name in index["weight_map"].values()})
        absent = [path.name for path in files if not path.is_file()]
        if absent:
            raise ValueError(f"{model_path} lacks files of its index: {_listed(absent)}")
        return files
    files = sorted(model_path.glob("*.safetensors"))
    if not files:
        raise ValueError(f"no safetensors files in {model_path}")
    return files


def _stream(files: list[Path]) -> Iterator[tuple[str, torch.Tensor, float]]:
    """Name, tensor (mapped from the file, so only what is copied is read), share done."""
    for index, path in enumerate(files):
        try:
            with safe_open(path, framework="pt") as file:
                names = list(file.keys())
                for done, name in enumerate(names, start=1):
                    yield name, file.get_tensor(name), (index + done / len(names)) / len(files)
        except SafetensorError as error:
            raise ValueError(f"cannot read {path}: {error}") from error


def _is_ignored(name: str, model: Decoder) -> bool:
    tied_head = model.config.tied_embeddings and name == "lm_head.weight"
    return tied_head or name.endswith(_IGNORED_SUFFIXES)


def _listed(names: set[str] | list[str], limit: int = 8) -> str:
    shown = sorted(names)
    more = f" and {len(shown) - limit} more" if len(shown) > limit else ""
    return ", ".join(shown[:limit]) + more
