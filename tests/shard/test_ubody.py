from __future__ import annotations

import json
import shutil
import zipfile
from fractions import Fraction
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from cigpose.files.errors import DataError
from cigpose.shard.formats.ubody import extract_frames, num_extracted, source_frame, video_name

DRIVE = "drive.google.com/file/d"
VIDEOS = f"{DRIVE}/UBODY-VIDEOS-ID/videos.zip"
ANNOTATIONS = f"{DRIVE}/UBODY-ANNOTATIONS-ID/annotations.zip"
SPLIT = f"{DRIVE}/UBODY-SPLITS-ID/splits.zip:splits/{{}}_scene_test_list.npy"
SCENES = ("Magic_show", "Speech")


@pytest.fixture
def ubody(sharder: Any, mirror_folder: Path) -> Any:
    def shard(
        raw: Path = mirror_folder, scenes: tuple[str, ...] = SCENES, *, split: str = "train", **options: Any
    ) -> Any:
        files = {"images": VIDEOS, "annotations": ANNOTATIONS, "split_file": SPLIT.format("intra")}
        return sharder(raw, reader="ubody", scenes=scenes, split=split, **(files | options))

    return shard


def _counts(sharder: Any, index: Any) -> dict[str, int]:
    truth = json.loads((sharder.folder / "annotations.json").read_text())
    return {"images": len(truth["images"]), "annotations": len(truth["annotations"]), "valid": index.persons}


@pytest.mark.slow
@pytest.mark.parametrize("interval", [1, 10])
@pytest.mark.parametrize("scene", SCENES)
@pytest.mark.parametrize("first_only", [False, True], ids=["every person", "first person only"])
def test_counts_are_those_expected_of_the_intra_scene_split(
    scene: str, interval: int, first_only: bool, mirror_folder: Path, ubody: Any, sharder: Any
) -> None:
    expected = json.loads((mirror_folder / "expected.json").read_text())["ubody"]["intra_scene"]
    rule = "reference" if first_only else "every_person_kept"
    counts = expected[f"{rule}_train_interval_{interval}"][scene]
    index = ubody(
        scenes=(scene,), frame_interval=interval, first_person_only=first_only, ground_truth=True, sharding=SMALL
    )
    found = _counts(sharder, index)
    assert {name: found[name] for name in counts} == counts


SMALL = {"images_per_shard": 40}


@pytest.mark.parametrize(
    ("split_file", "scene", "split"),
    [("intra", "Magic_show", "val"), ("inter", "Magic_show", "train"), ("inter", "Speech", "val")],
)
def test_sides_of_the_splits_are_those_of_the_converter(
    split_file: str, scene: str, split: str, mirror_folder: Path, ubody: Any, sharder: Any
) -> None:
    expected = json.loads((mirror_folder / "expected.json").read_text())["ubody"][f"{split_file}_scene"]
    index = ubody(
        scenes=(scene,),
        split=split,
        split_file=SPLIT.format(split_file),
        first_person_only=True,
        ground_truth=True,
        sharding=SMALL,
    )
    assert _counts(sharder, index)["annotations"] == expected["reference_converter"][scene][split]


def test_ids_and_keys_are_unique_over_scenes(ubody: Any, sharder: Any) -> None:
    index = ubody(frame_interval=10, ground_truth=True)
    samples = sharder.samples()
    persons = [person["id"] for sample in samples.values() for person in sample["persons"]]
    assert len(samples) == len({sample["image_id"] for sample in samples.values()}) == index.images
    assert len(persons) == len(set(persons)) == index.persons == 21
    assert list(samples)[:2] == ["Magic_show-00000000", "Magic_show-00000010"]
    assert (
        samples["Magic_show-00000010"]["file_name"] == "Magic_show/Magic_show_S1_Trim1/Magic_show_S1_Trim1/000011.png"
    )
    truth = json.loads((sharder.folder / "annotations.json").read_text())
    assert {image["id"] for image in truth["images"]} >= {sample["image_id"] for sample in samples.values()}
    assert truth["categories"][0]["name"] == "person"


