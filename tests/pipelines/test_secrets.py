"""What a user knows and nobody else may: planted in every marked field, searched in all that is kept or shown."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from cigpose.config import Config, config_from_mapping, load_preset, public_params
from cigpose.config.params_file import write_params
from cigpose.config.schema import ADDRESS, field_marks, to_mapping
from cigpose.deploy.export import export_onnx
from cigpose.model.estimator import build_model
from cigpose.model.weights import read_config, save_weights
from pipelines import register, ui
from pipelines.retraining.overrides import asked_config
from pipelines.tracking.courier import tracked

SECRET = "S3CRET"
LOOKS_LIKE_ONE = re.compile(
    r"address|ur[il]s?$|webhook|mirror|_ids?$|locations?$|endpoint|pretrained|start_from|token|secret|password|key$",
    re.I,
)


def planted(values: dict[str, Any], tracking_uri: str) -> Config:
    """The experiment with a secret in every marked field."""
    bad = f"https://user:{SECRET}@127.0.0.1:9/x?X-Amz-Signature={SECRET}#{SECRET}"
    values["data"]["download"] |= {"mirror": bad, "drive_ids": {"videos.zip": SECRET}}
    values["data"]["locations"] = {"elsewhere": bad}
    values["model"]["backbone"]["pretrained"] = f"https://user:{SECRET}@127.0.0.1:9/x.pth?sig={SECRET}"
    values["train"]["start_from"] = f"https://user:{SECRET}@127.0.0.1:9/y.pth?sig={SECRET}"
    values["train"]["checkpoint"]["address"] = f"s3://user:{SECRET}@bucket/x"
    values["registry"]["tracking_uri"] = tracking_uri
    values["notify"]["webhook"] = f"https://127.0.0.1:9/services/{SECRET}"
    return config_from_mapping(values)


def fields(values: Any, path: str = "") -> list[str]:
    if not isinstance(values, dict):
        return [path]
    return [path, *(found for key, item in values.items() for found in fields(item, f"{path}.{key}".lstrip(".")))]


def test_every_field_that_looks_like_an_address_or_an_id_is_marked() -> None:
    marks = field_marks(Config, "public")
    found = {path for path in fields(to_mapping(load_preset("quickstart"))) if LOOKS_LIKE_ONE.search(path)}
    assert found == set(marks)
    assert {marks[f"data.download.{name}"] for name in ("mirror", "drive_ids")} == {"empty"}


def test_the_public_params_are_an_experiment_without_secrets(config: Config) -> None:
    secret = planted(config.to_mapping(), f"postgresql://user:{SECRET}@host/mlflow")
    values = secret.to_public_mapping()
    assert SECRET not in json.dumps(values)
    public = config_from_mapping(values)
    assert public.registry.tracking_uri == "postgresql://host/mlflow"
    assert public.data.locations == {"elsewhere": "https://127.0.0.1:9/x"}
    assert (public.data.download.mirror, public.data.download.drive_ids) == (None, {})
    assert public.model.backbone.pretrained == "https://127.0.0.1:9/x.pth"
    assert config.to_public_mapping() == config.to_mapping()
    assert all(
        mark == ADDRESS["public"] or not _look_up(values, path) for path, mark in field_marks(Config, "public").items()
    )


def _look_up(values: Any, path: str) -> Any:
    for part in path.split("."):
        values = values[part]
    return values


def test_a_part_of_the_params_as_dvc_lock_has_it_is_made_public_too() -> None:
    assert public_params({"videos.zip": SECRET}, "data.download.drive_ids") == {}
    assert public_params(SECRET, "data.download.drive_ids.videos.zip") is None
    assert public_params(f"s3://u:{SECRET}@b/x", "data.locations.a") == "s3://b/x"
    assert public_params({"tracking_uri": f"http://{SECRET}@h"}, "registry") == {"tracking_uri": "http://h"}
    assert public_params({"epochs": 3}, "train") == {"epochs": 3}


def test_private_values_are_not_written_into_dvc_lock(root: Path) -> None:
    stages = yaml.safe_load((root / "dvc.yaml").read_text())["stages"].values()
    depended = {key for stage in stages for key in stage.get("do", stage)["params"]}
    private = {path for path, mark in field_marks(Config, "public").items() if mark != ADDRESS["public"]}
    assert not [path for path in private if any(f"{path}.".startswith(f"{key}.") for key in depended)]


def test_changed_params_are_shown_without_secrets(project: Path, config: Config) -> None:
    write_params(config, project / "params.yaml")
    mirror, uri = f"http://u:{SECRET}@h", f"http://u:{SECRET}@h:5000"
    overrides = {"data.download.mirror": mirror, "registry.tracking_uri": uri, "seed": 3}
    _, changes = asked_config(project / "params.yaml", None, overrides)
    assert changes == {
        "data.download.mirror": (None, None),
        "registry.tracking_uri": (None, "http://h:5000"),
        "seed": (0, 3),
    }


@pytest.mark.slow
def test_no_secret_is_in_anything_that_is_kept_or_shown(
    project: Path, trained, make_config, mlflow_server, capfd: pytest.CaptureFixture[str], caplog
) -> None:
    mlflow_server.start()
    own = mlflow_server.own(project)
    address = mlflow_server.address.replace("//", f"//user:{SECRET}@")
    config = planted(make_config(**own).to_mapping(), address)
    trained(config, seed=1, whole_ap=0.6)
    model = build_model(config)
    save_weights(project / "data/model/model.safetensors", model.state_dict(), config)
    (project / "data/report/model.onnx").unlink()  # the fixture's stand-in
    export_onnx(model, config, project / "data/report/model.onnx")
    params = {"data.download.drive_ids": {"videos.zip": SECRET}, "registry": config.to_mapping()["registry"]}
    lock = {"schema": "2.0", "stages": {"register": {"cmd": "x", "params": {"params.yaml": params}}}}
    (project / "dvc.lock").write_text(yaml.safe_dump(lock))
    with tracked(config, project / ".runs/shards") as run:
        run.note_inputs([project / "data/shards/rendered-val"], "validation")
    assert register.main([]) == 0
    assert register.main(["--show"]) == 0
    (project / "data/model/run.json").write_text(json.dumps({"run_id": "0" * 32}))
    shutil.rmtree(project / "data/model/record")
    assert register.main([]) == 1
    away = f"127.0.0.1:{ui.free_port()}"  # where no server is, which is said with the address
    with tracked(planted(config.to_mapping(), f"http://user:{SECRET}@{away}"), project / ".runs/away"):
        pass

    secret = SECRET.encode()
    users = {project / name for name in ("params.yaml", "dvc.lock", "data/model/params.yaml")}  # what is his stays
    kept = [path for folder in (project, mlflow_server.folder) for path in folder.rglob("*") if path.is_file()]
    assert {path for path in kept if secret in path.read_bytes()} <= users
    experiment = json.loads((project / ".runs/shards/sync.json").read_text())["experiment_id"]
    models = mlflow_server.folder / "mlartifacts" / experiment / "models"
    for name in ("dvc.lock", "params.yaml", "model.onnx", "model.safetensors", "lineage.json"):
        assert len(list(models.glob(f"*/artifacts/artifacts/{name}"))) == 1
    assert read_config(project / "data/model/model.safetensors").registry.tracking_uri == mlflow_server.address
    shown = capfd.readouterr()
    assert f"MLflow    {mlflow_server.address}/#/" in shown.out and "has no run" in shown.err
    assert f"MLflow at http://{away}: " in caplog.text
    assert SECRET not in shown.out + shown.err + caplog.text
