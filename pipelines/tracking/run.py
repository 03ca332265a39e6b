"""MLflow seen from a stage: where it is, and runs that never wait for it.

    run = tracking.start_run(config, kind="train", run_folder=Path(".runs/quickstart-1a2b"))
    run.log_metrics({"train/loss": 0.5}, step=20)
    run.finish("FINISHED")

The address is `registry.tracking_uri` of params.yaml, else MLFLOW_TRACKING_URI, else a sqlite file beside params.yaml.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import threading
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import requests
import yaml
from mlflow import MlflowClient

from cigpose.config import Config
from cigpose.files.addresses import without_credentials
from pipelines.lineage import content_digest, dvc_hashes, git_revision, project_root, read_shard_index, shards_digest
from pipelines.tracking.database import database_path, prepared
from pipelines.tracking.delivery import Courier, deliver_folder, deliver_run, find_local, get_experiment, is_active
from pipelines.tracking.spool import LOCAL, Spool

log = logging.getLogger(__name__)

Status = Literal["FINISHED", "FAILED", "KILLED"]
START_WAIT_S = 8.0
"""Seconds that `start_run` gives a server to answer before it goes on without; a sqlite file may take longer."""
FINISH_WAIT_S = 60.0
"""Seconds that `finish` gives the delivery of what is left."""
SAMPLE_S = 10.0
"""Seconds between two samples of system metrics, where MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL does not say else."""
KNOCK_S = 4.0
"""Seconds that a server may take to take a connection, and again to answer."""


class UnreachableError(OSError):
    """An MLflow server that does not answer."""


def tracking_address(config: Config, root: Path | None = None) -> str:
    """The address of MLflow for this experiment; a relative sqlite path is taken from the project's folder."""
    root = root or project_root()
    address = config.registry.tracking_uri or os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{root}/mlflow.db"
    path = address.removeprefix("sqlite:///")
    if path != address and not path.startswith("/"):
        address = f"sqlite:///{root / path}"
    return address


def artifact_folder(address: str, root: Path | None = None) -> str | None:
    """Where a new experiment keeps its files: `mlartifacts` beside a sqlite file; a server decides for itself."""
    return ((root or project_root()) / "mlartifacts").as_uri() if address.startswith("sqlite:") else None


def connect(address: str) -> MlflowClient:
    """A client of MLflow; a new sqlite file is set up by one process alone, whole or not at all.

    Raises:
        DatabaseError: the sqlite file is not a whole database.
        UnreachableError: the server does not answer; known within some seconds, without MLflow's own patience.
        MlflowException: it answers with an error.
    """
    if address.startswith("http"):
        _knock(address)
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.WARNING)
    path = database_path(address)
    with prepared(path) if path else contextlib.nullcontext():
        client = MlflowClient(tracking_uri=address, registry_uri=address)
        client.search_experiments(max_results=1)
    return client


def _knock(address: str) -> None:
    """Raise UnreachableError unless someone speaks HTTP at an address; what is said does not matter."""
    try:
        requests.get(f"{address.rstrip('/')}/health", timeout=KNOCK_S, allow_redirects=False, stream=True).close()
    except requests.RequestException as err:
        place = without_credentials(address)
        raise UnreachableError(f"MLflow at {place} does not answer ({type(err).__name__}).") from err


