from __future__ import annotations

import base64
import json
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import cv2
import mlflow
import numpy as np
import pandas
import pytest
import requests
import torch
from mlflow.models import Model
from mlflow.pyfunc.model import PythonModelContext

from cigpose.config import Config
from cigpose.config.params_file import write_params
from cigpose.deploy.detector import Detector
from cigpose.deploy.predictor import Predictor, read_image
from cigpose.model.estimator import build_model
from cigpose.model.weights import save_weights
from pipelines import register, ui
from pipelines.registry import serving
from pipelines.registry.package import Package, build
from pipelines.registry.versions import Measurement

from .conftest import small_config

BOXES = [[10.0, 20.0, 200.0, 220.0], [50.0, 10.0, 120.0, 230.0]]
LIMITS = {"max_boxes": 20, "max_megapixels": 2.0, "max_request_mb": 2.0}


def encoded_picture(width: int = 320, height: int = 240) -> bytes:
    noise = np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8)
    return cv2.imencode(".png", cv2.resize(noise, (width, height)))[1].tobytes()


PICTURE = encoded_picture()
TEXT = base64.b64encode(PICTURE).decode()


@pytest.fixture(scope="module")
def packaged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder as `register` logs it."""
    root = tmp_path_factory.mktemp("packaged")
    config = small_config(serving=LIMITS)
    torch.manual_seed(1)
    save_weights(root / "data/model.safetensors", build_model(config).state_dict(), config)
    write_params(config, root / "data/params.yaml")
    (root / "data/model.onnx").write_bytes(b"not looked at")
    facts = {"images": 1, "persons": 1, "content": "c", "dvc_md5": None}
    package = Package(
        config=config,
        folder=root / "data",
        report=root / "data",
        evaluation=Measurement(metrics={"whole/AP": 0.5}, data="d", protocol="{}"),
        lineage={"datasets": {config.data.val: facts}, "git_revision": None, "dvc_lock": None},
        run={},
    )
    build(package, root / "model", root, Model())
    return root / "model"


@pytest.fixture(scope="module")
def expected(packaged: Path) -> list[dict[str, Any]]:
    """Persons of `PICTURE` in `BOXES`."""
    return Predictor.load(packaged / "artifacts/model.safetensors")(PICTURE, BOXES).to_records()


@pytest.fixture(scope="module")
def server(packaged: Path) -> Iterator[str]:
    """Address of MLflow's own server with that model, on loopback."""
    port = ui.free_port()
    serve = (sys.executable, "-m", "mlflow", "models", "serve", "-m", str(packaged), "--env-manager", "local")
    server = ui.Server(
        name="model server",
        command=(*serve, "-h", "127.0.0.1", "-p", str(port)),
        health=f"http://127.0.0.1:{port}/ping",
        address=f"http://127.0.0.1:{port}",
        log=packaged.parent / "serve.log",
        env={"OMP_NUM_THREADS": "1", "PYTHONPATH": ""},
    )
    with ui.running(server, root=packaged.parent, timeout_s=300):
        yield server.address


@pytest.fixture(scope="module")
def ask(server: str) -> Callable[..., requests.Response]:
    def post(records: Any = (), **body: Any) -> requests.Response:
        return requests.post(f"{server}/invocations", timeout=60, **(body or {"json": {"dataframe_records": records}}))

    return post


def test_rows_are_answered_in_order_and_share_batches(packaged: Path, expected: list[dict[str, Any]]) -> None:
    model = mlflow.pyfunc.load_model(str(packaged))
    answers = model.predict(pandas.DataFrame({"image": [PICTURE, PICTURE], "boxes": [json.dumps(BOXES), None]}))
    assert answers[0]["persons"] == expected
    assert [len(answer["persons"]) for answer in answers] == [2, 1]
    assert answers[1]["persons"][0]["bbox_xyxy"] == [0, 0, 320, 240]
    assert answers[0]["names"][0] == "nose"
    batches = []
    model.unwrap_python_model()._predictor.model.register_forward_hook(
        lambda _, images, __: batches.append(len(images[0]))
    )
    model.predict(pandas.DataFrame({"image": [PICTURE] * 4, "boxes": [BOXES] * 4}))
    assert max(batches) == 8
    with pytest.raises(ValueError, match=r"^column 'boxs': unknown. Did you mean 'boxes'\?$"):
        model.predict(pandas.DataFrame({"image": [PICTURE], "boxs": ["[]"]}))


def test_limits_are_the_registered_ones_unless_the_loader_gives_others(packaged: Path) -> None:
    rows = pandas.DataFrame({"image": [PICTURE], "boxes": [BOXES * 15]})
    with pytest.raises(ValueError, match="30 of them, allowed are 20"):
        mlflow.pyfunc.load_model(str(packaged)).predict(rows)
    generous = mlflow.pyfunc.load_model(str(packaged), model_config={"max_boxes": 30})
    assert len(generous.predict(rows)[0]["persons"]) == 30


def test_broken_weights_are_the_models_fault(packaged: Path) -> None:
    model = mlflow.pyfunc.load_model(str(packaged))
    with torch.no_grad():
        model.unwrap_python_model()._predictor.model.head.cls_gx.weight.fill_(float("nan"))
    with pytest.raises(mlflow.MlflowException, match="gives scores that are NaN") as caught:
        model.predict(pandas.DataFrame({"image": [PICTURE]}))
    assert caught.value.get_http_status_code() == 500


