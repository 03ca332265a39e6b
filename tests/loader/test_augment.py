from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest

from cigpose.config import AugmentationStage
from cigpose.crop import box_to_center_scale, crop_image, crop_matrix, crop_to_image, fix_aspect_ratio, transform_points
from cigpose.keypoints import COCO, COCO_WHOLEBODY
from cigpose.loader.augment import (
    PersonBox,
    augment_person,
    change_box,
    draw_box_change,
    flip,
    half_body,
    person_matrix,
    random_half_body,
)

SIZES = {"256x192": (192, 256), "384x288": (288, 384)}
STAGES = {
    "stage1_m_l": AugmentationStage(),
    "stage2_m_l": AugmentationStage(shift_factor=0.0, scale_range=(0.75, 1.25), rotate_degrees=60.0),
    "stage1_x": AugmentationStage(scale_range=(0.5, 1.5), rotate_degrees=90.0),
    "stage2_x": AugmentationStage(shift_factor=0.0, scale_range=(0.5, 1.5), rotate_degrees=90.0),
}
GREY_LEVEL = 1


@pytest.fixture(scope="module")
def folder(golden: Path) -> Path:
    return golden / "transforms"


@pytest.fixture(scope="module")
def affine(folder: Path) -> dict[str, np.ndarray]:
    return dict(np.load(folder / "affine_and_flip.npz"))


@pytest.fixture(scope="module")
def large_folder(large_golden: Path) -> Path:
    return large_golden / "transforms"


@pytest.fixture(scope="module")
def pixels(folder: Path) -> dict[str, np.ndarray]:
    """Scattered pixels of the reference's crops, and what they are made of."""
    return dict(np.load(folder / "pixels.npz"))


def sparse_image(affine: dict[str, np.ndarray], row: int, pixels: dict[str, np.ndarray], name: str) -> np.ndarray:
    """The picture as far as the kept pixels of a crop are made of it; noise elsewhere."""
    width, height = affine["image_wh"][row].tolist()
    margin = 1000  # squares may lie outside of the picture
    rng = np.random.default_rng(0)
    padded = rng.integers(0, 256, (height + 2 * margin, width + 2 * margin, 3), dtype=np.uint8)
    for (x, y), square in zip(pixels[f"{name}/corner"] + margin, pixels[f"{name}/around"], strict=True):
        padded[y : y + square.shape[0], x : x + square.shape[1]] = square
    return padded[margin:-margin, margin:-margin]


def assert_kept_pixels_equal(crop: np.ndarray, pixels: dict[str, np.ndarray], name: str) -> None:
    x, y = pixels[f"{name}/place"].T
    assert np.abs(crop[y, x].astype(int) - pixels[f"{name}/pixel"]).max() <= GREY_LEVEL


def image_of(large_folder: Path, affine: dict[str, np.ndarray], row: int) -> np.ndarray:
    return cv2.imread(str(large_folder / "images" / f"{affine['img_id'][row]:012d}.png"))


def reference_crop(large_folder: Path, name: str) -> np.ndarray:
    return cv2.imread(str(large_folder / "crops" / f"{name}.png")).astype(int)


def person_of(affine: dict[str, np.ndarray], row: int, width: int = 640) -> PersonBox:
    return PersonBox(
        keypoints=affine["keypoints"][row],
        visible=affine["visible"][row].astype(np.float32),
        center=affine["center"][row],
        scale=affine["scale_padded"][row],
        image_size=(width, 480),
    )


def some_person(num_visible: int = 17) -> PersonBox:
    rng = np.random.default_rng(3)
    visible = np.zeros(17, dtype=np.float32)
    visible[:num_visible] = 1
    return PersonBox(
        keypoints=rng.uniform(20, 200, (17, 2)),
        visible=visible,
        center=np.array([110.0, 110.0]),
        scale=np.array([200.0, 230.0]),
        image_size=(320, 240),
    )


# Geometry


def test_crop_matrices_equal_the_reference(golden: Path) -> None:
    units = np.load(golden / "units" / "warp_matrix.npz")
    for center, scale, rotation, size, matrix in zip(
        *(units[name] for name in ("center", "scale", "rotation", "output_wh", "matrix")), strict=True
    ):
        np.testing.assert_allclose(crop_matrix(center, scale, rotation, size), matrix, rtol=0, atol=1e-9)