def run_url(address: str, experiment_id: str, run_id: str) -> str:
    """The page of a run; for sqlite the one that `make ui` serves. MLflow shows its GenAI side unless told else."""
    local = f"http://127.0.0.1:{os.environ.get('MLFLOW_PORT') or 5000}"
    base = without_credentials(address).rstrip("/") if address.startswith("http") else local
    return f"{base}/#/experiments/{experiment_id}/runs/{run_id}?workflowType=machine_learning"


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested parameters as `section.key` -> text; lists and empty mappings as JSON."""
    flat: dict[str, str] = {}
    for name, value in values.items():
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value if isinstance(value, str) else json.dumps(value)
    return flat


class Run:
    """An MLflow run that takes everything at once and delivers it when it can.

    No method waits for the server, except `finish`, and that a limited time.
    """

    def __init__(self, spool: Spool, courier: Courier, address: str) -> None:
        self._spool, self._courier, self._address = spool, courier, address
        self._last_steps = spool.last_steps()
        self._sampler: _SystemSampler | None = None
        self._lock = threading.Lock()
        self._finished = False

    @property
    def run_id(self) -> str:
        """MLflow's id; `local-...` as long as MLflow could not be reached (`resolve_run_id` translates it later)."""
        return self._spool.state["run_id"] or self._spool.state["local_id"]

    @property
    def url(self) -> str | None:
        """The run's page in the MLflow UI; None as long as MLflow could not be reached."""
        state = self._spool.state
        return run_url(self._address, state["experiment_id"], state["run_id"]) if state["run_id"] else None

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Record numbers at a step.

        A resumed training repeats the steps since its checkpoint: a metric already recorded at this step or a later
        one is left out, so that no point appears twice.
        """
        with self._lock:
            new = {name: float(value) for name, value in metrics.items() if step > self._last_steps.get(name, -1)}
            if not new:
                return
            self._last_steps |= dict.fromkeys(new, step)
            self._spool.append({"do": "metrics", "step": step, "values": new})
        self._courier.notify()

    def log_params(self, values: Mapping[str, Any]) -> None:
        """Record parameters, nested or flat. MLflow keeps the first value of each."""
        self._spool.append({"do": "params", "values": flatten(values)})
        self._courier.notify()

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Record tags; a later value replaces an earlier one."""
        self._spool.append({"do": "tags", "values": dict(tags)})
        self._courier.notify()

    def log_artifact(self, path: str | Path, artifact_path: str | None = None) -> None:
        """Record a file or a folder as it is now.

        Args:
            path: the file or folder; a copy is kept until it is uploaded.
            artifact_path: folder of the run to put it in.

        Raises:
            FileNotFoundError: there is no such file.
        """
        path = Path(path)
        if not path.exists():
            raise FileNotFoundError(f"{path}: not found, so it cannot be logged to the run.")
        if path.is_dir():
            artifact_path = f"{artifact_path}/{path.name}" if artifact_path else path.name
        self._spool.append({"do": "artifact", "file": self._spool.keep_copy(path), "to": artifact_path})
        self._courier.notify()

    def log_text(self, text: str, name: str, artifact_path: str | None = None) -> None:
        """Record a text as file `name`."""
        self._spool.append({"do": "artifact", "file": self._spool.keep_text(text, name), "to": artifact_path})
        self._courier.notify()

    def log_inputs(self, locations: Iterable[str | Path], context: str = "training") -> None:
        """Record the shards a run reads: name, digest of their content, and what DVC knows them by.

        Args:
            locations: folders or addresses of shards, each with an index.json.
            context: what they are read for: `training`, `validation`.
        """
        hashes = dvc_hashes(Path("dvc.lock"))
        datasets = [_describe_shards(location, context, hashes) for location in locations]
        self._spool.append({"do": "inputs", "datasets": datasets})
        self._courier.notify()

    def sample_system(self, every_s: float) -> None:
        """Record CPU, memory, disk, network and GPU use every `every_s` seconds from now on."""
        self._sampler = _SystemSampler(self, every_s, first_step=self._last_steps.get(_SystemSampler.MEMORY, -1) + 1)

    def finish(self, status: Status = "FINISHED") -> None:
        """End the run and deliver what is left, as far as MLflow can be reached; a second call does nothing."""
        if self._finished:
            return
        self._finished = True
        if self._sampler is not None:
            self._sampler.stop()
        self._spool.append({"do": "end", "status": status})
        if not self._courier.close(FINISH_WAIT_S):
            log.warning(
                "MLflow at %s does not have the whole run yet. It is kept in %s and delivered by the next stage that "
                "reaches MLflow.",
                without_credentials(self._address),
                self._spool.records_path,
            )
        self._spool.release()

    def __enter__(self) -> Run:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.finish("FINISHED")
        else:
            self.finish("FAILED" if issubclass(kind, Exception) else "KILLED")


def start_run(config: Config, kind: str = "train", *, run_folder: Path, run_id: str | None = None) -> Run:
    """Begin a run, or go on with the one that was begun in `run_folder`.

    Parameters, the resolved params.yaml and the git revision are logged once, when the run is new.

    Args:
        config: the experiment.
        kind: what the run is, as tag `cigpose.kind`.
        run_folder: local folder that keeps the records until MLflow has them.
        run_id: go on in this MLflow run, where `run_folder` knows none.

    Raises:
        RuntimeError: another process writes to the same run.
    """
    be_impatient()
    root = project_root()
    address = tracking_address(config, root)
    artifacts = artifact_folder(address, root)
    spool = Spool(run_folder)
    if not spool.acquire(timeout_s=10):
        raise RuntimeError(f"{run_folder}: another process is writing to this run. Wait for it, or stop it first.")
    is_new = not spool.records_path.is_file()
    if spool.state["address"] != address:
        spool.start_over(address=address)
    if spool.state["run_id"] is None and run_id is not None and not run_id.startswith(LOCAL):
        client = connect(address)
        spool.update(run_id=run_id, experiment_id=client.get_run(run_id).info.experiment_id)
    spool.update(experiment=config.registry.experiment, artifacts=artifacts)
    spool.append({"do": "begin", "name": config.name, "tags": _run_tags(config, kind)})
    courier = Courier(spool, connect)
    courier.siblings = sorted(
        path.parent for path in spool.folder.parent.glob("*/tracking.json") if path.parent != spool.folder
    )
    run = Run(spool, courier, address)
    if is_new:
        _log_parameters(run, config)
    courier.start()
    courier.tried.wait(60 if artifacts else START_WAIT_S)
    if os.environ.get("MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING", "true").lower() != "false":
        run.sample_system(float(os.environ.get("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", SAMPLE_S)))
    return run


