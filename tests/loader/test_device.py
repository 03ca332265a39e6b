from __future__ import annotations

from contextlib import closing
from dataclasses import replace
from typing import Any

import cv2
import numpy as np
import pytest
import torch

from cigpose.config import AugmentationConfig, AugmentationStage
from cigpose.keypoints import COCO
from cigpose.loader import device as device_module
from cigpose.loader.batches import TrainLoader
from cigpose.loader.device import change_pixels, is_on_device
from cigpose.loader.pixels import (
    BLUR,
    GAINS,
    HOLE,
    IS_DRAWN,
    MEDIAN_BLUR,
    NUM_DRAWN,
    PixelAugmentation,
    PixelDraw,
    change_hsv,
)
from cigpose.train.step import to_device

STAGE = AugmentationStage(blur_prob=0.5, median_blur_prob=0.5, dropout_prob=0.7)
SIZE = 64, 80  # a width that is no multiple of 32 ends in what OpenCV itself rounds otherwise
GREY_LEVEL = 1


def crops(num: int) -> np.ndarray:
    """(num, 80, 64, 3): noise, smooth colours, and greys."""
    rng = np.random.default_rng(0)
    made = rng.integers(0, 256, (num, *SIZE[::-1], 3), dtype=np.uint8)
    for i in range(0, num, 3):
        made[i] = cv2.resize(made[i, :6, :5], SIZE, interpolation=cv2.INTER_CUBIC)
        made[(i + 1) % num] = made[(i + 1) % num, ..., :1]
    return made


def changed(before: np.ndarray, drawn: np.ndarray) -> np.ndarray:
    there = torch.from_numpy(before.copy())
    change_pixels(there, torch.from_numpy(drawn))
    return there.numpy()


def drawn_for(num: int, **columns: object) -> np.ndarray:
    drawn = np.zeros((num, NUM_DRAWN), dtype=np.int16)
    for name, value in columns.items():
        drawn[:, {"gains": GAINS, "blur": BLUR, "median": MEDIAN_BLUR, "hole": HOLE, "is_drawn": IS_DRAWN}[name]] = (
            value
        )
    return drawn


@pytest.mark.parametrize("most_pixels", [device_module.MOST_PIXELS, 7 * SIZE[0] * SIZE[1]])
def test_a_device_makes_of_crops_what_the_processor_makes_of_them(
    monkeypatch: pytest.MonkeyPatch, most_pixels: int
) -> None:
    monkeypatch.setattr(device_module, "MOST_PIXELS", most_pixels)
    before, points, visible = crops(60), np.zeros((17, 2)), np.ones(17)
    augmentation, draw = PixelAugmentation(STAGE, COCO), PixelDraw(STAGE, SIZE)
    here, there = ([np.random.default_rng(seed) for seed in range(60)] for _ in range(2))
    expected = np.stack([augmentation(crop, points, visible, rng)[0] for crop, rng in zip(before, here, strict=True)])
    drawn = np.stack([draw(rng) for rng in there])
    assert {0, 3, 5, 7} == set(drawn[:, BLUR].tolist()) == set(drawn[:, MEDIAN_BLUR].tolist())
    difference = np.abs(changed(before, drawn).astype(int) - expected)
    assert difference.max() <= GREY_LEVEL
    assert (difference > 0).mean() < 1e-3
    assert [rng.random() for rng in here] == [rng.random() for rng in there], "and nothing more was drawn"


@pytest.mark.parametrize("gains", [(0, 0, 0), (5, 30, -30), (-5, -30, 30), (180, 1, 0), (255, 255, 9), (-255, 0, -255)])
def test_colours_are_those_of_opencv(gains: tuple[int, int, int]) -> None:
    crop = np.random.default_rng(1).integers(0, 256, (512, 512, 3), dtype=np.uint8)
    found = changed(crop[None], drawn_for(1, is_drawn=1, gains=gains))[0]
    difference = np.abs(found.astype(int) - change_hsv(crop, gains))
    assert difference.max() <= GREY_LEVEL
    assert (difference > 0).mean() < 1e-3