@pytest.mark.parametrize("tag", SIZES)
def test_boxes_give_the_reference_crop_and_keypoints(affine: dict[str, np.ndarray], tag: str) -> None:
    center, scale = box_to_center_scale(affine["bbox_xyxy"], 1.25)
    np.testing.assert_array_equal(center, affine["center"])
    np.testing.assert_allclose(scale, affine["scale_padded"], rtol=1e-6)
    np.testing.assert_allclose(fix_aspect_ratio(scale, SIZES[tag]), affine[f"{tag}/input_scale"], rtol=1e-6)
    for row in range(len(center)):
        matrix = person_matrix(person_of(affine, row), SIZES[tag])
        np.testing.assert_allclose(matrix, affine[f"{tag}/matrix"][row], rtol=1e-6, atol=1e-4)
        points = transform_points(matrix, affine["keypoints"][row])
        np.testing.assert_allclose(points, affine[f"{tag}/transformed_keypoints"][row], rtol=1e-5, atol=1e-3)


def test_a_flipped_person_is_the_reference_one(affine: dict[str, np.ndarray]) -> None:
    for row, (width, _) in enumerate(affine["image_wh"].tolist()):
        flipped = flip(person_of(affine, row, width), COCO_WHOLEBODY.flip_index)
        np.testing.assert_allclose(flipped.keypoints, affine["flip/keypoints"][row])
        np.testing.assert_array_equal(flipped.visible, affine["flip/visible"][row])
        np.testing.assert_allclose(flipped.center, affine["flip/center"][row], rtol=1e-6)
        matrix = person_matrix(flipped, SIZES["256x192"])
        np.testing.assert_allclose(matrix, affine["flip/256x192/matrix"][row], rtol=1e-6, atol=1e-4)


def test_a_person_flipped_twice_is_the_same() -> None:
    person = change_box(some_person(), np.array([0.1, -0.05]), 1.1, 25.0)
    again = flip(flip(person, COCO.flip_index), COCO.flip_index)
    np.testing.assert_allclose(again.keypoints, person.keypoints)
    np.testing.assert_allclose(again.center, person.center)
    assert (again.mirrored, again.rotation) == (person.mirrored, person.rotation)


def test_keypoints_come_back_from_the_crop_to_the_image() -> None:
    size = (192, 256)
    center = np.array([[100.0, 80.0], [33.5, 250.25]])
    scale = fix_aspect_ratio(np.array([[120.0, 60.0], [31.0, 97.0]]), size)
    points = np.random.default_rng(0).uniform(-50, 300, (2, 17, 2))
    crop = np.stack(
        [transform_points(crop_matrix(c, s, 0.0, size), p) for c, s, p in zip(center, scale, points, strict=True)]
    )
    np.testing.assert_allclose(crop_to_image(crop, center, scale, size), points, atol=1e-3)
    np.testing.assert_allclose(crop_to_image(crop[1], center[1], scale[1], size), points[1], atol=1e-3)


# Half body and box


class Draws:
    """A generator whose uniform draws are known."""

    def __init__(self, values: list[float]) -> None:
        self.values = values

    def random(self, size: int) -> np.ndarray:
        return np.array(self.values[:size])


def test_half_body_takes_the_reference_branches(folder: Path, affine: dict[str, np.ndarray]) -> None:
    records = json.loads((folder / "half_body.json").read_text())
    rows = {int(ann): row for row, ann in enumerate(affine["ann_id"])}
    for record in records:
        person = person_of(affine, rows[record["ann_id"]])
        if "visible_override" in record:
            person = replace(person, visible=np.isin(np.arange(133), record["visible_override"]).astype(np.float32))
        draws, stage = Draws(record["rand_draws"]), AugmentationStage(half_body_prob=1.0)
        result = random_half_body(person, draws, stage, COCO_WHOLEBODY)  # type: ignore[arg-type]
        np.testing.assert_allclose(result.center, record["center"], rtol=1e-6)
        np.testing.assert_allclose(result.scale, record["scale"], rtol=1e-6)
    assert {record["branch"] for record in records} == {"upper", "lower", "none"}


@pytest.mark.parametrize(("num_visible", "changes"), [(8, False), (9, True)], ids=["8 visible", "9 visible"])
def test_half_body_needs_nine_visible_keypoints(num_visible: int, changes: bool) -> None:
    person = some_person(num_visible)
    stage = AugmentationStage(half_body_prob=1.0)
    assert (random_half_body(person, np.random.default_rng(0), stage, COCO) is not person) == changes


