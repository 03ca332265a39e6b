"""The five lines of Python: pictures in every form, people by name, scores as probabilities, other people's forms."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

import cv2
import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from PIL import Image as Pillow

import cigpose
from cigpose.config import Config
from cigpose.deploy.models import preset_of
from cigpose.deploy.predictor import Poses, Predictor, read_image
from cigpose.evaluate.calibration import Calibration
from cigpose.files.digest import sha256_of
from cigpose.model.estimator import PoseEstimator

BOXES = [[10.0, 10.0, 60.0, 110.0], [80.0, 20.0, 150.0, 100.0]]


@pytest.fixture(scope="module")
def predictor(model: PoseEstimator, config: Config) -> Predictor:
    return Predictor(model, config, device="cpu")


@pytest.fixture
def poses(predictor: Predictor, picture: np.ndarray) -> Poses:
    return predictor(picture, BOXES)


def test_importing_cigpose_imports_no_torch() -> None:
    code = "import sys, cigpose; assert 'Predictor' in dir(cigpose); assert not {'torch', 'cv2'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
    assert cigpose.Predictor is Predictor


# --- what goes in ---


def test_a_picture_is_the_same_in_every_form(predictor: Predictor, picture: np.ndarray, tmp_path: Path) -> None:
    path = tmp_path / "picture.png"
    cv2.imwrite(str(path), picture)
    rgb = np.ascontiguousarray(picture[..., ::-1])
    tensor = torch.from_numpy(rgb).permute(2, 0, 1)
    forms = [path, str(path), path.read_bytes(), picture, tensor, tensor.float() / 255, Pillow.fromarray(rgb)]
    for form in forms:
        assert np.array_equal(read_image(form), picture), type(form)
        assert np.array_equal(predictor(form, BOXES).keypoints, predictor(picture, BOXES).keypoints)


def test_pillows_pictures_are_turned_as_their_exif_says(picture: np.ndarray) -> None:
    content, exif = io.BytesIO(), Pillow.Exif()
    exif[0x0112] = 6  # turn by a quarter
    Pillow.fromarray(picture).save(content, "PNG", exif=exif)
    content.seek(0)
    assert read_image(Pillow.open(content)).shape == (160, 120, 3)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (torch.zeros(3, 4, 4) + 2, "floats from 0 to 1, got 2 to 2"),
        (torch.full((3, 4, 4), float("nan")), "floats from 0 to 1, got nan"),
        (torch.zeros(3, 4, 4, dtype=torch.int64), "expected a tensor of uint8 or floats"),
        (torch.zeros(4, 4, 3, dtype=torch.uint8), r"RGB tensor \(3, H, W\), got \(4, 4, 3\)"),
        (7, "int is none; expected a path"),
    ],
)
def test_what_is_no_picture_is_one_sentence(image: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_image(image)


def test_a_list_gives_a_list_and_a_generator_gives_as_it_goes(predictor: Predictor, picture: np.ndarray) -> None:
    read: list[int] = []

    def pictures():
        for number in range(40):
            read.append(number)
            yield picture

    stream = predictor(pictures())
    assert read == []
    first = next(stream)
    assert len(first) == 1 and len(read) == 16
    assert sum(1 for _ in stream) == 39
    several = predictor([picture, picture], [BOXES, None])
    assert several[0].image is picture and predictor.predict_many([picture], [None])[0].image is None
    assert [len(found) for found in several] == [2, 1]
    with pytest.raises(ValueError, match="boxes: 1 for 2 pictures"):
        predictor([picture, picture], [BOXES])
    with pytest.raises(ValueError, match="boxes: they end before the pictures do"):
        list(predictor(iter([picture, picture]), [BOXES]))


def test_the_detector_is_asked_where_no_boxes_are_given(model: PoseEstimator, config: Config, picture) -> None:
    class Everybody:
        def __call__(self, image: np.ndarray) -> np.ndarray:
            return np.array([[*box, 0.5] for box in BOXES])

    found = Predictor(model, config, device="cpu", detector=Everybody())  # type: ignore[arg-type]
    assert found(picture).bbox_xyxy.tolist() == BOXES and found(picture).box_scores.tolist() == [0.5, 0.5]
    assert len(found(picture, BOXES[:1])) == 1


def test_threads_that_share_a_predictor_get_what_one_alone_gets(predictor: Predictor) -> None:
    rng = np.random.default_rng(0)
    pictures = [rng.integers(0, 256, (60 + 3 * i, 80, 3), dtype=np.uint8) for i in range(24)]
    alone = [predictor(picture) for picture in pictures]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(predictor, pictures))
    for ours, theirs in zip(together, alone, strict=True):
        assert np.array_equal(ours.keypoints, theirs.keypoints) and np.array_equal(ours.raw_scores, theirs.raw_scores)


# --- what comes out ---


def test_people_know_their_keypoints_by_name(poses: Poses) -> None:
    people = list(poses)
    assert [person.bbox_xyxy.tolist() for person in people] == BOXES
    wrist = people[1]["left_wrist"]
    k = poses.keypoint_set.names.index("left_wrist")
    assert (wrist.x, wrist.y) == tuple(poses.keypoints[1, k].tolist())
    assert wrist.raw_score == poses.raw_scores[1, k] and 0 <= wrist.score <= 1
    assert list(people[0])[:2] == ["nose", "left_eye"] and len(people[0]) == 133
    with pytest.raises(KeyError, match="'left_tail' is no keypoint of coco_wholebody"):
        people[0]["left_tail"]


def test_without_a_calibration_scores_are_cut_off_and_it_is_said(poses: Poses) -> None:
    assert not poses.calibrated
    assert np.array_equal(poses.scores, np.clip(poses.raw_scores, 0, 1))
    assert (poses.person_scores <= 1).all() and (poses.raw_person_scores > 1).any()


def test_a_calibration_beside_the_model_is_used_if_it_is_of_these_weights(
    checkpoint: Path, picture: np.ndarray, tmp_path: Path
) -> None:
    weights = tmp_path / "model" / "model.safetensors"
    weights.parent.mkdir()
    weights.write_bytes(checkpoint.read_bytes())
    table = ([0.0, 10.0], [0.25, 0.75])
    known = Calibration(
        tables={"all": table, "face": ([0.0], [0.5])}, error=0.0, labels=1, models=(sha256_of(weights),)
    )
    (tmp_path / "report").mkdir()
    known.write(tmp_path / "report")
    found = Predictor.load(weights, device="cpu")(picture, BOXES)
    assert found.calibrated
    assert np.allclose(found.scores[:, :17], np.interp(found.raw_scores[:, :17], *table))
    assert (found.scores[:, list(found.keypoint_set.parts["face"])] == 0.5).all()
    assert ((found.person_scores > 0.25) & (found.person_scores < 0.75)).all()
    other = Calibration(tables={"all": table}, error=0.0, labels=1, models=("0" * 64,))
    other.write(tmp_path / "report")
    assert not Predictor.load(weights, device="cpu")(picture, BOXES).calibrated
    (tmp_path / "report" / "calibration.json").write_text("{}")
    with pytest.raises(ValueError, match=r"calibration.json: not a calibration of ours"):
        Predictor.load(weights, device="cpu")


def test_poses_as_coco_results_and_as_a_table(poses: Poses) -> None:
    entries = poses.to_coco(7)
    assert [entry["image_id"] for entry in entries] == [7, 7]
    assert entries[0]["score"] == round(float(poses.raw_person_scores[0]), 4)
    assert len(entries[0]["keypoints"]) == 51 and len(entries[0]["face_kpts"]) == 204
    table = poses.to_pandas()
    assert len(table) == 2 * 133
    row = table[(table.person == 1) & (table.keypoint == "left_wrist")].iloc[0]
    assert row.x == poses[1]["left_wrist"].x and row.raw_score == poses[1]["left_wrist"].raw_score


def test_poses_as_supervisions_keypoints(poses: Poses, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "supervision", None)
    with pytest.raises(ValueError, match="to_supervision: supervision is not installed"):
        poses.to_supervision()
    taken = {}
    stand_in = ModuleType("supervision")
    stand_in.KeyPoints = lambda **columns: taken.update(columns)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "supervision", stand_in)
    poses.to_supervision()
    assert taken["xy"].shape == (2, 133, 2) and taken["keypoint_confidence"].shape == (2, 133)
    assert len(taken["detection_confidence"]) == len(taken["class_id"]) == 2


def test_poses_are_drawn_and_saved_but_over_nothing(poses: Poses, picture: np.ndarray, tmp_path: Path) -> None:
    drawn = poses.plot()
    assert drawn.shape == picture.shape and (drawn != picture).any()
    assert np.array_equal(cv2.imread(str(poses.save(tmp_path / "drawn.png"))), drawn)
    assert len(json.loads(poses.save(tmp_path / "poses.json").read_text())) == 2
    with pytest.raises(FileExistsError, match=r"drawn.png: exists"):
        poses.save(tmp_path / "drawn.png")
    poses.save(tmp_path / "drawn.png", overwrite=True)
    with pytest.raises(ValueError, match="Give a name that ends in"):
        poses.save(tmp_path / "drawn.docx")
    again = Poses.from_records(poses.to_records(), poses.image_size, poses.keypoint_set)
    with pytest.raises(ValueError, match="came without their picture"):
        again.plot()


# --- where models are ---


def test_an_official_file_says_by_its_name_what_it_is() -> None:
    assert preset_of(Path("weights/cigpose-m_coco_256x192.pth")) == "cigpose-m_coco_256x192"
    assert preset_of(Path("cigpose-m_coco_256x192.onnx")) is None and preset_of(Path("best.pth")) is None


def test_a_folder_with_a_model_is_a_model(checkpoint: Path, picture: np.ndarray, tmp_path: Path) -> None:
    (tmp_path / "artifacts").mkdir()
    (tmp_path / "artifacts" / "model.safetensors").symlink_to(checkpoint)
    assert len(Predictor.load(tmp_path, device="cpu")(picture)) == 1
    with pytest.raises(FileNotFoundError, match=r"no model in this folder; looked for model.safetensors"):
        Predictor.load(tmp_path.parent)


@pytest.mark.slow  # a process that imports MLflow
def test_a_registry_that_is_not_there_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with pytest.raises(
        ValueError, match=r"mlflow.db: no registry there. `dvc repro` in the project's folder"
    ) as caught:
        Predictor.load("models:/people@champion")
    assert len(str(caught.value).splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def public_file(path: Path, *, batch: int | str = "batch", **meta: object) -> Path:
    """A network in cigpose-onnx's format: 17 keypoints, all where the picture is brightest."""
    node, constant = helper.make_node, numpy_helper.from_array
    graph = helper.make_graph(
        [
            node("ReduceMean", ["input", "colours"], ["light"], keepdims=0),  # (B, 96, 64)
            node("ReduceMax", ["light", "rows"], ["across"], keepdims=1),
            node("ReduceMax", ["light", "columns"], ["down_"], keepdims=1),
            node("Transpose", ["down_"], ["down"], perm=[0, 2, 1]),
            *(node("Expand", [name, "many"], [f"{name}_many"]) for name in ("across", "down")),
            *(
                node("Resize", [f"{name}_many", "", "scales"], [out], mode="nearest")
                for name, out in (("across", "simcc_x"), ("down", "simcc_y"))
            ),
        ],
        "pose",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, [batch, 3, 96, 64])],
        [
            helper.make_tensor_value_info("simcc_x", TensorProto.FLOAT, [batch, 17, 128]),
            helper.make_tensor_value_info("simcc_y", TensorProto.FLOAT, [batch, 17, 192]),
        ],
        [
            *(constant(np.int64([axis]), name) for axis, name in ((1, "colours"), (1, "rows"), (2, "columns"))),
            constant(np.int64([1, 17, 1]), "many"),
            constant(np.float32([1, 1, 2]), "scales"),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    text = json.dumps({"input_w": 64, "input_h": 96, "split_ratio": 2.0, **meta})
    model.metadata_props.add(key="cigpose_meta", value=text)
    onnx.save(model, str(path))
    return path


@pytest.mark.parametrize("batch", ["batch", 1, 2])
def test_files_of_cigpose_onnx_are_models(tmp_path: Path, batch: int | str) -> None:
    image = np.zeros((200, 300, 3), np.uint8)
    image[88:93, 138:143] = 255
    predictor = Predictor.load(public_file(tmp_path / "public.onnx", batch=batch))
    assert predictor.keypoint_set.name == "coco" and predictor.recipe.box_padding == 1.25
    found = predictor(image, [[100, 40, 180, 160], [110, 60, 170, 120], [90, 40, 190, 160]])
    assert np.abs(found.keypoints - [140, 90]).max() < 5
    shifted = public_file(tmp_path / "own.onnx", mean=[0, 0, 0], std=[1, 1, 1], padding=1.0)
    own = Predictor.load(shifted)(image, [[100, 40, 180, 160]])
    assert np.allclose(own.raw_scores, 1, atol=0.02)  # statistics of pixels from 0 to 1


def test_a_public_file_that_does_not_say_what_it_is_is_refused(tmp_path: Path) -> None:
    path = public_file(tmp_path / "public.onnx", input_w="wide")
    with pytest.raises(ValueError, match="its metadata cigpose_meta is not JSON with input_w"):
        Predictor.load(path)
    with pytest.raises(ValueError, match="gives 17 keypoints and does not name them"):
        Predictor.load(public_file(tmp_path / "names.onnx", keypoint_names=["nose"]))
