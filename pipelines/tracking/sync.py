"""Brings MLflow up to the folder of a run, and may be called at any time, as often as one likes, by several at once.

MLflow is asked what it has, and a metric goes on after the last step at which MLflow has it. So it does not matter when
a delivery was cut off. What MLflow does not tell is in sync.json:

    {"address", "run_id", "experiment_id": which run of which MLflow it is, "former_ids": that it had before,
     "files": path -> [time, bytes] as uploaded, "refused": metric -> step, "ended": the end that MLflow knows of}
"""

from __future__ import annotations

import contextlib
import json
import logging
import shutil
from collections.abc import Callable, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

import yaml
from mlflow import MlflowClient
from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param, RunTag, ViewType
from mlflow.entities import Run as MlflowRun
from mlflow.exceptions import MlflowException

from cigpose.config import Config
from cigpose.files.addresses import without_credentials
from cigpose.files.atomic import ClaimedError, claimed, clear_leftovers, write_json, written_folder
from pipelines.tracking.address import VIEW, artifact_folder
from pipelines.tracking.run import LOCAL, PARAMS, STATE, Run, flatten, read_facts, read_records

log = logging.getLogger(__name__)

REFUSALS = {"INVALID_PARAMETER_VALUE", "BAD_REQUEST", "INVALID_STATE"}
"""Answers that will be the same next time: what was refused is given up, and said so."""
COLUMNS = ["version/whole_AP", "version/body_AP", "version/left_hand_AP", "version/right_hand_AP", "train/loss"]
EXPERIMENT_TAGS = {
    "mlflow.experimentKind": "custom_model_development",
    f"mlflow.sharedViewState.{VIEW}": json.dumps(
        {"selectedColumns": ["attributes.`Created`", *(f"metrics.`{name}`" for name in COLUMNS)]}
    ),
}
"""Which of its sides the MLflow UI shows, and its list of runs with figures (`address.experiment_url`)."""
LOCAL_ID_TAG = "cigpose.local_id"
PREFIXES = {"log": "train", "validation": "val", "best": "val_best"}
"""Kind of record -> first part of its metrics' names, where that is not the kind: a section of charts in the UI, which
puts them in the order of the alphabet. The figures of the registered version come last, as `version/<part>_AP`."""
LARGEST_METRICS, LARGEST_PARAMS = 1000, 100
"""What MLflow takes in one request."""


def sync_run(folder: Path, client: MlflowClient, *, wait: bool = True) -> str:
    """Bring MLflow up to the run in `folder`; where it has no such run, all of it is sent as a new one.

    Args:
        folder: of a run that was begun.
        client: of the MLflow that gets it.
        wait: for another process that delivers the same run.

    Returns: MLflow's id of the run.

    Raises:
        ClaimedError: another process delivers it, and `wait` is off.
        MlflowException, OSError: MLflow could not be reached, or failed; the next call goes on.
    """
    with claimed(folder / "sync.lock", f"the delivery of {folder}", wait=wait):
        clear_leftovers(folder / STATE)
        return _Delivery(Run(folder), client).deliver()


class _Delivery:
    """One call of `sync_run`."""

    def __init__(self, run: Run, client: MlflowClient) -> None:
        self.run, self.client, self.facts = run, client, run.facts
        self.state = _NEW_STATE | read_facts(run.folder / STATE)

    def save(self, **state: Any) -> None:
        self.state |= state
        write_json(self.run.folder / STATE, self.state)

    def deliver(self) -> str:
        facts = self.facts  # read before the records: where it has the run's end, they are all there
        found = self._find() or self._create()
        run_id, changed = found.info.run_id, found.info.status != facts["status"]
        if changed and facts["ended"] is None:
            self.client.update_run(run_id, status=facts["status"])
        if tags := dict(facts["tags"].items() - found.data.tags.items()):
            self.client.log_batch(run_id, tags=[RunTag(*tag) for tag in tags.items()])
        known = {
            (item.dataset.name, item.dataset.digest) for item in (found.inputs.dataset_inputs if found.inputs else ())
        }
        inputs = [_dataset_input(item) for item in facts["inputs"]]
        if inputs := [item for item in inputs if (item.dataset.name, item.dataset.digest) not in known]:
            self.client.log_inputs(run_id, inputs)
        self._send_metrics(run_id, {metric.key: metric.step for metric in found.data.to_proto().metrics})
        if changed and facts["ended"] is not None:
            self.client.set_terminated(run_id, facts["status"], facts["ended"])
        self._send_files(run_id)
        if facts["ended"] != self.state["ended"]:
            self.save(ended=facts["ended"])
        return run_id

    def _find(self) -> MlflowRun | None:
        """The run as MLflow has it, if it is the same MLflow and has not lost it."""
        known = self.state["run_id"]
        if known is None:
            return None
        if self.state["address"] == without_credentials(self.client.tracking_uri):
            if (found := active_run(self.client, known)) is not None:
                return found
            log.warning("MLflow has no run %s any more: its history is sent again as a new run.", known)
        self.state = _NEW_STATE | {"former_ids": [*self.state["former_ids"], known]}
        return None

    def _create(self) -> MlflowRun:
        experiment, facts = get_experiment(self.client, self.facts["experiment"]), self.facts
        run_id = find_local(self.client, experiment, facts["id"])  # made, but the answer did not reach us
        if run_id is None:
            tags = facts["tags"] | {LOCAL_ID_TAG: facts["id"]}
            made = self.client.create_run(experiment, start_time=facts["started"], tags=tags, run_name=facts["name"])
            run_id = made.info.run_id
        self.save(run_id=run_id, experiment_id=experiment, address=without_credentials(self.client.tracking_uri))
        return self.client.get_run(run_id)

    def _send_metrics(self, run_id: str, last_steps: Mapping[str, int]) -> None:
        refused = self.state["refused"]
        last_steps = {name: max(last_steps.get(name, -1), refused.get(name, -1)) for name in {*last_steps, *refused}}
        for path in (self.run.history, self.run.system):
            pending = _pending(path, last_steps)
            for batch in (pending[i : i + LARGEST_METRICS] for i in range(0, len(pending), LARGEST_METRICS)):
                names = {metric.key: metric.step for metric in batch}
                if not self._offer(", ".join(list(names)[:3]), self.client.log_batch, run_id, metrics=batch):
                    self.save(refused=self.state["refused"] | names)

    def _send_files(self, run_id: str) -> None:
        for name, to in self.facts["files"].items():
            path = self.run.folder / name
            version = [path.stat().st_mtime_ns, path.stat().st_size] if path.is_file() else None
            if version in (None, self.state["files"].get(name)):
                continue
            if name == PARAMS:
                values = flatten(yaml.safe_load(path.read_text(encoding="utf-8")))
                params = [Param(*param) for param in values.items()]
                for i in range(0, len(params), LARGEST_PARAMS):
                    self._offer(name, self.client.log_batch, run_id, params=params[i : i + LARGEST_PARAMS])
            self._offer(name, self.client.log_artifact, run_id, str(path), to)
            self.save(files=self.state["files"] | {name: version})

    def _offer(self, what: str, send: Callable[..., object], *args: Any, **values: Any) -> bool:
        """Send; False if MLflow refuses it, which is said."""
        try:
            send(*args, **values)
        except MlflowException as err:
            if err.error_code not in REFUSALS:
                raise
            log.warning("MLflow refused %s of %s: %s", what, self.run.folder, without_credentials(str(err)))
            return False
        return True


