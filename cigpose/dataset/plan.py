"""A first experiment on somebody's own people: crop, network, schedule, from the people and the machine."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from cigpose.config import Config, config_from_mapping
from cigpose.dataset.table import Table

SIGMA_OF_SIDE = 0.3536
"""SimCC sigma over the root of the side, as in all of the paper's presets (4.9 for 192, 5.66 for 256, 6.93 for 384)."""
PADDING = 1.25
SPREAD = 1.25
"""People whose boxes' sides differ by less than this, from first to third quartile, have a shape of their own."""


@dataclass(frozen=True, kw_only=True)
class Size:
    """A network, and whom it is for."""

    name: str
    least_people: int
    """To train on; below, a smaller one."""
    backbone: Mapping[str, Any]
    head: Mapping[str, Any]
    pixels: int
    """Of the crop."""
    batch: int
    longest: int
    """Epochs, at most."""


ON_CPU = Size(
    name="cigpose-tiny", least_people=0, pixels=160 * 160, batch=16, longest=60,
    backbone={"widen_factor": 0.25, "deepen_factor": 0.334, "out_stage": 2},
    head={"kind": "cigpose", "hidden": 128, "gau_s": 64, "final_kernel_size": 3},
)  # fmt: skip
ON_GPU = (
    Size(
        name="cigpose-s", least_people=0, pixels=256 * 192, batch=64, longest=210,
        backbone={"widen_factor": 0.5, "deepen_factor": 0.334, "out_stage": 3},
        head={"kind": "cigpose", "hidden": 256, "gau_s": 128},
    ),
    Size(
        name="cigpose-m", least_people=10_000, pixels=256 * 192, batch=128, longest=300,
        backbone={"widen_factor": 0.75, "deepen_factor": 0.67},
        head={"kind": "cigpose", "hidden": 256, "gau_s": 128},
    ),
    Size(
        name="cigpose-l", least_people=50_000, pixels=256 * 192, batch=128, longest=420,
        backbone={"widen_factor": 1.0, "deepen_factor": 1.0},
        head={"kind": "cigpose", "hidden": 256, "gau_s": 128},
    ),
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What there is to train on."""

    cores: int
    gpus: int

    @classmethod
    def here(cls) -> Machine:
        """This one."""
        return cls(cores=len(os.sched_getaffinity(0)), gpus=torch.cuda.device_count())

    @property
    def minutes(self) -> float:
        """For a first training, where the user says nothing."""
        return 240.0 if self.gpus else 20.0

    @property
    def words(self) -> str:
        """It, for the user."""
        return f"{self.gpus} GPU" + "s" * (self.gpus > 1) if self.gpus else f"{self.cores} cores, no GPU"


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A first experiment, and why it is this one."""

    config: Config
    reasons: tuple[str, ...]
    seconds: float
    """A training takes about so long here; nan where it was not measured."""
    people_per_second: float


def choose_size(num_people: int, machine: Machine) -> tuple[Size, str]:
    """The network for so many people to train on, and why."""
    if not machine.gpus:
        return ON_CPU, (
            "without a GPU only steps count: the smallest network, on small crops, sees each person most often in the "
            "time there is"
        )
    size = [size for size in ON_GPU if num_people >= size.least_people][-1]
    above = [other.least_people for other in ON_GPU if other.least_people > num_people]
    larger = f"; a larger one from {above[0]:,} people on" if above else ""
    return size, f"for {num_people:,} people from random weights; larger ones want more labels{larger}"


def crop_size(boxes_xywh: np.ndarray, pixels: int, stride: int) -> tuple[tuple[int, int], str]:
    """(width, height) of the crop, and why.

    The shape is that of the middle box where most have nearly one shape, else square. Its pixels are those asked for,
    fewer where people are smaller in their pictures: enlarging shows nothing new.

    Args:
        boxes_xywh: (N, 4), N at least 1.
        pixels: of the crop, at most about.
        stride: what both sides must be multiples of.
    """
    sides = boxes_xywh[:, 2:]
    sides = sides[(sides > 0).all(axis=1)]
    if not len(sides):
        sides = np.ones((1, 2))
    ratios = np.log(sides[:, 0] / sides[:, 1])
    low, middle, high = np.exp(np.quantile(ratios, [0.25, 0.5, 0.75]))
    is_one_shape = high / low < SPREAD**2
    aspect = float(np.clip(middle, 0.5, 2.0)) if is_one_shape or middle < 0.75 or middle > 1 / 0.75 else 1.0
    longest = float(np.median(sides.max(axis=1))) * PADDING
    height = math.sqrt(pixels / aspect)
    scale = min(1.0, longest / max(height, height * aspect))
    width, height = (max(stride * 2, round(side * scale / stride) * stride) for side in (height * aspect, height))
    shape = f"boxes are {low:.2f} to {high:.2f} as wide as high (quartiles; the middle one {middle:.2f})"
    small = f", people are small ({longest:.0f} pixels with their margin)" if scale < 1 else ""
    return (int(width), int(height)), f"{shape}{small}"


def make_plan(
    *,
    name: str,
    table: Table,
    boxes_xywh: np.ndarray,
    num_train: int,
    num_val: int,
    datasets: Mapping[str, Mapping[str, Any]],
    has_areas: bool,
    machine: Machine,
    minutes: float,
    measure_speed: Callable[[Config], float] | None,
    epochs: int | None = None,
) -> Plan:
    """The first experiment.

    Args:
        name: of the data; names of datasets, experiment and registered model are made of it.
        table: of keypoints.
        boxes_xywh: (N, 4) of the people to train on.
        num_train: people to train on.
        num_val: people to measure on.
        datasets: `data.datasets` of params.yaml, first the one to train on, then the one to measure on.
        has_areas: whether areas are of the people's own, not of their boxes.
        machine: to train on.
        minutes: that the training may take.
        measure_speed: persons per second that an experiment trains here; None: not measured, and the longest schedule.
        epochs: in place of as many as fit.
    """
    size, why = choose_size(num_train, machine)
    input_size, shape = crop_size(boxes_xywh, size.pixels, 2 ** (size.backbone.get("out_stage", 4) + 1))
    values = _values(name, table, size, input_size, list(datasets), dict(datasets), machine, num_train, has_areas)
    batch = _batch(size, num_train, machine)
    trial = config_from_mapping(_scheduled(values, 3, num_train, batch))
    rate = measure_speed(trial) if measure_speed else math.nan
    per_epoch = (num_train + num_val / 12) / rate  # a validation every few epochs, forward only, flip test
    if epochs is None:
        epochs = size.longest if math.isnan(rate) else int(min(size.longest, max(3, 60 * minutes / per_epoch)))
    config = config_from_mapping(_scheduled(values, epochs, num_train, batch))
    steps = epochs * -(-num_train // batch)
    reasons = (
        f"model: {size.name}, {why}",
        f"crop: {input_size[0]} x {input_size[1]} (width x height): {shape}",
        f"schedule: {epochs} epochs of {num_train:,} people, {steps:,} steps of {batch}",
    )
    return Plan(config=config, reasons=reasons, seconds=epochs * per_epoch, people_per_second=rate)


def _batch(size: Size, num_train: int, machine: Machine) -> int:
    """As the size says, less where that would be fewer than twenty steps of an epoch; workers share it evenly."""
    shares = _workers(machine)
    return max(1, min(size.batch, num_train // 20) // shares) * shares


def _workers(machine: Machine) -> int:
    return machine.gpus or min(2, machine.cores)


def _values(
    name: str,
    table: Table,
    size: Size,
    input_size: tuple[int, int],
    keys: Sequence[str],
    datasets: dict[str, Any],
    machine: Machine,
    num_train: int,
    has_areas: bool,
) -> dict[str, Any]:
    """All of params.yaml but the schedule."""
    keypoints = table.keypoints
    flips = bool(keypoints.flip_pairs)
    has_halves = bool(keypoints.upper_body and keypoints.lower_body)
    metric = "body/AP" if len(keypoints.parts) == 1 else "whole/AP"
    protocol = {
        "boxes": "ground_truth",
        "flip_test": flips,
        "area": "annotation" if has_areas else "box",
        "metric": metric,
    }
    workers = _workers(machine)
    width, height = input_size
    light = {
        "flip_prob": 0.5 if flips else 0.0, "half_body_prob": 0.0, "shift_factor": 0.05, "scale_range": [0.8, 1.25],
        "rotate_degrees": 30.0, "dropout_prob": 0.0, "blur_prob": 0.0, "median_blur_prob": 0.0,
    }  # fmt: skip
    full = {"flip_prob": 0.5 if flips else 0.0, "half_body_prob": 0.3 if has_halves else 0.0}
    stages = (
        full,
        full | {"shift_factor": 0.0, "scale_range": [0.75, 1.25], "rotate_degrees": 60.0, "dropout_prob": 0.5},
    )
    return {
        "name": f"{size.name}_{name}_{height}x{width}",
        "seed": 0,
        "keypoints": table.value,
        "data": {
            "download": {"sources": {}},
            "render": {},
            "datasets": datasets,
            "train": [keys[0]],
            "val": keys[1],
            "sharding": {"images_per_shard": max(1, min(1000, num_train // 16))},
        },
        "model": {
            "input_size": list(input_size),
            "backbone": dict(size.backbone),
            "head": dict(size.head),
            "simcc": {"sigma": [round(SIGMA_OF_SIDE * math.sqrt(side), 2) for side in input_size]},
            "causal": {"train_top_k": max(1, len(keypoints) // 10)},
        },
        "augmentation": {
            "stage1": stages[0] if machine.gpus else light,
            "stage2": stages[1] if machine.gpus else light,
            "box_padding": PADDING,
        },
        "train": {
            "validation": protocol,
            "loader": {"processes": max(1, machine.cores // machine.gpus - 1) if machine.gpus else 0},
            "cluster": {"num_workers": workers, "threads_per_worker": max(1, machine.cores // workers)},
            "checkpoint": {"every_minutes": 5.0},
            "precision": "auto" if machine.gpus else "fp32",
        },
        "evaluate": protocol,
        "registry": {"model": f"cigpose-{name}", "experiment": name, "measure_onnx": True},
    }


def _scheduled(values: dict[str, Any], epochs: int, num_train: int, batch: int) -> dict[str, Any]:
    """The whole of params.yaml."""
    steps = -(-num_train // batch)
    # on few people the mean over many steps would still be that of the first ones
    has_ema = epochs * steps > 20_000
    rate = 0.002 * math.sqrt(batch / 16) if batch > 16 else 0.002
    return {
        **values,
        "augmentation": {**values["augmentation"], "stage2_from_epoch": max(1, round(0.9 * epochs))},
        "train": {
            **values["train"],
            "epochs": epochs,
            "batch_total": batch,
            "loss_batch": batch,
            "optimizer": {"learning_rate": round(rate, 5), "learning_rate_batch": batch},
            "schedule": {
                "warmup_steps": min(1000, max(1, epochs * steps // 10)),
                "cosines": [{"begin_epoch": 0, "end_epoch": epochs, "final_factor": 0.01}],
            },
            "ema": {"enabled": has_ema},
            "validate_every_epochs": max(1, min(10, epochs // 4)),
        },
    }
