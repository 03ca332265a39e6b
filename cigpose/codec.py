"""SimCC: a coordinate as a class among the bins of an axis (arXiv 2107.03332; upstream `SimCCLabel`).

Batched tensor operations on whatever device the tensors are; nothing is read back.
B persons, K keypoints, W bins of x, H bins of y.
"""

from __future__ import annotations

import torch
from torch import Tensor

NOWHERE = -0.5
"""Coordinate of a keypoint whose score is not positive: upstream divides its -1 by the split ratio of 2."""


def num_bins(input_size: tuple[int, int], split_ratio: float) -> tuple[int, int]:
    """Bins of the x and the y axis.

    Args:
        input_size: (width, height) of the crop in pixels.
        split_ratio: bins per crop pixel.
    """
    return int(input_size[0] * split_ratio), int(input_size[1] * split_ratio)


def _encode_axis(coordinate: Tensor, bins: int, sigma: float, split_ratio: float) -> tuple[Tensor, Tensor]:
    """Label of one axis, (B, K, bins), and whether any of mu +- 3 sigma lies on it, (B, K) bool."""
    mu = torch.round(coordinate.float() * split_ratio)  # half to even, as numpy's rint
    position = torch.arange(bins, dtype=mu.dtype, device=mu.device)
    # exp is ten times slower where its result is denormal; 1e-35 in place of 0 changes no softmax.
    exponent = (position - mu.unsqueeze(-1)).square_().div_(-2 * sigma**2).clamp_(min=-80)
    inside = (mu - 3 * sigma < bins) & (mu + 3 * sigma + 1 >= 0)
    return exponent.exp_(), inside


def encode(
    keypoints: Tensor,
    visible: Tensor,
    input_size: tuple[int, int],
    sigma: tuple[float, float],
    split_ratio: float = 2.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Training targets of keypoints.

    Args:
        keypoints: (B, K, 2) x, y in crop pixels; invisible ones may be anything finite.
        visible: (B, K) training weight. Below 0.5 the label is zero and the weight is kept as it is.
        input_size: (width, height) of the crop in pixels.
        sigma: width of the label of x and y, in bins.
        split_ratio: bins per crop pixel.

    Returns:
        `target_x` (B, K, W) and `target_y` (B, K, H), float32 Gaussians of height 1, not normalised, and `weight`
        (B, K) float32. A visible keypoint so far out that three sigmas miss an axis has zero labels and weight 0.
    """
    bins_x, bins_y = num_bins(input_size, split_ratio)
    target_x, inside_x = _encode_axis(keypoints[..., 0], bins_x, sigma[0], split_ratio)
    target_y, inside_y = _encode_axis(keypoints[..., 1], bins_y, sigma[1], split_ratio)
    visible = visible.float()
    seen, inside = visible >= 0.5, inside_x & inside_y
    labelled = (seen & inside).unsqueeze(-1)
    weight = visible * (inside | ~seen)
    return target_x * labelled, target_y * labelled, weight


def decode(simcc_x: Tensor, simcc_y: Tensor, split_ratio: float = 2.0) -> tuple[Tensor, Tensor]:
    """Keypoints at the highest bins.

    Args:
        simcc_x: (B, K, W) logits or labels.
        simcc_y: (B, K, H).
        split_ratio: bins per crop pixel.

    Returns:
        `keypoints` (B, K, 2) float32 x, y in crop pixels and `scores` (B, K) float32: the smaller of the two maxima,
        raw, so that it may exceed 1. Where the score is not positive both coordinates are `NOWHERE`. Of equal bins the
        first wins.
    """
    top_x, bin_x = simcc_x.float().max(-1)
    top_y, bin_y = simcc_y.float().max(-1)
    scores = torch.minimum(top_x, top_y)
    keypoints = torch.stack((bin_x, bin_y), -1).float() / split_ratio
    return torch.where(scores.unsqueeze(-1) > 0, keypoints, NOWHERE), scores