def test_frames_of_a_25_fps_clip_are_those_of_the_30_fps_extraction(mirror_folder: Path) -> None:
    expected = json.loads((mirror_folder / "expected.json").read_text())["ubody"]
    frames = expected["source_frame_of_extracted_frame"]["Speech_S2_Trim2"]
    assert [source_frame(i, Fraction(25)) for i in range(60)] == frames
    assert num_extracted(50, Fraction(25)) == 60 == expected["frames_after_30fps_extraction"]["Speech_S2_Trim2"]
    assert [source_frame(i, Fraction(30)) for i in range(5)] == [0, 1, 2, 3, 4]
    assert [source_frame(i, Fraction(60)) for i in range(3)] == [0, 2, 4]


def test_pictures_show_the_frames_they_are_named_after(mirror_folder: Path, tmp_path: Path) -> None:
    path = _unpack(mirror_folder, "videos/Speech/Speech_S2_Trim2/Speech_S2_Trim2.mp4", tmp_path)
    expected = json.loads((mirror_folder / "expected.json").read_text())["ubody"]["source_frame_of_extracted_frame"]
    capture = cv2.VideoCapture(str(path))
    source = [capture.read()[1] for _ in range(50)]
    wanted = [2, 3, 31, 58, 59, 60]
    frames = dict(extract_frames(path, wanted, 95))
    assert frames.pop(60) is None, "the clip has 60 frames"
    for index, jpeg in frames.items():
        assert isinstance(jpeg, bytes)
        picture = cv2.imdecode(np.frombuffer(jpeg, np.uint8), cv2.IMREAD_COLOR).astype(np.int16)
        error = [np.abs(picture - frame).mean() for frame in source]
        assert np.argmin(error) == expected["Speech_S2_Trim2"][index]


def test_pictures_of_a_clip_may_be_listed_in_any_order_and_twice(
    mirror_folder: Path, tmp_path: Path, ubody: Any, sharder: Any
) -> None:
    with zipfile.ZipFile(mirror_folder / ANNOTATIONS) as archive:
        values = json.loads(archive.read("annotations/Magic_show/keypoint_annotation.json"))
    ubody(scenes=("Magic_show",), frame_interval=10)
    expected = sharder.files()
    values["images"].reverse()
    values["images"].append({**values["images"][-1], "id": 1000})
    values["annotations"].append({**values["annotations"][0], "id": 1000, "image_id": 1000})
    folder = tmp_path / "annotations" / "Magic_show"
    folder.mkdir(parents=True)
    (folder / "keypoint_annotation.json").write_text(json.dumps(values))
    shutil.copy(mirror_folder / VIDEOS, tmp_path / "videos.zip")
    ubody(
        tmp_path,
        ("Magic_show",),
        frame_interval=10,
        images="videos.zip",
        annotations="annotations",
        split=None,
        split_file=None,
    )
    found = sharder.files()
    assert list(found)[-2:] == ["Magic_show-00001000.jpg", "Magic_show-00001000.json"]
    assert found["Magic_show-00001000.jpg"] == found["Magic_show-00000000.jpg"]
    assert all(found[name] == data for name, data in expected.items() if name.endswith(".jpg"))


def test_a_cut_clip_is_noticed(mirror_folder: Path) -> None:
    with pytest.raises(DataError, match=r"cut_Speech_S1_Trim1.mp4: cannot be opened as a video"):
        list(extract_frames(mirror_folder / "bad" / "cut_Speech_S1_Trim1.mp4", [0], 95))
    frames = dict(extract_frames(mirror_folder / "bad" / "cut_faststart_Speech_S1_Trim1.mp4", [60, 0, 20, 50], 95))
    assert isinstance(frames[0], bytes)
    assert isinstance(frames[20], bytes)
    assert isinstance(frames[50], DataError)
    assert "claims 60 frames, only 28 can be decoded; it is cut" in str(frames[50])
    assert frames[60] is None


