"""Which number formats weights and keys/values are kept in, from the operator's wishes."""

from __future__ import annotations

from dataclasses import replace

import torch

from services.worker.engine.layers.fp8 import Fp8Scheme
from services.worker.engine.models.config import ModelConfig
from services.worker.engine.options import EngineOptions

KV_CACHE_DTYPES = {
    "fp8_e4m3": "float8_e4m3fn",
    "fp8_e5m2": "float8_e5m2",
}

# First NVIDIA GPUs with FP8 tensor cores and conversions (Ada).
_FP8_CAPABILITY = (8, 9)


def decide_fp8(
    options: EngineOptions, config: ModelConfig, *, device: torch.device, dtype: str
) -> Fp8Scheme | None:
    """How linear layers are kept in FP8; None keeps them in `dtype`.

    Raises ValueError where that cannot be.
    """
    wanted = options.quantization
    if wanted not in (None, "fp8"):
        raise ValueError(f"quantization must be fp8, got {wanted!r}")
    scheme = config.fp8
    if scheme is None and wanted == "fp8":
        scheme = Fp8Scheme()
    if scheme is None:
        return None
    if device.type == "cuda" and dtype != "bfloat16":
        raise ValueError(f"quantization fp8 on GPUs needs dtype bfloat16, got {dtype}")
    if options.load_format == "dummy":
        return replace(scheme, checkpoint_scales=None)
    return scheme


def decide_kv_cache_dtype(options: EngineOptions, dtype: str) -> str:
    """The page pool's type, as torch names it. Raises ValueError for an unknown one."""
    if options.kv_cache_dtype == "auto":
        return dtype
    name = KV_CACHE_DTYPES.get(options.kv_cache_dtype)
    if name is None:
        raise ValueError(
            f"kv_cache_dtype must be auto, {' or '.join(KV_CACHE_DTYPES)}, "
            f"got {options.kv_cache_dtype!r}"
        )
    return name


def check_fp8_device(device: torch.device, *, weights: bool, kv_cache_dtype: str) -> None:
    """Raises ValueError for a GPU without the conversions that are wanted."""
    if device.type != "cuda" or not (weights or kv_cache_dtype == "float8_e4m3fn"):
        return
    capability = torch.cuda.get_device_capability(device)
    if capability < _FP8_CAPABILITY:
        raise ValueError(
            f"FP8 (E4M3) needs a GPU of compute capability 8.9 or more, this one has "
            f"{capability[0]}.{capability[1]}"
        )
