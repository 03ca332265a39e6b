from __future__ import annotations

import base64
import json
import sys
from pathlib import Path

import cv2
import mlflow
import numpy as np
import pandas
import pytest
import requests

from cigpose.config import Config
from cigpose.deploy.predictor import Predictor
from pipelines import register, ui
from pipelines.registry import serving


def encoded_picture() -> bytes:
    noise = np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8)
    return cv2.imencode(".png", cv2.resize(noise, (320, 240)))[1].tobytes()


@pytest.mark.parametrize(
    ("value", "boxes"), [(None, None), ("", None), (float("nan"), None), ("[[1, 2, 3, 4]]", [[1, 2, 3, 4]])]
)
def test_boxes_of_a_row(value, boxes) -> None:
    assert serving.parse_boxes(value) == boxes


def test_boxes_that_are_no_json_are_refused() -> None:
    with pytest.raises(ValueError, match="is not JSON; expected"):
        serving.parse_boxes("1, 2, 3")


@pytest.mark.slow
def test_a_registered_model_is_loaded_and_served(project: Path, trained, config: Config) -> None:
    trained(config, seed=1, whole_ap=0.5)
    address = f"sqlite:///{project}/mlflow.db"
    register.register(config, project)
    picture, boxes = encoded_picture(), [[10.0, 20.0, 200.0, 220.0], [50.0, 10.0, 120.0, 230.0]]
    expected = Predictor.load(project / "data/model/model.safetensors")(picture, boxes).to_records()

    model = mlflow.pyfunc.load_model("models:/cigpose-quickstart@champion")
    rows = pandas.DataFrame({"image": [picture, picture], "boxes": [json.dumps(boxes), None]})
    answers = model.predict(rows)
    assert answers[0]["persons"] == expected
    assert [len(answer["persons"]) for answer in answers] == [2, 1]
    assert answers[1]["persons"][0]["bbox_xyxy"] == [0, 0, 320, 240]
    assert answers[0]["names"][0] == "nose"
    assert len(model.predict(pandas.DataFrame({"image": [picture]}))) == 1

    port = ui.free_port()
    server = ui.Server(
        name="model server",
        command=(
            *(sys.executable, "-m", "mlflow", "models", "serve", "-m", "models:/cigpose-quickstart@champion"),
            *("--env-manager", "local", "-h", "127.0.0.1", "-p", str(port)),
        ),
        health=f"http://127.0.0.1:{port}/ping",
        address=f"http://127.0.0.1:{port}",
        log=project / "serve.log",
        env={"MLFLOW_TRACKING_URI": address, "OMP_NUM_THREADS": "1", "PYTHONPATH": ""},
    )
    with ui.running(server, root=project, timeout_s=300):
        text = base64.b64encode(picture).decode()
        record = {"image": text, "boxes": json.dumps(boxes)}
        reply = requests.post(f"{server.address}/invocations", json={"dataframe_records": [record]}, timeout=60)
        assert reply.status_code == 200, reply.text
        served = reply.json()["predictions"][0]
        assert served["image_size"] == [320, 240]
        for ours, theirs in zip(served["persons"], expected, strict=True):
            assert np.allclose(ours["keypoints"], theirs["keypoints"], atol=0.02)
        bad = {"image": base64.b64encode(b"no picture").decode()}
        reply = requests.post(f"{server.address}/invocations", json={"dataframe_records": [bad]}, timeout=60)
        assert reply.status_code == 400
        assert "row 0" in reply.text and "cannot decode" in reply.text