@pytest.mark.parametrize(
    ("bad", "sentence"),
    [
        ("cut_Speech_S1_Trim1.mp4", r"Speech/Speech_S1_Trim1/Speech_S1_Trim1/000001.png.*cannot be opened as a video"),
        ("cut_faststart_Speech_S1_Trim1.mp4", r"claims 60 frames, only 28 can be decoded"),
        (None, r"image 0: Speech/Speech_S1_Trim1/Speech_S1_Trim1/000001.png is not in videos.zip"),
    ],
)
def test_a_broken_clip_is_one_clear_sentence_unless_tolerated(
    bad: str | None, sentence: str, mirror_folder: Path, tmp_path: Path, ubody: Any, sharder: Any
) -> None:
    raw = tmp_path / "raw"
    raw.mkdir()
    shutil.copy(mirror_folder / ANNOTATIONS, raw / "annotations.zip")
    name = "videos/Speech/Speech_S1_Trim1/Speech_S1_Trim1.mp4"
    with zipfile.ZipFile(mirror_folder / VIDEOS) as old, zipfile.ZipFile(raw / "videos.zip", "w") as new:
        for member in old.namelist():
            if member != name:
                new.writestr(member, old.read(member))
        if bad:
            new.write(mirror_folder / "bad" / bad, name)
    files = {"images": "videos.zip", "annotations": "annotations.zip", "split_file": None, "split": None}
    options = {"scenes": ("Speech",), "frame_interval": 10, **files}
    with pytest.raises(ValueError, match=sentence) as error:
        ubody(raw, **options)
    assert "\n" not in str(error.value)
    assert not list(sharder.root.glob("*"))
    index = ubody(raw, sharding={"max_bad_share": 0.9}, **options)
    assert index.bad["count"] > 0
    assert index.persons > 0


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"scenes": ("Speech", "Opera")}, r"annotations.zip: has no scenes \['Opera'\]. It has: Magic_show, Speech"),
        ({"split_file": None}, r"split is given without split_file"),
        ({"split_file": SPLIT.format("outer")}, r"splits.zip: has no member"),
        ({"annotations": VIDEOS}, r"holds no <scene>/keypoint_annotation.json"),
        ({"scenes": ("Speech",), "split": "val"}, r"no annotation in the wanted scenes, split and interval"),
    ],
)
def test_params_that_do_not_fit_the_files_are_refused(options: dict[str, Any], sentence: str, ubody: Any) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=sentence):
        ubody(**options)


def test_annotations_and_clips_may_lie_in_folders(
    mirror_folder: Path, tmp_path: Path, ubody: Any, sharder: Any
) -> None:
    expected = ubody(frame_interval=10).shards
    for spec in (VIDEOS, ANNOTATIONS, SPLIT.format("intra").split(":")[0]):
        with zipfile.ZipFile(mirror_folder / spec) as archive:
            archive.extractall(tmp_path / "UBody")
    index = ubody(
        tmp_path / "UBody",
        frame_interval=10,
        images="videos",
        annotations="annotations",
        split_file="splits/intra_scene_test_list.npy",
    )
    assert index.shards == expected


@pytest.mark.parametrize(
    ("file_name", "video"),
    [
        ("/Speech_S2_Trim2/Speech_S2_Trim2/000016.png", "Speech_S2"),
        ("Speech_S2_Trim2/Speech_S2_Trim2/000016.png", "Speech_S2"),
        ("concert/concert/000001.png", "concert"),
        ("000001.png", ""),
    ],
)
def test_the_video_of_a_frame_is_its_folder_up_to_trim(file_name: str, video: str) -> None:
    assert video_name(file_name) == video


def _unpack(mirror_folder: Path, member: str, folder: Path) -> Path:
    with zipfile.ZipFile(mirror_folder / VIDEOS) as archive:
        return Path(archive.extract(member, folder))
