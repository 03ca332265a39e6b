from __future__ import annotations

import json
from pathlib import Path

import cv2
import numpy as np
import pytest

from cigpose.cli import main
from cigpose.config import Config
from cigpose.deploy.media import BoxFile, predict_pictures, predict_video
from cigpose.deploy.predictor import Predictor
from cigpose.model.estimator import PoseEstimator


@pytest.fixture
def predictor(model: PoseEstimator, config: Config) -> Predictor:
    return Predictor(model, config)


@pytest.fixture
def album(tmp_path: Path, picture: np.ndarray) -> Path:
    folder = tmp_path / "album"
    (folder / "summer").mkdir(parents=True)
    cv2.imwrite(str(folder / "000000000007.jpg"), picture)
    cv2.imwrite(str(folder / "summer" / "beach.png"), picture[:60])
    (folder / "notes.txt").write_text("not a picture")
    return folder


@pytest.fixture
def film(tmp_path: Path, picture: np.ndarray) -> Path:
    path = tmp_path / "film.mp4"
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"mp4v"), 10.0, (160, 120))
    for shift in range(20):
        writer.write(np.roll(picture, shift, axis=1))
    writer.release()
    return path


def boxes(path: Path, *entries: dict) -> BoxFile:
    path.write_text(json.dumps(entries))
    return BoxFile(path, min_score=0.2)


def test_a_folder_gives_a_record_and_a_drawing_per_picture(predictor: Predictor, album: Path, tmp_path: Path) -> None:
    records = json.loads(predict_pictures(predictor, album, tmp_path / "out").read_text())
    assert [record["file_name"] for record in records] == ["000000000007.jpg", "summer/beach.png"]
    assert [len(record["persons"]) for record in records] == [1, 1]
    assert np.shape(records[0]["persons"][0]["keypoints"]) == (133, 3)
    assert records[1]["persons"][0]["bbox_xyxy"] == [0, 0, 160, 60]
    drawn = cv2.imread(str(tmp_path / "out" / "summer" / "beach.jpg"))
    assert drawn is not None and drawn.shape == (60, 160, 3)


def test_boxes_are_found_by_name_by_last_part_and_by_number(predictor: Predictor, album: Path, tmp_path: Path) -> None:
    given = boxes(
        tmp_path / "boxes.json",
        {"image_id": 7, "bbox": [10, 10, 40, 80], "score": 0.9},
        {"image_id": 7, "bbox": [60, 10, 40, 80], "score": 0.8, "category_id": 1},
        {"image_id": 7, "bbox": [60, 10, 40, 80], "score": 0.8, "category_id": 18},
        {"image_id": 7, "bbox": [90, 10, 40, 80], "score": 0.1},
        {"file_name": "beach.png", "bbox": [5, 5, 30, 50]},
    )
    path = predict_pictures(predictor, album, tmp_path / "out", boxes=given, draw=False)
    records = json.loads(path.read_text())
    assert [person["bbox_xyxy"] for person in records[0]["persons"]] == [[10, 10, 50, 90], [60, 10, 100, 90]]
    assert [len(record["persons"]) for record in records] == [2, 1]
    assert [file.name for file in path.parent.iterdir()] == ["poses.json"]


def test_a_picture_that_the_boxes_do_not_name_has_nobody(predictor: Predictor, album: Path, tmp_path: Path) -> None:
    given = boxes(tmp_path / "boxes.json", {"file_name": "elsewhere.jpg", "bbox": [5, 5, 30, 50]})
    records = json.loads(predict_pictures(predictor, album, tmp_path / "out", boxes=given).read_text())
    assert [record["persons"] for record in records] == [[], []]


def test_a_video_gives_a_record_per_frame_and_a_video(predictor: Predictor, film: Path, tmp_path: Path) -> None:
    given = boxes(tmp_path / "boxes.json", {"image_id": 3, "bbox": [5, 5, 30, 50]})
    records = json.loads(predict_video(predictor, film, tmp_path / "out", boxes=given).read_text())
    assert [record["frame"] for record in records] == list(range(20))
    assert [len(record["persons"]) for record in records] == [int(frame == 3) for frame in range(20)]
    assert records[5]["time_s"] == 0.5
    drawn = cv2.VideoCapture(str(tmp_path / "out" / "film.mp4"))
    assert (drawn.get(cv2.CAP_PROP_FRAME_COUNT), drawn.get(cv2.CAP_PROP_FPS)) == (20, 10)


def test_a_failure_leaves_nothing_that_looks_complete(predictor: Predictor, album: Path, tmp_path: Path) -> None:
    (album / "zebra.jpg").write_bytes(b"broken")
    with pytest.raises(ValueError, match=r"zebra\.jpg: OpenCV cannot decode"):
        predict_pictures(predictor, album, tmp_path / "out", draw=False)
    assert list((tmp_path / "out").iterdir()) == []


def test_sources_that_do_not_exist_or_hold_nothing_are_named(predictor: Predictor, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such picture or folder"):
        predict_pictures(predictor, tmp_path / "nowhere", tmp_path / "out")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="no pictures in it"):
        predict_pictures(predictor, tmp_path / "empty", tmp_path / "out")
    with pytest.raises(FileNotFoundError, match="no such video"):
        predict_video(predictor, tmp_path / "nowhere.mp4", tmp_path / "out")
    (tmp_path / "text.mp4").write_text("no video")
    with pytest.raises(ValueError, match="cannot decode a single frame"):
        predict_video(predictor, tmp_path / "text.mp4", tmp_path / "out")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not valid JSON"),
        ('{"annotations": []}', "expected a list of detections, got dict"),
        ('[{"bbox": [1, 2, 3, 4]}]', "detection 0: expected a mapping with file_name or image_id"),
        ('[{"image_id": 1, "bbox": [1, 2, 3]}]', r"detection 0: expected bbox \[x, y, w, h\], got \[1, 2, 3\]"),
    ],
    ids=["cut", "a COCO file", "no picture", "short box"],
)
def test_a_box_file_that_is_none_is_refused(content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "boxes.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        BoxFile(tmp_path / "boxes.json")
    with pytest.raises(FileNotFoundError, match="no detections there"):
        BoxFile(tmp_path / "nowhere.json")


def test_the_command_line_predicts_a_folder_and_a_video(
    checkpoint: Path, album: Path, film: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert main(["predict", str(album), str(film), "--model", str(checkpoint), "--out", str(out)]) == 0
    assert capsys.readouterr().out.splitlines() == [
        f"{album}: {out}/album/poses.json",
        f"{film}: {out}/film/film.json",
    ]
    assert main(["predict", str(tmp_path / "gone.jpg"), "--model", str(checkpoint)]) == 2
    assert "gone.jpg: no such picture, folder or video" in capsys.readouterr().err
