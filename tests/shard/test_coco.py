from __future__ import annotations

import json
import os
import re
import shutil
import zipfile
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from pycocotools.coco import COCO

from cigpose.evaluate.ground_truth import load_ground_truth
from cigpose.files.jpeg import jpeg_size
from cigpose.keypoints import COCO_WHOLEBODY

DRIVE = "drive.google.com/file/d"
TRAIN = {
    "images": "images.cocodataset.org/zips/train2017.zip",
    "annotations": f"{DRIVE}/1thErEToRbmM9uLNi1JXXfOsaS5VK2FXf/coco_wholebody_train_v1.0.json",
}
VAL = {
    "images": "images.cocodataset.org/zips/val2017.zip",
    "annotations": f"{DRIVE}/1N6VgwKnj8DeyGXCvp1eYgNbRmw6jdfrb/coco_wholebody_val_v1.0.json",
}
BODY = "images.cocodataset.org/annotations/annotations_trainval2017.zip:annotations/person_keypoints_{}2017.json"
DETECTIONS = f"{DRIVE}/1ygw57X-mh0QBfENB-U5DsuSauGIu-8RB/COCO_val2017_detections_AP_H_56_person.json"
SPLITS = {
    "wholebody train": ("coco_wholebody", TRAIN),
    "wholebody val": ("coco_wholebody", VAL),
    "body train": ("coco", TRAIN | {"annotations": BODY.format("train")}),
    "body val": ("coco", VAL | {"annotations": BODY.format("val")}),
}
ARM = {
    "name": "arm",
    "names": ["shoulder", "elbow", "wrist", "thumb", "little"],
    "sigmas": [0.08, 0.07, 0.06, 0.03, 0.03],
}
EMPTY = {"images": [], "annotations": [], "categories": []}


@pytest.fixture
def raw(tmp_path: Path, mirror_folder: Path) -> Path:
    """A raw folder of one's own: val2017.zip and the whole-body annotations."""
    folder = tmp_path / "raw"
    folder.mkdir()
    shutil.copy(mirror_folder / VAL["images"], folder / "images.zip")
    shutil.copy(mirror_folder / VAL["annotations"], folder / "annotations.json")
    return folder


def edit(raw: Path, change: Any) -> None:
    path = raw / "annotations.json"
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values).replace('"DEEP"', "[" * 10_000 + "]" * 10_000))


OWN = {"images": "images.zip", "annotations": "annotations.json"}


@pytest.mark.parametrize("split", SPLITS)
def test_counts_are_those_of_the_original_datasets(split: str, mirror_folder: Path, sharder: Any) -> None:
    expected = json.loads((mirror_folder / "expected.json").read_text())
    keypoints, dataset = SPLITS[split]
    index = sharder(mirror_folder, keypoints=keypoints, ground_truth=True, **dataset)
    name = split.split()[1]
    counts = expected["coco_wholebody"][name]
    assert index.persons == counts["valid"]
    truth = json.loads((sharder.folder / "annotations.json").read_text())
    assert (len(truth["images"]), len(truth["annotations"])) == (counts["images"], counts["annotations"])
    dropped = expected["coco"][f"{name}2017"]["dropped"]
    names = {"iscrowd": "crowd", "num_keypoints_0": "no_body_keypoints"}
    assert index.dropped == {names[reason]: count for reason, count in dropped.items()}


@pytest.mark.parametrize(
    ("keypoints", "golden_name"), [("coco", "parsed_coco"), ("coco_wholebody", "parsed_coco_wholebody")]
)
def test_persons_equal_those_the_original_code_parses(
    keypoints: str, golden_name: str, mirror_folder: Path, golden: Path, sharder: Any
) -> None:
    reference = np.load(golden / "transforms" / f"{golden_name}.npz")
    found = 0
    for name, (known, dataset) in SPLITS.items():
        if known != keypoints:
            continue
        sharder(mirror_folder, keypoints=keypoints, **dataset)
        for row, identity in enumerate(reference["ann_id"]):
            person = sharder.persons().get(int(identity))
            if person is None:
                continue
            found += 1
            points = np.array(person["keypoints"], np.float64)
            np.testing.assert_array_equal(np.float32(person["bbox_xyxy"]), reference["bbox_xyxy"][row], err_msg=name)
            np.testing.assert_array_equal(
                points[:, :2].astype(reference["keypoints"].dtype), reference["keypoints"][row]
            )
            assert np.float32(person["area"]) == reference["area"][row]
            if identity != 198196:  # the mirror gives this person's left hand fractional visibilities
                np.testing.assert_array_equal(points[:, 2] > 0, reference["keypoints_visible"][row] > 0)
    assert found == len(reference["ann_id"]) == 12


