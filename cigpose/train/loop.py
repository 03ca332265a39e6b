"""The training of one worker, from the first step or the last checkpoint to the end.

It knows the model, the shards and the other workers, and nothing of Ray or MLflow: what happens is told to a
`Listener`, on rank 0 only.
"""

from __future__ import annotations

import functools
import itertools
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from typing import Any

from cigpose.config import Config
from cigpose.loader.batches import TrainLoader
from cigpose.loader.device import is_on_device
from cigpose.model.weights import save_weights
from cigpose.train import workers
from cigpose.train.build import build_state
from cigpose.train.divergence import refuse_diverged
from cigpose.train.meter import Meter
from cigpose.train.optim import learning_rates
from cigpose.train.place import Listener, Place, Record
from cigpose.train.snapshots import Snapshot, Writer
from cigpose.train.state import random_state, refuse_changed_params, set_random_state, under
from cigpose.train.step import Batch, Copier, Copying, train_step
from cigpose.train.validation import Validation


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
        ValueError: pixels are to be changed on a GPU, and there is none.
        CheckpointError: the params differ from the checkpoint's, or one cannot be written.
    """
    training = _Training(config, place, listener)
    with closing(training.loader):
        return training.run()


class _Training:
    """One call of `train`: what its parts share."""

    def __init__(self, config: Config, place: Place, listener: Listener) -> None:
        self.config, self.place, self.listener = config, place, listener
        self.is_first = place.rank == 0
        self.state = build_state(
            config,
            rank=place.rank,
            device=place.device,
            root=place.root,
            pretrained=place.params.get("pretrained.sha256"),
            start=place.start,
        )
        self.resumed = self._restore()
        self.loader = TrainLoader(
            config,
            rank=place.rank,
            world=place.world,
            root=place.shards,
            on_device=is_on_device(config.augmentation, place.device),
        )
        self.steps_per_epoch = self.loader.num_batches // config.train.accumulate_steps
        self.rates = learning_rates(
            config.train.resolved_learning_rate, config.train.schedule, self.steps_per_epoch, config.train.epochs
        )
        self.last_checkpoint: tuple[int, int, int] | None = self._mark if self.resumed else None
        self.last_checkpoint_time = time.monotonic()
        self.validation = Validation(config, place, self.state, listener)
        self.snapshot, self.writer, self.told = Snapshot(), Writer(), ""

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
        with self.validation, self.writer:
            self.validation.begin_again()
            while state.epoch < train.epochs:
                self._run_epoch()
                state.epoch, state.step_in_epoch = state.epoch + 1, 0
                if state.epoch % train.validate_every_epochs == 0 or state.epoch == train.epochs:
                    self.validation.begin()
                    self._save_checkpoint()
                elif self._is_checkpoint_due():
                    self._save_checkpoint()
            if self.validation.has_begun:  # the last checkpoint, once more with the score
                self.validation.take(wait=True)
                self._save_checkpoint(again=True)
            self._tell_written()
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
            self._take_news()
            is_last = state.step_in_epoch >= self.steps_per_epoch
            if state.step % train.log_every_steps == 0 or is_last:
                self._log(meter, rate)
            if self._is_checkpoint_due() and not is_last:
                self._save_checkpoint()

    def _steps(self, batches: Iterator[Batch], meter: Meter) -> Iterator[Sequence[Batch]]:
        """The micro-batches of each optimiser step, on the device; the next ones are on their way meanwhile."""
        copier = Copier(self.place.device)

        def begin() -> list[Copying]:
            with meter.waiting():
                group = list(itertools.islice(batches, self.config.train.accumulate_steps))
            return [copier.begin(batch) for batch in group]

        coming = begin()
        while coming:
            group, coming = [copier.end(copying) for copying in coming], begin()
            yield group

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

    def _is_checkpoint_due(self) -> bool:
        """Whether to write one now; all workers agree. The clock is asked where records are logged."""
        when, state = self.config.train.checkpoint, self.state
        if when.every_steps is not None and state.step % when.every_steps == 0:
            return True
        if when.every_minutes is None or state.step % self.config.train.log_every_steps:
            return False
        elapsed = time.monotonic() - self.last_checkpoint_time
        return workers.largest_over_workers(elapsed, self.place.device) >= 60 * when.every_minutes

    def _save_checkpoint(self, *, again: bool = False) -> None:
        """Begin to write one, unless the last one says the same; a collective of all workers."""
        state = self.state
        if self.last_checkpoint == self._mark and not again:
            return
        state.settle()
        generators = workers.gather(random_state())
        if generators is not None:
            refuse_diverged(state.model)
            self._tell_written()
            tensors, values = state.state_dict()
            values |= {"params": self.place.params, "random": generators}
            self.snapshot.take(tensors)
            self.writer.begin(functools.partial(self._write_checkpoint, state.step, values))
        self.last_checkpoint, self.last_checkpoint_time = self._mark, time.monotonic()

    def _write_checkpoint(self, step: int, values: dict[str, Any]) -> str:
        """Write what the snapshot holds, in the writer's thread; its name."""
        tensors, store = self.snapshot.read(), self.place.store
        unscored = values["unscored"]
        if unscored is not None and unscored["step"] == step:  # these weights, which may turn out the best
            weights = under("model." if self.state.ema is None else "ema.", tensors)
            store.save_weights(step, lambda path: save_weights(path, weights, self.config))
        return store.save(step, tensors, values)

    def _tell_written(self) -> None:
        """Wait for the checkpoint that is being written, if any, and tell of it."""
        name = self.writer.finish()
        if name is not None and name != self.told:
            self.listener.on_checkpoint(name)
            self.told = name

    def _take_news(self) -> None:
        """Take over what was done beside the training, and is ready."""
        if self.writer.is_done:
            self._tell_written()
        self.validation.take()

    def _restore(self) -> bool:
        """Take over the newest checkpoint that is whole, which rank 0 reads; whether there was one."""
        store, rank = self.place.store, self.place.rank
        if rank == 0:
            store.clear_halves()
        found = store.load_newest() if rank == 0 else None
        known = workers.from_rank_0(found and (found[0], found[2]))
        if known is None:
            return False
        name, values = known
        refuse_changed_params(values["params"], self.place.params, f"{store.address}/{name}")
        self.state.load_state_dict(workers.tensors_from_rank_0(found and found[1]), values)
        if rank < len(values["random"]):
            set_random_state(values["random"][rank])
        return True


def first_batch(step_in_epoch: int, steps_per_epoch: int, accumulate_steps: int) -> int:
    """Where an epoch is entered. Other workers than those before may have made more steps of it than there are now."""
    return min(step_in_epoch, steps_per_epoch) * accumulate_steps
