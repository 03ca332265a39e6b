from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import cv2
import numpy as np
import pytest
import yaml

from cigpose.cli.main import main
from cigpose.config import Config, config_from_mapping, load_params, load_preset
from cigpose.config.params_file import write_params
from cigpose.dataset.sigmas import chosen_values, origin_of, sigmas_of_repeats, sigmas_of_residuals
from cigpose.evaluate.ground_truth import parse_ground_truth
from cigpose.keypoints import KeypointSet

NAMES = ["left_wrist", "right_wrist", "left_ankle", "right_ankle", "club", "ball"]
TRUE = np.array([0.062, 0.062, 0.089, 0.089, 0.05, 0.02])
AREA = 900.0
KEYPOINTS = {
    "name": "golf",
    "names": NAMES,
    "sigmas": [0.062, 0.062, 0.089, 0.089, 0.079, 0.079],
    "sigmas_origin": "published by COCO (4 of 6), assumed to be 0.079 (2 of 6)",
}


def labels(rng: np.random.Generator, places: np.ndarray, times: float = 1.0) -> np.ndarray:
    """(N, K, 3) of somebody whose labels scatter by the true sigmas, so that E[d^2 / s^2] is their square."""
    scatter = rng.normal(size=places.shape) * times * TRUE[:, None] * np.sqrt(AREA / 2)
    return np.concatenate([places + scatter, np.full((*places.shape[:2], 1), 2.0)], axis=2)


@pytest.fixture
def places() -> np.ndarray:
    """(N, K, 2): where the keypoints of a thousand people are."""
    return np.random.default_rng(0).uniform(20, 80, (1000, len(NAMES), 2))


def test_people_labelled_twice_give_the_sigmas_of_the_labels_and_swaps_do_not_matter(places: np.ndarray) -> None:
    rng = np.random.default_rng(1)
    first, second = labels(rng, places), labels(rng, places)
    second[:50, [0, 1]] = second[:50, [1, 0]]
    first[:985, 5, 2] = 0
    estimate = sigmas_of_repeats(first, second, np.full(1000, AREA))
    assert estimate.values[:5] == pytest.approx(TRUE[:5], rel=0.1)
    assert np.isnan(estimate.values[5]) and estimate.counts.tolist() == [1000] * 5 + [15]


def test_residuals_are_scaled_at_published_sigmas(places: np.ndarray) -> None:
    rng = np.random.default_rng(1)
    keypoints = KeypointSet.from_mapping(KEYPOINTS)
    predicted = labels(rng, places, times=3.0)[..., :2]  # a model that misses by three times what people do
    estimate = sigmas_of_residuals(predicted, labels(rng, places), np.full(1000, AREA), keypoints)
    assert estimate.values == pytest.approx(TRUE, rel=0.1)
    assert "scaled at 4 published ones" in estimate.method
    values = chosen_values(estimate, keypoints, everyone=False)
    assert list(values) == ["club", "ball"]
    said = origin_of(keypoints, values, estimate.method)
    assert said.endswith("on 1000 people, scaled at 4 published ones (2 of 6), published by COCO (4)")
    assert list(chosen_values(estimate, keypoints, everyone=True)) == NAMES


def test_residuals_without_published_keypoints_say_that_they_are_too_large(places: np.ndarray) -> None:
    rng = np.random.default_rng(1)
    keypoints = KeypointSet.from_mapping(KEYPOINTS | {"names": [f"point{i}" for i in range(6)]})
    predicted = labels(rng, places, times=3.0)[..., :2]
    estimate = sigmas_of_residuals(predicted, labels(rng, places), np.full(1000, AREA), keypoints)
    assert estimate.values == pytest.approx(TRUE * np.sqrt(10), rel=0.1)
    assert "its own error" in estimate.method and "too large" in estimate.limits


def golf() -> Config:
    values = load_preset("quickstart").to_mapping() | {"keypoints": KEYPOINTS}
    values["evaluate"]["metric"] = values["train"]["validation"]["metric"] = "body/AP"
    return config_from_mapping(values)


