"""Where a worker trains, and whom it tells."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from cigpose.config import Config
from cigpose.evaluate.predictions import Predictions
from cigpose.train.checkpoints import CheckpointStore
from cigpose.train.state import TrainState

Record = dict[str, Any]


class Listener(Protocol):
    """Told what happens, on rank 0. Returns soon: training waits."""

    def on_start(self, state: TrainState, total_steps: int) -> None:
        """Training begins, or goes on from a checkpoint whose history is in `state`."""

    def on_crops(self, crops: np.ndarray, keypoints: np.ndarray, visible: np.ndarray) -> None:
        """The first training batch of this process: uint8 (B, H, W, 3) RGB, (B, K, 2) crop pixels, (B, K)."""

    def on_log(self, record: Record) -> None:
        """Means since the last record."""

    def on_validation(self, record: Record, predictions: Predictions) -> None:
        """The metrics of a validation, and what they were computed from; steps after it may have been told before."""

    def on_checkpoint(self, name: str) -> None:
        """A checkpoint has been written. Not told again when it is written once more, with the score of its epoch."""


@dataclass(frozen=True, kw_only=True)
class StartingModel:
    """The network whose weights a training takes where they fit (`cigpose.model.transfer`).

    Attributes:
        read: gives the bytes of its safetensors file; called on rank 0.
        config: the experiment it comes from; None if not known.
        where: where it comes from, for messages.
        sha256: of the file.
    """

    read: Callable[[], bytes]
    config: Config | None
    where: str
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a worker runs and what it reads and writes.

    Attributes:
        rank, world: this worker and their number.
        device: where it computes.
        shards: folder with the shards of the datasets.
        root: folder of params.yaml; pretrained weights are in data/raw/pretrained below it.
        store: the run's checkpoints.
        params: what must not change while the run is under way (`influential_params`).
        start: the network to start from, if there is one.
    """

    rank: int
    world: int
    device: torch.device
    shards: Path
    root: Path
    store: CheckpointStore
    params: dict[str, Any]
    start: StartingModel | None = None
