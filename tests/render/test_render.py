from __future__ import annotations

import contextlib
import io
import itertools
import json
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from pycocotools.coco import COCO

from cigpose.config import RenderConfig
from cigpose.keypoints import COCO_WHOLEBODY
from cigpose.render import render_dataset, render_image
from cigpose.render.body import paint_figure
from cigpose.render.face import FIRM, TEMPLATE, landmark_visible, sample_face
from cigpose.render.figure import Figure, Placement, sample_person
from cigpose.render.hand import BONES, sample_hand
from cigpose.render.paint import Canvas, Light
from cigpose.render.skeleton import (
    ELBOW_LIMIT,
    FOREARM,
    KNEE_LIMIT,
    SHIN,
    THIGH,
    UPPER_ARM,
    rotate_y,
    sample_build,
    sample_pose,
)
from pipelines import render as stage

CONFIG = RenderConfig(seed=11, num_images=40, image_size=(400, 320))
LENGTHS = {"keypoints": 51, "foot_kpts": 18, "face_kpts": 204, "lefthand_kpts": 63, "righthand_kpts": 63}
PARTS = ("face", "lefthand", "righthand")
RIGHT_ARM = [8, 10, *range(112, 133)]


def keypoints(annotation: dict[str, Any]) -> np.ndarray:
    """(133, 3) x, y, v."""
    return np.concatenate([np.reshape(annotation[field], (-1, 3)) for field in LENGTHS])


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rendered")
    render_dataset(CONFIG, folder, processes=1)
    return folder


@pytest.fixture(scope="module")
def document(dataset: Path) -> dict[str, Any]:
    return json.loads((dataset / "annotations.json").read_text())


@pytest.fixture(scope="module")
def annotations(document: dict[str, Any]) -> list[dict[str, Any]]:
    return document["annotations"]


def test_the_files_load_in_pycocotools_and_name_every_picture(dataset: Path, document: dict[str, Any]) -> None:
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO(dataset / "annotations.json")
    assert len(coco.getImgIds()) == CONFIG.num_images
    assert coco.loadCats([1])[0]["keypoints"] == list(COCO_WHOLEBODY.names[:17])
    assert all(1 <= joint <= 17 for bone in coco.loadCats([1])[0]["skeleton"] for joint in bone)
    with zipfile.ZipFile(dataset / "images.zip") as archive:
        assert [Path(name).name for name in archive.namelist()] == [i["file_name"] for i in document["images"]]
        assert {member.compress_type for member in archive.infolist()} == {zipfile.ZIP_STORED}
        picture = cv2.imdecode(np.frombuffer(archive.read("images/000000000001.jpg"), np.uint8), cv2.IMREAD_COLOR)
    assert picture.shape == (320, 400, 3)
    for annotation in document["annotations"]:
        mask = coco.annToMask(annotation)
        assert mask.sum() == pytest.approx(annotation["area"], rel=0.1, abs=40), "segmentation and area disagree"


def test_every_annotation_has_all_fields_of_coco_wholebody(annotations: list[dict[str, Any]]) -> None:
    assert [annotation["id"] for annotation in annotations] == list(range(1, len(annotations) + 1))
    for annotation in annotations:
        assert {field: len(annotation[field]) for field in LENGTHS} == LENGTHS
        assert annotation["category_id"] == 1 and annotation["iscrowd"] == 0 and annotation["area"] > 0
        assert 1 <= annotation["image_id"] <= CONFIG.num_images
        assert annotation["num_keypoints"] == (keypoints(annotation)[:17, 2] > 0).sum()
        for part in PARTS:
            assert len(annotation[f"{part}_box"]) == 4
        for part in (*PARTS, "foot"):
            assert isinstance(annotation[f"{part}_valid"], bool)