def test_other_sigmas_measure_anew_and_train_nothing() -> None:
    config = golf()
    values = config.to_mapping()
    values["evaluate"]["sigmas"] = {"origin": "a study", "values": {"club": 0.05}}
    other = config_from_mapping(values)
    assert other.keypoint_set.sigmas == (0.062, 0.062, 0.089, 0.089, 0.05, 0.079)
    assert other.keypoint_set.sigmas_origin == "a study"
    assert other.for_validation().keypoint_set == config.keypoint_set
    for stage, is_same in (("shard", True), ("train", True), ("evaluate", False), ("register", False)):
        assert (other.params_of(stage) == config.params_of(stage)) is is_same
    truth = {
        "images": [{"id": 1, "width": 9, "height": 9}], "categories": [{"id": 1, "name": "person"}],
        "annotations": [{"id": 1, "image_id": 1, "bbox": [0, 0, 9, 9], "area": 40, "keypoints": [1, 1, 2] * 6}],
    }  # fmt: skip
    assert len(parse_ground_truth(json.dumps(truth), other.keypoint_set, where="t")) == 1


@pytest.mark.parametrize(
    ("values", "said"),
    [({"clubs": 0.05}, "'clubs' is no keypoint of 'golf'"), ({"club": 0}, "club must be more than 0 and at most 10")],
)
def test_sigmas_that_cannot_be_are_refused(values: dict[str, float], said: str) -> None:
    mapping = golf().to_mapping()
    mapping["evaluate"]["sigmas"] = {"origin": "me", "values": values}
    with pytest.raises(ValueError, match=r"evaluate\.sigmas\.values") as refused:
        config_from_mapping(mapping)
    assert said in str(refused.value)


@pytest.fixture
def twice(tmp_path: Path) -> Path:
    """A project with 40 people, each labelled in one.json and in two.json."""
    rng = np.random.default_rng(2)
    cv2.imwrite(str(tmp_path / "a.jpg"), np.zeros((100, 2000, 3), dtype=np.uint8))
    corners = np.stack([np.arange(40) * 50.0, np.zeros(40)], axis=1)
    places = rng.uniform(10, 40, (40, 6, 2)) + corners[:, None]
    for name in ("one", "two"):
        people = [
            {"id": i, "image_id": 1, "category_id": 1, "bbox": [*corner, 50, 50], "area": AREA, "iscrowd": 0,
             "keypoints": points.ravel().tolist()}
            for i, (corner, points) in enumerate(zip(corners.tolist(), labels(rng, places), strict=True))
        ]  # fmt: skip
        document = {"images": [{"id": 1, "file_name": "a.jpg", "width": 2000, "height": 100}], "annotations": people}
        (tmp_path / f"{name}.json").write_text(json.dumps(document))
    write_params(dataclasses.replace(golf(), name="mine"), tmp_path / "params.yaml")
    return tmp_path


def sigmas(folder: Path, *more: str) -> int:
    command = ["dataset", "sigmas", "--params", str(folder / "params.yaml"), "--shards", str(folder / "shards")]
    return main([*command, "--predictions", str(folder / "predictions.npz"), *more])


def test_the_command_shows_an_estimate_and_writes_it_only_when_asked(
    twice: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (twice / "params.yaml").read_bytes()
    how = ["--pictures", str(twice), "--labels", str(twice / "one.json"), "--again", str(twice / "two.json")]
    assert sigmas(twice, *how) == 0
    shown = capsys.readouterr().out
    assert "estimated from 40 people labelled twice (2 of 6), published by COCO (4)" in shown.replace("\n      ", " ")
    assert (twice / "params.yaml").read_bytes() == before
    assert sigmas(twice, *how, "--write") == 0
    assert (twice / "params-before-1.yaml").read_bytes() == before
    found = load_params(twice / "params.yaml").evaluate.sigmas
    assert found is not None and found.values == pytest.approx({"club": 0.05, "ball": 0.02}, rel=0.4)
    assert yaml.safe_load(before)["keypoints"] == load_params(twice / "params.yaml").keypoints


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--labels", "one.json"], "say as --pictures which pictures"),
        (["--labels", "one.json", "--pictures", "."], "0 people are labelled twice, expected 20 or more"),
        ([], "predictions.npz: no predictions there"),
    ],
)
def test_without_people_labelled_twice_or_predictions_it_is_one_sentence(
    twice: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, more: list[str], said: str
) -> None:
    monkeypatch.chdir(twice)
    assert sigmas(twice, *more) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1
