"""Batch normalisation over all workers, where torch has none: on the CPU.

`torch.nn.SyncBatchNorm` needs a GPU. This one sums values, squares and counts over the workers, in the backward pass
the two sums of the gradient, and so equals BatchNorm over the joint batch.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, distributed, nn


class CPUSyncBatchNorm(nn.BatchNorm2d):
    """BatchNorm2d whose training statistics are those of all workers' batches together."""

    def forward(self, input: Tensor) -> Tensor:
        """Normalise (B, C, H, W)."""
        if not self.training:
            return super().forward(input)
        x = input.float() if input.dtype in (torch.bfloat16, torch.float16) else input
        output, mean, var, count = _Normalize.apply(x, self.weight, self.bias, self.eps)  # type: ignore[no-untyped-call]
        assert self.running_mean is not None and self.running_var is not None and self.num_batches_tracked is not None
        assert self.momentum is not None
        with torch.no_grad():
            self.num_batches_tracked.add_(1)
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(var * (count / (count - 1).clamp(min=1)), self.momentum)
        return output.to(input.dtype)


class _Normalize(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        channels = x.shape[1]
        # two passes over the workers keep the variance exact: a sum of squares minus a square loses digits
        count = x.new_full((1,), x.numel() // channels)
        sums = torch.cat([x.sum((0, 2, 3)), count])
        distributed.all_reduce(sums)
        count = sums[-1]
        mean = sums[:-1] / count
        centred = x - _wide(mean)
        squares = centred.square().sum((0, 2, 3))
        distributed.all_reduce(squares)
        var = squares / count
        scale = torch.rsqrt(var + eps)
        normal = centred * _wide(scale)
        ctx.save_for_backward(normal, weight, scale, count)
        ctx.mark_non_differentiable(mean, var, count)
        return normal * _wide(weight) + _wide(bias), mean, var, count

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, *_: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        normal, weight, scale, count = ctx.saved_tensors
        d_bias = gradient.sum((0, 2, 3))
        d_weight = (gradient * normal).sum((0, 2, 3))
        sums = torch.stack([d_bias, d_weight])
        distributed.all_reduce(sums)
        sums /= count
        d_input = (gradient - _wide(sums[0]) - normal * _wide(sums[1])) * _wide(weight * scale)
        return d_input, d_weight, d_bias, None


def _wide(values: Tensor) -> Tensor:
    return values[None, :, None, None]


def synchronize_batch_norm(module: nn.Module) -> nn.Module:
    """`module` with every BatchNorm2d in it normalising over all workers: SyncBatchNorm on a GPU, ours on the CPU."""
    if next(module.parameters()).is_cuda:
        return nn.SyncBatchNorm.convert_sync_batchnorm(module)  # type: ignore[no-untyped-call]
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm2d):
            setattr(module, name, _converted(child))
        else:
            synchronize_batch_norm(child)
    return module


def _converted(layer: nn.BatchNorm2d) -> CPUSyncBatchNorm:
    ours = CPUSyncBatchNorm(layer.num_features, eps=layer.eps, momentum=layer.momentum)
    ours.weight, ours.bias = layer.weight, layer.bias
    for name, buffer in layer.named_buffers():
        setattr(ours, name, buffer)
    return ours.train(layer.training)
