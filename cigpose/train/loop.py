"""The training of one worker, from the first step or the last checkpoint to the end.

It knows the model, the shards and the other workers, and nothing of Ray or MLflow: what happens is told to a
`Listener`, on rank 0 only.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from cigpose.config import Config
from cigpose.evaluate.checkpoint import dataset_truth, open_shards
from cigpose.evaluate.coco import evaluate_predictions
from cigpose.evaluate.ground_truth import GroundTruth
from cigpose.evaluate.predict import Predictions, predict
from cigpose.loader.batches import TrainLoader, eval_loader
from cigpose.model.weights import save_weights
from cigpose.train import workers
from cigpose.train.build import build_state
from cigpose.train.checkpoints import CheckpointStore
from cigpose.train.divergence import refuse_diverged
from cigpose.train.meter import Meter
from cigpose.train.optim import learning_rates
from cigpose.train.state import TrainState, random_state, refuse_changed_params, set_random_state
from cigpose.train.step import Batch, Copier, train_step

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
        """The metrics of a validation, and what they were computed from."""

    def on_checkpoint(self, name: str) -> None:
        """A checkpoint has been written."""


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
    """

    rank: int
    world: int
    device: torch.device
    shards: Path
    root: Path
    store: CheckpointStore
    params: dict[str, Any]


def train(config: Config, place: Place, listener: Listener) -> Record:
    """Train until `config.train.epochs` are done; every worker calls this.

    A run whose store has a checkpoint goes on from it.

    Args:
        config: the experiment; its `cluster.num_workers` is the number of workers that are there.
        place: this worker.
        listener: told what happens; used on rank 0 only.

    Returns: `best` (see `TrainState.best`), `weights` (their file in the store), `step`, `history`.

    Raises:
        NonFiniteLossError: the loss became NaN or infinite.
        CheckpointError: the params differ from the checkpoint's, or one cannot be written.
    """
    training = _Training(config, place, listener)
    with closing(training.loader):
        return training.run()