def test_fractional_visibilities_stay_as_they_are(mirror_folder: Path, sharder: Any) -> None:
    sharder(mirror_folder, **TRAIN)
    visibility = np.array(sharder.persons()[198196]["keypoints"])[91:112, 2]
    assert ((visibility > 0) & (visibility < 1)).any()


def test_detections_are_kept_whole_and_only_where_there_is_a_file(mirror_folder: Path, sharder: Any) -> None:
    boxes = json.loads((mirror_folder / DETECTIONS).read_text())
    index = sharder(mirror_folder, detections=DETECTIONS, **VAL)
    (sample,) = sharder.samples().values()
    assert index.detections == len(sample["detections"]) == 33
    x, y, w, h = boxes[0]["bbox"]
    assert sample["detections"][0] == {"bbox_xyxy": [x, y, x + w, y + h], "score": boxes[0]["score"]}
    sharder(mirror_folder, **VAL)
    assert all("detections" not in sample for sample in sharder.samples().values())


def test_ground_truth_keeps_every_field_and_the_crowd(mirror_folder: Path, sharder: Any) -> None:
    sharder(mirror_folder, ground_truth=True, **TRAIN)
    source = json.loads((mirror_folder / TRAIN["annotations"]).read_text())
    truth = COCO(str(sharder.folder / "annotations.json")).dataset
    for table in ("images", "annotations", "categories"):
        assert truth[table] == source[table]


def test_pictures_keep_their_bytes(mirror_folder: Path, sharder: Any) -> None:
    sharder(mirror_folder, **VAL)
    with zipfile.ZipFile(mirror_folder / VAL["images"]) as archive:
        assert sharder.files()["000000196141.jpg"] == archive.read("val2017/000000196141.jpg")


@pytest.mark.parametrize("packing", ["deflated", "other order", "flat", "folder", "tar"])
def test_shards_do_not_depend_on_how_the_pictures_are_packed(
    packing: str, mirror_folder: Path, sharder: Any, tmp_path: Path
) -> None:
    expected = sharder(mirror_folder, **TRAIN).shards[0].sha256
    raw = tmp_path / "raw"
    raw.mkdir()
    shutil.copy(mirror_folder / TRAIN["annotations"], raw / "annotations.json")
    with zipfile.ZipFile(mirror_folder / TRAIN["images"]) as archive:
        files = {name: archive.read(name) for name in archive.namelist() if not name.endswith("/")}
    images = "images.zip"
    if packing in ("folder", "tar"):
        images = "images"
        for name, data in files.items():
            (raw / images / name).parent.mkdir(parents=True, exist_ok=True)
            (raw / images / name).write_bytes(data)
        if packing == "tar":
            shutil.make_archive(str(raw / "images"), "tar", raw / "images")
            images = "images.tar"
    else:
        method = zipfile.ZIP_DEFLATED if packing == "deflated" else zipfile.ZIP_STORED
        with zipfile.ZipFile(raw / images, "w", method) as archive:
            for name in sorted(files, reverse=packing == "other order"):
                archive.writestr(Path(name).name if packing == "flat" else name, files[name])
    index = sharder(raw, images=images, annotations="annotations.json")
    assert index.shards[0].sha256 == expected


def test_persons_may_be_listed_before_the_pictures(raw: Path, sharder: Any) -> None:
    expected = sharder(raw, **OWN).shards
    path = raw / "annotations.json"
    values = json.loads(path.read_text())
    path.write_text(json.dumps(dict(sorted(values.items())), indent=1))
    assert next(iter(json.loads(path.read_text()))) == "annotations"
    assert sharder(raw, **OWN).shards == expected