def test_a_detector_that_was_registered_finds_the_people(packaged: Path, shared: Path, tmp_path: Path) -> None:
    detector = shared / "detectors/yolox_nano.onnx"
    context = PythonModelContext({"weights": packaged / "artifacts/model.safetensors", "detector": detector}, LIMITS)
    service = serving.PoseService()
    service.load_context(context)
    labels = json.loads((shared / "coco128/keypoints.json").read_text())["annotations"]
    largest = max(labels, key=lambda label: label["area"])["image_id"]
    with zipfile.ZipFile(shared / "coco128/images.zip") as archive:
        content = archive.read(f"images/{largest:012d}.jpg")
    expected = Detector(detector)(read_image(content))
    found = service.predict(context, {"image": [content, content], "boxes": [None, BOXES]})
    assert len(expected) > 0
    assert [person["bbox_xyxy"] for person in found[0]["persons"]] == np.round(expected[:, :4], 2).tolist()
    assert len(found[1]["persons"]) == len(BOXES)


@pytest.mark.slow
def test_a_registered_model_is_loaded_by_its_alias_with_its_detector(
    project: Path, trained, make_config: Callable[..., Config], shared: Path
) -> None:
    config = make_config(detector="nowhere.onnx")
    trained(config, seed=1, whole_ap=0.5)
    with pytest.raises(FileNotFoundError, match=r"nowhere\.onnx: no ONNX file there"):
        register.register(config, project)
    config = make_config(detector=str(shared / "detectors/yolox_nano.onnx"))
    register.register(config, project)
    model = mlflow.pyfunc.load_model("models:/cigpose-quickstart@champion")
    assert model.model_config["max_boxes"] == config.registry.serving.max_boxes
    assert model.predict(pandas.DataFrame({"image": [PICTURE]}))[0]["persons"] == []  # nobody in the noise
    assert len(model.predict(pandas.DataFrame({"image": [PICTURE], "boxes": [BOXES]}))[0]["persons"]) == 2


@pytest.mark.slow
def test_the_server_answers_with_poses(ask: Callable[..., requests.Response], expected: list[dict[str, Any]]) -> None:
    for boxes in (json.dumps(BOXES), BOXES):
        reply = ask([{"image": TEXT, "boxes": boxes}])
        assert reply.status_code == 200, reply.text
        served = reply.json()["predictions"][0]
        assert served["image_size"] == [320, 240]
        for ours, theirs in zip(served["persons"], expected, strict=True):
            assert np.allclose(ours["keypoints"], theirs["keypoints"], atol=0.02)


LARGE = cv2.imencode(".png", np.zeros((1500, 2000, 3), np.uint8))[1].tobytes()


def rows(picture: bytes = PICTURE, **columns: Any) -> dict[str, Any]:
    return {"json": {"dataframe_records": [{"image": base64.b64encode(picture).decode(), **columns}]}}


def raw(data: Any) -> dict[str, Any]:
    return {"data": data, "headers": {"content-type": "application/json"}}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("body", "status", "sentence"),
    [
        (rows(b"none"), 400, "row 0: image: these 4"),
        (rows(boxs="[]"), 400, "column 'boxs': unknown. Did you mean"),
        (rows(boxes=[[0, 0, 1e300, 9]]), 400, "row 0: boxes: [0.0"),
        (rows(boxes="[[NaN,0,1,9]]"), 400, "row 0: boxes: '[[NaN"),
        (rows(boxes=BOXES * 5000), 400, "request: "),
        (rows(boxes=str(BOXES * 20)), 400, "row 0: boxes: 40 of them"),
        (rows(LARGE), 400, "row 0: image: 2000 x 1500 pixels"),
        (raw(b"[" * 30_000), 400, "request: 30000 bytes of JSON"),
        (raw(b"[" * 4000), 400, "request: JSON in 4000 levels"),
        (raw(b"{"), 400, "request: not valid JSON"),
        ({"json": {"inputs": [TEXT]}}, 400, "request: expected one key, dataframe_records"),
        (raw(bytes(2_100_000)), 413, "request: more than 2 MB"),
        (raw(iter([bytes(10**6)] * 3)), 413, "request: more than 2 MB"),
    ],
    ids=["picture", "column", "far", "NaN", "10000", "40", "pixels", "wide", "deep", "JSON", "key", "long", "chunks"],
)
def test_the_server_says_in_a_sentence_what_is_wrong_with_a_request(
    ask: Callable[..., requests.Response], body: dict[str, Any], status: int, sentence: str
) -> None:
    began = time.monotonic()
    reply = ask(**body)
    assert reply.status_code == status
    assert reply.json()["message"].startswith(sentence)
    assert len(reply.text) < 400 and "Traceback" not in reply.text
    assert time.monotonic() - began < 5  # refused, not computed


@pytest.mark.slow
def test_eight_clients_at_once_are_all_answered(ask: Callable[..., requests.Response]) -> None:
    def answered(_: int) -> bool:
        reply = ask([{"image": TEXT, "boxes": BOXES}])
        return reply.status_code == 200 and len(reply.json()["predictions"][0]["persons"]) == 2

    speed = {}
    for clients in (1, 8):
        began = time.monotonic()
        with ThreadPoolExecutor(clients) as pool:
            assert all(pool.map(answered, range(24)))
        speed[clients] = 24 / (time.monotonic() - began)
    print(f"requests a second: one client {speed[1]:.0f}, eight {speed[8]:.0f}, ratio {speed[8] / speed[1]:.2f}")
    assert speed[8] > 0.5 * speed[1]  # a lock held too long or threads that fight would show
