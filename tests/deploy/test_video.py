from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from cigpose.cli.main import main
from cigpose.deploy import video
from cigpose.deploy.ahead import read_ahead
from cigpose.deploy.predictor import Predictor
from cigpose.deploy.smoothing import OneEuro, Smoother
from cigpose.deploy.tracks import PATIENCE, Seen, Tracker, followed

FRAMES = 23


class Walker:
    """A stand-in detector: finds the bright block, and a second one in frames that have it."""

    min_score = 0.0

    def __init__(self, *_: object, **__: object) -> None:
        self.asked = 0

    def __call__(self, image: np.ndarray) -> np.ndarray:
        self.asked += 1
        _, _, stats, _ = cv2.connectedComponentsWithStats((image[..., 1] > 128).astype(np.uint8))
        return np.array([[x, y, x + w, y + h, 0.9] for x, y, w, h, size in stats[1:] if size > 400]).reshape(-1, 5)


@pytest.fixture
def walk(tmp_path: Path) -> Path:
    """Somebody walks to the right; somebody else stands at the bottom from frame 10 on."""
    path = tmp_path / "walk.mp4"
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"mp4v"), 10.0, (192, 144))
    for number in range(FRAMES):
        frame = np.zeros((144, 192, 3), np.uint8)
        frame[20:80, 10 + 4 * number : 40 + 4 * number] = 255
        if number >= 10:
            frame[100:140, 20:60] = 255
        writer.write(frame)
    writer.release()
    return path


@pytest.fixture
def predict(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, walk: Path
) -> Iterator[Callable[..., int]]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("cigpose.deploy.detector.Detector", Walker)
    (tmp_path / "walker.onnx").write_bytes(b"stands for a detector")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    common = ["--model", str(checkpoint), "--device", "cpu", "--detector", "walker.onnx"]
    yield lambda *arguments: main(["predict", "walk.mp4", *map(str, arguments), *common])
    torch.set_num_threads(threads)


def records(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "walk.jsonl").read_text().splitlines()]


def test_people_keep_their_numbers_and_walk_between_detections(predict, tmp_path: Path, capsys) -> None:
    assert predict("--out", "out", "--detect-every", 4) == 0
    assert f"walk.mp4: {FRAMES} frames, " in capsys.readouterr().out
    found = records(tmp_path / "out")
    assert [[person["id"] for person in record["persons"]] for record in found] == [[1]] * 12 + [[1, 2]] * 11
    for record in found[:21]:  # detected in frame 20; from there on the box stays
        left = record["persons"][0]["bbox_xyxy"][0]
        assert abs(left - (10 + 4 * record["frame"])) <= 2.5
    results = json.loads((tmp_path / "out" / "walk.json").read_text())
    assert [entry["track_id"] for entry in results if entry["image_id"] == 12] == [1, 2]
    drawn = cv2.VideoCapture(str(tmp_path / "out" / "drawn" / "walk.mp4"))
    assert drawn.get(cv2.CAP_PROP_FRAME_COUNT) == FRAMES