def test_a_set_of_keypoints_of_ones_own_shards(tmp_path: Path, sharder: Any) -> None:
    raw = tmp_path / "raw"
    (raw / "photos" / "day one").mkdir(parents=True)
    picture = np.full((60, 80, 3), 90, np.uint8)
    cv2.imwrite(str(raw / "photos" / "day one" / "a.b.jpg"), picture)
    cv2.imwrite(str(raw / "photos" / "c.png"), picture)
    arm = [10, 10, 2, 20, 20, 2, 30, 30, 1, 0, 0, 0, 40.5, 31.25, 0.5]
    table = {
        "images": [
            {"id": 1, "file_name": "/day one/a.b.jpg", "width": 80, "height": 60},
            {"id": 2, "file_name": "c.png", "width": 80, "height": 60},
            {"id": 3, "file_name": "nobody.jpg", "width": 80, "height": 60},
        ],
        "annotations": [
            {"id": 7, "image_id": 1, "bbox": [5, 5, 40, 30], "keypoints": arm},
            {"id": 8, "image_id": 2, "bbox": [60, 40, 40, 40], "keypoints": arm},
            {"id": 9, "image_id": 2, "bbox": [5, 5, 40, 30], "category_id": 3},
            {"id": 10, "image_id": 2, "bbox": [5, 5, 40, 30], "keypoints": [0] * 15},
        ],
    }
    (raw / "arms.json").write_text(json.dumps(table))
    index = sharder(raw, keypoints=ARM, images="photos", annotations="arms.json", ground_truth=True)
    assert (index.keypoints, index.num_keypoints, index.images, index.persons) == ("arm", 5, 2, 2)
    assert index.dropped == {"no_box_or_keypoints": 1, "no_body_keypoints": 1}
    first, second = (sharder.persons()[i] for i in (7, 8))
    assert first["keypoints"] == [[10, 10, 2], [20, 20, 2], [30, 30, 1], [0, 0, 0], [40.5, 31.25, 0.5]]
    assert first["area"] == pytest.approx(0.53 * 40 * 30)
    assert second["bbox_xyxy"] == [60, 40, 79, 59]
    assert jpeg_size(sharder.files()["000000000002.jpg"]) == (80, 60), "a PNG goes in as JPEG"
    categories = json.loads((sharder.folder / "annotations.json").read_text())["categories"]
    assert categories[0]["keypoints"] == ARM["names"]


