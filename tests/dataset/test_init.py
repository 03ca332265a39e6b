"""`cigpose dataset init` on rendered people with keypoints of their own."""

from __future__ import annotations

import json
import shutil
import zipfile
from pathlib import Path

import cv2
import numpy as np
import pytest
import yaml
from nested import change

from cigpose.cli.main import main
from cigpose.config import RenderConfig, config_from_mapping, load_params
from cigpose.evaluate.checkpoint import evaluate_model
from cigpose.files.atomic import claimed
from cigpose.keypoints import COCO_WHOLEBODY
from cigpose.model.estimator import build_model
from cigpose.render import render_dataset
from cigpose.shard.write import write_dataset

OWN = ("left_wrist", "left_elbow", "left_shoulder", "right_wrist", "right_elbow", "right_shoulder", "nose")
LINES = [[1, 2], [2, 3], [4, 5], [5, 6], [3, 6]]


@pytest.fixture(scope="module")
def rendered(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """photos/ and labels.json: 24 pictures of people, seven keypoints, for one of which nobody publishes a sigma."""
    folder = tmp_path_factory.mktemp("own")
    render_dataset(
        RenderConfig(seed=3, num_images=24, image_size=(96, 120), max_persons=1), folder / "set", processes=1
    )
    with zipfile.ZipFile(folder / "set" / "images.zip") as archive:
        archive.extractall(folder / "photos")
    document = json.loads((folder / "set" / "annotations.json").read_bytes())
    places = [COCO_WHOLEBODY.names.index(name) for name in OWN]
    for person in document["annotations"]:
        points = np.reshape(person["keypoints"], (-1, 3))
        person["keypoints"] = points[places].ravel().tolist()
        person["num_keypoints"] = int((points[places, 2] > 0).sum())
    names = [*OWN[:-1], "muzzle"]
    document["categories"] = [{"id": 1, "name": "person", "keypoints": names, "skeleton": LINES}]
    (folder / "labels.json").write_text(json.dumps(document))
    return folder


def init(rendered: Path, out: Path, *more: str) -> int:
    command = ["dataset", "init", str(rendered / "photos"), str(rendered / "labels.json"), "--name", "mine"]
    return main([*command, "--out", str(out), "--epochs", "3", "--people", "3", *more])


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_init_leads_from_pictures_and_labels_to_shards_and_an_ap(
    rendered: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = files_of(rendered)
    assert init(rendered, tmp_path) == 0
    assert files_of(rendered) == before  # photographs and labels are only read
    said = capsys.readouterr().out
    for line in (
        "mates      left_wrist - right_wrist, left_elbow - right_elbow, left_shoulder - right_shoulder",
        "groups     left_wrist left_elbow left_shoulder; right_wrist right_elbow right_shoulder; "
        "left_shoulder right_shoulder",
        "sigmas     published by COCO (6 of 7), assumed to be 0.079 (1 of 7)",
        "3 epochs of",
        "minutes of training on this machine",
        "Nobody publishes sigmas for muzzle",
        "Pictures were split one by one",
    ):
        assert line in said
    assert cv2.imread(str(tmp_path / "data" / "mine-labels.jpg")).shape[0] > 300
    config = load_params(tmp_path / "params.yaml")
    values = change(config.to_mapping(), data__sharding__processes=1, model__backbone__widen_factor=0.125)
    config = config_from_mapping(values)
    raw, shards = tmp_path / "data" / "raw", tmp_path / "data" / "shards"
    assert all(path.is_symlink() for path in (raw / "mine" / "images").glob("*.jpg"))
    people = [write_dataset(config, f"mine-{side}", raw, shards).persons for side in ("train", "val")]
    labelled = json.loads((rendered / "labels.json").read_bytes())["annotations"]
    assert sum(people) == sum(person["num_keypoints"] > 0 for person in labelled) and min(people) >= 2
    evaluation = evaluate_model(build_model(config), config, shards_root=shards, device="cpu")
    assert evaluation is not None and len(evaluation.predictions) == people[1]
    assert 0 <= evaluation.metrics["body/AP"] <= 1


def test_whole_body_labels_are_taken_with_their_other_fields(rendered: Path, tmp_path: Path) -> None:
    given = [str(rendered / "set" / name) for name in ("images.zip", "annotations.json")]
    assert main(["dataset", "init", *given, "--name", "mine", "--out", str(tmp_path), "--epochs", "3"]) == 0
    config = load_params(tmp_path / "params.yaml")
    assert config.keypoint_set == COCO_WHOLEBODY
    assert (tmp_path / "data/mine-labels.jpg").is_file()
    for name in ("mine-train", "mine-val"):
        write_dataset(config, name, tmp_path / "data/raw", tmp_path / "shards")
    evaluation = evaluate_model(build_model(config), config, shards_root=tmp_path / "shards", device="cpu")
    assert evaluation is not None and evaluation.predictions.keypoints.shape[1] == 133


def test_init_replaces_a_preset_but_nothing_of_the_users(
    rendered: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    params = tmp_path / "params.yaml"
    assert main(["use", "quickstart", "--params", str(params)]) == 0
    assert init(rendered, tmp_path) == 0
    mine = params.read_text().replace("epochs: 3", "epochs: 7")
    params.write_text(mine)
    before = files_of(tmp_path)
    assert init(rendered, tmp_path) == 2
    assert "is yours. --force replaces it and keeps a copy" in capsys.readouterr().err
    assert files_of(tmp_path) == before
    assert init(rendered, tmp_path, "--force") == 0
    assert (tmp_path / "params-before-1.yaml").read_text() == mine
    assert load_params(params).train.epochs == 3


def test_corrected_labels_are_read_anew_without_touching_params(rendered: Path, tmp_path: Path) -> None:
    copy = tmp_path / "labels"
    copy.mkdir()
    shutil.copy(rendered / "labels.json", copy)
    (copy / "photos").symlink_to(rendered / "photos")
    assert init(copy, tmp_path) == 0
    params = (tmp_path / "params.yaml").read_bytes()
    document = json.loads((copy / "labels.json").read_bytes())
    document["annotations"][0]["keypoints"][0] += 1.5
    (copy / "labels.json").write_text(json.dumps(document))
    assert init(copy, tmp_path, "--keep-params") == 0
    assert (tmp_path / "params.yaml").read_bytes() == params
    found = {}
    for side in ("train", "val"):
        written = json.loads((tmp_path / "data" / "raw" / "mine" / f"{side}.json").read_bytes())
        found |= {person["id"]: person["keypoints"] for person in written["annotations"]}
    assert found[document["annotations"][0]["id"]] == document["annotations"][0]["keypoints"]


def test_a_zip_and_a_file_to_measure_on_are_linked_and_kept_apart(rendered: Path, tmp_path: Path) -> None:
    document = json.loads((rendered / "labels.json").read_bytes())
    for name, images in (("train", document["images"][:16]), ("val", document["images"][16:])):
        ids = {image["id"] for image in images}
        people = [person for person in document["annotations"] if person["image_id"] in ids]
        (tmp_path / f"{name}.json").write_text(json.dumps(document | {"images": images, "annotations": people}))
    command = ["dataset", "init", str(rendered / "set" / "images.zip"), str(tmp_path / "train.json"), "--name", "z"]
    command += ["--val", str(tmp_path / "val.json"), "--out", str(tmp_path / "out"), "--epochs", "3", "--people", "2"]
    assert main(command) == 0
    raw = tmp_path / "out" / "data" / "raw" / "z"
    assert sorted(path.name for path in raw.iterdir()) == ["dataset.json", "images.zip", "train.json", "val.json"]
    assert (raw / "images.zip").resolve() == (rendered / "set" / "images.zip").resolve()
    params = yaml.safe_load((tmp_path / "out" / "params.yaml").read_text())
    assert params["data"]["datasets"]["z-val"]["annotations"] == "val.json"
    assert len(json.loads((raw / "val.json").read_bytes())["images"]) == 8


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--val-share", "2"], "--val-share must be above 0 and below 1"),
        (["--val", "LABELS"], "24 of its pictures are trained on too"),
        (["--keypoints", "a,b"], "people have 7 keypoints, --keypoints names 2"),
        (["--keypoints", "cocoa"], "'cocoa' is not one of"),
        (["--keep-params"], "so there is none to keep"),
        (["--sigmas", "nowhere.json"], "nowhere.json: not found"),
        (["--category", "dog"], "has no category 'dog', only person"),
        (["--name", "My Data"], "'My Data' cannot name folders"),
    ],
)
def test_what_cannot_be_is_one_sentence_and_writes_nothing(
    rendered: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], more: list[str], said: str
) -> None:
    more = [str(rendered / "labels.json") if word == "LABELS" else word for word in more]
    assert init(rendered, tmp_path, *more) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1
    assert files_of(tmp_path) == {}


def test_a_folder_of_somebody_else_is_not_replaced(
    rendered: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    theirs = tmp_path / "data" / "raw" / "mine"
    theirs.mkdir(parents=True)
    (theirs / "photo.jpg").write_bytes(b"precious")
    assert init(rendered, tmp_path) == 2
    assert "was not made by `cigpose dataset init`" in capsys.readouterr().err
    assert files_of(tmp_path) == {"data/raw/mine/photo.jpg": b"precious"}


def test_a_second_init_of_the_same_data_is_told_of_the_first_and_writes_no_params(
    rendered: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with claimed(tmp_path / "data" / ".raw-mine.lock", "a first"):
        assert init(rendered, tmp_path) == 2
    assert "`cigpose dataset init` of mine is running already (process " in capsys.readouterr().err
    assert not (tmp_path / "params.yaml").exists() and not (tmp_path / "data" / "raw" / "mine").exists()
    assert init(rendered, tmp_path) == 0
