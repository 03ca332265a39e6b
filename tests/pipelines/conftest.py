"""Projects in temporary folders, small enough to be trained, registered and scheduled in a test."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from shard_index import shard_index
from train_stage import Stage, make_stage

from cigpose.config import Config, config_from_mapping, load_preset
from cigpose.config.params_file import write_params
from pipelines import ui
from pipelines.lineage import dataset_facts
from pipelines.registry.measurement import Measurement, flat_metrics, protocol_of
from pipelines.tracking.address import connect
from pipelines.tracking.courier import tracked

OUTSIDE = ("MLFLOW_TRACKING_URI", "MLFLOW_PORT", "PREFECT_API_URL", "PREFECT_HOME", "PREFECT_SERVER_API_PORT")


@pytest.fixture(scope="session")
def empty_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An MLflow database without runs; copying it is faster than making one."""
    path = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    connect(f"sqlite:///{path}")
    return path


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Stage:
    """A folder in which the stage `train` runs, with shards of a few rendered people."""
    return make_stage(tmp_path_factory.mktemp("stage"))


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, empty_database: Path) -> Path:
    """A project folder as the working directory, with an empty MLflow database and no address from outside."""
    for name in OUTSIDE:
        monkeypatch.setenv(name, "")  # so that what a test leaves behind is undone
        monkeypatch.delenv(name)
    monkeypatch.setattr("mlflow.tracking._tracking_service.utils._tracking_uri", None)
    monkeypatch.setenv("MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING", "false")
    folder = tmp_path / "project"
    folder.mkdir()
    monkeypatch.chdir(folder)
    shutil.copyfile(empty_database, folder / "mlflow.db")
    return folder


def small_config(**registry: Any) -> Config:
    """The quickstart model at a tenth of its size, with the numbers that tests name."""
    values = load_preset("quickstart").to_mapping()
    values["train"] |= {"epochs": 4, "batch_total": 16}
    values["train"]["schedule"]["cosines"] = [{"begin_epoch": 0, "end_epoch": 4, "final_factor": 0.01}]
    values["train"]["optimizer"]["learning_rate"] = 0.0012
    values["data"]["render"]["rendered-val"]["num_images"] = 160
    values["seed"] = 0
    values["model"]["backbone"]["widen_factor"] = 0.125
    values["model"]["head"] |= {"hidden": 32, "gau_s": 16}
    values["model"]["input_size"] = [96, 128]
    values["model"]["causal"]["eval_top_k"] = 0
    values["registry"] |= registry
    return config_from_mapping(values)


@pytest.fixture
def config() -> Config:
    """See `small_config`."""
    return small_config()


@pytest.fixture
def make_config() -> Callable[..., Config]:
    """`small_config`, with other values under `registry`."""
    return small_config


@pytest.fixture
def trained(project: Path) -> Callable[..., str]:
    """Leave what the stages before `register` leave: `trained(config, seed=1, whole_ap=0.6)` gives the run's id.

    The weights are random, the metrics made up.
    """

    def make(config: Config, seed: int, whole_ap: float, images: int = 160) -> str:
        import torch

        from cigpose.model.estimator import build_model
        from cigpose.model.weights import save_weights

        write_params(config, project / "params.yaml")
        with tracked(config, project / f".runs/run-{seed}") as run:
            run.log_record({"kind": "log", "step": 1, "loss": 1.0})
        torch.manual_seed(seed)
        shutil.rmtree(project / "data/model", ignore_errors=True)
        for folder in ("model", "report/pictures", "metrics"):
            (project / "data" / folder).mkdir(parents=True, exist_ok=True)
        save_weights(project / "data/model/model.safetensors", build_model(config).state_dict(), config)
        write_params(config, project / "data/model/params.yaml")
        names = ("rendered-train", "rendered-val")
        for name in names:
            _write_json(project / f"data/shards/{name}/index.json", shard_index(name, images))
        datasets = {name: dataset_facts(config, name, project / "data/shards") for name in names}
        facts = {"run_id": run.run_id, "epochs": 4, "best_epoch": 3, "datasets": datasets}
        _write_json(project / "data/model/run.json", facts)
        picture = np.full((60, 80, 3), 7 * seed, np.uint8)
        cv2.imwrite(str(project / "data/report/pictures/page-00.jpg"), picture)
        (project / "data/report/model.onnx").write_bytes(b"made by the evaluation")
        (project / "data/report/report.html").write_text("<!doctype html><title>Report</title>")
        figures = {"whole": {"AP": whole_ap, "AR": whole_ap}, "body": {"AP": 0.8, "AR": 0.8}}
        _write_json(project / "data/metrics/evaluate.json", figures)
        write_measured(project, config, figures)
        run.copy(project / "data/model/record")
        return run.run_id

    return make


def write_measured(project: Path, config: Config, figures: dict[str, dict[str, float]]) -> None:
    """Leave figures as the stage `evaluate` leaves them, of the people of data.val."""
    facts = dataset_facts(config, config.data.val, project / "data/shards")
    measurement = Measurement(metrics=flat_metrics(figures), data=facts["content"], protocol=protocol_of(config))
    values = {"dataset": {"name": config.data.val, **facts}, **measurement.to_json()}
    _write_json(project / "data/report/measurement.json", values)


@pytest.fixture
def measure() -> Callable[[Path, Config, dict[str, dict[str, float]]], None]:
    """See `write_measured`."""
    return write_measured


def _write_json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


class MlflowServer:
    """A real server on loopback that can be killed and started again on the same port and database.

    Tests share it, and keep apart by the names of their experiment and model (`own`).
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.port = folder, ui.free_port()
        self.address = f"http://127.0.0.1:{self.port}"
        self.process: subprocess.Popen[str] | None = None

    def own(self, project: Path) -> dict[str, str]:
        """`registry` of a test's config: this server, under names that no other test has."""
        name = f"{project.parent.name}-{os.urandom(2).hex()}"
        return {"tracking_uri": self.address, "experiment": name, "model": name}

    def start(self) -> None:
        """Be up; nothing to do where it is."""
        if self.process is not None:
            return
        server = ui.mlflow_server(self.folder, self.port, f"sqlite:///{self.folder}/mlflow.db")
        server.log.parent.mkdir(parents=True, exist_ok=True)
        with server.log.open("a") as log:
            self.process = ui.start(server.command, cwd=self.folder, env=server.env, output=log)
        ui.wait_healthy(server, self.process, 300)

    def kill(self) -> None:
        """Be down, in the middle of whatever it does."""
        if self.process is not None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait(10)
            self.process = None


@pytest.fixture(scope="session")
def mlflow_server(tmp_path_factory: pytest.TempPathFactory, empty_database: Path) -> Iterator[MlflowServer]:
    """A server for all tests, up or down; each test starts or kills it as it needs."""
    server = MlflowServer(tmp_path_factory.mktemp("server"))
    shutil.copyfile(empty_database, server.folder / "mlflow.db")
    yield server
    server.kill()
