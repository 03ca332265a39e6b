"""CSPNeXt, the backbone of RTMDet and RTMPose (arXiv 2212.07784; upstream `mmdet.CSPNeXt`, arch P5).

Module names are upstream's, so that its checkpoints load as they are. B samples, C channels, H, W of a feature map.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cigpose.config import BackboneConfig

# Channels out, CSPNeXt blocks, residual blocks, spatial pyramid pooling; of stages 1 to 4 at widen = deepen = 1.
_STAGES = ((128, 3, True, False), (256, 6, True, False), (512, 6, True, False), (1024, 3, False, True))


class ConvModule(nn.Module):
    """Convolution without bias, batch norm, SiLU."""

    def __init__(self, inputs: int, outputs: int, kernel_size: int, *, stride: int = 1, groups: int = 1) -> None:
        super().__init__()
        padding = kernel_size // 2
        self.conv = nn.Conv2d(inputs, outputs, kernel_size, stride, padding, groups=groups, bias=False)
        self.bn = nn.BatchNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        """(B, inputs, H, W) -> (B, outputs, H / stride, W / stride)."""
        return F.silu(self.bn(self.conv(x)))


class DepthwiseSeparableConv(nn.Module):
    """A convolution within each channel, then one across channels."""

    def __init__(self, channels: int, kernel_size: int) -> None:
        super().__init__()
        self.depthwise_conv = ConvModule(channels, channels, kernel_size, groups=channels)
        self.pointwise_conv = ConvModule(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> the same."""
        return self.pointwise_conv(self.depthwise_conv(x))


class CSPNeXtBlock(nn.Module):
    """3x3 convolution, 5x5 depthwise separable convolution, shortcut."""

    def __init__(self, channels: int, *, residual: bool) -> None:
        super().__init__()
        self.conv1 = ConvModule(channels, channels, 3)
        self.conv2 = DepthwiseSeparableConv(channels, 5)
        self.residual = residual

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> the same."""
        out = self.conv2(self.conv1(x))
        return out + x if self.residual else out


class ChannelAttention(nn.Module):
    """A gate per channel from the mean of its map."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.fc = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> the same."""
        return x * F.hardsigmoid(self.fc(x.mean((2, 3), keepdim=True)))


class CSPLayer(nn.Module):
    """Cross stage partial layer: a path of blocks beside a short one, joined by channel attention."""

    def __init__(self, channels: int, num_blocks: int, *, expand_ratio: float, residual: bool) -> None:
        super().__init__()
        mid = int(channels * expand_ratio)
        self.main_conv = ConvModule(channels, mid, 1)
        self.short_conv = ConvModule(channels, mid, 1)
        self.final_conv = ConvModule(2 * mid, channels, 1)
        self.blocks = nn.Sequential(*(CSPNeXtBlock(mid, residual=residual) for _ in range(num_blocks)))
        self.attention = ChannelAttention(2 * mid)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> the same."""
        both = torch.cat((self.blocks(self.main_conv(x)), self.short_conv(x)), dim=1)
        return self.final_conv(self.attention(both))


class SPPBottleneck(nn.Module):
    """Spatial pyramid pooling: maxima over windows of 5, 9 and 13."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = ConvModule(channels, channels // 2, 1)
        self.conv2 = ConvModule(channels // 2 * 4, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> the same."""
        x = self.conv1(x)
        # A window of 9 is a window of 5 over windows of 5, and so on: the same maxima for less.
        pool5 = F.max_pool2d(x, 5, 1, 2)
        pool9 = F.max_pool2d(pool5, 5, 1, 2)
        pool13 = F.max_pool2d(pool9, 5, 1, 2)
        return self.conv2(torch.cat((x, pool5, pool9, pool13), dim=1))


class CSPNeXt(nn.Module):
    """Stem and stages up to the one whose features are wanted; later stages are not built.

    Attributes:
        out_channels: channels of the feature map.
        stride: crop pixels per cell of it.
    """

    def __init__(self, config: BackboneConfig) -> None:
        super().__init__()
        stem = int(64 * config.widen_factor)
        half = int(64 * config.widen_factor // 2)
        self.stem = nn.Sequential(
            ConvModule(3, half, 3, stride=2), ConvModule(half, half, 3), ConvModule(half, stem, 3)
        )
        channels = stem
        for number, (width, depth, residual, pyramid) in enumerate(_STAGES[: config.out_stage], start=1):
            outputs, num_blocks = int(width * config.widen_factor), max(round(depth * config.deepen_factor), 1)
            layers: list[nn.Module] = [ConvModule(channels, outputs, 3, stride=2)]
            if pyramid:
                layers.append(SPPBottleneck(outputs))
            layers.append(CSPLayer(outputs, num_blocks, expand_ratio=config.expand_ratio, residual=residual))
            self.add_module(f"stage{number}", nn.Sequential(*layers))
            channels = outputs
        self.out_channels = channels
        self.stride = 2 ** (config.out_stage + 1)

    def forward(self, images: Tensor) -> Tensor:
        """Features of normalised crops: (B, 3, H, W) -> (B, out_channels, H / stride, W / stride)."""
        x = images
        for stage in self.children():
            x = stage(x)
        return x
