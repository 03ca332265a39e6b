"""The scoring of validations, in a process beside the one that trains.

That process imports this module and what it uses; none of it needs torch, so it is there in a moment.
"""

from __future__ import annotations

from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from types import TracebackType

import numpy as np

from cigpose.config import Config
from cigpose.evaluate.coco import evaluate_predictions
from cigpose.evaluate.ground_truth import GroundTruth
from cigpose.evaluate.labels import dataset_truth, open_shards
from cigpose.evaluate.predictions import Predictions
from cigpose.pool import process_pool

Metrics = dict[str, float]
_PIECE = 1024
"""Persons that are handed over at a time: Python stands still meanwhile, in the thread that trains too."""


class Scorer:
    """Scores predictions of `config.data.val` one after another, by the protocol of `config.evaluate`."""

    def __init__(self, config: Config, shards: Path) -> None:
        self._config, self._shards = config, shards
        self._pool = process_pool(1)
        self._last: Future[Metrics] | None = None

    def submit(self, predictions: Predictions) -> None:
        """Begin to score; the answer to the former ones must have been taken."""
        assert self._last is None
        for start in range(0, len(predictions), _PIECE):
            self._pool.submit(_receive, predictions.select(np.s_[start : start + _PIECE]))
        self._last = self._pool.submit(_score, self._config, self._shards)

    @property
    def is_done(self) -> bool:
        """Whether there is an answer that nobody has taken."""
        return self._last is not None and self._last.done()

    def take(self) -> Metrics:
        """The answer, after waiting for it.

        Raises:
            ChildProcessError: the process was killed.
            ValueError: the predictions or the labels cannot be used.
        """
        assert self._last is not None
        answer, self._last = self._last, None
        try:
            return answer.result()
        except BrokenProcessPool as err:
            raise ChildProcessError("the process that scores a validation was killed (out of memory?)") from err

    def __enter__(self) -> Scorer:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._pool.shutdown(wait=error is None, cancel_futures=True)


# In the process that scores: the labels, and what has come of the predictions.
_truth: GroundTruth | None = None
_pieces: list[Predictions] = []


def _receive(piece: Predictions) -> None:
    _pieces.append(piece)


def _score(config: Config, shards: Path) -> Metrics:
    global _truth
    if _truth is None:
        _truth = dataset_truth(open_shards(config, config.data.val, shards), config)
    predictions = Predictions.concatenate(_pieces or [Predictions.empty(len(config.keypoint_set))])
    _pieces.clear()
    return evaluate_predictions(predictions, _truth, config.keypoint_set, config.evaluate)
