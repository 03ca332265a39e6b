"""What was trained and measured here is registered there; what MLflow loses it gets again; a project may be moved."""

from __future__ import annotations

import json
import shutil
from collections import OrderedDict
from pathlib import Path

import mlflow
import pytest
from mlflow import MlflowClient

from cigpose.config import Config
from cigpose.config.params_file import write_params
from pipelines import register, ui
from pipelines.tracking.address import connect

pytestmark = pytest.mark.slow
MODEL = "cigpose-quickstart"


def client_of(project: Path) -> MlflowClient:
    return connect(f"sqlite:///{project}/mlflow.db")


def state_of(project: Path) -> dict[str, object]:
    """What MLflow has of the champion's run, but for ids and times; with the files of its model."""
    client = client_of(project)
    version = client.get_model_version_by_alias(MODEL, "champion")
    run = client.get_run(version.run_id)
    artifacts = [file.path for folder in ("", "evaluation", "evaluation/pictures", "training")
                 for file in client.list_artifacts(version.run_id, folder)]  # fmt: skip
    model = {file.path for file in client.list_logged_model_artifacts(version.source.removeprefix("models:/"))}
    tags = {name: text for name, text in version.tags.items() if name != "dvc.lock"}
    about = (run.info.run_name, run.info.status, run.data.params, run.data.metrics, run.data.tags["cigpose.local_id"])
    return {"tags": tags, "run": about, "artifacts": sorted(artifacts), "model": model}


def enter(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Be in a project as a new process is: MLflow's address of the last one is in this process's environment."""
    monkeypatch.chdir(folder)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setattr("mlflow.tracking._tracking_service.utils._tracking_uri", None)
    monkeypatch.setattr("mlflow.tracking._tracking_service.utils._artifact_repos_cache", OrderedDict())


def note_pictures(project: Path) -> None:
    """A picture of the training, in its record and in its run's folder."""
    for folder in (project / "data/model/record", project / ".runs/run-1"):
        facts = json.loads((folder / "run.json").read_text())
        (folder / "crops.jpg").write_bytes(b"crops")
        (folder / "run.json").write_text(json.dumps(facts | {"files": facts["files"] | {"crops.jpg": "training"}}))


@pytest.fixture
def registered(project: Path, trained, config: Config) -> dict[str, object]:
    trained(config, seed=1, whole_ap=0.6)
    note_pictures(project)
    assert register.main([]) == 0
    return state_of(project)


def test_a_model_is_registered_elsewhere_from_data_model_and_data_report_alone(
    project: Path, registered: dict, empty_database: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "training/crops.jpg" in registered["artifacts"] and "params.yaml" in registered["artifacts"]
    kept = (project / "data/registered.json").read_text()
    assert not [word for word in (str(project), "sqlite", "http", "5000") if word in kept]
    elsewhere = project.parent / "elsewhere"
    for name in ("model", "report"):
        shutil.copytree(project / "data" / name, elsewhere / "data" / name)
    shutil.copyfile(project / "params.yaml", elsewhere / "params.yaml")
    shutil.copyfile(empty_database, elsewhere / "mlflow.db")
    enter(elsewhere, monkeypatch)
    assert register.main([]) == 0
    assert state_of(elsewhere) == registered
    assert register.main([]) == 0
    assert len(client_of(elsewhere).search_model_versions(f"name = '{MODEL}'")) == 1


def copied(project: Path, name: str, without: tuple[str, ...]) -> Path:
    """The project under another name: MLflow keeps what it has open of a database, so that none is taken from it."""
    target = project.with_name(name)
    shutil.copytree(project, target, ignore=lambda folder, names: without if Path(folder) == project else ())
    return target


@pytest.mark.parametrize("lost", [("mlflow.db",), ("mlflow.db", ".runs"), ("mlartifacts",)], ids="+".join)
def test_what_mlflow_has_lost_it_gets_again(
    project: Path, registered: dict, lost: tuple[str, ...], empty_database: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = copied(project, "left", without=lost)
    enter(left, monkeypatch)
    if "mlflow.db" in lost:
        shutil.copyfile(empty_database, left / "mlflow.db")  # as `register` would make it, in less time
    (left / "mlartifacts").mkdir(exist_ok=True)
    assert register.main([]) == 0
    restored = state_of(left)
    if lost == ("mlartifacts",):  # nobody asks after the files of the training
        restored["artifacts"] = registered["artifacts"]
    assert restored == registered


def test_a_project_that_was_moved_finds_its_models(
    project: Path, registered: dict, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    moved = copied(project, "moved", without=())
    (project / "mlartifacts").rename(project / "gone")
    enter(moved, monkeypatch)
    mlflow.set_tracking_uri(f"sqlite:///{moved}/mlflow.db")
    assert state_of(moved) == registered
    folder = Path(mlflow.artifacts.download_artifacts(f"models:/{MODEL}@champion", dst_path=str(moved / "out")))
    weights = (moved / "data/model/model.safetensors").read_bytes()
    assert (folder / "artifacts/model.safetensors").read_bytes() == weights
    places = [experiment.artifact_location for experiment in client_of(moved).search_experiments()]
    assert [place for place in places if not place.startswith((moved / "mlartifacts").as_uri())] == []  # of new runs
    assert register.main([]) == 0
    assert len(client_of(moved).search_model_versions(f"name = '{MODEL}'")) == 1
    assert str(project) not in capsys.readouterr().out


def test_registering_again_changes_nothing_and_leaves_what_somebody_decided(
    project: Path, trained, registered: dict, config: Config
) -> None:
    trained(config, seed=2, whole_ap=0.5)
    assert register.main([]) == 0
    client = client_of(project)
    client.set_registered_model_alias(MODEL, "champion", "2")
    trained(config, seed=1, whole_ap=0.6)
    before = [client.get_model_version(MODEL, number).last_updated_timestamp for number in "12"]
    assert register.main([]) == 0
    assert [client.get_model_version(MODEL, number).last_updated_timestamp for number in "12"] == before
    assert int(client.get_model_version_by_alias(MODEL, "champion").version) == 2


def test_an_mlflow_that_is_away_stops_nobody_who_has_registered_before(
    project: Path, registered: dict, make_config, capsys
) -> None:
    before = (project / "data/registered.json").read_bytes()
    write_params(make_config(tracking_uri=f"http://127.0.0.1:{ui.free_port()}"), project / "params.yaml")
    assert register.main([]) == 0
    assert "could not be asked" in capsys.readouterr().out
    assert (project / "data/registered.json").read_bytes() == before
