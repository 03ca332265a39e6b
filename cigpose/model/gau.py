"""Gated attention unit between keypoints (arXiv 2202.10447; upstream `RTMCCBlock`, without position terms).

B samples, K keypoints, C channels, E expanded channels, S size of the shared query/key.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ScaleNorm(nn.Module):
    """Division by the root mean square of a row, with one learned gain."""

    def __init__(self, channels: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.scale = channels**-0.5
        self.eps = eps
        self.g = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) -> the same."""
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True) * self.scale
        return x / norm.clamp(min=self.eps) * self.g


class Scale(nn.Module):
    """A learned factor per channel."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) -> the same."""
        return x * self.scale


class GatedAttentionUnit(nn.Module):
    """Attention with squared ReLU in place of softmax, gated, with a scaled shortcut."""

    def __init__(self, channels: int, s: int, expansion: int = 2) -> None:
        super().__init__()
        self.s = s
        self.expanded = channels * expansion
        self.gamma = nn.Parameter(torch.rand(2, s))
        self.beta = nn.Parameter(torch.rand(2, s))
        self.o = nn.Linear(self.expanded, channels, bias=False)
        self.uv = nn.Linear(channels, 2 * self.expanded + s, bias=False)
        self.ln = ScaleNorm(channels)
        self.res_scale = Scale(channels)

    def forward(self, x: Tensor) -> Tensor:
        """(B, K, C) -> the same."""
        gate, value, base = F.silu(self.uv(self.ln(x))).tensor_split((self.expanded, 2 * self.expanded), dim=-1)
        query = base * self.gamma[0] + self.beta[0]  # (B, K, S)
        key = base * self.gamma[1] + self.beta[1]  # (B, K, S)
        attention = F.relu(query @ key.transpose(1, 2) / math.sqrt(self.s)).square()  # (B, K, K)
        return self.res_scale(x) + self.o(gate * (attention @ value))
