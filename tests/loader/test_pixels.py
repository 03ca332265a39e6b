from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import albumentations
import cv2
import numpy as np
import pytest

from cigpose.config import AugmentationStage, Config, load_preset
from cigpose.config.schema import ConfigError
from cigpose.keypoints import COCO
from cigpose.loader.pixels import BlackDropout, PixelAugmentation, change_hsv, check_extra, draw_hsv_gains

GREY_LEVEL = 1
NOTHING = np.zeros((17, 2)), np.zeros(17, dtype=np.float32)


@pytest.fixture(scope="module")
def folder(golden: Path) -> Path:
    return golden / "transforms"


@pytest.fixture(scope="module")
def large_folder(large_golden: Path) -> Path:
    return large_golden / "transforms"


@pytest.fixture(scope="module")
def pixels(folder: Path) -> dict[str, np.ndarray]:
    """Scattered pixels of the reference's crops, and what they are made of."""
    return dict(np.load(folder / "pixels.npz"))


def reference_crop(large_folder: Path, name: str) -> np.ndarray:
    return cv2.imread(str(large_folder / "crops" / f"{name}.png")).astype(int)


def changed_pixels(augmentation: PixelAugmentation, crop: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return augmentation(crop, *NOTHING, rng)[0]


# The original's steps


def hsv_gains(folder: Path, seed: int) -> list[int]:
    """The reference's draws of a seed."""
    cases = json.loads((folder / "hsv.json").read_text())["cases"]
    return next(case["gains"] for case in cases if case["seed"] == seed)


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_hsv_changes_of_pixels_equal_the_reference(folder: Path, pixels: dict[str, np.ndarray], seed: int) -> None:
    before, after = (pixels[f"256x192_ann437295{suffix}/pixel"][None] for suffix in ("", f"_hsv_seed{seed}"))
    changed = change_hsv(np.ascontiguousarray(before[..., ::-1]), hsv_gains(folder, seed))[..., ::-1]
    assert np.abs(changed.astype(int) - after).max() <= GREY_LEVEL


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_hsv_changes_of_whole_crops_equal_the_reference(large_folder: Path, seed: int) -> None:
    crop = reference_crop(large_folder, "256x192_ann437295").astype(np.uint8)[..., ::-1]
    changed = change_hsv(np.ascontiguousarray(crop), hsv_gains(large_folder, seed))[..., ::-1]
    assert np.abs(changed - reference_crop(large_folder, f"256x192_ann437295_hsv_seed{seed}")).max() <= GREY_LEVEL


@pytest.mark.parametrize("gains", [(0, 0, 0), (5, 30, -30), (-5, -30, 30), (90, 255, -255), (-170, -999, 999)])
def test_hsv_changes_are_the_plain_formula(gains: tuple[int, int, int]) -> None:
    crop = np.random.default_rng(0).integers(0, 256, (40, 30, 3), dtype=np.uint8)
    kept = crop.copy()
    hsv = cv2.cvtColor(crop, cv2.COLOR_RGB2HSV).astype(int) + gains
    hsv[..., 0] %= 180
    expected = cv2.cvtColor(np.clip(hsv, 0, 255).astype(np.uint8), cv2.COLOR_HSV2RGB)
    np.testing.assert_array_equal(change_hsv(crop, gains), expected)
    np.testing.assert_array_equal(crop, kept)


def test_hsv_gains_have_the_reference_distribution(folder: Path) -> None:
    expected = json.loads((folder / "hsv.json").read_text())["statistics"]
    rng, num = np.random.default_rng(0), 20_000
    gains = np.array([draw_hsv_gains(rng, AugmentationStage()) for _ in range(num)])
    np.testing.assert_allclose((gains == 0).mean(axis=0), expected["fraction_zero"], atol=4 * 0.5 / np.sqrt(num))
    np.testing.assert_array_equal(gains.min(axis=0), expected["min"])
    np.testing.assert_array_equal(gains.max(axis=0), expected["max"])
    np.testing.assert_allclose(gains.std(axis=0), expected["std"], rtol=0.03)


def quiet(**changes: Any) -> AugmentationStage:
    """A stage without any pixel change but those named."""
    values = {"hsv_delta": (0, 0, 0), "blur_prob": 0.0, "median_blur_prob": 0.0, "dropout_prob": 0.0, **changes}
    return AugmentationStage(**values)


def test_dropout_has_the_reference_distribution(folder: Path) -> None:
    expected = json.loads((folder / "coarse_dropout_statistics.json").read_text())
    height, width = expected["image_hw"]
    augmentation, rng, num = PixelAugmentation(quiet(dropout_prob=1.0), COCO), np.random.default_rng(0), 1500
    white = np.full((height, width, 3), 255, dtype=np.uint8)
    holes = []
    for _ in range(num):
        rows, columns = np.nonzero(changed_pixels(augmentation, white, rng)[..., 0] == 0)
        top, left, bottom, right = rows.min(), columns.min(), rows.max() + 1, columns.max() + 1
        assert len(rows) == (bottom - top) * (right - left)
        holes.append(((bottom - top) / height, (right - left) / width, top, left))
    levels = expected["quantile_levels"]
    found = np.quantile(np.array(holes, dtype=float), levels, axis=0).T
    names = ("hole_height_fraction", "hole_width_fraction", "hole_top", "hole_left")
    # Uniform draws: 4 standard errors of a level (0.052 here), times the range, and a pixel for rounding.
    for name, values, spread, pixel in zip(names, found, (0.2, 0.2, 205, 154), (1 / 256, 1 / 192, 1, 1), strict=True):
        np.testing.assert_allclose(values, expected[f"{name}_quantiles"], atol=0.052 * spread + 2 * pixel)


def test_a_hole_is_the_one_that_the_library_would_draw() -> None:
    sizes = {"hole_height_range": (0.2, 0.4), "hole_width_range": (0.2, 0.4), "num_holes_range": (1, 1), "p": 1.0}
    ours, library = BlackDropout(**sizes), albumentations.CoarseDropout(**sizes)
    for seed in range(200):
        rngs = [np.random.default_rng(seed) for _ in range(2)]
        for transform, rng in zip((ours, library), rngs, strict=True):
            rng.integers(9, size=seed % 2)  # half of the 64 bits may be left of the draw before
            transform.set_random_state(rng, random.Random(seed))
        drawn, expected = (one.get_params_dependent_on_data({"shape": (256, 192, 3)}, {}) for one in (ours, library))
        np.testing.assert_array_equal(drawn["holes"], expected["holes"])
        assert rngs[0].bit_generator.state == rngs[1].bit_generator.state, "for transforms that come after it"


def test_a_hole_may_be_as_large_as_the_crop() -> None:
    augmentation = PixelAugmentation(quiet(dropout_prob=1.0, dropout_size=(1.0, 1.0)), COCO)
    white = np.full((64, 48, 3), 255, dtype=np.uint8)
    assert not changed_pixels(augmentation, white, np.random.default_rng(0)).any()


@pytest.mark.parametrize("name", ["blur_prob", "median_blur_prob"])
def test_blurs_come_with_their_probability_and_every_odd_size(name: str) -> None:
    augmentation, rng = PixelAugmentation(quiet(**{name: 0.5}), COCO), np.random.default_rng(0)
    crop = np.random.default_rng(1).integers(0, 256, (24, 20, 3), dtype=np.uint8)
    plain = change_hsv(crop, (0, 0, 0))
    known = {plain.tobytes(): 0}
    for size in (3, 5, 7):
        blurred = cv2.blur(plain, (size, size)) if name == "blur_prob" else cv2.medianBlur(plain, size)
        known[blurred.tobytes()] = size
    sizes = [known[changed_pixels(augmentation, crop, rng).tobytes()] for _ in range(1200)]
    assert abs(np.mean([size == 0 for size in sizes]) - 0.5) < 4 * 0.5 / np.sqrt(1200)
    for size in (3, 5, 7):
        assert abs(sizes.count(size) / 1200 - 1 / 6) < 4 * np.sqrt(1 / 6 / 1200)


def test_equal_generators_give_equal_pixels_whatever_came_before() -> None:
    crop = np.random.default_rng(1).integers(0, 256, (64, 48, 3), dtype=np.uint8)
    kept = crop.copy()
    extra = ({"RandomBrightnessContrast": {"p": 0.5}}, {"GaussNoise": None}, {"Affine": {"rotate": [-20, 20]}})
    stage = AugmentationStage(blur_prob=0.5, median_blur_prob=0.5, extra=extra)
    used = PixelAugmentation(stage, COCO)
    for seed in range(20):
        changed_pixels(used, crop, np.random.default_rng(1000 + seed))
        fresh = changed_pixels(PixelAugmentation(stage, COCO), crop, np.random.default_rng(seed))
        np.testing.assert_array_equal(changed_pixels(used, crop, np.random.default_rng(seed)), fresh)
    np.testing.assert_array_equal(crop, kept)


# The user's transforms


def test_without_extra_transforms_keypoints_are_not_touched() -> None:
    keypoints, visible = np.random.default_rng(0).uniform(-9, 99, (17, 2)), np.ones(17, dtype=np.float32)
    crop = np.zeros((64, 48, 3), dtype=np.uint8)
    _, moved, seen = PixelAugmentation(AugmentationStage(), COCO)(crop, keypoints, visible, np.random.default_rng(0))
    assert moved is keypoints and seen is visible


def with_extra(*entries: dict[str, Any], stage: str = "stage1", input_size: tuple[int, int] = (192, 256)) -> Config:
    base = load_preset("cigpose-m_coco_256x192")
    changed = replace(getattr(base.augmentation, stage), extra=entries)
    model = replace(base.model, input_size=input_size)
    return replace(base, model=model, augmentation=replace(base.augmentation, **{stage: changed}))


def dots(augmentation: PixelAugmentation, keypoints: np.ndarray, seed: int) -> Iterator[np.ndarray | None]:
    """Where a dot burnt in at each keypoint is found afterwards, each in a crop of its own; None where it is gone."""
    y, x = np.mgrid[:256, :192]
    for point in keypoints:
        dot = 255 * np.exp(-((x - point[0]) ** 2 + (y - point[1]) ** 2) / (2 * 2.0**2))
        crop = np.repeat(dot.astype(np.uint8)[..., None], 3, axis=2)
        made = augmentation(crop, *NOTHING, np.random.default_rng(seed))[0][..., 0].astype(float)
        made[made < made.max() / 2] = 0
        yield np.array([(made * x).sum(), (made * y).sum()]) / made.sum() if made.max() > 100 else None


MOVING: dict[str, dict[str, Any]] = {
    "HorizontalFlip": {},
    "VerticalFlip": {},
    "Rotate": {"limit": [-60, 60]},
    "SafeRotate": {"limit": [-60, 60]},
    "Affine": {"scale": [0.7, 1.3], "translate_percent": [-0.3, 0.3], "shear": [-15, 15], "rotate": [-30, 30]},
    "ShiftScaleRotate": {"rotate_limit": 20},
    "Perspective": {"scale": [0.05, 0.15]},
    "RandomResizedCrop": {"size": [256, 192], "scale": [0.4, 1.0]},
    "CropAndPad": {"percent": [-0.2, 0.2]},
    "ElasticTransform": {"alpha": 600, "sigma": 12},
    "GridDistortion": {},
    "OpticalDistortion": {"distort_limit": [-0.2, 0.2]},
    "OneOf": {"transforms": [{"HorizontalFlip": {"p": 1}}, {"VerticalFlip": {"p": 1}}]},
    "Sequential": {"transforms": [{"HorizontalFlip": {"p": 1}}, {"VerticalFlip": {"p": 1}}]},
}


MIRRORING = {"HorizontalFlip", "VerticalFlip", "OneOf"}  # two flips one after the other turn a crop


@pytest.mark.parametrize("name", MOVING)
def test_keypoints_go_where_the_dots_burnt_into_the_crop_go(name: str) -> None:
    augmentation = PixelAugmentation(quiet(extra=({name: {**MOVING[name], "p": 1.0}},)), COCO)
    order = COCO.flip_index if name in MIRRORING else np.arange(17)
    num_found = 0
    for seed in range(3):
        rng = np.random.default_rng(seed)
        keypoints, visible = rng.uniform(12, [180, 244], (17, 2)), rng.integers(0, 2, 17).astype(np.float32)
        black = np.zeros((256, 192, 3), dtype=np.uint8)
        _, moved, seen = augmentation(black, keypoints, visible, np.random.default_rng(seed))
        found = list(dots(augmentation, keypoints, seed))
        for k, burnt in enumerate(order):
            from_border = min(*moved[k], *((191, 255) - moved[k]))
            if found[burnt] is None:
                assert from_border < 8 or seen[k] == 0
            elif from_border > 8:
                np.testing.assert_allclose(moved[k], found[burnt], atol=2.0)
                assert seen[k] == visible[burnt]
                num_found += 1
    assert num_found > 20


@pytest.mark.parametrize("name", ["ElasticTransform", "GridDistortion", "Affine"])
def test_a_keypoint_outside_of_the_crop_is_not_visible_once_the_crop_is_moved(name: str) -> None:
    augmentation = PixelAugmentation(quiet(extra=({name: {**MOVING[name], "p": 1.0}},)), COCO)
    keypoints = np.random.default_rng(0).uniform(40, 150, (17, 2))
    keypoints[3], keypoints[8] = (-30.0, 50.0), (100.0, 300.0)
    crop, visible = np.zeros((256, 192, 3), dtype=np.uint8), np.ones(17, dtype=np.float32)
    _, _, seen = augmentation(crop, keypoints, visible, np.random.default_rng(0))
    assert np.flatnonzero(seen == 0).tolist() == [3, 8]
    still = PixelAugmentation(quiet(extra=({name: {**MOVING[name], "p": 0.0}},)), COCO)
    _, moved, seen = still(crop, keypoints, visible, np.random.default_rng(0))
    np.testing.assert_array_equal(moved, keypoints)
    np.testing.assert_array_equal(seen, visible)


def test_dropped_pixels_leave_keypoints_as_they_are() -> None:
    augmentation = PixelAugmentation(quiet(extra=({"GridDropout": {"p": 1.0}},)), COCO)
    keypoints, visible = np.random.default_rng(0).uniform(-20, 220, (17, 2)), np.ones(17, dtype=np.float32)
    crop = np.full((256, 192, 3), 255, dtype=np.uint8)
    made, moved, seen = augmentation(crop, keypoints, visible, np.random.default_rng(0))
    assert (made == 0).mean() > 0.1
    np.testing.assert_array_equal(moved, keypoints)
    np.testing.assert_array_equal(seen, visible)


GOOD = [
    {"RandomBrightnessContrast": {"p": 0.2}},
    {"GaussNoise": None},
    {"ImageCompression": {"quality_range": [40, 90], "p": 0.3}},
    {"CLAHE": {}},
    {"SomeOf": {"transforms": [{"ToGray": {}}, {"HorizontalFlip": {}}], "n": 1}},
    *({name: arguments} for name, arguments in MOVING.items()),
]


@pytest.mark.parametrize("input_size", [(192, 256), (288, 384)])
def test_transforms_that_can_be_trained_with_pass_the_check(input_size: tuple[int, int]) -> None:
    entries = [{**entry} for entry in GOOD if "RandomResizedCrop" not in entry]
    check_extra(with_extra(*entries, input_size=input_size))


@pytest.mark.parametrize(
    ("entry", "sentence"),
    [
        (
            {"RandomBrightnesContrast": {}},
            "albumentations has no transform 'RandomBrightnesContrast'. Did you mean 'Rand",
        ),
        ({"os": {}}, "albumentations has no transform 'os'."),
        ({"Rotate": {"limits": 3}}, "Rotate has no argument 'limits'. Did you mean 'limit'?"),
        (
            {"Rotate": {"p": 2}},
            "Rotate does not take these arguments: p: Input should be less than or equal to 1, got 2.",
        ),
        ({"RandomCrop": {"width": 9}}, "RandomCrop does not take these arguments: height: Field required, got "),
        (
            {"RandomCrop": {"width": 9, "height": 9}},
            "RandomCrop makes uint8 9 x 9 of a uint8 crop of 192 x 256; it must",
        ),
        ({"Normalize": {}}, "Normalize makes float32 192 x 256 of a uint8 crop"),
        ({"RandomRotate90": {}}, "RandomRotate90 makes uint8 256 x 192 of a uint8 crop of 192 x 256"),
        ({"DualTransform": {}}, "DualTransform cannot be used on crops: "),
        ({"TextImage": {"font_path": "nowhere.ttf"}}, "TextImage cannot be used on crops: "),
        (
            {"OneOf": {"transforms": [{"Blurr": {}}]}},
            "OneOf.transforms[0]: albumentations has no transform 'Blurr'. Did you",
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
@pytest.mark.parametrize("stage", ["stage1", "stage2"])
def test_a_transform_that_cannot_be_trained_with_is_one_sentence(
    entry: dict[str, Any], sentence: str, stage: str
) -> None:
    with pytest.raises(ConfigError) as error:
        check_extra(with_extra({"GaussNoise": {}}, entry, stage=stage))
    assert str(error.value).startswith(f"augmentation.{stage}.extra[1]")
    assert sentence in str(error.value)
    assert "\n" not in str(error.value) and len(str(error.value)) < 300


def test_a_transform_that_draws_from_elsewhere_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class Careless(albumentations.ImageOnlyTransform):  # type: ignore[misc]
        def apply(self, img: np.ndarray, **_: Any) -> np.ndarray:
            return np.random.default_rng().integers(0, 256, img.shape, dtype=np.uint8)

    monkeypatch.setattr(albumentations, "Careless", Careless, raising=False)
    with pytest.raises(ConfigError, match="Careless makes different crops of equal random numbers"):
        check_extra(with_extra({"Careless": {}}))
