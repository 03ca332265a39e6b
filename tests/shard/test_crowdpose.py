from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

DRIVE = "drive.google.com/file/d"
IMAGES = f"{DRIVE}/1VprytECcLtU4tKP32SYi_7oDRbw7yUTL/images.zip"
TAR = "download.openmmlab.com/mmpose/datasets/crowdpose_annotations.tar"
MEMBER = TAR + ":crowdpose_annotations/mmpose_crowdpose_{}.json"
DETECTIONS = f"{TAR}:crowdpose_annotations/det_for_crowd_test_0.1_0.5.json"
OFFICIAL = f"{DRIVE}/13xScmTWqO6Y6m_CjiQ-23ptgX9sC-J9I/crowdpose_trainval.json"


@pytest.fixture
def crowdpose(sharder: Any) -> Any:
    def shard(raw: Path, annotations: str, images: str = IMAGES, **options: Any) -> Any:
        return sharder(
            raw, keypoints="crowdpose", reader="crowdpose", images=images, annotations=annotations, **options
        )

    return shard


@pytest.mark.parametrize("split", ["train", "val", "trainval", "test"])
def test_counts_are_those_of_the_original_dataset(
    split: str, mirror_folder: Path, sharder: Any, crowdpose: Any
) -> None:
    counts = json.loads((mirror_folder / "expected.json").read_text())["crowdpose"][split]
    index = crowdpose(mirror_folder, MEMBER.format(split), ground_truth=True)
    truth = json.loads((sharder.folder / "annotations.json").read_text())
    assert index.persons == counts["valid"]
    assert (len(truth["images"]), len(truth["annotations"])) == (counts["images"], counts["annotations"])
    assert index.dropped == ({} if split in ("val", "test") else {"no_body_keypoints": 1})
    assert all("crowdIndex" in image for image in truth["images"])


def test_detections_come_with_the_test_split(mirror_folder: Path, crowdpose: Any) -> None:
    assert crowdpose(mirror_folder, MEMBER.format("test"), detections=DETECTIONS).detections == 3


def test_persons_equal_those_the_original_code_parses(
    mirror_folder: Path, golden: Path, sharder: Any, crowdpose: Any
) -> None:
    reference = np.load(golden / "transforms" / "parsed_crowdpose.npz")
    persons = {}
    for split in ("trainval", "test"):
        crowdpose(mirror_folder, MEMBER.format(split))
        persons |= sharder.persons()
    for row, identity in enumerate(reference["ann_id"].tolist()):
        points = np.float32(persons[identity]["keypoints"])
        np.testing.assert_array_equal(np.float32(persons[identity]["bbox_xyxy"]), reference["bbox_xyxy"][row])
        np.testing.assert_array_equal(points[:, :2], reference["keypoints"][row])
        np.testing.assert_array_equal(np.minimum(points[:, 2], 1), reference["keypoints_visible"][row])
        np.testing.assert_allclose(persons[identity]["area"], reference["area"][row], rtol=1e-6)


def test_swapped_sizes_are_mended_and_counted(mirror_folder: Path, sharder: Any, crowdpose: Any) -> None:
    good = crowdpose(mirror_folder, OFFICIAL)
    swapped = crowdpose(mirror_folder, "bad/swapped_hw_crowdpose_trainval.json", ground_truth=True)
    assert swapped.mended == {"swapped_size": 2}
    assert good.mended == {}
    assert swapped.shards == good.shards, "boxes are clipped to the true size"
    images = json.loads((sharder.folder / "annotations.json").read_text())["images"]
    assert [(image["width"], image["height"]) for image in images] == [(640, 425), (640, 425)]


def test_a_size_that_is_wrong_otherwise_is_an_error(
    mirror_folder: Path, tmp_path: Path, sharder: Any, crowdpose: Any
) -> None:
    shutil.copy(mirror_folder / IMAGES, tmp_path / "images.zip")
    values = json.loads((mirror_folder / OFFICIAL).read_text())
    values["images"][0] |= {"width": 600}
    (tmp_path / "annotations.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match=r"image 106848 .*the annotations say 600x425, the picture is 640x425"):
        crowdpose(tmp_path, "annotations.json", images="images.zip")
    assert not sharder.folder.exists()


def test_a_tar_with_links_and_members_outside_is_refused(mirror_folder: Path, sharder: Any, crowdpose: Any) -> None:
    member = "bad/tar_slip_crowdpose_annotations.tar:crowdpose_annotations/mmpose_crowdpose_test.json"
    with pytest.raises(ValueError, match=r"tar_slip.*member '../escaped.txt' points outside the archive"):
        crowdpose(mirror_folder, member)
    assert not sharder.folder.exists()
