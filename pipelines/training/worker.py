"""What runs in a Ray worker: the library's training, with its news put into the driver's queue."""

from __future__ import annotations

import errno
import functools
import socket
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import ray
import ray.train
import ray.train.torch
import torch
from ray.util.queue import Queue

from cigpose.config import config_from_mapping
from cigpose.evaluate.predictions import Predictions
from cigpose.train.build import for_world
from cigpose.train.checkpoints import CheckpointError, CheckpointStore
from cigpose.train.divergence import NonFiniteLossError
from cigpose.train.loop import train
from cigpose.train.place import Place, StartingModel
from cigpose.train.state import TrainState
from pipelines.training.cluster import TrainingError, refuse_other_folder
from pipelines.training.start import FILE

CROPS_SHOWN = 16


class Messenger:
    """A `Listener` that puts events into the driver's queue: plain values and numpy arrays."""

    def __init__(self, mailbox: Queue, shown_images: list[int]) -> None:
        self.mailbox = mailbox
        self.shown_images = shown_images

    def send(self, event: str, **values: Any) -> None:
        """Put one event into the queue."""
        self.mailbox.put_nowait({"event": event, **values})

    def on_start(self, state: TrainState, total_steps: int) -> None:
        """The history that the checkpoint holds: the driver may have missed its end."""
        self.send("start", step=state.step, total_steps=total_steps, history=state.history)

    def on_crops(self, crops: np.ndarray, keypoints: np.ndarray, visible: np.ndarray) -> None:
        """A few crops of the first batch."""
        shown = slice(CROPS_SHOWN)
        self.send("crops", crops=crops[shown], keypoints=keypoints[shown], visible=visible[shown])

    def on_log(self, record: dict[str, Any]) -> None:
        """A line of the history."""
        self.send("log", record=record)

    def on_validation(self, record: dict[str, Any], predictions: Predictions) -> None:
        """A line of the history, and the persons of the images that are shown."""
        shown = predictions.select(np.isin(predictions.image_id, self.shown_images))
        self.send("validation", record=record, predictions=shown)

    def on_checkpoint(self, name: str) -> None:
        """A checkpoint has been written."""
        self.send("checkpoint", name=name)


def work(settings: dict[str, Any]) -> dict[str, Any] | None:
    """One worker. A failure that would come again is told to the driver, and not tried again.

    Args:
        settings: see `pipelines.training.driver.train_on_ray`; with `config`, plain values, `mailbox`, a queue, and
            `marker`, of `pipelines.training.cluster.marked`.

    Returns: what the training returns on rank 0; None elsewhere, and after a failure.
    """
    context = ray.train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    messenger = Messenger(settings["mailbox"], settings["shown_images"])
    try:
        config = for_world(config_from_mapping(settings["config"]), world)
        torch.set_num_threads(config.train.cluster.threads_per_worker)
        refuse_other_folder(settings["marker"])
        root = Path(settings["root"])
        place = Place(
            rank=rank,
            world=world,
            device=ray.train.torch.get_device(),
            shards=root / "data" / "shards",
            root=root,
            store=CheckpointStore(settings["checkpoints"], config.train.checkpoint.keep),
            params=settings["params"],
            start=_received(settings["start"], root),
        )
        result = train(config, place, messenger)
        return result if rank == 0 else None
    except Exception as err:
        message = explain(err, settings["config"])
        if message is not None:
            messenger.send("failed", message=message)
        raise


def _received(sent: dict[str, Any] | None, root: Path) -> StartingModel | None:
    """What `pipelines.training.driver` sent of the network to start from; its bytes come when they are asked for."""
    if sent is None:
        return None
    config = config_from_mapping(sent["config"]) if sent["config"] else None
    content: Any = sent["content"]
    read: Callable[[], Any] = (root / FILE).read_bytes if content is None else functools.partial(ray.get, content)
    return StartingModel(read=read, config=config, where=sent["where"], sha256=sent["sha256"])


def explain(err: Exception, params: dict[str, Any]) -> str | None:
    """A failure in one sentence for the user; None for one that another try may get over, as the death of a peer.

    Args:
        err: what the training raised.
        params: the experiment, plain values.
    """
    train = params["train"]
    if isinstance(err, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(err):
        share = train["batch_total"] // (train["cluster"]["num_workers"] * train["accumulate_steps"])
        return (
            f"out of memory on {socket.gethostname()} with {share} persons per forward pass: raise "
            "train.accumulate_steps, which lowers that number and not the total batch, or set train.precision: bf16."
        )
    if isinstance(err, OSError) and err.errno == errno.ENOSPC:
        return f"the disk of {socket.gethostname()} is full ({err.filename or err}). Make room and run again to go on."
    if isinstance(err, TrainingError | CheckpointError | NonFiniteLossError | ValueError | FileNotFoundError):
        return str(err)
    if isinstance(err, RuntimeError | OSError):  # a peer that died, a network that failed
        return None
    return f"{type(err).__name__} in a worker: {err}\n{traceback.format_exc()}"