def test_half_body_has_its_probabilities() -> None:
    rng, person = np.random.default_rng(0), some_person()
    results = [random_half_body(person, rng, AugmentationStage(), COCO) for _ in range(4000)]
    upper = half_body(person, True, COCO)
    changed = [result for result in results if result is not person]
    share = np.mean([np.array_equal(result.center, upper.center) for result in changed])
    assert abs(len(changed) / 4000 - 0.3) < 0.03  # 4 standard errors
    assert abs(share - 0.7) < 0.055


def check_box_changes(folder: Path, affine: dict[str, np.ndarray], setting: str, kept: str) -> None:
    """Our changes of the boxes against a table of the reference, which holds every keypoint or `[:, ::7]` of them."""
    table = {
        name.split("/", 1)[1]: values
        for name, values in np.load(folder / "bbox_transform.npz").items()
        if name.startswith(f"{setting}/")
    }
    rows = {int(ann): row for row, ann in enumerate(affine["ann_id"])}
    for i, ann in enumerate(table["ann_id"].tolist()):
        person = change_box(
            person_of(affine, rows[ann]), table["offset"][i], float(table["scale"][i]), float(table["rotation"][i])
        )
        np.testing.assert_allclose(person.center, table["center_out"][i], rtol=1e-5)
        np.testing.assert_allclose(person.scale, table["scale_out"][i], rtol=1e-5)
        matrix = person_matrix(person, SIZES["256x192"])
        np.testing.assert_allclose(matrix, table["matrix_256x192"][i], rtol=1e-5, atol=1e-3)
        points = transform_points(matrix, person.keypoints)[:: 7 if kept else 1]
        np.testing.assert_allclose(points, table[f"transformed_keypoints_256x192{kept}"][i], rtol=1e-4, atol=5e-3)


@pytest.mark.parametrize("setting", STAGES)
def test_box_changes_equal_the_reference(folder: Path, affine: dict[str, np.ndarray], setting: str) -> None:
    check_box_changes(folder, affine, setting, "[:, ::7]")


@pytest.mark.parametrize("setting", STAGES)
def test_box_changes_equal_the_large_set_in_every_keypoint(
    large_folder: Path, affine: dict[str, np.ndarray], setting: str
) -> None:
    check_box_changes(large_folder, affine, setting, "")


@pytest.mark.parametrize("setting", STAGES)
def test_box_draws_have_the_reference_distribution(folder: Path, setting: str) -> None:
    expected = json.loads((folder / "bbox_transform_statistics.json").read_text())[setting]
    rng, stage, num = np.random.default_rng(0), STAGES[setting], 20_000
    offsets, scales, rotations = map(np.array, zip(*(draw_box_change(rng, stage) for _ in range(num)), strict=True))
    shifted, rotated = (offsets != 0).any(axis=1), rotations != 0
    error = 4 * 0.5 / np.sqrt(num)
    assert abs(shifted.mean() - expected["fraction_shifted"]) < error
    assert abs(rotated.mean() - expected["fraction_rotated"]) < error
    levels = expected["quantile_levels"]
    low, high = stage.scale_range

    def check(values: np.ndarray, quantiles: list[float], half_range: float) -> None:
        # The density inside [-1, 1] is at least 0.35, so a quantile is off by at most its level's error / 0.35.
        np.testing.assert_allclose(np.quantile(values, levels), quantiles, atol=half_range * 2 * error / 0.35)

    check(scales, expected["scale_quantiles"], (high - low) / 2)
    check(rotations[rotated], expected["rotation_quantiles_given_rotated"], stage.rotate_degrees)
    if stage.shift_factor:
        check(offsets[shifted, 0], expected["shift_x_quantiles_given_shifted"], stage.shift_factor)
    assert np.abs(offsets).max() <= stage.shift_factor
    assert low <= scales.min() and scales.max() <= high


def test_augmenting_changes_nothing_of_its_argument_and_depends_on_the_generator_alone() -> None:
    person = some_person()
    kept = (person.keypoints.copy(), person.visible.copy(), person.center.copy(), person.scale.copy())
    results = [augment_person(person, np.random.default_rng(seed), AugmentationStage(), COCO) for seed in (1, 1, 2)]
    for before, after in zip(kept, (person.keypoints, person.visible, person.center, person.scale), strict=True):
        np.testing.assert_array_equal(before, after)
    np.testing.assert_array_equal(results[0].center, results[1].center)
    assert results[0].rotation == results[1].rotation
    assert not np.array_equal(results[0].scale, results[2].scale)


# Pixels


CROPS = [("256x192", 442619), ("256x192", 437295), ("256x192", 460541), ("384x288", 437295)]