def test_unlabelled_keypoints_are_zero_and_labelled_ones_lie_in_the_picture(annotations: list[dict[str, Any]]) -> None:
    for annotation in annotations:
        table = keypoints(annotation)
        assert set(np.unique(table[:, 2])) <= {0, 1, 2}
        assert not table[table[:, 2] == 0].any()
        labelled = table[table[:, 2] > 0]
        assert (labelled[:, :2] >= 0).all()
        assert (labelled[:, 0] <= 399).all() and (labelled[:, 1] <= 319).all()


def test_parts_that_are_not_valid_are_all_zero_and_valid_ones_are_not(annotations: list[dict[str, Any]]) -> None:
    for annotation in annotations:
        for part in (*PARTS, "foot"):
            table = np.reshape(annotation[f"{part}_kpts"], (-1, 3))
            assert table.any() == annotation[f"{part}_valid"]
            if part != "foot":
                assert np.any(annotation[f"{part}_box"]) == annotation[f"{part}_valid"]


def test_boxes_hold_what_they_name(annotations: list[dict[str, Any]]) -> None:
    for annotation in annotations:
        table = keypoints(annotation)
        left, top, width, height = annotation["bbox"]
        seen = table[table[:, 2] == 2]
        assert (seen[:, 0] >= left).all() and (seen[:, 0] <= left + width).all()
        assert (seen[:, 1] >= top).all() and (seen[:, 1] <= top + height).all()
        assert left >= 0 and top >= 0 and left + width <= 400 and top + height <= 320
        for part in PARTS:
            part_points = np.reshape(annotation[f"{part}_kpts"], (-1, 3))
            part_points = part_points[part_points[:, 2] > 0]
            if len(part_points):
                x, y, w, h = annotation[f"{part}_box"]
                np.testing.assert_allclose((x, y), part_points[:, :2].min(axis=0), atol=0.006)
                np.testing.assert_allclose((x + w, y + h), part_points[:, :2].max(axis=0), atol=0.012)


def test_the_dataset_has_all_it_promises(annotations: list[dict[str, Any]]) -> None:
    tables = [keypoints(annotation) for annotation in annotations]
    assert any(annotation["face_valid"] for annotation in annotations)
    assert any(not annotation["face_valid"] for annotation in annotations)
    assert any(not annotation["foot_valid"] for annotation in annotations)
    visible = np.mean([(table[:, 2] == 2).mean() for table in tables])
    hidden = np.mean([(table[:, 2] == 1).mean() for table in tables])
    assert visible > 0.5 and hidden > 0.05
    per_image = np.bincount([annotation["image_id"] for annotation in annotations])
    assert per_image.max() == 3 and np.median(per_image[1:]) >= 1


@pytest.mark.slow
def test_the_files_are_the_same_bytes_for_any_number_of_processes(dataset: Path, tmp_path: Path) -> None:
    config = replace(CONFIG, num_images=18)
    for processes in (1, 2):
        render_dataset(config, tmp_path / str(processes), processes=processes)
    for name in ("images.zip", "annotations.json"):
        assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "2" / name).read_bytes()
    assert sorted(path.name for path in (tmp_path / "1").iterdir()) == ["annotations.json", "images.zip"]
    with zipfile.ZipFile(dataset / "images.zip") as many, zipfile.ZipFile(tmp_path / "1" / "images.zip") as few:
        name = "images/000000000018.jpg"
        assert many.read(name) == few.read(name), "a picture depends on how many there are"


def test_another_seed_gives_other_pictures() -> None:
    assert not np.array_equal(render_image(CONFIG, 0)[0], render_image(replace(CONFIG, seed=12), 0)[0])