class _Training:
    """One call of `train`: what its parts share."""

    def __init__(self, config: Config, place: Place, listener: Listener) -> None:
        self.config, self.place, self.listener = config, place, listener
        self.validation = config.for_validation()
        self.is_first = place.rank == 0
        self.truth: GroundTruth | None = None
        self.state = build_state(config, rank=place.rank, device=place.device, root=place.root)
        self.resumed = self._restore()
        self.loader = TrainLoader(config, rank=place.rank, world=place.world, root=place.shards)
        self.steps_per_epoch = self.loader.num_batches // config.train.accumulate_steps
        self.rates = learning_rates(
            config.train.resolved_learning_rate, config.train.schedule, self.steps_per_epoch, config.train.epochs
        )
        self.last_checkpoint: tuple[int, int, int] | None = self._mark if self.resumed else None
        self.last_checkpoint_time = time.monotonic()

    @property
    def _position(self) -> int:
        """Place of the coming step in the run. Not `step`: a run that lost a node may have made other epochs."""
        return self.state.epoch * self.steps_per_epoch + self.state.step_in_epoch

    @property
    def _mark(self) -> tuple[int, int, int]:
        """What a checkpoint would say of the progress: the end of an epoch is not the step before it."""
        return self.state.epoch, self.state.step_in_epoch, self.state.step

    def run(self) -> Record:
        """Train to the end."""
        state, train = self.state, self.config.train
        if self.is_first:
            self.listener.on_start(state, len(self.rates))
        while state.epoch < train.epochs:
            self._run_epoch()
            state.epoch, state.step_in_epoch = state.epoch + 1, 0
            if state.epoch % train.validate_every_epochs == 0 or state.epoch == train.epochs:
                self._validate()
                self._save_checkpoint()
            elif self._is_checkpoint_due():
                self._save_checkpoint()
        return {"best": state.best, "weights": state.weights, "step": state.step, "history": state.history}

    def _run_epoch(self) -> None:
        state, train = self.state, self.config.train
        meter = Meter(self.place.device)
        start = first_batch(state.step_in_epoch, self.steps_per_epoch, train.accumulate_steps)
        for batches in self._steps(self.loader.batches(state.epoch, start), meter):
            if self.is_first and meter.is_fresh:
                self._show_crops(batches[0])
            rate = self.rates[self._position]
            metrics = train_step(state, batches, rate=rate, clip_grad_norm=train.optimizer.clip_grad_norm)
            state.step, state.step_in_epoch = state.step + 1, state.step_in_epoch + 1
            meter.add(metrics, sum(len(batch["keys"]) for batch in batches))
            is_last = state.step_in_epoch >= self.steps_per_epoch
            if state.step % train.log_every_steps == 0 or is_last:
                self._log(meter, rate)
            if self._is_checkpoint_due() and not is_last:
                self._save_checkpoint()

    def _steps(self, batches: Iterator[Batch], meter: Meter) -> Iterator[list[Batch]]:
        """The micro-batches of each optimiser step, on the device."""
        copier = Copier(self.place.device)
        while True:
            with meter.waiting():
                group = list(itertools.islice(batches, self.config.train.accumulate_steps))
            if not group:
                return
            yield [copier(batch) for batch in group]

    def _log(self, meter: Meter, rate: float) -> None:
        state = self.state
        state.settle()
        if meter.is_empty:  # fp16 has skipped every step since; all workers agree
            return
        record = {"kind": "log", "epoch": state.epoch, "step": state.step, "lr": float(rate)}
        record |= meter.read(len(self.rates) - self._position)
        state.history.append(record)
        if self.is_first:
            self.listener.on_log(record)

    def _show_crops(self, batch: Batch) -> None:
        crops, keypoints, visible = (batch[key].cpu().numpy() for key in ("crops", "keypoints", "visible"))
        self.listener.on_crops(crops, keypoints, visible)

    def _validate(self) -> None:
        """Each worker predicts its share of the people; rank 0 scores them all."""
        state, config, place = self.state, self.validation, self.place
        workers.copy_rank_0([state.model] if state.ema is None else [state.model, state.ema.module])
        loader = eval_loader(config, config.data.val, rank=place.rank, world=place.world, root=place.shards)
        began = time.monotonic()
        share = predict(
            state.evaluated, loader, config.keypoint_set, device=place.device, flip_test=config.evaluate.flip_test
        )
        shares = workers.gather(share)
        if shares is None:
            return
        predictions = Predictions.concatenate(shares)
        if self.truth is None:
            self.truth = dataset_truth(open_shards(config, config.data.val, place.shards), config)
        metrics = evaluate_predictions(predictions, self.truth, config.keypoint_set, config.evaluate)
        record = {"kind": "validation", "epoch": state.epoch, "step": state.step, "seconds": time.monotonic() - began}
        record |= metrics
        state.history.append(record)
        value = chosen_metric(metrics, config.evaluate.metric)
        if state.best is None or value > state.best["value"]:
            best = {"metric": config.evaluate.metric, "value": value, "epoch": state.epoch, "step": state.step}
            state.best = {**best, "metrics": metrics}
            weights = {key: tensor.cpu() for key, tensor in state.evaluated.state_dict().items()}
            state.weights = place.store.save_weights(state.step, lambda path: save_weights(path, weights, self.config))
        self.listener.on_validation(record, predictions)

    def _is_checkpoint_due(self) -> bool:
        """Whether to write one now; all workers agree. The clock is asked where records are logged."""
        when, state = self.config.train.checkpoint, self.state
        if when.every_steps is not None and state.step % when.every_steps == 0:
            return True
        if when.every_minutes is None or state.step % self.config.train.log_every_steps:
            return False
        elapsed = time.monotonic() - self.last_checkpoint_time
        return workers.largest_over_workers(elapsed, self.place.device) >= 60 * when.every_minutes

    def _save_checkpoint(self) -> None:
        state = self.state
        if self.last_checkpoint == self._mark:
            return
        state.settle()
        generators = workers.gather(random_state())
        if generators is not None:
            tensors, values = state.state_dict()
            refuse_diverged(state.model)
            values |= {"params": self.place.params, "random": generators}
            name = self.place.store.save(state.step, {key: t.cpu() for key, t in tensors.items()}, values)
            self.listener.on_checkpoint(name)
        self.last_checkpoint, self.last_checkpoint_time = self._mark, time.monotonic()

    def _restore(self) -> bool:
        """Take over the newest checkpoint that is whole; whether there was one."""
        store, rank = self.place.store, self.place.rank
        found = store.load_newest() if rank == 0 else None
        name = workers.from_rank_0(found and found[0])
        if name is None:
            return False
        tensors, values = found[1:] if found is not None else store.load(name)
        refuse_changed_params(values["params"], self.place.params, f"{store.address}/{name}")
        self.state.load_state_dict(tensors, values)
        if rank < len(values["random"]):
            set_random_state(values["random"][rank])
        return True


def first_batch(step_in_epoch: int, steps_per_epoch: int, accumulate_steps: int) -> int:
    """Where an epoch is entered. Other workers than those before may have made more steps of it than there are now."""
    return min(step_in_epoch, steps_per_epoch) * accumulate_steps


def chosen_metric(metrics: Mapping[str, float], name: str) -> float:
    """The figure by which validations are compared.

    Raises:
        ValueError: the evaluation gives no such figure.
    """
    if name not in metrics:
        raise ValueError(
            f"train.validation.metric: {name!r} is not among what the evaluation gives: {', '.join(metrics)}."
        )
    return metrics[name]
