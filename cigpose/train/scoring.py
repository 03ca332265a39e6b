"""The scoring of validations, in a process beside the one that trains.

That process imports this module and what it uses; none of it needs torch, so it is there in a moment. It is reached by
a pipe and no more: the semaphores of a pool would stay in /dev/shm when everything is killed.
"""

from __future__ import annotations

import multiprocessing
import signal
import threading
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from cigpose.config import Config
from cigpose.evaluate.coco import evaluate_predictions
from cigpose.evaluate.ground_truth import GroundTruth
from cigpose.evaluate.labels import dataset_truth, open_shards
from cigpose.evaluate.predictions import Predictions
from cigpose.pool import leave_with_parent

Metrics = dict[str, float]
_PIECE = 1024
"""Persons that are handed over at a time: Python stands still meanwhile, in the thread that trains too."""
_SCORE, _END = "score", "end"
_LOOK_S = 0.5
"""How often a process that is waited for is asked whether it still lives."""


class Scorer:
    """Scores predictions of `config.data.val` one after another, by the protocol of `config.evaluate`."""

    def __init__(self, config: Config, shards: Path) -> None:
        self._config, self._shards = config, shards
        self._process: Any = None
        self._connection: Connection
        self._sender: threading.Thread | None = None

    def submit(self, predictions: Predictions) -> None:
        """Begin to score; the answer to the former ones must have been taken."""
        assert self._sender is None
        if self._process is None:
            self._start()
        # in a thread, as the pipe holds less than a piece and the process may still be starting
        self._sender = threading.Thread(target=self._send, args=(predictions,), daemon=True)
        self._sender.start()

    def _start(self) -> None:
        # spawn: a fork would inherit threads of torch and our own in whatever state they are
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_work, args=(theirs, self._config, self._shards), daemon=True)
        self._process.start()
        theirs.close()

    def _send(self, predictions: Predictions) -> None:
        with suppress(OSError):  # the process was killed, which `take` says
            for start in range(0, len(predictions), _PIECE):
                self._connection.send(predictions.select(np.s_[start : start + _PIECE]))
            self._connection.send(_SCORE)

    @property
    def is_done(self) -> bool:
        """Whether there is an answer that nobody has taken."""
        return self._sender is not None and (self._connection.poll() or not self._process.is_alive())

    def take(self) -> Metrics:
        """The answer, after waiting for it.

        Raises:
            ChildProcessError: the process was killed.
            ValueError: the predictions or the labels cannot be used.
        """
        assert self._sender is not None
        while not self._connection.poll(_LOOK_S) and self._process.is_alive():
            pass
        try:
            answer = self._connection.recv() if self._connection.poll() else None
        except (EOFError, OSError):
            answer = None
        if answer is None:
            raise ChildProcessError("the process that scores a validation was killed (out of memory?)")
        self._sender.join()
        self._sender = None
        if isinstance(answer, BaseException):
            raise answer
        return answer

    def __enter__(self) -> Scorer:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if self._process is None:
            return
        if error is not None:
            self._process.kill()
        if self._sender is not None:
            self._sender.join()
        with suppress(OSError):
            self._connection.send(_END)
        self._process.join()
        self._connection.close()


def _work(connection: Connection, config: Config, shards: Path) -> None:
    """What the process does: gather pieces, score them when told to."""
    leave_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent says when
    truth: GroundTruth | None = None
    pieces: list[Predictions] = []
    while True:
        told = connection.recv()
        if isinstance(told, Predictions):
            pieces.append(told)
        elif told == _END:
            return
        else:
            try:
                if truth is None:
                    truth = dataset_truth(open_shards(config, config.data.val, shards), config)
                found = Predictions.concatenate(pieces or [Predictions.empty(len(config.keypoint_set))])
                connection.send(evaluate_predictions(found, truth, config.keypoint_set, config.evaluate))
            except Exception as err:  # whatever it is, the one that trains tells of it
                connection.send(err)
            pieces.clear()
