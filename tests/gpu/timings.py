"""What `make gpu-check` measures, on a device of one's choice: a step, an evaluation, the loader, the memory's speed.

Crops are random; what a step costs does not depend on what is on them. The loader's are of rendered people.
"""

from __future__ import annotations

import dataclasses
import math
import resource
import time
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from cigpose.config import Config, DatasetConfig, RenderConfig
from cigpose.evaluate.predict import predict
from cigpose.loader.batches import TrainLoader
from cigpose.model.complexity import complexity
from cigpose.model.estimator import build_model
from cigpose.render import render_dataset
from cigpose.shard.write import write_dataset
from cigpose.train.build import state_around
from cigpose.train.state import TrainState
from cigpose.train.step import AUTOCAST, Copier, resolved_precision, train_step

RATE, LARGEST_GRADIENT = 1e-4, 35.0
PEOPLE = "rendered"
NO_MEMORY_MOVED = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}


def measure_step(config: Config, device: torch.device, *, warm_up: int = 5, steps: int = 30) -> dict[str, Any]:
    """Time the training step, and the evaluation of the same network.

    Args:
        config: the experiment; `train` says precision, compiled or not, and with one worker the number of crops.
        device: where to compute.
        warm_up: steps before the clock, in which kernels are chosen and compiled.
        steps: steps that are timed.

    Returns: `crops` a step, `seconds` a step, `host_seconds` in which it is queued, `gib` of memory at most (on a CPU
        the whole process's), `operations` (floating point) and `bytes` a step (None where they are not known),
        `evaluated_per_s`: crops a second with the flip test, None if compiled: evaluations never are.
    """
    torch.manual_seed(0)
    if config.train.compile:  # the compiler counts the bytes of its kernels where it would log them
        torch._logging.set_logs(inductor_metrics=True)
    state = state_around(build_model(config).to(device), config, device)
    batch = make_batch(config, device)
    seconds, host_seconds = _time_steps(state, batch, device, warm_up, steps)
    gib = _largest_memory(device) / 2**30
    crops = len(batch["keys"])
    return {
        "crops": crops,
        "seconds": seconds,
        "host_seconds": host_seconds,
        "gib": gib,
        # forward and backward: three times the forward, two operations to a multiply-add
        "operations": 6 * complexity(config).multiply_adds * crops,
        "bytes": count_bytes(state, config, Copier(device)(batch)),
        "evaluated_per_s": None if config.train.compile else measure_evaluation(state, config, device, batches=steps),
    }


def make_batch(config: Config, device: torch.device) -> dict[str, Any]:
    """A training batch of one worker on the host, in pinned memory if the device is a GPU, as the loader gives it."""
    persons, (width, height) = config.train.batch_per_worker, config.model.input_size
    keypoints = len(config.keypoint_set)
    tensors = {
        "crops": torch.randint(0, 256, (persons, height, width, 3), dtype=torch.uint8),
        "keypoints": torch.rand(persons, keypoints, 2) * torch.tensor([width, height]),
        "visible": torch.ones(persons, keypoints),
    }
    return {**_pinned_for(device, tensors), "keys": ["random"] * persons}


def _pinned_for(device: torch.device, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.pin_memory() if device.type == "cuda" else tensor for name, tensor in tensors.items()}


