"""How fast an experiment would train here: a few of its steps, on people of its own."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from typing import Any

import cv2
import numpy as np
import torch

from cigpose.config import Config
from cigpose.crop import box_to_center_scale, crop_image, crop_matrix, fix_aspect_ratio
from cigpose.dataset.reading import Photographs
from cigpose.model.device import choose_device
from cigpose.model.estimator import Normalize, build_model

STEPS = 4
"""That are timed, after one that is not."""
AROUND = 1.25
"""Time of a training over that of its steps and crops alone: optimiser, augmentation, averaging over workers."""


def measure_people_per_second(
    config: Config, photographs: Photographs, people: Sequence[tuple[str, Sequence[float]]]
) -> float:
    """People that all workers of a training go through in a second, roughly.

    Timed are decoding and cutting of some people (on one core), and forward and backward of a worker's batch (on as
    many threads as it has). Other work on the machine makes it slower, now and then.

    Args:
        config: the experiment.
        photographs: the pictures.
        people: file name and box (x, y, width, height) of some of them.
    """
    cores, cluster = len(os.sched_getaffinity(0)), config.train.cluster
    step = _seconds_of_a_step(config)
    crop = _seconds_of_a_crop(config, photographs, people) if people else 0.0
    batch = config.train.batch_per_worker
    device = choose_device(None)
    if device.type == "cuda":  # crops are made beside the steps
        return min(batch / step * cluster.num_workers, cores / max(crop, 1e-6)) / AROUND
    return cluster.num_workers / (step / batch + crop) / AROUND


def _seconds_of_a_step(config: Config) -> float:
    device, threads = choose_device(None), torch.get_num_threads()
    batch, (width, height) = config.train.batch_per_worker, config.model.input_size
    keypoints = torch.rand(batch, len(config.keypoint_set), 2, device=device) * torch.tensor(
        [width, height], device=device
    )
    visible = torch.ones(batch, len(config.keypoint_set), device=device)
    try:
        torch.set_num_threads(config.train.cluster.threads_per_worker)
        model: Any = build_model(config).to(device).train()
        crops = torch.randint(0, 256, (batch, height, width, 3), dtype=torch.uint8, device=device)
        images = Normalize().to(device)(crops).contiguous(memory_format=torch.channels_last)
        begun = 0.0
        for number in range(STEPS + 1):
            if number == 1:
                begun = _now(device)
            parts = model.loss(images, keypoints, visible)
            torch.stack([value for name, value in parts.items() if name.startswith("loss_")]).sum().backward()  # type: ignore[no-untyped-call]
        return (_now(device) - begun) / STEPS
    finally:
        torch.set_num_threads(threads)


def _seconds_of_a_crop(
    config: Config, photographs: Photographs, people: Sequence[tuple[str, Sequence[float]]]
) -> float:
    threads = cv2.getNumThreads()
    cv2.setNumThreads(1)
    try:
        begun = time.perf_counter()
        for file_name, box in people:
            picture = photographs.find(file_name)
            assert picture is not None  # the labels were held against the pictures
            x, y, w, h = box
            center, scale = box_to_center_scale(np.array([x, y, x + w, y + h]), config.augmentation.box_padding)
            size = config.model.input_size
            matrix = crop_matrix(center, fix_aspect_ratio(scale, size), 0.0, size)
            crop_image(photographs.decode(picture), matrix, size)
        return (time.perf_counter() - begun) / len(people)
    finally:
        cv2.setNumThreads(threads)


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