def be_impatient(timeout_s: float = 5.0) -> None:
    """Let MLflow's client give up soon where the environment does not say else: it would try for minutes."""
    for name, value in (("TIMEOUT", f"{timeout_s:g}"), ("MAX_RETRIES", "1"), ("BACKOFF_FACTOR", "1")):
        os.environ.setdefault(f"MLFLOW_HTTP_REQUEST_{name}", value)
    logging.getLogger("urllib3.connectionpool").setLevel(logging.ERROR)  # it tells of every attempt


def _run_tags(config: Config, kind: str) -> dict[str, str]:
    tags = {"cigpose.kind": kind, "cigpose.preset": config.name, "mlflow.source.name": f"pipelines.{kind}"}
    revision = git_revision()
    if revision:
        tags |= {"git.revision": revision, "mlflow.source.git.commit": revision.partition("+")[0]}
    return tags


def _log_parameters(run: Run, config: Config) -> None:
    values = config.to_public_mapping()
    run.log_params(values)
    run.log_text(yaml.safe_dump(values, sort_keys=False), "params.yaml")


def _describe_shards(location: str | Path, context: str, hashes: Mapping[str, str]) -> dict[str, Any]:
    index = read_shard_index(location)
    tags = {"mlflow.data.context": context, "content": content_digest(index)}
    md5 = hashes.get(str(location).rstrip("/")) or hashes.get(f"data/shards/{Path(str(location)).name}")
    if md5:
        tags["dvc_md5"] = md5
    profile = {name: index.get(name) for name in ("images", "persons", "detections")} | {"shards": len(index["shards"])}
    uri = without_credentials(str(location)) if "://" in str(location) else str(Path(location).resolve())
    dataset = {
        "name": index["dataset"],
        "digest": shards_digest(index),
        "source_type": "http"
        if str(location).startswith("http")
        else "s3"
        if str(location).startswith("s3")
        else "local",
        "source": json.dumps({"uri": uri}),
        "profile": json.dumps(profile),
    }
    return {"dataset": dataset, "tags": tags}


def resolve_run_id(client: MlflowClient, config: Config, run_id: str, runs: Path, address: str) -> str | None:
    """MLflow's id of a run; None if there is no such run.

    Delivers first what the folders under `runs` still hold. A run that began while MLflow could not be reached gets its
    id now, and one whose database was deleted, or that was tracked at another address, is sent again.
    """
    folders = [path.parent for path in sorted(runs.glob("*/tracking.json"))]
    for folder in folders:
        deliver_folder(folder, client, address)
    for folder in folders:
        if Spool(folder).is_known_as(run_id):
            return deliver_run(folder, client, address, artifact_folder(address))
    if run_id.startswith(LOCAL):
        return find_local(client, get_experiment(client, config.registry.experiment), run_id)
    return run_id if is_active(client, run_id) else None


class _SystemSampler:
    """Records MLflow's own system metrics through the run, so that a server's absence does not end them."""

    MEMORY = "system/process_memory_megabytes"

    def __init__(self, run: Run, every_s: float, first_step: int) -> None:
        self._run, self._every_s, self._step = run, every_s, first_step
        self._stopping = threading.Event()
        self._monitors = list(_system_monitors())
        self._thread = threading.Thread(target=self._work, name="system-metrics", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._stopping.set()
        self._thread.join(5)

    def _work(self) -> None:
        while not self._stopping.wait(self._every_s):
            values: dict[str, float] = {}
            for monitor in self._monitors:
                with contextlib.suppress(Exception):  # a counter the system does not offer
                    monitor.collect_metrics()
                    values |= monitor.aggregate_metrics()
                monitor.clear_metrics()
            metrics = {f"system/{name}": value for name, value in values.items()}
            metrics[self.MEMORY] = process_tree_memory() / 1e6
            self._run.log_metrics({name: value for name, value in metrics.items() if math.isfinite(value)}, self._step)
            self._step += 1


def _system_monitors() -> Iterator[Any]:
    from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor
    from mlflow.system_metrics.metrics.disk_monitor import DiskMonitor
    from mlflow.system_metrics.metrics.gpu_monitor import GPUMonitor
    from mlflow.system_metrics.metrics.network_monitor import NetworkMonitor

    for monitor in (CPUMonitor, DiskMonitor, NetworkMonitor, GPUMonitor):
        with contextlib.suppress(Exception):  # no NVML, no GPU
            yield monitor()


def process_tree_memory() -> int:
    """Resident bytes of this process and its descendants; pages they share count once for each."""
    import psutil

    total, process = 0, psutil.Process()
    for member in (process, *process.children(recursive=True)):
        with contextlib.suppress(psutil.Error):
            total += member.memory_info().rss
    return total
