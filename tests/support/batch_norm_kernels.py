"""The five kernels of torch's SyncBatchNorm, which exist on CUDA only, written out for CPU and fake tensors.

Importing this gives them to torch, for the whole process: `torch.batch_norm_stats` and its kin run on the CPU then.
"""

from __future__ import annotations

import torch
from torch import Tensor

DIMENSIONS = (0, 2, 3)


def wide(values: Tensor) -> Tensor:
    return values[None, :, None, None]


def batch_norm_stats(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    var, mean = torch.var_mean(x.float(), DIMENSIONS, correction=0)
    return mean, torch.rsqrt(var + eps)


def batch_norm_gather_stats_with_counts(
    x: Tensor,
    means: Tensor,
    invstds: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    momentum: float,
    eps: float,
    counts: Tensor,
) -> tuple[Tensor, Tensor]:
    weights, count = counts[:, None].double(), counts.sum().double()
    mean = (means.double() * weights).sum(0) / count
    variances = invstds.double() ** -2 - eps + (means.double() - mean).square()
    var = (variances * weights).sum(0) / count
    running_mean.lerp_(mean.to(running_mean.dtype), momentum)
    running_var.lerp_((var * count / (count - 1)).to(running_var.dtype), momentum)
    return mean.float(), torch.rsqrt(var + eps).float()


def batch_norm_elemt(x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, invstd: Tensor, eps: float) -> Tensor:
    return ((x.float() - wide(mean)) * wide(invstd * weight) + wide(bias)).to(x.dtype)


def batch_norm_backward_reduce(
    gradient: Tensor,
    x: Tensor,
    mean: Tensor,
    invstd: Tensor,
    weight: Tensor,
    input_g: bool,
    weight_g: bool,
    bias_g: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    assert input_g and weight_g and bias_g
    dy = gradient.float()
    sum_dy, sum_dy_xmu = dy.sum(DIMENSIONS), (dy * (x.float() - wide(mean))).sum(DIMENSIONS)
    return sum_dy, sum_dy_xmu, sum_dy_xmu * invstd, sum_dy.clone()


def batch_norm_backward_elemt(
    gradient: Tensor,
    x: Tensor,
    mean: Tensor,
    invstd: Tensor,
    weight: Tensor,
    sum_dy: Tensor,
    sum_dy_xmu: Tensor,
    count: Tensor,
) -> Tensor:
    total = count.sum()
    centred = (x.float() - wide(mean)) * wide(invstd.square() * sum_dy_xmu / total)
    return ((gradient.float() - wide(sum_dy / total) - centred) * wide(invstd * weight)).to(x.dtype)


KERNELS = (
    batch_norm_stats,
    batch_norm_gather_stats_with_counts,
    batch_norm_elemt,
    batch_norm_backward_reduce,
    batch_norm_backward_elemt,
)
_library = torch.library.Library("aten", "IMPL")  # kept: what it gives ends with it
for _kernel in KERNELS:
    for _key in ("CPU", "Meta"):
        _library.impl(_kernel.__name__, _kernel, _key)
