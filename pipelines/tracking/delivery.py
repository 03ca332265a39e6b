"""Carries the records of a `Spool` to MLflow, in order, once each, whenever its server can be reached."""

from __future__ import annotations

import contextlib
import itertools
import logging
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from mlflow import MlflowClient
from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param, RunTag, ViewType
from mlflow.exceptions import MlflowException

from cigpose.files.addresses import without_credentials
from pipelines.tracking.spool import Spool

log = logging.getLogger(__name__)

SILENCE_S = 60.0
"""Seconds without an attempt after one has failed."""
GATHER_S = 1.0
"""Seconds over which records are gathered into one request."""
REFUSALS = {"INVALID_PARAMETER_VALUE", "BAD_REQUEST", "INVALID_STATE"}
"""Answers that will be the same next time: the record is given up, and said so."""
EXPERIMENT_TAGS = {"mlflow.experimentKind": "custom_model_development"}
"""Which of its sides the MLflow UI shows."""
LOCAL_ID_TAG = "cigpose.local_id"


class LostRunError(Exception):
    """MLflow no longer has the run."""


def deliver(spool: Spool, client: MlflowClient) -> int:
    """Send what is pending.

    Sending a record twice does no harm: a metric is identified by its time, step and value, and the rest overwrites
    itself. So the position is saved after each answer, and a crash in between repeats one request.

    Args:
        spool: owned by this process. Its state names the experiment, which is made if it does not exist, and where
            a new experiment keeps its files (None leaves that to the server).
        client: of the tracking address.

    Returns: the number of records delivered.

    Raises:
        MlflowException: the server could not be reached or failed. Delivered records are not sent again.
    """
    try:
        return _deliver_pending(spool, client)
    except LostRunError:
        log.warning("MLflow has no run %s any more: its history is sent again as a new run.", spool.state["run_id"])
        spool.start_over()
        return _deliver_pending(spool, client)


def _deliver_pending(spool: Spool, client: MlflowClient) -> int:
    count = 0
    for position, batch in _batches(spool.records(spool.state["sent"])):
        if spool.state["run_id"] is None:
            experiment = get_experiment(client, spool.state["experiment"], spool.state["artifacts"])
            _create_run(spool, client, batch[0], experiment)
        try:
            _send(spool, client, batch)
        except MlflowException as err:
            if err.error_code == "RESOURCE_DOES_NOT_EXIST" or "must be in the 'active' state" in str(err):
                raise LostRunError from err
            if err.error_code not in REFUSALS:
                raise
            log.warning(
                "MLflow refused %d record(s) of kind %s: %s", len(batch), batch[0]["do"], without_credentials(str(err))
            )
        spool.update(sent=position)
        for record in batch:
            if record["do"] == "artifact":
                spool.drop_copy(record["file"])
        count += len(batch)
    return count


def _batches(records: Iterable[tuple[int, dict[str, Any]]]) -> Iterator[tuple[int, list[dict[str, Any]]]]:
    """Records grouped into requests: up to 1000 metrics that follow each other, everything else alone."""
    for kind, group in itertools.groupby(records, key=lambda item: item[1]["do"]):
        batch: list[dict[str, Any]] = []
        values = end = 0
        for position, record in group:
            size = len(record["values"]) if kind == "metrics" else 1000
            if batch and values + size > 1000:
                yield end, batch
                batch, values = [], 0
            batch.append(record)
            values, end = values + size, position
        yield end, batch


def get_experiment(client: MlflowClient, name: str, artifacts: str | None = None) -> str:
    """Id of the experiment called `name`, made if needed."""
    found = client.get_experiment_by_name(name)
    if found is None:
        with contextlib.suppress(MlflowException):  # another process may have made it meanwhile
            return client.create_experiment(name, artifact_location=artifacts, tags=EXPERIMENT_TAGS)
        found = client.get_experiment_by_name(name)
        if found is None:
            raise MlflowException(f"experiment {name!r} could not be made")
    if found.lifecycle_stage == "deleted":
        client.restore_experiment(found.experiment_id)
    return found.experiment_id


def find_local(client: MlflowClient, experiment_id: str, local_id: str) -> str | None:
    """Id of the run that was begun as `local_id`, if MLflow has it."""
    runs = client.search_runs([experiment_id], f"tags.`{LOCAL_ID_TAG}` = '{local_id}'", ViewType.ACTIVE_ONLY, 1)
    return runs[0].info.run_id if runs else None


def _create_run(spool: Spool, client: MlflowClient, record: dict[str, Any], experiment_id: str) -> None:
    local_id = spool.state["local_id"]
    run_id = find_local(client, experiment_id, local_id)  # made, but the answer did not reach us
    if run_id is None:
        tags = {**record.get("tags", {}), LOCAL_ID_TAG: local_id}
        run = client.create_run(experiment_id, start_time=record["time"], tags=tags, run_name=record.get("name"))
        run_id = run.info.run_id
    spool.update(run_id=run_id, experiment_id=experiment_id)


