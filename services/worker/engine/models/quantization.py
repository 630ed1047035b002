"""Reads a checkpoint's `quantization_config`: which FP8 checkpoints are served, and how.

Two dialects are read: compressed-tensors' "float-quantized" (`config_groups`, `ignore`) and
`quant_method: fp8` (`activation_scheme`, `modules_to_not_convert`). Both give linear weights as
float8_e4m3fn with scales that multiply them.

A checkpoint's static scales of activations are not used: one scale a token, found at run time, is
never coarser.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from services.worker.engine.layers.fp8 import Fp8Scheme

_SUPPORTED = (
    "supported: FP8 (E4M3) weights with one scale a tensor or an output channel and FP8 "
    "activations, as quant_method 'fp8' or compressed-tensors 'float-quantized'"
)
_FP8_FORMATS = ("float-quantized", "naive-quantized")


def parse_quantization(raw: Mapping[str, Any]) -> Fp8Scheme | None:
    """The scheme of a config.json; None where its weights are not quantized.

    Raises ValueError naming what is not supported.
    """
    settings = raw.get("quantization_config") or raw.get("compression_config")
    if not settings:
        return None
    if not isinstance(settings, Mapping):
        raise ValueError(f"config.json: quantization_config must be an object, got {settings!r}")
    method = settings.get("quant_method")
    if method == "fp8":
        return _parse_fp8(settings)
    if method == "compressed-tensors":
        return _parse_compressed_tensors(settings)
    raise _unsupported(f"quant_method {method!r}")


def _parse_fp8(settings: Mapping[str, Any]) -> Fp8Scheme:
    if settings.get("weight_block_size") is not None:
        raise _unsupported(f"weight_block_size {settings['weight_block_size']}")
    activations = settings.get("activation_scheme", "dynamic")
    if activations not in ("dynamic", "static"):
        raise _unsupported(f"activation_scheme {activations!r}")
    _check_format(settings.get("fmt", "e4m3"))
    ignored = settings.get("modules_to_not_convert") or settings.get("ignored_layers") or ()
    return Fp8Scheme(checkpoint_scales="tensor", ignored=tuple(ignored))


def _check_format(name: str) -> None:
    if name not in ("e4m3", "float8_e4m3fn"):
        raise _unsupported(f"fmt {name!r}")


def _parse_compressed_tensors(settings: Mapping[str, Any]) -> Fp8Scheme:
    if settings.get("format") not in _FP8_FORMATS:
        raise _unsupported(f"format {settings.get('format')!r}")
    groups = settings.get("config_groups") or {}
    if len(groups) != 1:
        raise _unsupported(f"{len(groups)} config_groups")
    (group,) = groups.values()
    if group.get("targets") != ["Linear"]:
        raise _unsupported(f"targets {group.get('targets')}")
    if group.get("output_activations"):
        raise _unsupported("output_activations")
    activations = group.get("input_activations")
    if not activations:
        raise _unsupported("weights alone in FP8 (no input_activations)")
    _check_fp8("input_activations", activations, ("tensor", "token"))
    scales = _check_fp8("weights", group.get("weights") or {}, ("tensor", "channel"))
    return Fp8Scheme(checkpoint_scales=scales, ignored=tuple(settings.get("ignore") or ()))


def _check_fp8(what: str, settings: Mapping[str, Any], strategies: tuple[str, ...]) -> Any:
    """The strategy of symmetric 8-bit floats."""
    kind = (settings.get("type"), settings.get("num_bits"), settings.get("symmetric", True))
    if kind != ("float", 8, True):
        raise _unsupported(f"{what} of type {kind[0]!r} with {kind[1]} bits, symmetric {kind[2]}")
    if settings.get("strategy") not in strategies:
        raise _unsupported(f"{what} with strategy {settings.get('strategy')!r}")
    return settings["strategy"]


def _unsupported(what: str) -> ValueError:
    return ValueError(f"config.json: quantization with {what} is not supported; {_SUPPORTED}")
