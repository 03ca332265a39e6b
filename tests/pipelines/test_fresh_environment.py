from __future__ import annotations

import json
from pathlib import Path

import cv2
import numpy as np
import torch
from fresh_environment import make_environment, needs_registry, run_alone
from mlflow.models import Model

from cigpose.config.params_file import write_params
from cigpose.deploy.export import export_onnx
from cigpose.deploy.predictor import Predictor
from cigpose.model.estimator import build_model
from cigpose.model.weights import save_weights
from pipelines.registry.measurement import Measurement
from pipelines.registry.package import Package, build

from .conftest import small_config

USE = """
import json, sys
import mlflow, pandas
folder, picture = sys.argv[1:]
model = mlflow.pyfunc.load_model(folder)
persons = model.predict(pandas.DataFrame({"image": [open(picture, "rb").read()]}))[0]["persons"]
import cigpose
from cigpose.deploy.predictor import Predictor
exported = Predictor.load(folder + "/artifacts/model.onnx")(picture).to_records()
print(json.dumps({"library": cigpose.__file__, "persons": persons, "onnx": exported}))
"""


@needs_registry
def test_a_registered_model_works_in_an_environment_of_its_own_requirements(tmp_path: Path) -> None:
    config, root = small_config(), tmp_path / "project"
    (root / "report").mkdir(parents=True)
    torch.manual_seed(1)
    network = build_model(config).eval()
    save_weights(root / "model.safetensors", network.state_dict(), config)
    write_params(config, root / "params.yaml")
    export_onnx(network, config, root / "report/model.onnx")
    facts = {"images": 1, "persons": 1, "content": "c", "dvc_md5": None}
    package = Package(
        config=config,
        folder=root,
        report=root / "report",
        evaluation=Measurement(metrics={"whole/AP": 0.5}, data="d", protocol="{}"),
        lineage={"datasets": {config.data.val: facts}, "git_revision": None, "dvc_lock": None},
        run={},
    )
    build(package, tmp_path / "model", root, Model())
    picture = tmp_path / "picture.png"
    cv2.imwrite(str(picture), np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8))
    expected = Predictor.load(root / "model.safetensors")(picture).to_records()
    python = make_environment(tmp_path / "venv", "-r", str(tmp_path / "model/requirements.txt"))
    found = json.loads(run_alone(python, USE, tmp_path / "model", picture, folder=tmp_path))
    assert found["library"].startswith(str(tmp_path / "model/code"))
    for way in ("persons", "onnx"):
        [theirs], [ours] = found[way], expected
        assert np.allclose(np.array(theirs["keypoints"]), ours["keypoints"], atol=0.02), way
