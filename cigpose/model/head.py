"""SimCC heads: RTMPose (arXiv 2303.07399; upstream `RTMCCHead`) and CIGPose (arXiv 2603.09418; `CIGHead`).

B samples, K keypoints, C channels of an embedding, F cells of the feature map, W bins of x, H bins of y.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cigpose import codec
from cigpose.config import ModelConfig
from cigpose.keypoints import KeypointSet
from cigpose.model import losses
from cigpose.model.causal import CausalIntervention, confounding_score
from cigpose.model.gau import GatedAttentionUnit, ScaleNorm
from cigpose.model.hgnn import HGNN

Logits = losses.Logits

UNCERTAINTY_GRADIENT = 0.01
"""Factor on the gradient of the supervised initial prediction, which reaches nothing else. AdamW's steps do not depend
on the scale of a gradient; the norm that all parameters are clipped by does, and would be spent on these layers."""


class SimCCHead(nn.Module):
    """What both heads share: a map per keypoint, a pair of classifiers over bins, the targets of the loss."""

    def __init__(self, config: ModelConfig, num_keypoints: int, in_channels: int, cells: int) -> None:
        super().__init__()
        head = config.head
        self.input_size = config.input_size
        self.simcc = config.simcc
        self.beta = config.loss_beta
        self.num_bins = codec.num_bins(config.input_size, config.simcc.split_ratio)
        kernel = head.final_kernel_size
        self.final_layer = nn.Conv2d(in_channels, num_keypoints, kernel, padding=kernel // 2)
        self.mlp = self._embedding(cells, head.hidden)
        self.gau = GatedAttentionUnit(head.hidden, head.gau_s, head.gau_expansion)
        self.cls_x = nn.Linear(head.hidden, self.num_bins[0], bias=False)
        self.cls_y = nn.Linear(head.hidden, self.num_bins[1], bias=False)

    @staticmethod
    def _embedding(cells: int, hidden: int) -> nn.Sequential:
        return nn.Sequential(ScaleNorm(cells), nn.Linear(cells, hidden, bias=False))

    def init_weights(self) -> None:
        """Upstream's initialisation: N(0, 0.01) for maps and embeddings, zero biases."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.01)
            if isinstance(module, nn.Conv2d | nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)

    def targets(self, keypoints: Tensor, visible: Tensor) -> tuple[Logits, Tensor]:
        """Labels of both axes and the weight of each keypoint, (B, K); see `codec.encode`."""
        x, y, weight = codec.encode(
            keypoints, visible, self.input_size, self.simcc.sigma, split_ratio=self.simcc.split_ratio
        )
        return (x, y), weight

    @staticmethod
    def apply_classifiers(x: Tensor, of_x: nn.Linear, of_y: nn.Linear) -> Logits:
        """Logits of both axes, (B, K, C) -> (B, K, W), (B, K, H); in float32 under autocast too.

        The loss multiplies them by its temperature, 10: a step of bfloat16 between them would be one of ten.
        """
        device = x.device.type
        if not (torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)):
            return of_x(x), of_y(x)
        with torch.autocast(device, enabled=False):
            x = losses.at_least_float32(x)
            return of_x(x), of_y(x)

    def accuracy(self, logits: Logits, labels: Logits, weight: Tensor) -> Tensor:
        """Scalar PCK; see `losses.keypoint_accuracy`."""
        return losses.keypoint_accuracy(logits, labels, weight, self.input_size, self.simcc.split_ratio)


class RTMPoseHead(SimCCHead):
    """The baseline: maps, embeddings, attention, classifiers."""

    def __init__(self, config: ModelConfig, keypoints: KeypointSet, in_channels: int, cells: int) -> None:
        super().__init__(config, len(keypoints), in_channels, cells)
        self.init_weights()

    def forward(self, features: Tensor) -> Logits:
        """(B, channels, h, w) -> logits (B, K, W) and (B, K, H)."""
        maps = self.final_layer(features).flatten(2)  # (B, K, F)
        x = self.gau(self.mlp(maps))  # (B, K, C)
        return self.apply_classifiers(x, self.cls_x, self.cls_y)

    def loss(self, features: Tensor, keypoints: Tensor, visible: Tensor) -> dict[str, Tensor]:
        """Losses of a training batch; see `estimator.PoseEstimator.loss`."""
        labels, weight = self.targets(keypoints, visible)
        logits = self(features)
        loss_kpt = losses.keypoint_loss(logits, labels, weight, self.beta)
        return {
            "loss": loss_kpt,
            "loss_kpt": loss_kpt,
            "loss_cf": torch.zeros_like(loss_kpt),
            "acc_pose": self.accuracy(logits, labels, weight),
        }


