from __future__ import annotations

import json
from pathlib import Path

import cv2
import numpy as np
import pytest

from cigpose.draw import draw_poses, pack_pictures
from cigpose.evaluate import report
from cigpose.evaluate.ground_truth import load_ground_truth
from cigpose.evaluate.predictions import Predictions
from cigpose.keypoints import COCO, COCO_WHOLEBODY

from .conftest import Project

METRICS = {"body/AP": 0.5, "body/AP50": 0.75, "body/AP75": 0.25, "body/AR": 0.6, "hand/AP": -1.0, "hand/AR": -1.0}


def test_tables_show_every_part_and_a_dash_where_nothing_was_measured() -> None:
    assert report.parts_table(METRICS).splitlines() == [
        "| part | AP | AP50 | AP75 | AR |",
        "| --- | ---: | ---: | ---: | ---: |",
        "| body | 0.500 | 0.750 | 0.250 | 0.600 |",
        "| hand | - | - | - | - |",
    ]


def test_files_of_metrics_hold_every_figure(tmp_path: Path) -> None:
    path = report.write_metrics_json(METRICS, tmp_path / "metrics" / "evaluate.json")
    assert json.loads(path.read_text()) == report.nested(METRICS)
    plot = report.write_parts_csv(METRICS, tmp_path / "plots" / "parts.csv")
    assert plot.read_text() == "part,AP,AP50,AP75,AR\nbody,0.500000,0.750000,0.250000,0.600000\n"


def test_pck_counts_labelled_keypoints_near_enough(project: Project) -> None:
    truth = load_ground_truth(project.shards / "people/annotations.json", COCO)
    corners = np.c_[truth.bbox_xywh[:, :2], truth.bbox_xywh[:, :2] + truth.bbox_xywh[:, 2:]]
    keypoints = truth.keypoints[..., :2].copy()
    keypoints[:, 0, 0] += 0.04 * 55  # the larger side of every box is 55
    keypoints[:, 1, 1] += 50
    predictions = Predictions(
        image_id=truth.image_id,
        person_id=truth.annotation_id,
        keypoints=keypoints,
        keypoint_scores=np.ones(keypoints.shape[:2]),
        center=corners[:, :2],
        scale=corners[:, 2:],
        bbox_xyxy=corners,
        box_score=np.ones(len(truth)),
    )
    labelled = (truth.keypoints[..., 2] > 0).sum()  # the first two keypoints of everybody are
    found = report.pck(predictions, truth, COCO)["body"]
    near, all_near = 1 - 2 * len(truth) / labelled, 1 - len(truth) / labelled
    assert found == pytest.approx({"PCK@0.02": near, "PCK@0.05": all_near, "PCK@0.1": all_near})
    assert report.pck(Predictions.empty(17), truth, COCO)["body"]["PCK@0.1"] == -1.0


@pytest.mark.parametrize(("num", "pages"), [(0, 0), (1, 1), (5, 2)])
def test_contact_sheets_hold_so_many_pictures_a_page(project: Project, tmp_path: Path, num: int, pages: int) -> None:
    truth = load_ground_truth(project.shards / "people/annotations.json", COCO)
    pictures = [(image_id, np.full((120, 160, 3), 128, np.uint8)) for image_id in range(1, num + 1)]
    made = report.contact_sheets(
        pictures, Predictions.empty(17), COCO, tmp_path, truth=truth, per_page=4, tile_height=90
    )
    assert [path.name for path in made] == [f"page-{i:02d}.jpg" for i in range(pages)]
    if made:
        height, width = cv2.imread(str(made[0])).shape[:2]
        assert (width, height) == ((2 * 240 + 18, 2 * 90 + 18) if num > 1 else (240 + 12, 90 + 12))


WIDTHS = {
    "portraits among landscapes": [225, 600, 400, 225, 900, 300, 450, 400],
    "one panorama": [200, 200, 200, 1600, 200],
    "equal": [300] * 7,
    "alone": [123],
}


@pytest.mark.parametrize("widths", WIDTHS.values(), ids=WIDTHS)
def test_a_packed_page_shows_every_picture_once_in_order_and_little_paper(widths: list[int]) -> None:
    pictures = [np.full((300, width, 3), 20 * (i + 1), np.uint8) for i, width in enumerate(widths)]
    page = pack_pictures(pictures)
    count, _, stats, centers = cv2.connectedComponentsWithStats((page[..., 0] < 200).astype(np.uint8))
    found = sorted(zip(stats[1:].tolist(), centers[1:], strict=True), key=lambda entry: (entry[0][1], entry[0][0]))
    assert count - 1 == len(widths)
    shown = [page[int(y), int(x), 0] for _, (x, y) in found]
    assert shown == [20 * (i + 1) for i in range(len(widths))]
    for (_, _, width, height, _), original in zip([entry for entry, _ in found], widths, strict=True):
        assert 0.7 * 300 - 5 <= height <= 300 and width / height == pytest.approx(original / 300, rel=0.03)
    assert (page == 255).all(axis=2).mean() < 0.2
    assert np.array_equal(page, pack_pictures(pictures))


def wholebody_person(score: float) -> tuple[np.ndarray, np.ndarray]:
    points = np.random.default_rng(0).uniform(20, 180, (1, 133, 2))
    return points, np.full((1, 133), score)


def test_drawing_changes_a_copy_and_only_near_shown_keypoints() -> None:
    image = np.zeros((200, 200, 3), np.uint8)
    keypoints, scores = wholebody_person(0.9)
    drawn = draw_poses(image, keypoints, scores, COCO_WHOLEBODY)
    assert drawn.any() and not image.any()
    assert not draw_poses(image, keypoints, np.full((1, 133), 0.1), COCO_WHOLEBODY).any()
    faint = draw_poses(image, keypoints, np.full((1, 133), 0.4), COCO_WHOLEBODY)
    assert 0 < faint.max() < drawn.max()


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e12, -1e12])
def test_keypoints_that_are_nowhere_are_left_out(value: float) -> None:
    image = np.zeros((200, 200, 3), np.uint8)
    assert not draw_poses(image, np.full((2, 17, 2), value), np.ones((2, 17)), COCO).any()


def test_nobody_leaves_the_picture_as_it_is() -> None:
    image = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    assert np.array_equal(draw_poses(image, np.zeros((0, 17, 2)), np.zeros((0, 17)), COCO), image)


@pytest.mark.parametrize(
    ("image", "keypoints", "message"),
    [
        (np.zeros((9, 9), np.uint8), np.zeros((1, 17, 2)), "expected a uint8"),
        (np.zeros((9, 9, 3)), np.zeros((1, 17, 2)), "got float64"),
        (np.zeros((9, 9, 3), np.uint8), np.zeros((1, 133, 2)), r"expected keypoints \(N, 17, 2\)"),
    ],
    ids=["grey", "float", "other set"],
)
def test_what_cannot_be_drawn_is_refused(image: np.ndarray, keypoints: np.ndarray, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        draw_poses(image, keypoints, np.ones(keypoints.shape[:2]), COCO)
