"""Validation: all workers predict, then training goes on while another process scores; rank 0 takes the score over.

What comes of it does not depend on when the score comes: its record enters the history after those of its step, and
the best epoch is the first of the highest figure. Until then the checkpoint names what has no score yet, with its
weights: a training that goes on from there predicts again.
"""

from __future__ import annotations

import bisect
import copy
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

import safetensors
import safetensors.torch
from torch import nn

from cigpose.config import Config
from cigpose.evaluate.predict import Predictions, predict
from cigpose.loader.batches import eval_loader
from cigpose.train import workers
from cigpose.train.checkpoints import CheckpointError, weights_name
from cigpose.train.place import Listener, Place, Record
from cigpose.train.scoring import Scorer
from cigpose.train.state import TrainState, random_state, set_random_state
from cigpose.train.step import AUTOCAST, resolved_precision


class Validation:
    """The validations of one training, one at a time.

    Args:
        config: the experiment; `train.validation` is the protocol.
        place: this worker.
        state: its training; `unscored`, `history`, `best` and `weights` are changed.
        listener: told of each score, on rank 0.
    """

    def __init__(self, config: Config, place: Place, state: TrainState, listener: Listener) -> None:
        self.config = config.for_validation()
        self.place, self.state, self.listener = place, state, listener
        self.has_begun = False
        self._autocast = AUTOCAST[resolved_precision(config, place.device)]
        self._scorer = Scorer(self.config, place.shards)
        self._predictions: Predictions | None = None
        self._seconds = 0.0

    def __enter__(self) -> Validation:
        self._scorer.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._scorer.__exit__(kind, error, at)

    def begin(self) -> None:
        """Predict with the model as it is; the next checkpoint keeps its weights. A collective of all workers."""
        state = self.state
        self.take(wait=True)
        workers.copy_rank_0([state.model] if state.ema is None else [state.model, state.ema.module])
        about = {"epoch": state.epoch, "step": state.step, "weights": weights_name(state.step)}
        self._predict(state.evaluated, about)

    def begin_again(self) -> None:
        """The same for what had no score yet in the checkpoint that was loaded. A collective of all workers.

        Raises:
            CheckpointError: its weights are missing or damaged.
        """
        about, self.state.unscored = self.state.unscored, None
        if about is None:
            return
        generators = random_state()  # which the loader draws from
        model = copy.deepcopy(self.state.evaluated)
        if self.place.rank == 0:
            self._load(model, about["weights"])
        workers.copy_rank_0([model])
        self._predict(model, about)
        set_random_state(generators)

    def _load(self, model: nn.Module, name: str) -> None:
        store = self.place.store
        with tempfile.TemporaryDirectory(prefix="cigpose-") as scratch:
            path = Path(scratch) / name
            try:
                store.fetch(name, path)
                model.load_state_dict(safetensors.torch.load_file(path))
            except (FileNotFoundError, RuntimeError, safetensors.SafetensorError) as err:
                raise CheckpointError(
                    f"{store.address}/{name}: these weights, whose score is not known yet, cannot be used ({err}). "
                    "Copy them back; --restart begins anew."
                ) from err

    def _predict(self, model: nn.Module, about: Record) -> None:
        config, place, began = self.config, self.place, time.monotonic()
        self.has_begun = True
        loader = eval_loader(config, config.data.val, rank=place.rank, world=place.world, root=place.shards)
        share = predict(
            model,
            loader,
            config.keypoint_set,
            device=place.device,
            flip_test=config.evaluate.flip_test,
            autocast=self._autocast,
        )
        shares = workers.gather(share)
        if shares is not None:
            self._predictions = Predictions.concatenate(shares)
            self._scorer.submit(self._predictions)
            self.state.unscored = about
            self._seconds = time.monotonic() - began

    def take(self, *, wait: bool = False) -> None:
        """Take over the score of the last predictions, if it is there or is waited for.

        Raises:
            ChildProcessError: the process that makes it was killed.
            ValueError: it cannot be made, or has no such figure as is asked for.
        """
        state, metric = self.state, self.config.evaluate.metric
        if self._predictions is None or state.unscored is None or not (wait or self._scorer.is_done):
            return
        metrics = self._scorer.take()
        about, predictions = state.unscored, self._predictions
        state.unscored = self._predictions = None
        when = {"epoch": about["epoch"], "step": about["step"]}
        record = {"kind": "validation", **when, "seconds": self._seconds, **metrics}
        bisect.insort(state.history, record, key=lambda kept: kept["step"])
        value = chosen_metric(metrics, metric)
        if state.best is None or value > state.best["value"]:
            state.best = {"metric": metric, "value": value, **when, "metrics": metrics}
            state.weights = about["weights"]
        self.listener.on_validation(record, predictions)


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