def test_a_render_that_fails_leaves_the_old_files(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    render_dataset(replace(CONFIG, num_images=1), tmp_path, processes=1)
    before = (tmp_path / "images.zip").read_bytes()

    def broken(*_: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr("cigpose.render.dataset.render_image", broken)
    with pytest.raises(OSError, match="No space"):
        render_dataset(replace(CONFIG, num_images=1), tmp_path, processes=1)
    assert (tmp_path / "images.zip").read_bytes() == before


@pytest.mark.slow
def test_paired_scenes_differ_in_the_context_alone() -> None:
    differing = 0
    for index in range(8):
        agreeing = replace(CONFIG, spurious_context=1.0, context=1.0, clutter=0.0)
        one, labels = render_image(agreeing, index)
        other, same_labels = render_image(replace(agreeing, spurious_context=0.0), index)
        assert labels == same_labels
        changed = (one != other).any(axis=2)
        differing += bool(changed.any())
        without, _ = render_image(replace(agreeing, context=0.0), index)
        # Where neither context object is, the three scenes are one.
        objects = cv2.dilate(
            ((one != without).any(axis=2) | (other != without).any(axis=2)).astype(np.uint8), np.ones((3, 3))
        )
        assert not (changed & (objects == 0)).any()
    assert differing >= 6


def right_wrist_is_up(annotation: dict[str, Any]) -> bool | None:
    table = keypoints(annotation)
    return bool(table[10, 1] < table[6, 1]) if table[6, 2] and table[10, 2] else None


def orange_share(picture: np.ndarray) -> float:
    """Share of pixels of the orange panel's hue."""
    red, green, blue = (picture[..., i].astype(int) for i in range(3))
    return float(((red - blue > 90) & (red - green > 40) & (red > 140)).mean())


def blue_share(picture: np.ndarray) -> float:
    red, green, blue = (picture[..., i].astype(int) for i in range(3))
    return float(((blue - red > 45) & (blue > green) & (blue > 90)).mean())


@pytest.mark.slow
@pytest.mark.parametrize("agreement", [1.0, 0.0])
def test_the_context_agrees_with_the_right_arm_as_often_as_asked(agreement: float) -> None:
    config = replace(CONFIG, spurious_context=agreement, context=1.0, clutter=0.0, occlusion=0.0, max_persons=1)
    right = total = 0
    for index in range(24):
        picture, people = render_image(config, index)
        plain, _ = render_image(replace(config, context=0.0), index)
        raised = right_wrist_is_up(people[0]) if people else None
        orange, blue = orange_share(picture) - orange_share(plain), blue_share(picture) - blue_share(plain)
        if raised is None or abs(orange - blue) < 0.004:
            continue
        total += 1
        right += (orange > blue) == raised
    assert total >= 12
    # The colours tell the objects apart in all but a few scenes.
    assert right / total == pytest.approx(agreement, abs=0.15)


def test_a_board_before_the_right_arm_keeps_its_labels() -> None:
    hidden = 0
    for index in range(12):
        plain = replace(CONFIG, occlusion=0.0, max_persons=1)
        _, before = render_image(plain, index)
        _, after = render_image(replace(plain, hide_arm=1.0), index)
        assert len(before) == len(after)
        for one, two in zip(before, after, strict=True):
            a, b = keypoints(one), keypoints(two)
            np.testing.assert_array_equal(a[:, :2], b[:, :2])
            np.testing.assert_array_equal(a[:, 2] > 0, b[:, 2] > 0)
            assert (b[:, 2] <= a[:, 2]).all()
            assert one["righthand_valid"] == two["righthand_valid"] and one["area"] == two["area"]
            assert not (b[RIGHT_ARM, 2] == 2).any(), "part of the arm shows past the board"
            hidden += int((a[RIGHT_ARM, 2] == 2).sum())
    assert hidden > 50


def test_left_and_right_are_the_persons() -> None:
    """A person who faces the camera has their left on the right of the picture, one seen from behind on the left."""
    index = COCO_WHOLEBODY.flip_index
    paired = index != np.arange(133)
    left = paired & (index > np.arange(133))
    left[23:91] = False  # the face's first half is the person's right
    rng = np.random.default_rng(3)
    seen = {True: 0, False: 0}
    for _ in range(60):
        person = sample_person(rng, 1.0, 0.33)
        if abs(np.cos(person.pose.yaw)) < 0.9 or abs(person.pose.torso[0, 0]) < 0.9:
            continue
        figure = Figure(person, Placement(200, 160, 250, 4))
        front = person.pose.torso[0, 0] > 0
        canvas = Canvas(np.zeros((320, 400, 3), np.uint8), Light(np.array([0, 0, -1.0]), 0.5, 0.7))
        points = paint_figure(canvas, figure).points
        for a in (5, 11):
            assert (points[a, 0] > points[a + 1, 0]) == front
        if abs(person.pose.head[0, 0]) > 0.8:
            assert (points[1, 0] > points[2, 0]) == (person.pose.head[0, 0] > 0)
            face_right = points[23:31, 0].mean() < points[32:40, 0].mean()
            assert face_right == (person.pose.head[0, 0] > 0)
        seen[front] += 1
    assert seen[True] > 5 and seen[False] > 0
    names = COCO_WHOLEBODY.names
    assert all("left" in names[i] for i in np.flatnonzero(left))


def test_the_face_is_symmetric_under_the_keypoint_sets_flip() -> None:
    index = COCO_WHOLEBODY.flip_index[23:91] - 23
    np.testing.assert_allclose(TEMPLATE[index] * (-1, 1, 1), TEMPLATE)
    assert TEMPLATE.shape == (68, 3) and len(FIRM) == 18


def test_landmarks_of_the_averted_half_of_a_face_are_hidden() -> None:
    face = sample_face(np.random.default_rng(0))
    assert landmark_visible(face, np.eye(3)).mean() > 0.95
    from_behind = landmark_visible(face, rotate_y(np.pi))
    assert not from_behind[17:].any()
    # Turned to their left, the person shows the right half: eye 36-41, not 42-47.
    turned = landmark_visible(face, rotate_y(1.3))
    assert turned[36:42].all() and not turned[42:48].any()


def test_limbs_keep_their_length_and_joints_their_limits() -> None:
    rng = np.random.default_rng(1)
    for _ in range(200):
        build = sample_build(rng)
        pose = sample_pose(rng, build, 1.0, 0.33)
        for limb, lengths, limit in (
            (pose.left_arm, (UPPER_ARM, FOREARM), ELBOW_LIMIT),
            (pose.right_arm, (UPPER_ARM, FOREARM), ELBOW_LIMIT),
            (pose.left_leg, (THIGH * build.leg, SHIN * build.leg), KNEE_LIMIT),
            (pose.right_leg, (THIGH * build.leg, SHIN * build.leg), KNEE_LIMIT),
        ):
            bones = np.diff(limb.joints, axis=0)
            np.testing.assert_allclose(np.linalg.norm(bones, axis=1), lengths, rtol=1e-9)
            cosine = bones[0] @ bones[1] / np.prod(lengths)
            assert np.arccos(np.clip(cosine, -1, 1)) <= limit + 0.02
            np.testing.assert_allclose(limb.frame.T @ limb.frame, np.eye(3), atol=1e-9)
        for leg in (pose.left_leg, pose.right_leg):
            # A knee bends backwards: seen from the pelvis the shin never points further forward than the thigh.
            thigh, shin = (pose.pelvis.T @ bone for bone in np.diff(leg.joints, axis=0))
            assert np.arctan2(shin[2], shin[1]) >= np.arctan2(thigh[2], thigh[1]) - 0.15


def test_turn_and_bent_legs_bound_the_poses() -> None:
    rng = np.random.default_rng(4)
    ahead = [sample_pose(rng, sample_build(rng), 0.0, 0.0) for _ in range(100)]
    assert not any(pose.legs_bent for pose in ahead)
    assert all(pose.yaw == 0 for pose in ahead)
    assert all(sample_pose(rng, sample_build(rng), 1.0, 1.0).legs_bent for _ in range(100))


def test_close_ups_cut_the_person() -> None:
    def share_with_an_ankle(close_ups: float) -> float:
        config = replace(CONFIG, max_persons=1, occlusion=0.0, close_ups=close_ups)
        people = [person for index in range(30) for person in render_image(config, index)[1]]
        return float(np.mean([keypoints(person)[15:17, 2].any() for person in people]))

    assert share_with_an_ankle(1.0) < 0.2
    assert share_with_an_ankle(0.0) > 0.9


def test_hands_have_the_same_bones_in_every_gesture_and_are_mirror_images() -> None:
    rng = np.random.default_rng(2)
    lengths = [
        np.linalg.norm(np.diff(sample_hand(rng).points[np.array(BONES)], axis=1)[:, 0], axis=1) for _ in range(30)
    ]
    np.testing.assert_allclose(lengths, np.broadcast_to(lengths[0], (30, 15)), rtol=1e-9)
    for _ in range(50):
        pose = sample_pose(rng, sample_build(rng), 1.0, 0.33)
        assert np.linalg.det(pose.left_arm.frame) == pytest.approx(-np.linalg.det(pose.right_arm.frame))


@pytest.mark.slow
def test_a_person_hidden_by_another_is_labelled_as_hidden() -> None:
    """Keypoints of the far person inside the near person's silhouette have v = 1."""
    config = replace(CONFIG, occlusion=0.0, max_persons=3)
    checked = hidden = 0
    for index in range(40):
        _, people = render_image(config, index)
        for far, near in itertools.pairwise(people):
            mask = np.zeros((320, 400), np.uint8)
            for polygon in near["segmentation"]:
                cv2.fillPoly(mask, [np.array(polygon).reshape(-1, 1, 2).astype(np.int32)], 1)
            mask = cv2.erode(mask, np.ones((7, 7)))
            table = keypoints(far)
            covered = [mask[round(y), round(x)] for x, y, _ in table]
            behind = table[np.array(covered, bool) & (table[:, 2] > 0)]
            hidden += int((behind[:, 2] == 1).sum())
            checked += len(behind)
    # A polygon has no holes: through a bent arm the far person may be seen all the same.
    assert checked > 20
    assert hidden / checked > 0.9


@pytest.mark.parametrize("size", [(64, 64), (640, 200), (199, 331)], ids=["smallest", "wide", "odd"])
def test_any_picture_size_works(size: tuple[int, int]) -> None:
    picture, _ = render_image(replace(CONFIG, image_size=size, hide_arm=1.0, occlusion=1.0, clutter=1.0), 3)
    assert picture.shape == (size[1], size[0], 3) and picture.dtype == np.uint8


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("num_images", 0, "num_images must be between 1 and"),
        ("image_size", (400, 32), "image_size must be at least 64 x 64"),
        ("max_persons", 0, "max_persons must be between 1 and"),
        ("context", 1.5, "context must be between 0 and 1"),
        ("hide_arm", -0.1, "hide_arm must be between 0 and 1"),
    ],
)
def test_a_knob_out_of_range_is_refused(field: str, value: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(CONFIG, **{field: value})


def test_the_stage_writes_the_dataset_that_params_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    preset = Path(stage.__file__).parents[1] / "cigpose" / "presets" / "quickstart.yaml"
    monkeypatch.chdir(tmp_path)
    Path("params.yaml").write_text(preset.read_text().replace("num_images: 160", "num_images: 2"))
    assert stage.main(["rendered-val"]) == 0
    assert sorted(path.name for path in Path("data/raw/rendered-val").iterdir()) == ["annotations.json", "images.zip"]


def test_the_stage_refuses_what_params_do_not_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    preset = Path(stage.__file__).parents[1] / "cigpose" / "presets" / "quickstart.yaml"
    monkeypatch.chdir(tmp_path)
    Path("params.yaml").write_text(preset.read_text())
    assert stage.main(["nosuch"]) == 1
    refused = "render: params.yaml: data.render has no 'nosuch', only ['rendered-train', 'rendered-val']."
    assert capsys.readouterr().err.startswith(refused)
