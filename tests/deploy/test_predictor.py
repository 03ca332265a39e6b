from __future__ import annotations

import struct
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from torch import nn

from cigpose.config import Config
from cigpose.deploy.predictor import Poses, Predictor, read_image
from cigpose.model.estimator import PoseEstimator

from .conftest import tiny_config

BOXES = [[10.0, 10.0, 60.0, 110.0], [80.0, 20.0, 150.0, 100.0], [-20.0, 50.0, 40.0, 140.0]]


class BrightSpot(nn.Module):
    """A stand-in network whose every keypoint is the brightest pixel: its answer can be known."""

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        bright = images.mean(dim=1)
        columns, rows = bright.amax(dim=1), bright.amax(dim=2)
        simcc_x = torch.zeros(len(images), 133, columns.shape[1] * 2)
        simcc_y = torch.zeros(len(images), 133, rows.shape[1] * 2)
        simcc_x[..., ::2], simcc_y[..., ::2] = columns[:, None], rows[:, None]
        return simcc_x, simcc_y


def spot(x: int, y: int) -> np.ndarray:
    """A cone of light: brighter the nearer."""
    rows, columns = np.mgrid[:200, :300]
    light = 250 - 2 * np.maximum(abs(columns - x), abs(rows - y))
    return np.clip(light, 0, 255).astype(np.uint8)[..., None].repeat(3, axis=2)


@pytest.mark.parametrize(
    "box",
    [[100.0, 40.0, 180.0, 160.0], [110.0, 60.0, 160.0, 110.0], [-50.0, -50.0, 200.0, 200.0]],
    ids=["inside", "wide", "over the border"],
)
def test_a_spot_is_found_where_it_is_in_the_picture(box: list[float]) -> None:
    poses = Predictor(BrightSpot(), tiny_config())(spot(140, 90), [box])
    scale = max(box[2] - box[0], (box[3] - box[1]) * 64 / 96) * 1.1 / 64  # image pixels of a crop pixel
    assert np.abs(poses.keypoints - [140, 90]).max() <= scale


def test_without_boxes_the_whole_picture_is_one_persons_box() -> None:
    predictor = Predictor(BrightSpot(), tiny_config())
    alone, boxed = predictor(spot(140, 90)), predictor(spot(140, 90), [[0, 0, 300, 200]])
    assert np.array_equal(alone.keypoints, boxed.keypoints) and alone.bbox_xyxy.tolist() == [[0, 0, 300, 200]]


def test_a_picture_without_anybody_gives_nobody() -> None:
    poses = Predictor(BrightSpot(), tiny_config())(spot(140, 90), np.zeros((0, 4)))
    assert len(poses) == 0 and poses.keypoints.shape == (0, 133, 2) and poses.to_records() == []


def test_pictures_together_and_alone_give_the_same(model: PoseEstimator, config: Config, picture: np.ndarray) -> None:
    predictor = Predictor(model, config)
    both = predictor.predict_many([picture, picture[:, ::-1].copy()], [BOXES, BOXES[:1]])
    alone = [predictor(picture, BOXES), predictor(picture[:, ::-1].copy(), BOXES[:1])]
    for ours, theirs in zip(both, alone, strict=True):
        assert np.allclose(ours.raw_scores, theirs.raw_scores, rtol=1e-4)
        assert (np.abs(ours.keypoints - theirs.keypoints) < 1e-3).mean() > 0.99  # equal bins may tie


def test_path_bytes_and_array_are_the_same_picture(
    model: PoseEstimator, config: Config, picture: np.ndarray, tmp_path: Path
) -> None:
    path = tmp_path / "picture.png"
    cv2.imwrite(str(path), picture)
    predictor = Predictor(model, config)
    found = [predictor(source, BOXES).keypoints for source in (path, str(path), path.read_bytes(), picture)]
    assert all(np.array_equal(keypoints, found[0]) for keypoints in found)


def test_box_scores_weigh_the_persons(model: PoseEstimator, config: Config, picture: np.ndarray) -> None:
    predictor = Predictor(model, config)
    plain = predictor(picture, BOXES)
    weighed = predictor(picture, [[*box, 0.5] for box in BOXES])
    assert np.allclose(weighed.person_scores, plain.person_scores / 2)
    assert np.allclose(weighed.raw_person_scores, plain.raw_person_scores / 2)


def test_the_predictor_agrees_with_the_evaluation(model: PoseEstimator, config: Config, picture: np.ndarray) -> None:
    from cigpose.crop import box_to_center_scale, crop_image, crop_matrix, fix_aspect_ratio
    from cigpose.evaluate.predict import predict

    center, scale = box_to_center_scale(np.array(BOXES), config.augmentation.box_padding)
    scale = fix_aspect_ratio(scale, (64, 96))
    crops = [
        crop_image(picture[..., ::-1].copy(), crop_matrix(c, s, 0.0, (64, 96)), (64, 96))
        for c, s in zip(center, scale, strict=True)
    ]
    batch = {
        "crops": torch.from_numpy(np.stack(crops)),
        "center": torch.from_numpy(center),
        "scale": torch.from_numpy(scale),
        "image_id": torch.ones(3, dtype=torch.int64),
        "person_id": torch.arange(3),
        "bbox_xyxy": torch.tensor(BOXES),
        "box_score": torch.ones(3),
    }
    expected = predict(model, [batch], config.keypoint_set, device="cpu", flip_test=True)
    poses = Predictor(model, config, flip_test=True)(picture, BOXES)
    assert np.array_equal(poses.keypoints, expected.keypoints)
    assert np.array_equal(poses.raw_scores, expected.keypoint_scores)