_NEW_STATE: dict[str, Any] = dict.fromkeys(("address", "run_id", "experiment_id", "ended")) | {
    "former_ids": [],
    "files": {},
    "refused": {},
}


def _pending(path: Path, last_steps: Mapping[str, int]) -> list[Metric]:
    """What MLflow lacks of a file of records, in order; what comes before a record that it has, it has."""
    pending = []
    for record in read_records(path):
        prefix = PREFIXES.get(record["kind"], record["kind"])
        metrics = [
            Metric(metric, float(value), record["time"], record["step"])
            for name, value in record.items()
            if name not in ("kind", "step", "time")
            and last_steps.get(metric := f"{prefix}/{name.replace('/', '_')}", -1) < record["step"]
        ]
        if not metrics:
            break
        pending.append(metrics)
    return list(chain.from_iterable(reversed(pending)))


def _dataset_input(item: Mapping[str, Any]) -> DatasetInput:
    return DatasetInput(Dataset(**item["dataset"]), [InputTag(*tag) for tag in item["tags"].items()])


def active_run(client: MlflowClient, run_id: str) -> MlflowRun | None:
    """A run, if MLflow has it, and not in its bin."""
    try:
        run = client.get_run(run_id)
    except MlflowException as err:
        if err.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return None
    return run if run.info.lifecycle_stage == "active" else None


def get_experiment(client: MlflowClient, name: str) -> str:
    """Id of the experiment called `name`, made if needed."""
    if (found := client.get_experiment_by_name(name)) is None:
        with contextlib.suppress(MlflowException):  # another process may have made it meanwhile
            return client.create_experiment(name, artifact_folder(client.tracking_uri), EXPERIMENT_TAGS)
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


def sync_waiting(runs: Path, client: MlflowClient) -> None:
    """Deliver what the runs below `runs` could not, if they are meant for this MLflow and nobody delivers them."""
    for path in sorted(runs.glob("*/run.json")):
        facts, state = read_facts(path), read_facts(path.with_name(STATE))
        is_done = facts.get("ended") is not None and facts["ended"] == state.get("ended")
        if facts.get("address") == without_credentials(client.tracking_uri) and not is_done:
            with contextlib.suppress(ClaimedError):
                sync_run(path.parent, client, wait=False)


def resolve_run_id(
    client: MlflowClient, config: Config, run_id: str, runs: Path, record: Path | None = None
) -> str | None:
    """MLflow's id of a run; None if there is no such run.

    Delivers first what the folders under `runs` still hold. A run that began while MLflow could not be reached gets its
    id now, and one whose database was deleted, or that was tracked at another address, is sent again.

    Args:
        client: of the MLflow that is asked.
        config: names the experiment.
        run_id: MLflow's, perhaps of another MLflow, or the run's own.
        runs: the folders of runs on this machine.
        record: a copy of the run's folder (`Run.copy`), for where neither MLflow nor `runs` has it.
    """
    sync_waiting(runs, client)
    facts = read_facts(record / "run.json") if record else {}
    names = {run_id, facts.get("id", run_id)}
    for path in sorted(runs.glob("*/run.json")):
        state = read_facts(path.with_name(STATE))
        if names & {read_facts(path).get("id"), state.get("run_id"), *state.get("former_ids", ())}:
            return sync_run(path.parent, client)
    if not run_id.startswith(LOCAL) and active_run(client, run_id):
        return run_id
    if record is None or "id" not in facts:
        is_local = run_id.startswith(LOCAL)
        return find_local(client, get_experiment(client, config.registry.experiment), run_id) if is_local else None
    folder = runs / f"record-{facts['id'].removeprefix(LOCAL)[:8]}"
    with claimed(folder.with_name(f"{folder.name}.lock"), f"taking over {record}", wait=True):
        if not folder.is_dir():
            with written_folder(folder) as part:
                shutil.copytree(record, part, dirs_exist_ok=True)
    return sync_run(folder, client)
