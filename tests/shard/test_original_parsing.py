"""Persons of the original's sample annotations, against those it parses from them; pictures do not matter here."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest


@pytest.fixture
def raw(tmp_path: Path, golden: Path) -> Any:
    """Writes a raw folder of sample annotations with grey pictures of their sizes."""

    def write(sample: str) -> Path:
        folder = tmp_path / sample
        folder.mkdir()
        annotations = (golden / "transforms" / f"{sample}_sample.json").read_text()
        (folder / "annotations.json").write_text(annotations)
        with zipfile.ZipFile(folder / "images.zip", "w") as archive:
            for image in json.loads(annotations)["images"]:
                grey = np.full((image["height"], image["width"], 3), 128, dtype=np.uint8)
                archive.writestr(f"images/{image['file_name']}", cv2.imencode(".jpg", grey)[1].tobytes())
        return folder

    return write


@pytest.mark.parametrize("known", ["coco", "coco_wholebody", "crowdpose"])
def test_persons_of_the_sample_equal_those_the_original_code_parses(
    known: str, raw: Any, golden: Path, sharder: Any
) -> None:
    reader = "crowdpose" if known == "crowdpose" else "coco"
    sharder(raw(known), keypoints=known, reader=reader, images="images.zip", annotations="annotations.json")
    persons, reference = sharder.persons(), np.load(golden / "transforms" / f"parsed_{known}.npz")
    assert sorted(persons) == sorted(reference["ann_id"].tolist())
    for row, identity in enumerate(reference["ann_id"].tolist()):
        person, expected = persons[identity], {name: reference[name][row] for name in reference.files}
        points = np.array(person["keypoints"], np.float64)
        np.testing.assert_array_equal(np.float32(person["bbox_xyxy"]), expected["bbox_xyxy"])
        np.testing.assert_array_equal(points[:, :2].astype(expected["keypoints"].dtype), expected["keypoints"])
        np.testing.assert_array_equal(points[:, 2] > 0, expected["keypoints_visible"] > 0)
        np.testing.assert_allclose(person["area"], expected["area"], rtol=1e-6)
