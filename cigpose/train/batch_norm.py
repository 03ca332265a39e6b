"""Batch normalisation over all workers.

`torch.nn.SyncBatchNorm` makes the host wait for the GPU three times in each layer: it looks for workers without a
batch, of which there are none here. It neither runs on a CPU nor compiles into one graph. This one does all three.

C channels, W workers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.distributed import _functional_collectives as collectives

# torch 2.13 has new names for them
_all_gather = getattr(collectives, "all_gather_single_autograd", None) or collectives.all_gather_tensor_autograd
_all_gather_into = getattr(distributed, "all_gather_single", None) or distributed.all_gather_into_tensor


class SynchronizedBatchNorm(nn.BatchNorm2d):
    """BatchNorm2d whose training statistics are those of all workers' batches together. No batch may be empty."""

    def forward(self, input: Tensor) -> Tensor:
        """Normalise (B, C, H, W)."""
        if not self.training:
            return super().forward(input)
        assert self.running_mean is not None and self.running_var is not None and self.num_batches_tracked is not None
        assert self.momentum is not None
        self.num_batches_tracked.add_(1)
        # torch's kernels for this purpose read each value as seldom as can be; the compiler makes its own
        if has_kernels(input):
            return _WithKernels.apply(  # type: ignore[no-untyped-call]
                input, self.weight, self.bias, self.running_mean, self.running_var, self.eps, self.momentum
            )
        x = input.float() if input.dtype in (torch.bfloat16, torch.float16) else input
        mean, var, count = _joint_statistics(x)
        with torch.no_grad():
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(var * (count / (count - 1).clamp(min=1)), self.momentum)
        scale = self.weight * torch.rsqrt(var + self.eps)
        return ((x - _wide(mean)) * _wide(scale) + _wide(self.bias)).to(input.dtype)


def has_kernels(x: Tensor) -> bool:
    """Whether `x` is normalised by torch's CUDA kernels."""
    return x.is_cuda and not torch.compiler.is_compiling()


def _joint_statistics(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean (C,), variance (C,) and number of values (1,) of each channel over all workers; gradients pass."""
    channels = x.shape[1]
    var, mean = torch.var_mean(x, (0, 2, 3), correction=0)
    own = torch.cat([mean, var, x.new_full((1,), x.numel() // channels)])
    means, variances, counts = torch.split(_gather(own), [channels, channels, 1], dim=1)  # (W, C), (W, C), (W, 1)
    count = counts.sum(0)
    mean = (means * counts).sum(0) / count
    # deviations, not squares less a square, which loses digits
    var = ((variances + (means - mean).square()) * counts).sum(0) / count
    return mean, var, count.detach()


def _gather(values: Tensor) -> Tensor:
    """(N,) of each worker -> (W, N). The gradient of a worker's values is summed over all of them."""
    return _all_gather(values[None], 0, distributed.group.WORLD)  # type: ignore[arg-type]


class _WithKernels(torch.autograd.Function):
    """`torch.nn.modules._functions.SyncBatchNorm` for batches that are never empty."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, var: Tensor, eps: float, momentum: float
    ) -> Tensor:
        """Normalise `x`, and move the running `mean` and `var`."""
        x = _dense(x)
        channels, world = x.shape[1], distributed.get_world_size()
        own_mean, own_invstd = torch.batch_norm_stats(x, eps)
        own = torch.cat([own_mean, own_invstd, own_mean.new_full((1,), x.numel() // channels)])
        gathered = own.new_empty(world, len(own))
        _all_gather_into(gathered.view(-1), own)
        means, invstds, counts = torch.split(gathered, [channels, channels, 1], dim=1)
        counts = counts.flatten().to(mean.dtype)
        joint_mean, joint_invstd = torch.batch_norm_gather_stats_with_counts(
            x, means, invstds, mean, var, momentum, eps, counts
        )
        ctx.save_for_backward(x, weight, joint_mean, joint_invstd, counts.to(torch.int32))
        return torch.batch_norm_elemt(x, weight, bias, joint_mean, joint_invstd, eps)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, invstd, counts = ctx.saved_tensors
        gradient = _dense(gradient)
        sum_dy, sum_dy_xmu, d_weight, d_bias = torch.batch_norm_backward_reduce(
            gradient, x, mean, invstd, weight, True, True, True
        )
        sums = torch.stack([sum_dy, sum_dy_xmu])
        distributed.all_reduce(sums)
        d_input = torch.batch_norm_backward_elemt(gradient, x, mean, invstd, weight, sums[0], sums[1], counts)
        return d_input, d_weight, d_bias, None, None, None, None


def _dense(x: Tensor) -> Tensor:
    """`x` in one of the two layouts that the kernels read."""
    return x if x.is_contiguous(memory_format=torch.channels_last) else x.contiguous()


def _wide(values: Tensor) -> Tensor:
    return values[None, :, None, None]


def synchronize_batch_norm(module: nn.Module) -> nn.Module:
    """`module` with every BatchNorm2d in it normalising over all workers."""
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm2d):
            setattr(module, name, _converted(child))
        else:
            synchronize_batch_norm(child)
    return module


def _converted(layer: nn.BatchNorm2d) -> SynchronizedBatchNorm:
    ours = SynchronizedBatchNorm(layer.num_features, eps=layer.eps, momentum=layer.momentum)
    ours.weight, ours.bias = layer.weight, layer.bias
    for name, buffer in layer.named_buffers():
        setattr(ours, name, buffer)
    return ours.train(layer.training)
