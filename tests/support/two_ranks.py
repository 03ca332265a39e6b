"""What two workers see: each function runs in both, joined by gloo, and returns something picklable.

`run(function)` starts them and gives both answers by rank.
"""

from __future__ import annotations

import copy
import socket
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.multiprocessing
from torch import Tensor, distributed, nn
from torch.nn.modules import _functions as torch_functions

SIZES = (3, 5)
"""Persons of each rank."""


def run(function: Callable[[int], Any]) -> list[Any]:
    """`function(rank)` in two processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with torch.multiprocessing.get_context("spawn").Pool(2) as pool:
        return pool.starmap(_join, [(function, rank, port) for rank in range(2)], chunksize=1)


def _join(function: Callable[[int], Any], rank: int, port: int) -> Any:
    torch.set_num_threads(1)
    address = f"tcp://127.0.0.1:{port}"
    distributed.init_process_group("gloo", init_method=address, rank=rank, world_size=2)
    try:
        return function(rank)
    finally:
        distributed.destroy_process_group()


def both(rank: int) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any], dict[str, Tensor]]:
    """`batch_norms`, `training` and `received`, for the start of the processes takes longest."""
    return batch_norms(rank), training(rank), received(rank)


def make_tensors() -> dict[str, Tensor]:
    """Of every kind that a checkpoint holds."""
    generator = torch.Generator().manual_seed(2)
    image = torch.randn(2, 3, 4, 5, generator=generator)
    return {"image": image.to(memory_format=torch.channels_last), "count": torch.tensor(3), "half": image.bfloat16()}


def received(rank: int) -> dict[str, Tensor]:
    """What this rank has of a checkpoint that rank 0 has read."""
    from cigpose.train.workers import tensors_from_rank_0

    return tensors_from_rank_0(make_tensors() if rank == 0 else None)


def make_layer() -> nn.BatchNorm2d:
    torch.manual_seed(0)
    layer = nn.BatchNorm2d(6)
    with torch.no_grad():
        layer.weight.uniform_(0.5, 2)
        layer.bias.normal_()
    return layer


def make_values() -> tuple[Tensor, Tensor]:
    """The joint batch of both ranks, and the weight of each output in the loss."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(sum(SIZES), 6, 5, 4, generator=generator) * 2 + 7
    return x, torch.randn(x.shape, generator=generator)


class Torchs(nn.BatchNorm2d):
    """`torch.nn.SyncBatchNorm`, which refuses CPU tensors before it comes to its arithmetic."""

    def forward(self, input: Tensor) -> Tensor:
        group = distributed.group.WORLD
        return torch_functions.SyncBatchNorm.apply(
            input, self.weight, self.bias, self.running_mean, self.running_var, self.eps, self.momentum, group, 2
        )


def batch_norms(rank: int) -> dict[str, dict[str, Tensor]]:
    """Outputs, gradients and statistics of this rank: torch's, and ours by each of its ways."""
    import batch_norm_kernels  # noqa: F401

    from cigpose.train import batch_norm

    layer = make_layer()
    ours = batch_norm.synchronize_batch_norm(nn.Sequential(copy.deepcopy(layer)))
    theirs = Torchs(6)
    theirs.load_state_dict(layer.state_dict())
    found = {"torch": _pass(theirs, theirs, rank)}
    chosen = batch_norm.has_kernels
    for name in ("plain", "captured", "kernels"):
        module = copy.deepcopy(ours)
        batch_norm.has_kernels = lambda _x, wanted=name == "kernels": wanted
        called = torch.compile(module, backend="aot_eager", fullgraph=True) if name == "captured" else module
        found[name] = _pass(module[0], called, rank)
    batch_norm.has_kernels = chosen
    return found


def _pass(layer: nn.BatchNorm2d, called: Callable[[Tensor], Tensor], rank: int) -> dict[str, Tensor]:
    values, weights = (part.split(SIZES)[rank] for part in make_values())
    x = values.clone().contiguous(memory_format=torch.channels_last).requires_grad_()
    out = called(x)
    (out * weights).sum().backward()
    for parameter in layer.parameters():
        distributed.all_reduce(parameter.grad)
    return {
        "out": out.detach(),
        "d_input": x.grad,
        "d_weight": layer.weight.grad,
        "d_bias": layer.bias.grad,
        "running_mean": layer.running_mean,
        "running_var": layer.running_var,
    }


def training(rank: int) -> dict[str, Any]:
    """Steps of two sizes of a small model, plain and compiled: losses, graphs, breaks, warnings, sum of weights."""
    from tiny_training import make_config

    from cigpose.model.estimator import build_model
    from cigpose.train.build import state_around
    from cigpose.train.step import train_step

    generator = torch.Generator().manual_seed(rank)
    batches = [
        {
            "crops": torch.randint(0, 256, (persons, 64, 48, 3), dtype=torch.uint8, generator=generator),
            "keypoints": torch.full((persons, 133, 2), 20.0 + rank),
            "visible": torch.ones(persons, 133),
            "keys": ["a"] * persons,
        }
        for persons in (3, 2, 3, 2)  # as the last batch of each epoch has another size
    ]
    answer: dict[str, Any] = {}
    compile_module = nn.Module.compile
    # captured and cut into DDP's buckets, but not compiled further, which takes minutes
    nn.Module.compile = lambda module, **options: compile_module(module, backend="eager", **options)
    for compiled in (False, True):
        config = make_config(
            train__cluster__num_workers=2,
            train__sync_batch_norm=True,
            train__compile=compiled,
            model__backbone__out_stage=2,
            model__backbone__deepen_factor=0.1,
        )
        torch.manual_seed(0)
        state = state_around(build_model(config), config, torch.device("cpu"))
        torch._dynamo.utils.counters.clear()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            losses = [train_step(state, [b], rate=1e-3, clip_grad_norm=35.0)["loss"].item() for b in batches]
        counters = torch._dynamo.utils.counters
        answer["compiled" if compiled else "eager"] = {
            "losses": losses,
            "warnings": [str(warning.message) for warning in caught],
            "graphs": counters["stats"]["unique_graphs"],
            "breaks": dict(counters["graph_break"]),
            "weights": sum(parameter.double().sum().item() for parameter in state.model.parameters()),
        }
    return answer