@pytest.mark.slow
@pytest.mark.parametrize("flip_test", [False, True])
def test_weights_and_onnx_give_equal_poses(
    checkpoint: Path, exported: Path, picture: np.ndarray, flip_test: bool
) -> None:
    ours = Predictor.load(checkpoint, flip_test=flip_test)(picture, BOXES)
    theirs = Predictor.load(exported, flip_test=flip_test)(picture, BOXES)
    assert np.allclose(ours.raw_scores, theirs.raw_scores, rtol=0, atol=1e-5 * np.abs(ours.raw_scores).max())
    assert (np.abs(ours.keypoints - theirs.keypoints) < 1e-3).mean() > 0.99  # equal bins may tie


@pytest.mark.parametrize(
    ("boxes", "message"),
    [
        ([[10, 10, 5, 50]], r"\[10.0, 10.0, 5.0, 50.0\] is not a box"),
        ([[0, 0, float("nan"), 9]], "is not a box"),
        ([[1, 2, 3]], r"got shape \(1, 3\)"),
        ([1, 2, 3, 4], r"got shape \(4,\)"),
        ([[7000, 7000, 7100, 7100]], r"\[7000.0, .* is beside the picture of 160 x 120 pixels"),
        ([[10, -50, 60, 0]], "is beside the picture"),
        ([[10, 10, 60, 7000]], "or beyond it by more than its size"),
        ([[-200, 10, 60, 100]], "or beyond it by more than its size"),
    ],
    ids=["turned round", "nan", "three numbers", "not a table", "far away", "above", "much too high", "much too wide"],
)
def test_boxes_that_are_none_are_refused(boxes: list, message: str, picture: np.ndarray) -> None:
    with pytest.raises(ValueError, match=message):
        Predictor(BrightSpot(), tiny_config())(picture, boxes)


def test_keypoints_stay_near_the_picture_whatever_box_is_taken(picture: np.ndarray) -> None:
    poses = Predictor(BrightSpot(), tiny_config())(picture, [[-160, -120, 320, 240], [100, 60, 320, 240]])
    assert (np.abs(poses.keypoints - [80, 60]) < 4 * np.array([160, 120])).all()


def test_a_model_that_gives_no_numbers_is_refused(picture: np.ndarray) -> None:
    class Broken(BrightSpot):
        def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return super().forward(images * float("nan"))

    with pytest.raises(ValueError, match="model: gives scores that are NaN or infinite"):
        Predictor(Broken(), tiny_config())(picture)


def test_written_poses_can_be_read_again(model: PoseEstimator, config: Config, picture: np.ndarray) -> None:
    for boxes in (BOXES, np.zeros((0, 4))):
        poses = Predictor(model, config)(picture, boxes)
        again = Poses.from_records(poses.to_records(), poses.image_size, config.keypoint_set)
        assert again.keypoints.shape == poses.keypoints.shape and again.to_records() == poses.to_records()
        assert np.allclose(again.keypoints, poses.keypoints, rtol=0, atol=0.0051)  # two decimals


@pytest.mark.parametrize(
    "image", [b"", b"no picture", np.zeros((5, 5), np.uint8), np.zeros((5, 5, 3), np.float32)],
    ids=["empty", "text", "grey", "float"],
)  # fmt: skip
def test_what_is_no_picture_is_refused(image: bytes | np.ndarray) -> None:
    with pytest.raises(ValueError, match="picture: "):
        read_image(image)


@pytest.mark.parametrize("kind", ["png", "jpg"])
def test_a_picture_that_would_fill_the_memory_is_refused_before_it_is_decoded(
    kind: str, picture: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = bytearray(cv2.imencode(f".{kind}", picture)[1].tobytes())
    at = 16 if kind == "png" else content.index(b"\xff\xc0") + 5
    size = struct.pack(">II", 40_000, 40_000) if kind == "png" else struct.pack(">HH", 40_000, 40_000)
    content[at : at + len(size)] = size
    monkeypatch.setattr(cv2, "imdecode", lambda *_: pytest.fail("decoded"))
    with pytest.raises(ValueError, match="picture: 40000 x 40000 pixels, allowed are 200 million"):
        read_image(bytes(content))


def test_what_opencv_itself_refuses_is_a_sentence() -> None:
    header = struct.pack("<2sIHHIIiiHHIIiiII", b"BM", 54, 0, 0, 54, 40, 60_000, 60_000, 1, 24, 0, 0, 0, 0, 0, 0)
    with pytest.raises(ValueError, match=r"picture: OpenCV (refuses to|cannot) decode"):
        read_image(header + bytes(100))


def test_a_missing_picture_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nobody\.jpg: no such picture"):
        read_image(tmp_path / "nobody.jpg")
