"""A training in this process, whose listener remembers what it is told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from cigpose.train.checkpoints import CheckpointStore
from cigpose.train.place import Place
from cigpose.train.state import influential_params


class KilledError(Exception):
    """In the place of a signal."""


class Recorder:
    """Listener that remembers, and can end the training at a step as a signal would."""

    def __init__(self, killed_at: int | None = None) -> None:
        self.killed_at = killed_at
        self.started: list[int] = []
        self.logs: list[dict[str, Any]] = []
        self.validations: list[dict[str, Any]] = []
        self.checkpoints: list[str] = []
        self.predictions: list[Any] = []
        self.told: list[str] = []
        self.crops: np.ndarray | None = None

    def on_start(self, state: Any, total_steps: int) -> None:
        self.started += [state.step, total_steps]

    def on_crops(self, crops: np.ndarray, keypoints: np.ndarray, visible: np.ndarray) -> None:
        self.crops = crops if self.crops is None else self.crops

    def on_log(self, record: dict[str, Any]) -> None:
        self.logs.append(record)
        self.told.append(f"log {record['step']}")
        if self.killed_at is not None and record["step"] >= self.killed_at:
            raise KilledError

    def on_validation(self, record: dict[str, Any], predictions: Any) -> None:
        self.validations.append(record)
        self.predictions.append(predictions)
        self.told.append(f"validation {record['step']}")

    def on_checkpoint(self, name: str) -> None:
        self.checkpoints.append(name)
        self.told.append(f"checkpoint {int(name.removeprefix('step-'))}")


def place(config: Any, shards: Path, folder: Path) -> Place:
    """The only worker, whose checkpoints are in `folder`."""
    return Place(
        rank=0,
        world=1,
        device=torch.device("cpu"),
        shards=shards,
        root=folder,
        store=CheckpointStore(folder / "checkpoints", config.train.checkpoint.keep),
        params=influential_params(config, {}),
    )


def final_state(folder: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Tensors and values of the newest checkpoint in `folder`."""
    _, tensors, values = CheckpointStore(folder / "checkpoints").load_newest()
    return tensors, values


def deterministic(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Records without what the clock and the machine say."""
    clock = ("images_per_s", "data_wait", "eta_s", "memory_mb", "seconds")
    return [{key: value for key, value in record.items() if key not in clock} for record in records]