class CIGPoseHead(SimCCHead):
    """Maps, embeddings, attention, causal intervention, graph network, classifiers.

    Upstream's state dict holds layers that no forward uses (`mlp`, `cls_x`, `cls_y`, inherited from RTMPose) and layers
    that no loss reaches (`initial_pred_x`, `initial_pred_y`, which only rank keypoints and keep their random start).
    All are here so that checkpoints are complete both ways; they take no gradient. `model.causal.supervise_uncertainty`
    trains the latter.
    """

    def __init__(self, config: ModelConfig, keypoints: KeypointSet, in_channels: int, cells: int) -> None:
        super().__init__(config, len(keypoints), in_channels, cells)
        hidden = config.head.hidden
        self.counterfactual_weight = config.causal.counterfactual_weight
        self.supervise_uncertainty = config.causal.supervise_uncertainty
        self.mlp_pre_gau = self._embedding(cells, hidden)
        self.initial_pred_x = nn.Linear(hidden, self.num_bins[0])
        self.initial_pred_y = nn.Linear(hidden, self.num_bins[1])
        self.cim = CausalIntervention(len(keypoints), hidden, config.causal)
        self.gcn = HGNN(hidden, config.hgnn.num_layers, keypoints)
        self.cls_gx = nn.Linear(hidden, self.num_bins[0])
        self.cls_gy = nn.Linear(hidden, self.num_bins[1])
        self.init_weights()
        for module in self.never_trained_modules():
            module.requires_grad_(False)

    def never_trained_modules(self) -> list[nn.Module]:
        """Layers that receive no gradient: eight tensors as upstream, four with supervised uncertainty."""
        unused: list[nn.Module] = [self.mlp, self.cls_x, self.cls_y]
        return unused if self.supervise_uncertainty else [*unused, self.initial_pred_x, self.initial_pred_y]

    def embed(self, features: Tensor) -> Tensor:
        """Embeddings of keypoints before any intervention: (B, channels, h, w) -> (B, K, C)."""
        maps = self.final_layer(features).flatten(2)  # (B, K, F)
        return self.gau(self.mlp_pre_gau(maps))

    def initial_prediction(self, x: Tensor) -> Logits:
        """The prediction whose peakedness ranks keypoints: (B, K, C) -> (B, K, W), (B, K, H).

        Its input is detached: scoring must not shape the embeddings. Under supervision it is layer-normed too, or its
        logits grow without bound and so do their gradients.
        """
        x = x.detach()
        if self.supervise_uncertainty:
            x = F.layer_norm(x, x.shape[-1:])
        return self.initial_pred_x(x), self.initial_pred_y(x)

    def classify(self, x: Tensor) -> Logits:
        """Graph network and classifiers: (B, K, C) -> (B, K, W), (B, K, H)."""
        return self.apply_classifiers(self.gcn(x), self.cls_gx, self.cls_gy)

    def forward(self, features: Tensor) -> Logits:
        """(B, channels, h, w) -> logits (B, K, W) and (B, K, H)."""
        x = self.embed(features)
        if not self.cim.is_off:
            score = confounding_score(*self.initial_prediction(x))
            x = self.cim(x, self.cim.select(score))
        return self.classify(x)

    def loss(self, features: Tensor, keypoints: Tensor, visible: Tensor) -> dict[str, Tensor]:
        """Losses of a training batch; see `estimator.PoseEstimator.loss`."""
        labels, weight = self.targets(keypoints, visible)
        x = self.embed(features)
        initial = self.initial_prediction(x)
        intervened = self.cim.select(confounding_score(*initial).detach())  # (B, K)
        # The order matters to the running statistics of the graph's batch norms: both passes move them.
        logits = self.classify(self.cim(x, intervened))
        with torch.no_grad():
            observed = self.classify(x)
        loss_kpt = losses.keypoint_loss(logits, labels, weight, self.beta)
        compared = (weight > 0) & ~intervened
        loss_cf = self.counterfactual_weight * losses.counterfactual_loss(observed, logits, compared)
        result = {
            "loss": loss_kpt + loss_cf,
            "loss_kpt": loss_kpt,
            "loss_cf": loss_cf,
            "acc_pose": self.accuracy(logits, labels, weight),
        }
        if self.supervise_uncertainty:
            loss = losses.keypoint_loss(initial, labels, weight, self.beta)
            loss = UNCERTAINTY_GRADIENT * loss + (1 - UNCERTAINTY_GRADIENT) * loss.detach()
            result |= {"loss": result["loss"] + loss, "loss_uncertainty": loss}
        return result