@pytest.mark.parametrize("size", [3, 5, 7])
def test_blurs_and_holes_are_those_of_opencv_to_the_last_bit(size: int) -> None:
    before = crops(4)
    found = changed(before, drawn_for(4, blur=size))
    np.testing.assert_array_equal(found, np.stack([cv2.blur(crop, (size, size)) for crop in before]))
    found = changed(before, drawn_for(4, median=size, hole=(5, 0, 64, 11)))
    expected = np.stack([cv2.medianBlur(crop, size) for crop in before])
    expected[:, 0:11, 5:64] = 0
    np.testing.assert_array_equal(found, expected)


def test_crops_for_which_nothing_was_drawn_stay_as_they_are() -> None:
    before, drawn = crops(6), drawn_for(6)
    drawn[2] = drawn_for(1, is_drawn=1, gains=(0, 0, 40))[0]
    found = changed(before, drawn)
    assert [np.array_equal(*pair) for pair in zip(before, found, strict=True)] == [True, True, False, True, True, True]


@pytest.mark.parametrize(
    ("chosen", "device", "expected"),
    [("cpu", "cuda", False), ("auto", "cpu", False), ("auto", "cuda", True), ("gpu", "cuda:1", True)],
)
def test_pixels_are_made_where_params_say(chosen: Any, device: str, expected: bool) -> None:
    stages = AugmentationConfig(stage1=STAGE, stage2=STAGE, stage2_from_epoch=1, device=chosen)
    assert is_on_device(stages, torch.device(device)) is expected


def test_a_gpu_that_is_not_there_or_cannot_be_used_is_said() -> None:
    stages = AugmentationConfig(stage1=STAGE, stage2=STAGE, stage2_from_epoch=1, device="gpu")
    with pytest.raises(
        ValueError, match=r"augmentation\.device is gpu, but this training runs on a cpu\. Write cpu, or"
    ):
        is_on_device(stages, torch.device("cpu"))
    with pytest.raises(ValueError, match=r"device is gpu, but stage2\.extra has transforms, .* Write auto"):
        replace(stages, stage2=replace(STAGE, extra=({"GaussNoise": None},)))


def in_batches(tiny_shards: Any, *, on_device: bool, processes: int = 0, extra: tuple[dict[str, Any], ...] = ()) -> Any:
    """Batches of the last epoch of stage 1 and the first of stage 2, which has the user's transforms."""
    config = tiny_shards.config("a", loader={"processes": processes})
    stages = replace(config.augmentation, stage1=STAGE, stage2=replace(STAGE, extra=extra), stage2_from_epoch=1)
    config = replace(config, augmentation=stages, model=replace(config.model, input_size=(64, 96)))
    loader = TrainLoader(config, rank=0, world=1, root=tiny_shards.root, on_device=on_device)
    with closing(loader):
        return [to_device(batch, torch.device("cpu")) for epoch in range(2) for batch in loader.batches(epoch)]


@pytest.mark.parametrize("processes", [0, 2])
def test_a_loader_that_leaves_pixels_to_the_device_gives_the_same_training(tiny_shards: Any, processes: int) -> None:
    tiny_shards.write("a", [5, 4])
    extra = ({"HorizontalFlip": {"p": 0.5}}, {"RandomBrightnessContrast": {"p": 0.5}})
    here, there = (
        in_batches(tiny_shards, on_device=on_device, processes=processes, extra=extra) for on_device in (False, True)
    )
    assert len(here) == len(there)
    for number, (one, other) in enumerate(zip(here, there, strict=True)):
        assert one.keys() == other.keys() == {"crops", "keypoints", "visible", "keys"}
        assert one["keys"] == other["keys"]
        assert torch.equal(one["keypoints"], other["keypoints"]) and torch.equal(one["visible"], other["visible"])
        difference = (one["crops"].int() - other["crops"].int()).abs()
        assert difference.max() <= (GREY_LEVEL if number < len(here) // 2 else 0), "the user's stage is the CPU's"
