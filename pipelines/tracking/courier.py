"""A training's run as it goes on: recorded on disk at once, delivered to MLflow by a thread that nobody waits for.

with tracked(config, folder) as run:
run.log_record({"kind": "log", "step": 20, "loss": 0.5})
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Iterator
from pathlib import Path

from mlflow import MlflowClient

from cigpose.config import Config
from cigpose.files.addresses import without_credentials
from pipelines.tracking.address import be_impatient, connect, tracking_address
from pipelines.tracking.run import Run
from pipelines.tracking.sync import sync_run, sync_waiting
from pipelines.tracking.system import sampled_system

log = logging.getLogger(__name__)

SILENCE_S = 60.0
"""Seconds without an attempt after one has failed."""
GATHER_S = 1.0
"""Seconds over which records are gathered into one delivery."""
FINISH_WAIT_S = 60.0
"""Seconds that the end of a run gives the delivery of what is left."""


@contextlib.contextmanager
def tracked(config: Config, folder: Path, kind: str = "train") -> Iterator[Run]:
    """Begin a run in `folder`, or go on with it, and end it with the block; only the end waits, a limited time."""
    be_impatient()
    address = tracking_address(config)
    run = Run(folder)
    run.begin(config, kind, address)
    courier = Courier(run, address)
    try:
        with sampled_system(run):
            yield run
    except BaseException as err:
        run.end("FAILED" if isinstance(err, Exception) else "KILLED")
        raise
    else:
        run.end("FINISHED")
    finally:
        courier.close(FINISH_WAIT_S)


class Courier:
    """A daemon thread that delivers a run whenever it changes, and stays silent for a while after a failure."""

    def __init__(self, run: Run, address: str) -> None:
        self._folder, self._address, self._place = run.folder, address, without_credentials(address)
        self._client: MlflowClient | None = None
        self._is_down = self._has_looked_around = False
        self._closing, self._changed = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._work, name="mlflow-courier", daemon=True)
        run.on_change = self._changed.set
        self._changed.set()
        self._thread.start()

    def close(self, timeout_s: float) -> None:
        """Try once more and stop; what MLflow lacks then is said."""
        self._closing.set()
        self._changed.set()
        self._thread.join(timeout_s)
        if self._thread.is_alive() or self._is_down:
            kept = "It is kept in %s and delivered by the next stage that reaches MLflow."
            log.warning(f"MLflow at %s does not have the whole run yet. {kept}", self._place, self._folder)

    def _work(self) -> None:
        while not self._closing.is_set():
            self._changed.wait()
            self._changed.clear()
            self._try()
            self._closing.wait(SILENCE_S if self._is_down else GATHER_S)
        self._try()

    def _try(self) -> None:
        """Deliver, and once what earlier runs beside this one could not; a failure is said once per outage."""
        was_down = self._is_down
        try:
            self._client = self._client or connect(self._address)
            sync_run(self._folder, self._client)
            if not self._has_looked_around:
                sync_waiting(self._folder.parent, self._client)
            self._is_down, self._has_looked_around = False, True
        except Exception as err:  # whatever goes wrong here, the training goes on
            self._is_down, self._client = True, None
            self._changed.set()
            if not was_down:
                first = without_credentials((str(err).strip().splitlines() or [type(err).__name__])[0])[:200]
                first = first.removeprefix(f"MLflow at {self._place} ").rstrip(".")
                log.warning("MLflow at %s: %s. Records are kept in %s.", self._place, first, self._folder)
        if was_down and not self._is_down:
            log.warning("MLflow at %s is back, and has the run so far.", self._place)