def crop_of(image: np.ndarray, affine: dict[str, np.ndarray], tag: str, ann: int) -> np.ndarray:
    """Our crop of a person."""
    row = affine["ann_id"].tolist().index(ann)
    return crop_image(image, person_matrix(person_of(affine, row), SIZES[tag]), SIZES[tag])


def flipped_crop_of(image: np.ndarray, affine: dict[str, np.ndarray]) -> np.ndarray:
    """Our crop of person 437295 in the mirrored picture."""
    row = affine["ann_id"].tolist().index(437295)
    person = flip(person_of(affine, row, image.shape[1]), COCO_WHOLEBODY.flip_index)
    return crop_image(image, person_matrix(person, SIZES["256x192"]), SIZES["256x192"], person.mirrored)


def changed_crop_of(image: np.ndarray, folder: Path, seed: int) -> np.ndarray:
    """Our crop of person 437295 after the reference's change of its box."""
    table = np.load(folder / "bbox_transform.npz")
    pick = (table["stage1_m_l/ann_id"] == 437295) & (table["stage1_m_l/seed"] == seed)
    return crop_image(image, table["stage1_m_l/matrix_256x192"][pick][0], SIZES["256x192"])


@pytest.mark.parametrize(("tag", "ann"), CROPS)
def test_pixels_of_crops_equal_the_reference(
    affine: dict[str, np.ndarray], pixels: dict[str, np.ndarray], tag: str, ann: int
) -> None:
    name, row = f"{tag}_ann{ann}", affine["ann_id"].tolist().index(ann)
    crop = crop_of(sparse_image(affine, row, pixels, name), affine, tag, ann)
    assert_kept_pixels_equal(crop, pixels, name)


def test_pixels_of_the_crop_of_a_flipped_person_equal_the_reference(
    affine: dict[str, np.ndarray], pixels: dict[str, np.ndarray]
) -> None:
    name, row = "256x192_ann437295_flipped", affine["ann_id"].tolist().index(437295)
    assert_kept_pixels_equal(flipped_crop_of(sparse_image(affine, row, pixels, name), affine), pixels, name)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_pixels_of_shifted_scaled_and_turned_crops_equal_the_reference(
    folder: Path, affine: dict[str, np.ndarray], pixels: dict[str, np.ndarray], seed: int
) -> None:
    name, row = f"256x192_ann437295_bboxtransform_seed{seed}", affine["ann_id"].tolist().index(437295)
    assert_kept_pixels_equal(changed_crop_of(sparse_image(affine, row, pixels, name), folder, seed), pixels, name)


def test_whole_crops_of_real_pictures_equal_the_reference(large_folder: Path, affine: dict[str, np.ndarray]) -> None:
    found = {}
    for tag, ann in CROPS:
        image = image_of(large_folder, affine, affine["ann_id"].tolist().index(ann))
        found[f"{tag}_ann{ann}"] = crop_of(image, affine, tag, ann)
    image = image_of(large_folder, affine, affine["ann_id"].tolist().index(437295))
    found["256x192_ann437295_flipped"] = flipped_crop_of(image, affine)
    for seed in range(3):
        found[f"256x192_ann437295_bboxtransform_seed{seed}"] = changed_crop_of(image, large_folder, seed)
    for name, crop in found.items():
        assert np.abs(crop - reference_crop(large_folder, name)).max() <= GREY_LEVEL, name


def test_a_mirrored_crop_is_the_crop_of_the_mirrored_picture() -> None:
    rng = np.random.default_rng(5)
    image = rng.integers(0, 256, (90, 121, 3), dtype=np.uint8)
    for _ in range(30):
        matrix = crop_matrix(rng.uniform(-20, 130, 2), rng.uniform(5, 300, 2), rng.uniform(-180, 180), (48, 64))
        direct = crop_image(cv2.flip(image, 1), matrix, (48, 64))
        mirrored = crop_image(image, matrix, (48, 64), mirrored=True)
        assert np.abs(direct.astype(int) - mirrored).max() <= GREY_LEVEL


@pytest.mark.parametrize(
    ("center", "scale"),
    [((1e6, -1e6), 50.0), ((40000.0, 20.0), 100.0), ((30.0, 30.0), 1e6)],
    ids=["far outside", "beyond 16 bits", "huge box"],
)
def test_a_crop_far_outside_the_picture_is_black(center: tuple[float, float], scale: float) -> None:
    image = np.full((60, 60, 3), 255, dtype=np.uint8)
    crop = crop_image(image, crop_matrix(np.array(center), np.array([scale, scale]), 0.0, (48, 48)), (48, 48))
    assert crop[:20, :20].max() == 0