def _time_steps(
    state: TrainState, batch: Mapping[str, Any], device: torch.device, warm_up: int, steps: int
) -> tuple[float, float]:
    """Seconds a step, and those of them in which the host queues it."""
    copier, host, began = Copier(device), 0.0, 0.0
    for number in range(warm_up + steps):
        if number == warm_up:
            state.settle()
            _wait_for(device)
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(device)  # compiling and choosing kernels takes more than steps do
            began, host = time.perf_counter(), 0.0
        queued = time.perf_counter()
        train_step(state, [copier(batch)], rate=RATE, clip_grad_norm=LARGEST_GRADIENT)
        host += time.perf_counter() - queued
    state.settle()
    _wait_for(device)
    return (time.perf_counter() - began) / steps, host / steps


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _largest_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class Traffic(TorchDispatchMode):
    """Adds up the bytes that operations read and write, each tensor once for each operation."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if not func.is_view and func._schema.name.partition("::")[2] not in NO_MEMORY_MOVED:
            read, changed = [], []
            for number, argument in enumerate(func._schema.arguments):
                leaves = tree_leaves(args[number] if number < len(args) else kwargs.get(argument.name))
                read += [] if argument.is_out else leaves
                changed += leaves if argument.is_write else []
            made = [leaf for leaf in tree_leaves(out) if not any(leaf is known for known in [*read, *changed])]
            self.total += sum(map(_size_of, [*read, *changed, *made]))
        return out


def _size_of(leaf: Any) -> int:
    if not isinstance(leaf, torch.Tensor):
        return 0
    # an expanded tensor has more elements than memory
    elements = math.prod(size for size, stride in zip(leaf.shape, leaf.stride(), strict=True) if stride)
    return elements * leaf.element_size()


def count_bytes(state: TrainState, config: Config, batch: Mapping[str, Any]) -> int | None:
    """Bytes that the operations of a step read and write; more than the memory sees, where its caches hold them.

    Of a compiled step those of the compiler's kernels by its own count, and of what is not compiled (the optimiser);
    None if it has not counted, as for kernels that it had compiled before.
    """
    with torch.compiler.set_stance("force_eager"):
        with Traffic() as whole:
            train_step(state, [batch], rate=RATE, clip_grad_norm=LARGEST_GRADIENT)
        if not config.train.compile:
            return whole.total
        with Traffic() as compiled:
            state.losses(batch["crops"], batch["keypoints"], batch["visible"])["loss"].backward()
    counted = torch._inductor.metrics.num_bytes_accessed
    return int(counted) + whole.total - compiled.total if counted else None


def measure_evaluation(state: TrainState, config: Config, device: torch.device, *, batches: int) -> float:
    """Crops a second of a validation: flip test, decoding, keypoints on the host."""
    config = config.for_validation()
    persons, (width, height) = config.evaluate.batch, config.model.input_size
    crops = torch.randint(0, 256, (persons, height, width, 3), dtype=torch.uint8)
    batch = {
        **_pinned_for(device, {"crops": crops}),
        "image_id": np.arange(persons),
        "person_id": np.arange(persons),
        "center": np.full((persons, 2), 100.0, np.float32),
        "scale": np.full((persons, 2), (width, height), np.float32),
        "bbox_xyxy": np.tile(np.float32([0, 0, width, height]), (persons, 1)),
        "box_score": np.ones(persons, np.float32),
    }
    autocast = AUTOCAST[resolved_precision(config, device)]

    def run(times: int) -> float:
        began = time.perf_counter()
        found = predict(
            state.evaluated, [batch] * times, config.keypoint_set, device=device, flip_test=True, autocast=autocast
        )
        assert len(found) == persons * times
        return time.perf_counter() - began

    run(2)
    return persons * batches / run(batches)


def measure_bandwidth(device: torch.device, num_bytes: int = 2 << 30, rounds: int = 20) -> float:
    """Bytes a second that a kernel reads and writes which does nothing else."""
    source = torch.ones(num_bytes // 4, device=device)
    target = torch.empty_like(source)
    for number in range(3 + rounds):
        if number == 3:
            _wait_for(device)
            began = time.perf_counter()
        torch.neg(source, out=target)
    _wait_for(device)
    return 2 * source.nbytes * rounds / (time.perf_counter() - began)


def with_people(config: Config, folder: Path, *, num_images: int, image_size: tuple[int, int] = (640, 480)) -> Config:
    """The experiment on rendered people, whose shards are made in `folder`."""
    dataset = DatasetConfig(raw=PEOPLE, reader="coco", images="images.zip", annotations="annotations.json")
    data = dataclasses.replace(config.data, datasets={PEOPLE: dataset}, train=(PEOPLE,), val=PEOPLE)
    config = dataclasses.replace(config, data=data)
    people = RenderConfig(seed=1, num_images=num_images, image_size=image_size, max_persons=3)
    render_dataset(people, folder / "raw" / PEOPLE)
    write_dataset(config, PEOPLE, folder / "raw", folder / "shards")
    return config


def measure_loader(config: Config, shards: Path, *, epochs: int) -> dict[str, Any]:
    """Run the training's own loader through its last epochs, as fast as it goes.

    Returns: `processes`, `per_s` (crops a second, from the first batch on) and `cpu_seconds` a crop, of all processes.
    """
    loader, began, counted, crops = TrainLoader(config, rank=0, world=1, root=shards), 0.0, 0, 0
    cpu = _cpu_seconds()
    with closing(loader):
        for epoch in range(config.train.epochs - epochs, config.train.epochs):
            for batch in loader.batches(epoch):
                counted += len(batch["keys"]) if crops else 0
                began = began or time.perf_counter()
                crops += len(batch["keys"])
        seconds = time.perf_counter() - began
    cpu = _cpu_seconds() - cpu  # of its processes too, which have ended
    return {"processes": config.train.loader.processes, "per_s": counted / seconds, "cpu_seconds": cpu / crops}


def _cpu_seconds() -> float:
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in used)
