"""Rotary position embedding (Su et al., arXiv 2104.09864) and its context extensions.

Frequencies follow Hugging Face's definitions, so that a checkpoint means here what it means
there. All of them depend on the configuration only, never on the sequence at hand: rotated keys
are cached and shared between sequences.

Shapes: T tokens, N heads, D head size, C context length.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeScaling:
    """A context extension; fields a kind does not use keep their defaults."""

    # "linear", "dynamic", "llama3" or "yarn".
    kind: str
    factor: float
    original_context: int
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    # None: derived from the factor.
    attention_factor: float | None = None
    truncate: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeConfig:
    theta: float
    head_dim: int
    scaling: RopeScaling | None = None


class RotaryTable:
    """Cosines and sines of every position, [C, D / 2] each, in the model's type."""

    def __init__(
        self, config: RopeConfig, context_length: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        frequencies, amplitude = rotary_frequencies(config, context_length)
        angles = torch.outer(torch.arange(context_length, dtype=torch.float32), frequencies)
        self._cos = (angles.cos() * amplitude).to(device=device, dtype=dtype)
        self._sin = (angles.sin() * amplitude).to(device=device, dtype=dtype)

    def at(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """[T] -> cosines and sines, [T, 1, D / 2] each."""
        return (
            self._cos.index_select(0, positions).unsqueeze(1),
            self._sin.index_select(0, positions).unsqueeze(1),
        )


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """[T, N, D] -> [T, N, D]; the two halves of a head are the rotated pairs."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def rotary_frequencies(config: RopeConfig, context_length: int) -> tuple[torch.Tensor, float]:
    """Frequencies [D / 2] in float32 and the factor on cosines and sines."""
    scaling = config.scaling
    if scaling is None:
        return _plain(config.theta, config.head_dim), 1.0
    if scaling.kind == "linear":
        return _plain(config.theta, config.head_dim) / scaling.factor, 1.0
    if scaling.kind == "dynamic":
        return _plain(_ntk_theta(config, scaling, context_length), config.head_dim), 1.0
    if scaling.kind == "llama3":
        return _llama3(_plain(config.theta, config.head_dim), scaling), 1.0
    if scaling.kind == "yarn":
        return _yarn(config, scaling)
    raise ValueError(f"unknown rope scaling {scaling.kind!r}")


def _plain(theta: float, head_dim: int) -> torch.Tensor:
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    return 1.0 / (theta**exponents)


def _ntk_theta(config: RopeConfig, scaling: RopeScaling, context_length: int) -> float:
    """Dynamic NTK's base for the longest sequence that this engine admits.

    Within the original context that is the plain base, as in Hugging Face. The original rule
    takes each sequence's present length, which would change keys that are cached already.
    """
    stretch = max(context_length, scaling.original_context) / scaling.original_context
    exponent = config.head_dim / (config.head_dim - 2)
    return float(config.theta * (scaling.factor * stretch - (scaling.factor - 1)) ** exponent)


def _llama3(frequencies: torch.Tensor, scaling: RopeScaling) -> torch.Tensor:
    """Llama 3.1: keeps high frequencies, divides low ones, blends between."""
    wavelengths = 2 * math.pi / frequencies
    low_wavelength = scaling.original_context / scaling.low_freq_factor
    high_wavelength = scaling.original_context / scaling.high_freq_factor
    blend = (scaling.original_context / wavelengths - scaling.low_freq_factor) / (
        scaling.high_freq_factor - scaling.low_freq_factor
    )
    divided = frequencies / scaling.factor
    blended = (1 - blend) * divided + blend * frequencies
    result = torch.where(wavelengths > low_wavelength, divided, frequencies)
    between = (wavelengths <= low_wavelength) & (wavelengths >= high_wavelength)
    return torch.where(between, blended, result)


def _yarn(config: RopeConfig, scaling: RopeScaling) -> tuple[torch.Tensor, float]:
    """YaRN (Peng et al., arXiv 2309.00071, section 3.2 and 3.4)."""
    half = config.head_dim // 2
    low = _yarn_dimension(scaling.beta_fast, config, scaling)
    high = _yarn_dimension(scaling.beta_slow, config, scaling)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, config.head_dim - 1)
    if low == high:
        high += 0.001
    ramp = ((torch.arange(half, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    plain = _plain(config.theta, config.head_dim)
    frequencies = plain / scaling.factor * ramp + plain * (1 - ramp)
    amplitude = scaling.attention_factor
    if amplitude is None:
        amplitude = yarn_magnitude(scaling.factor)
    return frequencies, amplitude


def yarn_magnitude(factor: float, scale: float = 1.0) -> float:
    """YaRN's temperature on attention, as a factor on cosines and sines (equation 22)."""
    return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0


def _yarn_dimension(rotations: float, config: RopeConfig, scaling: RopeScaling) -> float:
    """The dimension that turns `rotations` times over the original context."""
    turns = scaling.original_context / (rotations * 2 * math.pi)
    return config.head_dim * math.log(turns) / (2 * math.log(config.theta))