def _send(spool: Spool, client: MlflowClient, batch: list[dict[str, Any]]) -> None:
    run_id, record = spool.state["run_id"], batch[0]
    match record["do"]:
        case "begin":
            client.update_run(run_id, status="RUNNING")
        case "metrics":
            metrics = [
                Metric(name, value, item["time"], item["step"])
                for item in batch
                for name, value in item["values"].items()
            ]
            client.log_batch(run_id, metrics=metrics)
        case "params":
            params = [Param(name, value) for name, value in record["values"].items()]
            for i in range(0, len(params), 100):
                client.log_batch(run_id, params=params[i : i + 100])
        case "tags":
            client.log_batch(run_id, tags=[RunTag(name, value) for name, value in record["values"].items()])
        case "artifact":
            path = spool.folder / record["file"]
            if path.is_dir():
                client.log_artifacts(run_id, str(path), record["to"])
            elif path.is_file():
                client.log_artifact(run_id, str(path), record["to"])
        case "inputs":
            client.log_inputs(run_id, [_dataset_input(item) for item in record["datasets"]])
        case "end":
            client.set_terminated(run_id, record["status"], record["time"])
        case kind:
            raise AssertionError(f"{spool.records_path}: unknown kind of record {kind!r}")


def _dataset_input(item: dict[str, Any]) -> DatasetInput:
    tags = [InputTag(name, value) for name, value in item["tags"].items()]
    return DatasetInput(Dataset(**item["dataset"]), tags)


class Courier:
    """A daemon thread that delivers a spool while a run goes on, and stays out of its way."""

    def __init__(self, spool: Spool, connect: Callable[[str], MlflowClient]) -> None:
        """Prepare to deliver `spool`, which this process owns and whose state names address and experiment.

        `connect` makes a client for an address; it is called in the thread, and again after a failure.
        """
        self._spool, self._connect, self._address = spool, connect, spool.state["address"]
        self._client: MlflowClient | None = None
        self._closing, self._wake, self.tried = threading.Event(), threading.Event(), threading.Event()
        self._is_down = False
        self.siblings: list[Path] = []
        self._thread = threading.Thread(target=self._work, name="mlflow-courier", daemon=True)

    def start(self) -> None:
        """Begin to deliver."""
        self._thread.start()
        self._wake.set()

    def notify(self) -> None:
        """Say that there is something to deliver."""
        self._wake.set()

    def close(self, timeout_s: float) -> bool:
        """Try once more and stop.

        Returns: whether MLflow has everything.
        """
        self._closing.set()
        self._wake.set()
        self._thread.join(timeout_s)
        return not self._thread.is_alive() and self._spool.pending() == 0

    def _work(self) -> None:
        while not self._closing.is_set():
            self._wake.wait()
            self._wake.clear()
            delivered = self._try()
            self.tried.set()
            self._closing.wait(GATHER_S if delivered else SILENCE_S)
        self._try()

    def _try(self) -> bool:
        """Deliver what is pending; False on failure, which is logged once per outage."""
        try:
            if self._client is None:
                self._client = self._connect(self._address)
            count = deliver(self._spool, self._client)
            self._deliver_siblings(self._client)
        except Exception as err:  # whatever goes wrong here, the training goes on
            if not self._is_down:
                first = str(err).strip().splitlines()[0] if str(err).strip() else type(err).__name__
                place, first = without_credentials(self._address), without_credentials(first)[:200]
                first = first.removeprefix(f"MLflow at {place} ").rstrip(".")
                log.warning("MLflow at %s: %s. Records are kept in %s.", place, first, self._spool.records_path)
            self._is_down, self._client = True, None
            self._wake.set()
            return False
        if self._is_down:
            log.warning("MLflow at %s is back: %d records delivered.", without_credentials(self._address), count)
            self._is_down = False
        return True

    def _deliver_siblings(self, client: MlflowClient) -> None:
        """Deliver what earlier runs beside this one could not."""
        while self.siblings:
            deliver_folder(self.siblings.pop(), client, self._address)


def is_active(client: MlflowClient, run_id: str) -> bool:
    """Whether MLflow has a run, and not in its bin."""
    try:
        return client.get_run(run_id).info.lifecycle_stage == "active"
    except MlflowException as err:
        if err.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return False


def deliver_folder(folder: Path, client: MlflowClient, address: str) -> int:
    """Deliver what a run that ended could not, if it belongs to this address and nobody works on it."""
    if not Spool.exists(folder):
        return 0
    spool = Spool(folder)
    if not spool.pending() or spool.state["address"] != address or not spool.acquire():
        return 0
    try:
        return deliver(spool, client)
    finally:
        spool.release()


def deliver_run(folder: Path, client: MlflowClient, address: str, artifacts: str | None) -> str | None:
    """MLflow's id of the run tracked in `folder`; where this MLflow does not have it, its history is sent again."""
    spool = Spool(folder)
    if not spool.acquire(timeout_s=10):
        return None
    try:
        known = spool.state["run_id"]
        if spool.state["address"] != address or known is None or not is_active(client, known):
            spool.start_over(address=address, artifacts=artifacts)
        deliver(spool, client)
        return spool.state["run_id"]
    finally:
        spool.release()
