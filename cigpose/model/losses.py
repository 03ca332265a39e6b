"""Losses and training accuracy over SimCC logits (upstream `KLDiscretLoss`, `CounterfactualConsistencyLoss`).

All in float32 whatever the logits are; no data-dependent shapes, nothing read back from the device.
B samples, K keypoints, W bins of x, H bins of y.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from cigpose import codec

Logits = tuple[Tensor, Tensor]
"""simcc_x (B, K, W), simcc_y (B, K, H)."""

PCK_THRESHOLD = 0.05


def at_least_float32(x: Tensor) -> Tensor:
    """`x` as float32, unless it is float64."""
    return x if x.dtype == torch.float64 else x.float()


def _axis_divergence(logits: Tensor, label: Tensor, beta: float) -> Tensor:
    """KL divergence from softmax(beta * label) to softmax(beta * logits), mean over bins, (B, K)."""
    prediction = F.log_softmax(at_least_float32(logits) * beta, dim=-1)
    target = F.log_softmax(label.to(prediction.dtype) * beta, dim=-1)
    return (target.exp() * (target - prediction)).mean(-1)


def keypoint_loss(logits: Logits, labels: Logits, weight: Tensor, beta: float) -> Tensor:
    """Loss of predictions against labels.

    Args:
        logits: predictions of both axes.
        labels: Gaussian labels of both axes; not normalised, they go through a softmax too.
        weight: (B, K).
        beta: temperature of both softmaxes.

    Returns:
        Scalar: the mean over bins, weighted, summed over batch, keypoints and axes, divided by K. It grows with the
        batch, as upstream's does.
    """
    divergence = sum(_axis_divergence(x, label, beta) for x, label in zip(logits, labels, strict=True))
    return (divergence * weight).sum() / weight.shape[1]


def counterfactual_loss(observed: Logits, intervened: Logits, compared: Tensor) -> Tensor:
    """How far the intervention moves the prediction of keypoints it did not touch.

    Args:
        observed: predictions from the unchanged features; constants.
        intervened: predictions from the intervened features; the gradient goes here.
        compared: (B, K) bool, visible and not replaced.

    Returns:
        Scalar: KL(observed || intervened), summed over the bins of both axes, mean over `compared`; 0 if there is none.
    """
    total = torch.zeros_like(compared, dtype=torch.float32)
    for before, after in zip(observed, intervened, strict=True):
        fixed = F.log_softmax(at_least_float32(before.detach()), dim=-1)
        moved = F.log_softmax(at_least_float32(after), dim=-1)
        total = total + (fixed.exp() * (fixed - moved)).sum(-1)  # (B, K)
    return (total * compared).sum() / compared.sum().clamp(min=1)


def keypoint_accuracy(
    logits: Logits, labels: Logits, weight: Tensor, input_size: tuple[int, int], split_ratio: float
) -> Tensor:
    """PCK at 0.05 of the input size, as upstream logs it while training.

    Args:
        logits: predictions of both axes.
        labels: labels of both axes.
        weight: (B, K); keypoints with a positive weight count.
        input_size: (width, height) of the crop in pixels.
        split_ratio: bins per crop pixel.

    Returns:
        Scalar: mean over the keypoints that have at least one sample; 0 if none has.
    """
    predicted, _ = codec.decode(logits[0].detach(), logits[1].detach(), split_ratio)
    expected, _ = codec.decode(labels[0], labels[1], split_ratio)
    # Upstream divides the x error by the height and the y error by the width; kept, so that the figures compare.
    width, height = input_size
    error_x, error_y = (predicted - expected).unbind(-1)
    error = torch.stack((error_x / height, error_y / width), -1)
    counted = weight > 0  # (B, K)
    correct = (torch.linalg.vector_norm(error, dim=-1) < PCK_THRESHOLD) & counted
    samples = counted.sum(0)
    per_keypoint = correct.sum(0) / samples.clamp(min=1)
    return per_keypoint.sum() / (samples > 0).sum().clamp(min=1)
