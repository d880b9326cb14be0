"""Rotary angles looked up by each row's own positions."""

from __future__ import annotations

import math

import torch


def inverse_frequencies(
    head_dim: int,
    base: float,
    *,
    scaling_factor: float | None = None,
    low_freq_factor: float = 1.0,
    high_freq_factor: float = 4.0,
    original_max_position: int = 8192,
) -> torch.Tensor:
    """`[head_dim / 2]` float32 rotary frequencies, with Llama-3 scaling if `scaling_factor` is given.

    Llama-3 scaling leaves wavelengths below `original / high_freq_factor` alone, divides the frequency of
    those above `original / low_freq_factor` by the factor, and blends linearly in `original / wavelength`
    between the two.
    """
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    plain = 1.0 / base**exponents
    if scaling_factor is None:
        return plain
    turns = original_max_position * plain / (2 * math.pi)
    keep = ((turns - low_freq_factor) / (high_freq_factor - low_freq_factor)).clamp(0.0, 1.0)
    return keep * plain + (1.0 - keep) * plain / scaling_factor


class RowRotary(torch.nn.Module):
    """Angles for arbitrary positions; stateless, so 1F1B and recomputation see the right ones.

    The frequencies are no buffer: converting the model to bfloat16 must not round them.
    """

    def __init__(self, frequencies: torch.Tensor) -> None:
        super().__init__()
        self.frequencies = frequencies

    def forward(self, positions: torch.Tensor) -> torch.Tensor:
        """Positions `[batch, seq]` to angles `[seq, batch, 1, head_dim]` float32, as megatron-core applies them."""
        if self.frequencies.device != positions.device:
            self.frequencies = self.frequencies.to(positions.device)
        half = positions.t().float()[..., None, None] * self.frequencies
        return torch.cat([half, half], dim=-1)