@pytest.mark.parametrize("smooth", [(), ("--smooth",)], ids=["as predicted", "smoothed"])
def test_a_stopped_video_goes_on_with_the_same_people(
    predict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, smooth: tuple[str, ...]
) -> None:
    monkeypatch.setattr(video, "FRAMES_AT_ONCE", 3)
    assert predict("--out", "whole", "--detect-every", 5, *smooth) == 0
    many, calls = Predictor.predict_many, []

    def stopped(self, images, boxes):
        calls.append(1)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return many(self, images, boxes)

    monkeypatch.setattr(Predictor, "predict_many", stopped)
    assert predict("--out", "out", "--detect-every", 5, *smooth) == 130
    assert len(records(tmp_path / "out")) == 12
    assert predict("--out", "out", "--detect-every", 5, *smooth) == 0
    for name in ("walk.jsonl", "walk.json", "drawn/walk.mp4"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name


def test_smoothing_touches_the_results_and_not_the_records(predict, tmp_path: Path) -> None:
    assert predict("--out", "plain", "--no-drawings") == 0
    assert predict("--out", "smooth", "--no-drawings", "--smooth") == 0
    assert records(tmp_path / "plain") == records(tmp_path / "smooth")
    plain, smooth = (json.loads((tmp_path / name / "walk.json").read_text()) for name in ("plain", "smooth"))
    assert plain[0] == smooth[0] and plain != smooth


# --- sound ---


def test_a_drawing_without_ffmpegs_help_is_kept(predict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A ffmpeg that fails, as where the source has no sound."""
    (tmp_path / "bin").mkdir()
    tool = tmp_path / "bin" / "ffmpeg"
    tool.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/asked\nexit 1\n')
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=":")
    assert predict("--out", "out") == 0
    assert [("-c:a copy" in line, "-c:a aac" in line) for line in (tmp_path / "asked").read_text().splitlines()] == [
        (True, False),
        (False, True),
    ]
    assert cv2.VideoCapture(str(tmp_path / "out/drawn/walk.mp4")).get(cv2.CAP_PROP_FRAME_COUNT) == FRAMES
    assert sorted(path.name for path in (tmp_path / "out/drawn").iterdir()) == ["walk.mp4"]


@pytest.mark.skipif(shutil.which("ffmpeg") is None, reason="ffmpeg is not installed")
def test_the_sound_is_kept(predict, tmp_path: Path, walk: Path) -> None:
    silent = walk.rename(tmp_path / "silent.mp4")
    tone = ["-f", "lavfi", "-i", "sine=duration=2.3", "-map", "0:v", "-map", "1:a", "-c:v", "copy", "-c:a", "aac"]
    subprocess.run(["ffmpeg", "-v", "error", "-i", str(silent), *tone, str(walk)], check=True)
    assert predict("--out", "out") == 0
    said = subprocess.run(["ffmpeg", "-i", str(tmp_path / "out/drawn/walk.mp4")], capture_output=True, text=True)
    assert "Audio: aac" in said.stderr and "Video: mpeg4" in said.stderr


# --- tracks ---


def test_numbers_follow_the_overlap_and_outlive_a_miss() -> None:
    tracker = Tracker()
    left, right = [0, 0, 40, 80, 0.9], [100, 0, 140, 80, 0.8]
    assert tracker.update(np.array([left, right])).tolist() == [1, 2]
    assert tracker.update(np.array([np.add(right, 5), np.add(left, 5)])).tolist() == [2, 1]
    for _ in range(PATIENCE):
        assert tracker.update(np.array([left])).tolist() == [1]
    assert tracker.update(np.array([right])).tolist() == [2]
    for _ in range(PATIENCE + 1):
        tracker.update(np.zeros((0, 5)))
    assert tracker.update(np.array([left])).tolist() == [3]


def test_two_who_cross_are_assigned_together_and_not_one_by_one() -> None:
    tracker = Tracker()
    tracker.update(np.array([[0, 0, 100, 100, 1.0], [60, 0, 160, 100, 1.0]]))
    assert tracker.update(np.array([[35, 0, 135, 100, 1.0], [90, 0, 190, 100, 1.0]])).tolist() == [1, 2]


def test_boxes_between_detections_are_on_the_way() -> None:
    places = {0: [[0, 0, 10, 10, 1.0]], 4: [[40, 0, 50, 10, 1.0]], 8: np.zeros((0, 5))}
    ids = {0: [1], 4: [1], 8: []}
    seen = list(
        followed(
            ((number, np.zeros(0)) for number in range(10)),
            lambda number, _: Seen(np.array(places[number], dtype=float).reshape(-1, 5), np.array(ids[number])),
            4,
        )
    )
    assert [number for number, *_ in seen] == list(range(10))
    assert [item.boxes[:, 0].tolist() for *_, item in seen] == [
        *([[0.0], [10.0], [20.0], [30.0]] + [[40.0]] * 4),
        *([], []),
    ]


# --- smoothing ---


def test_trembling_goes_and_a_run_is_followed() -> None:
    rng = np.random.default_rng(0)
    still, smooth = OneEuro(30.0), OneEuro(30.0)
    trembling = 100 + rng.normal(0, 1, (300, 17, 2))
    calm = np.array([still(points, 200.0) for points in trembling])
    assert calm[50:].std() < 0.5 * trembling[50:].std()
    run = np.arange(60)[:, None, None] * np.full((1, 17, 2), 8.0)  # more than a height a second
    lag = run - np.array([smooth(points, 200.0) for points in run])
    assert abs(lag[30:]).max() < 8.0  # less than a frame behind


def test_who_comes_back_is_not_dragged_from_where_they_were() -> None:
    def record(*x: float) -> dict:
        return {"persons": [{"id": 1, "keypoints": [[value, 0.0, 1.0]], "bbox_xyxy": [0, 0, 9, 90]} for value in x]}

    smooth = Smoother(30.0)
    smooth(record(0.0))
    assert 0 < smooth(record(1.0))["persons"][0]["keypoints"][0][0] < 1
    smooth(record())
    assert smooth(record(500.0))["persons"][0]["keypoints"][0][0] == 500


# --- reading ahead ---


def test_an_error_while_reading_ahead_is_raised_where_the_items_are_used() -> None:
    def items() -> Iterator[int]:
        yield 1
        raise ValueError("no second one")

    ahead = read_ahead(items(), 4)
    assert next(ahead) == 1
    with pytest.raises(ValueError, match="no second one"):
        next(ahead)


def test_a_reader_that_is_not_read_to_the_end_ends() -> None:
    taken = []

    def endless() -> Iterator[int]:
        number = 0
        while True:
            taken.append(number)
            yield number
            number += 1

    ahead = read_ahead(endless(), 2)
    assert next(ahead) == 0
    ahead.close()
    count = len(taken)
    assert count <= 5 and len(taken) == count