# what, picture archive, annotation file, the sentence
BROKEN = {
    "zip cut": ("truncated_val2017.zip", None, r"images.zip: not a whole zip .* download it again"),
    "zip with one bit flipped": ("wrong_checksum_val2017.zip", None, r"196141.*CRC-32 is \w+, the zip says \w+"),
    "zip that leaves the folder": ("zip_slip_val2017.zip", None, r"member '../escaped.txt' points outside the archive"),
    "jpeg cut": ("truncated_jpeg_val2017.zip", None, r"image 196141 .*the JPEG is cut: 54138 bytes"),
    "json cut": (None, "cut_person_keypoints_val2017.json", r"annotations.json: the JSON is cut.*Download it again"),
    "web page": (None, "html_coco_wholebody_val_v1.0.json", r"annotations.json: this is a web page, not JSON"),
    "132 keypoints": (
        None,
        "kpts132_coco_wholebody_val_v1.0.json",
        r"annotation 460541: righthand_kpts has 60 numbers, expected 63 \(21 keypoints x 3\)",
    ),
    "not a number": (
        None,
        "nan_coco_wholebody_val_v1.0.json",
        r"2 of 5 persons unreadable.*460541: keypoints holds NaN.*1717641: lefthand_kpts holds NaN",
    ),
    "boxes": (
        None,
        "bad_bbox_coco_wholebody_val_v1.0.json",
        r"no picture with a valid person; dropped: .*'empty_box': 4",
    ),
    "missing pictures": (
        None,
        "missing_image_coco_wholebody_val_v1.0.json",
        r"annotation 488308: its image id 999999 is not in `images`.*image 777777: .* is not in images.zip",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_file_is_one_clear_sentence_and_leaves_no_dataset(
    case: str, raw: Path, mirror_folder: Path, sharder: Any
) -> None:
    images, annotations, sentence = BROKEN[case]
    if images:
        shutil.copy(mirror_folder / "bad" / images, raw / "images.zip")
    if annotations:
        shutil.copy(mirror_folder / "bad" / annotations, raw / "annotations.json")
    with pytest.raises(ValueError) as error:
        sharder(raw, **OWN)
    message = str(error.value)
    assert re.search(sentence, message, re.I), message
    assert "\n" not in message
    assert not list(sharder.root.glob("*"))
    assert not list(raw.parent.rglob("escaped.txt"))


@pytest.mark.parametrize(
    ("annotations", "persons", "bad"),
    [
        ("kpts132_coco_wholebody_val_v1.0.json", 3, 1),
        ("nan_coco_wholebody_val_v1.0.json", 2, 2),
        ("missing_image_coco_wholebody_val_v1.0.json", 2, 2),
    ],
)
def test_a_share_of_bad_samples_may_be_tolerated_and_is_reported(
    annotations: str, persons: int, bad: int, raw: Path, mirror_folder: Path, sharder: Any
) -> None:
    shutil.copy(mirror_folder / "bad" / annotations, raw / "annotations.json")
    index = sharder(raw, sharding={"max_bad_share": 0.4}, ground_truth=True, **OWN)
    assert index.persons == persons
    assert index.bad["count"] == bad == len(index.bad["examples"])
    truth = json.loads((sharder.folder / "annotations.json").read_text())
    assert len(truth["annotations"]) == 5 - bad, "what is unreadable is not scored either"


def _twice(values: dict[str, Any]) -> None:
    values["annotations"].append(values["annotations"][0])


def _image_twice(values: dict[str, Any]) -> None:
    values["images"].append(values["images"][0])


def _no_height(values: dict[str, Any]) -> None:
    values["images"].append({"id": 5, "file_name": "x.jpg", "width": 3})


def _other_size(values: dict[str, Any]) -> None:
    values["images"][0] |= {"width": 430}


def _infinite(values: dict[str, Any]) -> None:
    values["annotations"][0]["bbox"][0] = float("inf")


def _words(values: dict[str, Any]) -> None:
    values["annotations"][0]["keypoints"][0] = "left"


def _number(values: dict[str, Any]) -> None:
    values["annotations"].append(3)


def _nothing(values: dict[str, Any]) -> None:
    values.clear()


def _of_first(**changes: Any) -> Any:
    def change(values: dict[str, Any]) -> None:
        values["annotations"][0] |= changes

    change.__name__ = f"_{'_'.join(changes)}_{str(next(iter(changes.values())))[:12]}"
    return change


def _of_image(**changes: Any) -> Any:
    def change(values: dict[str, Any]) -> None:
        values["images"][0] |= changes

    change.__name__ = f"_image_{'_'.join(changes)}_{str(next(iter(changes.values())))[:12].encode('ascii', 'replace')}"
    return change


def _lists_in_lists(values: dict[str, Any]) -> None:
    values["annotations"][0] = [[1], [2]]


def _deep(values: dict[str, Any]) -> None:
    values["annotations"][0]["segmentation"] = "DEEP"


EDITS = [
    (_of_first(iscrowd="0"), r"annotation \d+: iscrowd is '0', expected 0 or 1"),
    (_of_first(iscrowd=2), r"annotation \d+: iscrowd is 2, expected 0 or 1"),
    (_of_first(iscrowd=[]), r"annotation \d+: iscrowd is \[\], expected 0 or 1"),
    (_of_first(area=-1.0), r"annotation \d+: area is -1.0, expected a number from 0"),
    (_of_first(area=True), r"annotation \d+: area is True, expected a number from 0"),
    (_of_first(num_keypoints="3"), r"annotation \d+: num_keypoints is '3', expected a whole number"),
    (_of_first(category_id="1"), r"annotation \d+: its category_id is '1', expected a whole number"),
    (_of_first(id=2**63), r"annotations.json: annotation 9223372036854775808: its id is not a whole number"),
    (_of_first(id=10**199), r"annotations.json: annotation 1e\+?199: its id is not a whole number"),
    (_of_first(id=True), r"annotations.json: annotation True: its id is not a whole number"),
    (_of_first(image_id=[]), r"annotation \d+: its image id \[\] is not in"),
    (_of_first(area=10**30, x=float("nan")), r"annotation \d+: it holds a number of more than 64 bits"),
    (_of_first(bbox=[[1], 2, 3, 4]), r"annotation \d+: bbox holds NaN, infinite values, or something"),
    (_of_first(keypoints=[[1, 2, 2]] * 17), r"annotation \d+: keypoints has 17 numbers, expected 51"),
    (_of_image(width=True), r"image \d+: its width is True, expected pixels"),
    (_of_image(height=2**40), r"image \d+: its height is 1099511627776, expected pixels"),
    (_of_image(file_name="caf\udce9.jpg"), r"image \d+: it cannot be written as JSON \(str is not valid UTF-8"),
    (_of_image(date=10**30, x=float("nan")), r"image \d+: it cannot be written as JSON \(Integer exceeds 64-bit"),
    (_lists_in_lists, r"annotations.json: annotation 1 of the list: b'\[\[1\], \[2\]\]', expected an object"),
    (_deep, r"annotations.json: annotation 1 of the list: brackets nested too deep to be read"),
    (_twice, r"annotation \d+: its id is there twice"),
    (_image_twice, r"image 196141: its id is listed twice"),
    (_no_height, r"image 5: its height is None, expected pixels"),
    (_other_size, r"the annotations say 430x429, the picture is 640x429"),
    (_infinite, r"bbox holds NaN, infinite values"),
    (_words, r"keypoints holds NaN, infinite values, or something that is no number"),
    (_number, r"after element 5 of 'annotations', expected a list of objects"),
    (_nothing, r"lists no images"),
]


@pytest.mark.parametrize(("change", "sentence"), EDITS, ids=[change.__name__[1:] for change, _ in EDITS])
def test_an_annotation_file_that_cannot_be_right_is_refused(
    change: Any, sentence: str, raw: Path, sharder: Any
) -> None:
    edit(raw, change)
    with pytest.raises(ValueError, match=sentence):
        sharder(raw, **OWN)
    assert not sharder.folder.exists()


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"images": "other.zip"}, r"other.zip: not found. Download it"),
        ({"annotations": "images.zip:nothing.json"}, r"images.zip: has no member 'nothing.json'"),
        ({"keypoints": "crowdpose"}, r"keypoints has 51 numbers, expected 42 \(14 keypoints x 3\)"),
    ],
)
def test_params_that_do_not_fit_the_files_are_refused(
    options: dict[str, str], sentence: str, raw: Path, sharder: Any
) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=sentence):
        sharder(raw, **{**OWN, **options})


