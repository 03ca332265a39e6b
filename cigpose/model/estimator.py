"""The whole network: backbone and head, from crops to logits and losses.

B samples, K keypoints, (W, H) of the crop in pixels.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor, nn

from cigpose.config import Config
from cigpose.model.cspnext import CSPNeXt
from cigpose.model.head import CIGPoseHead, RTMPoseHead

MEAN_RGB = (123.675, 116.28, 103.53)
STD_RGB = (58.395, 57.12, 57.375)


def _make_statistics(device: torch.device | None = None) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of RGB, (1, 3, 1, 1) each."""
    mean, std = (torch.tensor(values, device=device).view(1, 3, 1, 1) for values in (MEAN_RGB, STD_RGB))
    return mean, std


_statistics = functools.lru_cache(maxsize=8)(_make_statistics)  # on each device once


class Normalize(nn.Module):
    """`normalize` for networks that are compiled or exported: its constants are buffers, on the device already.

    They are in no state dict, so that the keys stay upstream's.
    """

    mean: Tensor
    std: Tensor

    def __init__(self) -> None:
        super().__init__()
        mean, std = _make_statistics()
        self.register_buffer("mean", mean, persistent=False)
        self.register_buffer("std", std, persistent=False)

    def forward(self, crops: Tensor) -> Tensor:
        """As `normalize`."""
        return (crops.permute(0, 3, 1, 2).float() - self.mean) / self.std

    def inverse(self, images: Tensor) -> Tensor:
        """Crops (B, H, W, 3) uint8 that give these images."""
        return (images * self.std + self.mean).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)


def normalize(crops: Tensor) -> Tensor:
    """What the network sees of crops.

    Args:
        crops: (B, H, W, 3) uint8 RGB.

    Returns:
        (B, 3, H, W) float32 on the same device, channels-last in memory.
    """
    # What is made under tracing may be a stand-in without values, which must not outlive it.
    traced = torch.compiler.is_compiling() or type(crops) is not Tensor
    mean, std = (_make_statistics if traced else _statistics)(crops.device)
    return (crops.permute(0, 3, 1, 2).float() - mean) / std


def images_for(model: nn.Module, crops: Tensor) -> Tensor:
    """`normalize` in the memory layout of the network's weights: in another one its convolutions take a tenth longer.

    Args:
        model: the network; one without convolutions of torch's takes them contiguous.
        crops: (B, H, W, 3) uint8 RGB on its device.
    """
    kernel = next((p for p in model.parameters() if p.dim() == 4 and p.shape[3] > 1), None)
    channels_last = kernel is not None and not kernel.is_contiguous()
    return normalize(crops).contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)


class PoseEstimator(nn.Module):
    """Backbone and head. Keys of the state dict are upstream's: `backbone.*`, `head.*`."""

    backbone: CSPNeXt
    head: CIGPoseHead | RTMPoseHead

    def __init__(self, config: Config, head: type[CIGPoseHead] | type[RTMPoseHead]) -> None:
        super().__init__()
        self.config = config
        self.backbone = CSPNeXt(config.model.backbone)
        width, height = (side // self.backbone.stride for side in config.model.input_size)
        self.head = head(config.model, config.keypoint_set, self.backbone.out_channels, width * height)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Logits of crops.

        Args:
            images: (B, 3, H, W) float32 RGB, as `normalize` gives them.

        Returns:
            `simcc_x` (B, K, bins of x) and `simcc_y` (B, K, bins of y); `codec.decode` makes keypoints of them.
        """
        return self.head(self.backbone(images))

    def loss(self, images: Tensor, keypoints: Tensor, visible: Tensor) -> dict[str, Tensor]:
        """Losses of a training batch; targets are made inside, on the device.

        Args:
            images: (B, 3, H, W) float32 RGB, as `normalize` gives them.
            keypoints: (B, K, 2) x, y in crop pixels.
            visible: (B, K) training weight, 0 or 1.

        Returns:
            Scalars: `loss`, the sum of `loss_kpt`, `loss_cf` (0 for RTMPose) and, where
            `model.causal.supervise_uncertainty`, `loss_uncertainty`, each with its gradient, so that training may weigh
            them otherwise; and `acc_pose`, PCK at 0.05. As upstream's, `loss_kpt` is summed over the batch.
        """
        return self.head.loss(self.backbone(images), keypoints, visible)


class CIGPose(PoseEstimator):
    """CIGPose: causal intervention and hierarchical graph (arXiv 2603.09418)."""

    head: CIGPoseHead

    def __init__(self, config: Config) -> None:
        super().__init__(config, CIGPoseHead)


class RTMPose(PoseEstimator):
    """The baseline: the same backbone with a plain head (arXiv 2303.07399)."""

    head: RTMPoseHead

    def __init__(self, config: Config) -> None:
        super().__init__(config, RTMPoseHead)


def build_model(config: Config) -> CIGPose | RTMPose:
    """The network that a configuration describes, freshly initialised from torch's global generator."""
    return CIGPose(config) if config.model.head.kind == "cigpose" else RTMPose(config)


def forward_flip_test(model: nn.Module, images: Tensor, flip_index: Tensor) -> tuple[Tensor, Tensor]:
    """Mean logits of crops and their mirror images.

    Args:
        model: maps images to logits of both axes.
        images: (B, 3, H, W).
        flip_index: (K,) int64; keypoint i of a mirrored person is keypoint flip_index[i] of the original.

    Returns:
        As `PoseEstimator.forward`. In each of the two passes CIGPose chooses for itself what to replace.
    """
    simcc_x, simcc_y = model(images)
    mirrored_x, mirrored_y = model(images.flip(3))
    mirrored_x = mirrored_x.index_select(1, flip_index).flip(2)
    return (simcc_x + mirrored_x) / 2, (simcc_y + mirrored_y.index_select(1, flip_index)) / 2
