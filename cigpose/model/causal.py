"""Causal intervention module of CIGPose (arXiv 2603.09418, section 3.2; upstream `CausalInterventionModule`).

Keypoints whose initial prediction is least peaked are taken to be confounded, and their embedding is replaced by a
learned one that does not see the image. B samples, K keypoints, C channels.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from cigpose.config import CausalConfig


def _highest_probability(logits: Tensor) -> Tensor:
    """Highest softmax value of each row, (..., bins) -> (...), float32."""
    logits = logits.float()
    return torch.exp(logits.amax(-1) - logits.logsumexp(-1))


def confounding_score(simcc_x: Tensor, simcc_y: Tensor) -> Tensor:
    """How little peaked the prediction of each keypoint is.

    Args:
        simcc_x: (B, K, W) logits.
        simcc_y: (B, K, H) logits.

    Returns:
        (B, K) float32 between 0, certain, and 1.
    """
    return 1 - (_highest_probability(simcc_x) + _highest_probability(simcc_y)) / 2


class CausalIntervention(nn.Module):
    """Replaces the embeddings of the most confounded keypoints by canonical ones."""

    def __init__(self, num_keypoints: int, channels: int, config: CausalConfig) -> None:
        super().__init__()
        self.strategy = config.strategy
        self.threshold = config.threshold
        self.train_top_k = min(config.train_top_k, num_keypoints)
        self.eval_top_k = min(config.eval_top_k, num_keypoints)
        self.canonical_features = nn.Embedding(num_keypoints, channels)

    @property
    def is_off(self) -> bool:
        """Whether nothing can be replaced in the present mode, so that no score is needed."""
        return self.strategy == "top_k" and not self.training and self.eval_top_k == 0

    def select(self, score: Tensor) -> Tensor:
        """Which keypoints to replace: (B, K) scores -> (B, K) bool."""
        if self.strategy == "threshold":
            return score > self.threshold
        top_k = self.train_top_k if self.training else self.eval_top_k
        chosen = score.topk(top_k, dim=1).indices
        return torch.zeros_like(score, dtype=torch.bool).scatter(1, chosen, True)

    def forward(self, x: Tensor, intervened: Tensor) -> Tensor:
        """Replace.

        Args:
            x: embeddings, (B, K, C).
            intervened: (B, K) bool.

        Returns:
            (B, K, C) of x's dtype. Only replaced rows send gradient to the canonical embeddings.
        """
        return torch.where(intervened.unsqueeze(-1), self.canonical_features.weight.to(x.dtype), x)