def test_boxes_of_pictures_that_are_not_listed_are_counted_as_bad(raw: Path, sharder: Any) -> None:
    boxes = [{"image_id": 1, "bbox": [0, 0, 5, 5], "score": 1.0, "category_id": 1}]
    (raw / "boxes.json").write_text(json.dumps(boxes))
    with pytest.raises(ValueError, match=r"boxes.json: box 1: image id 1 is not in the annotation file"):
        sharder(raw, detections="boxes.json", **OWN)


@pytest.mark.parametrize("first", ["annotations", "categories"])
def test_people_are_those_of_the_category_that_evaluation_scores(
    first: str, raw: Path, sharder: Any, tmp_path: Path
) -> None:
    def other_category(values: dict[str, Any]) -> None:
        row = next(row for row in values["annotations"] if row["num_keypoints"] and not row["iscrowd"])
        row["category_id"] = 2
        broken = next(row for row in reversed(values["annotations"]) if row["num_keypoints"] and not row["iscrowd"])
        broken |= {"category_id": 2, "keypoints": [0] * 60}
        values["categories"].append({"id": 2, "name": "mannequin"})
        rest = {key: values.pop(key) for key in list(values) if key != first}
        values |= rest

    expected = sharder(raw, **OWN)
    edit(raw, other_category)
    index = sharder(raw, ground_truth=True, **OWN)
    assert index.persons == expected.persons - 2
    assert index.dropped == {**expected.dropped, "other_category": 2}
    assert index.bad["count"] == 0
    truth = load_ground_truth(sharder.folder / "annotations.json", COCO_WHOLEBODY)
    scored = truth.annotation_id[~truth.is_crowd & (truth.num_keypoints > 0)]
    assert sorted(sharder.persons()) == sorted(scored.tolist()), "perfect predictions of the shards score AP 1"


def test_a_picture_whose_name_is_not_utf8_fails_no_sharding(tmp_path: Path, sharder: Any) -> None:
    folder = os.fsencode(tmp_path / "raw" / "photos")
    os.makedirs(folder)
    picture = cv2.imencode(".jpg", np.full((60, 80, 3), 90, np.uint8))[1].tobytes()
    for name in (b"good.jpg", b"caf\xe9.jpg"):
        Path(os.fsdecode(folder + b"/" + name)).write_bytes(picture)
    names = ["good.jpg", "caf\udce9.jpg"]
    people = [{"id": i, "image_id": i, "bbox": [5, 5, 40, 30], "keypoints": [10, 10, 2] * 5} for i in (0, 1)]
    images = [{"id": i, "file_name": name, "width": 80, "height": 60} for i, name in enumerate(names)]
    (tmp_path / "raw" / "a.json").write_text(json.dumps({"images": images, "annotations": people}))
    options = {"keypoints": ARM, "images": "photos", "annotations": "a.json"}
    index = sharder(tmp_path / "raw", sharding={"max_bad_share": 1.0}, **options)
    assert index.persons == 1 and index.bad["count"] == 2
    assert "image 1: it cannot be written as JSON (str is not valid UTF-8" in index.bad["examples"][0]
