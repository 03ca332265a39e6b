"""What one worker has to say to the others; each function also works where there is only one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, distributed, nn


def world_size() -> int:
    """Number of workers."""
    return distributed.get_world_size() if distributed.is_initialized() else 1


def gather(value: Any) -> list[Any] | None:
    """The values of all workers by rank, on rank 0; None elsewhere."""
    if world_size() == 1:
        return [value]
    gathered: list[Any] | None = [None] * world_size() if distributed.get_rank() == 0 else None
    distributed.gather_object(value, gathered)
    return gathered


def from_rank_0(value: Any) -> Any:
    """The value of rank 0."""
    if world_size() == 1:
        return value
    box = [value]
    distributed.broadcast_object_list(box)
    return box[0]


def tensors_from_rank_0(tensors: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
    """The tensors of rank 0, on the CPU; the others give None."""
    shapes = from_rank_0(None if tensors is None else {key: (t.shape, t.dtype) for key, t in tensors.items()})
    received = {}
    for key, (shape, dtype) in shapes.items():
        tensor = torch.empty(shape, dtype=dtype) if tensors is None else tensors[key].cpu().contiguous()
        if world_size() > 1:
            distributed.broadcast(tensor.view(-1).view(torch.uint8), src=0)
        received[key] = tensor
    return received


def mean_over_workers(totals: Mapping[str, Tensor], count: int) -> dict[str, float]:
    """Sums of `count` steps on each worker -> mean over steps and workers. One collective, one copy to the host.

    All workers give the same keys, and scalars on one device.
    """
    names = sorted(totals)
    first = totals[names[0]]
    values = torch.stack([totals[name].detach().double() for name in names] + [first.new_tensor(count).double()])
    if world_size() > 1:
        distributed.all_reduce(values)
    *sums, steps = values.tolist()
    return {name: total / steps for name, total in zip(names, sums, strict=True)}


def largest_over_workers(value: float, device: torch.device) -> float:
    """The largest of the workers' values."""
    if world_size() == 1:
        return value
    tensor = torch.tensor(value, dtype=torch.float64, device=device)
    distributed.all_reduce(tensor, distributed.ReduceOp.MAX)
    return float(tensor)


def copy_rank_0(modules: Iterable[nn.Module]) -> None:
    """Give every worker the parameters and buffers that rank 0 has.

    Gradients keep parameters equal; running statistics of plain BatchNorm differ until this is called.
    """
    if world_size() == 1:
        return
    with torch.no_grad():
        for module in modules:
            for tensor in module.state_dict().values():
                distributed.broadcast(tensor, src=0)
