"""Rotary position embeddings (RoPE, Su et al. 2021), in Hugging Face's rotate-half form, with scaled frequencies.

Scaling, with transformers' formulas: linear (Chen et al. 2023), YaRN (Peng et al. 2023), and that of Llama 3.1
(Grattafiori et al. 2024). ``dynamic`` changes nothing up to the maximum sequence length, and longer ones are refused.

Dimensions: B sequences, T tokens, E size of one head, R elements of it that are rotated.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lilpipe.config.model import RopeScalingConfig
from lilpipe.model.gradients import rotate

Angles = tuple[Tensor, Tensor]
"""RoPE cosines and sines, ``[B or 1, T, 1, R]`` each."""


def rope_table(
    max_seq_len: int, rotary_size: int, theta: float, scaling: RopeScalingConfig | None = None
) -> tuple[Tensor, Tensor]:
    """Return cosines and sines ``[max_seq_len, R]`` of position times frequency, in float32.

    Elements i and i + R/2 of a head are a pair that rotates by ``position / theta**(2i/R)``. The sine of the first half
    is negated, so that ``x * cos + swap(x) * sin``, where ``swap`` exchanges the halves, rotates every pair.
    """
    if torch.get_default_device().type == "meta":  # torch would import its compiler
        return torch.empty(max_seq_len, rotary_size), torch.empty(max_seq_len, rotary_size)
    frequency = 1.0 / theta ** (torch.arange(0, rotary_size, 2, dtype=torch.float32) / rotary_size)
    frequency, factor = frequency if scaling is None else scaled(frequency, theta, scaling), attention_factor(scaling)
    angle = torch.arange(max_seq_len, dtype=torch.float32)[:, None] * frequency
    cos, sin = angle.cos(), angle.sin()
    if factor != 1:
        cos, sin = cos * factor, sin * factor
    return torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the first R elements of ``x [B, T, heads, E]`` by the angles of ``cos`` and ``sin [B or 1, T, 1, R]``."""
    size = cos.shape[-1]
    if size == x.shape[-1]:
        return rotate(x, cos, sin)
    return torch.cat([rotate(x[..., :size], cos, sin), x[..., size:]], dim=-1)


def scaled(frequency: Tensor, theta: float, scaling: RopeScalingConfig) -> Tensor:
    """Return the scaled frequencies ``[R/2]``."""
    if scaling.rope_type == "linear":
        return frequency / scaling.factor
    if scaling.rope_type == "yarn":
        return _yarn(frequency, theta, scaling)
    if scaling.rope_type == "llama3":
        return _llama3(frequency, scaling)
    return frequency


def attention_factor(scaling: RopeScalingConfig | None) -> float:
    """Return the factor of rotated queries and keys: for YaRN by its equation 22, otherwise 1."""
    if scaling is None or scaling.rope_type != "yarn":
        return 1.0
    if scaling.attention_factor is not None:
        return scaling.attention_factor
    growth = 0.1 * math.log(scaling.factor) if scaling.factor > 1 else 0.0
    if scaling.mscale and scaling.mscale_all_dim:
        return (growth * scaling.mscale + 1.0) / (growth * scaling.mscale_all_dim + 1.0)
    return growth + 1.0


def _yarn(frequency: Tensor, theta: float, scaling: RopeScalingConfig) -> Tensor:
    """Divide frequencies of few rotations by the factor, keep those of many, interpolate in between."""
    length, size = scaling.original_max_position_embeddings, 2 * len(frequency)
    assert length is not None
    bounds = [
        size * math.log(length / (rotations * 2 * math.pi)) / (2 * math.log(theta))
        for rotations in (scaling.beta_fast or 32.0, scaling.beta_slow or 1.0)
    ]
    if scaling.truncate is not False:
        bounds = [math.floor(bounds[0]), math.ceil(bounds[1])]
    low, high = max(bounds[0], 0), min(bounds[1], size - 1)
    high = high + 0.001 if low == high else high
    ramp = ((torch.arange(len(frequency), dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    return frequency / scaling.factor * ramp + frequency * (1 - ramp)


def _llama3(frequency: Tensor, scaling: RopeScalingConfig) -> Tensor:
    """Divide frequencies of long wavelengths by the factor, keep those of short ones, interpolate in between."""
    length, low, high = scaling.original_max_position_embeddings, scaling.low_freq_factor, scaling.high_freq_factor
    assert length is not None
    assert low is not None
    assert high is not None
    wavelength = 2 * math.pi / frequency
    smooth = (length / wavelength - low) / (high - low)
    between = (1 - smooth) * frequency / scaling.factor + smooth * frequency
    result = torch.where(wavelength > length / low, frequency / scaling.factor, between)
    return torch.where(wavelength < length / high, frequency, result)
