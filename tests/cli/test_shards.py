from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from cigpose.cli.main import main
from cigpose.config.params_file import write_params
from cigpose.draw import LEFT, RIGHT
from cigpose.loader import sheet as sheet_module
from cigpose.loader.shards import open_address
from cigpose.loader.sheet import TILE_HEIGHT, contact_sheet, share_behind_their_like


def inspect(*arguments: object) -> int:
    return main(["shards", "inspect", *map(str, arguments)])


def test_inspect_prints_counts_and_writes_a_sheet(
    tiny_shards: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tiny_shards.write("a", [3, 2], detections=1)
    sheet = tmp_path / "new" / "sheet.jpg"
    assert inspect(folder, "--preset", "cigpose-m_coco_256x192", "--sheet", sheet, "--persons", 4) == 0
    printed = capsys.readouterr().out
    for text in ("a: 17 keypoints (coco)", "2 shards", "5 images", "9 persons, 1.80 an image", "2 detections"):
        assert text in printed
    assert str(sheet) in printed
    assert cv2.imread(str(sheet)).shape[0] > TILE_HEIGHT


def test_inspect_names_what_was_left_out_and_mended(tiny_shards: Any, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tiny_shards.write("a", [1])
    index = json.loads((folder / "index.json").read_text())
    index |= {"dropped": {"crowd": 1234}, "mended": {"swapped size": 2}, "bad": {"count": 1, "examples": ["person 7"]}}
    (folder / "index.json").write_text(json.dumps(index))
    assert inspect(folder, "--persons", 0) == 0
    printed = capsys.readouterr().out
    for text in ("left out: 1,234 crowd", "mended: 2 swapped size", "unreadable: 1, such as person 7"):
        assert text in printed


def test_verifying_reads_every_picture_of_every_shard(tiny_shards: Any, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tiny_shards.write("a", [2, 1])
    assert inspect(folder, "--verify", "--persons", 0) == 0
    assert "every picture decodes" in capsys.readouterr().out
    tiny_shards.pack(folder / "a-00001.tar", {"9.jpg": b"x", "9.json": b'{"width":9,"height":9,"persons":[]}'})
    entries = json.loads((folder / "index.json").read_text())["shards"]
    tiny_shards.index(folder, [entries[0], {**entries[1], "persons": 0}])
    assert inspect(folder, "--persons", 0) == 0
    assert inspect(folder, "--verify", "--persons", 0) == 2
    assert "a-00001.tar: 9.jpg: cannot be decoded; 1 bytes" in capsys.readouterr().err


def test_a_sheet_shows_the_transforms_of_the_user(
    tiny_shards: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, config = tiny_shards.write("a", [2]), tiny_shards.config("a")
    changed = replace(config.augmentation.stage2, extra=({"InvertImg": {"p": 1.0}}, {"HorizontalFlip": None}))
    config = replace(config, augmentation=replace(config.augmentation, stage2=changed))
    write_params(config, tmp_path / "params.yaml")
    assert inspect(folder, "--params", tmp_path / "params.yaml", "--sheet", tmp_path / "sheet.png") == 0
    assert "augmentation.stage2.extra: InvertImg {'p': 1.0}, HorizontalFlip\n" in capsys.readouterr().out
    sheet = cv2.imread(str(tmp_path / "sheet.png"))
    write_params(
        replace(config, augmentation=replace(config.augmentation, stage2=replace(changed, extra=()))),
        tmp_path / "p.yaml",
    )
    assert inspect(folder, "--params", tmp_path / "p.yaml", "--sheet", tmp_path / "other.png") == 0
    assert not np.array_equal(sheet, cv2.imread(str(tmp_path / "other.png")))


@pytest.mark.parametrize("num_persons", [1, 5, 100])
def test_a_sheet_shows_each_person_three_times(tiny_shards: Any, num_persons: int) -> None:
    folder = tiny_shards.write("a", [4], persons=(2, 1))
    sheet = contact_sheet(open_address(str(folder)), tiny_shards.config("a"), num_persons=num_persons)
    assert sheet.dtype == np.uint8
    groups = cv2.connectedComponentsWithStats((sheet != 255).any(axis=2).astype(np.uint8))[2][1:]
    groups = groups[groups[:, cv2.CC_STAT_AREA] > 0.4 * TILE_HEIGHT**2]
    assert len(groups) == min(num_persons, 6)
    ratios = groups[:, cv2.CC_STAT_WIDTH] / groups[:, cv2.CC_STAT_HEIGHT]
    assert ratios == pytest.approx(3 / 2, rel=0.02)  # crops are 32 x 64


def test_keypoints_are_drawn_where_they_are(tiny_shards: Any) -> None:
    folder = tiny_shards.write("a", [1], persons=(1,))
    points = np.zeros((17, 3))
    points[5], points[6] = (60, 40, 2), (30, 40, 2)  # the shoulders; the person's left is on the viewer's right
    record = tiny_shards._record(np.random.default_rng(0), 0, 1, 0)
    record["persons"][0] |= {"bbox_xyxy": [20, 10, 70, 70], "keypoints": points.tolist()}
    white = cv2.imencode(".jpg", np.full((80, 96, 3), 255, np.uint8))[1].tobytes()
    samples = {"0.jpg": white, "0.json": json.dumps(record, separators=(",", ":")).encode()}
    tiny_shards.pack(folder / "a-00000.tar", samples)
    tiny_shards.index(folder, [{"name": "a-00000.tar", "images": 1, "persons": 1, "detections": 0}])
    sheet = contact_sheet(open_address(str(folder)), tiny_shards.config("a"), num_persons=1)
    sheet = sheet[:, : TILE_HEIGHT // 2]

    def middle_of(color: tuple[int, int, int]) -> float:
        return float(np.nonzero((np.abs(sheet.astype(int) - color) < 12).all(axis=2))[1].mean())

    assert middle_of(RIGHT) < TILE_HEIGHT // 4 < middle_of(LEFT)


def test_other_seeds_show_other_persons(tiny_shards: Any) -> None:
    shards = open_address(str(tiny_shards.write("a", [9, 9])))
    config = tiny_shards.config("a")
    first, again, other = (contact_sheet(shards, config, num_persons=3, seed=seed) for seed in (0, 0, 1))
    assert np.array_equal(first, again) and not np.array_equal(first, other)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "nowhere/index.json: not found"),
        (["{folder}", "--preset", "quickstart"], "17 keypoints (coco), but params.yaml asks for 133"),
        (["{folder}", "--params", "nowhere.yaml"], "nowhere.yaml: not found"),
        (
            ["{folder}", "--params", "wrong.yaml"],
            "augmentation.stage1.extra[0]: albumentations has no transform 'Blurr'",
        ),
        (["{folder}", "--preset", "nothing"], "preset 'nothing' does not exist"),
        (
            ["{folder}", "--preset", "cigpose-m_coco_256x192", "--sheet", "sheet.what"],
            "sheet.what: not a kind of picture",
        ),
    ],
    ids=["no shards", "other keypoints", "no params", "no transform", "no preset", "no picture format"],
)
def test_mistakes_are_one_sentence(
    tiny_shards: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    folder, config = tiny_shards.write("a", [1]), tiny_shards.config("a")
    wrong = replace(config.augmentation.stage1, extra=({"Blurr": None},))
    write_params(replace(config, augmentation=replace(config.augmentation, stage1=wrong)), tmp_path / "wrong.yaml")
    monkeypatch.chdir(tmp_path)
    assert inspect(*(argument.format(folder=folder) for argument in arguments)) == 2
    assert message in capsys.readouterr().err


def test_a_dataset_without_persons_has_no_sheet(tiny_shards: Any) -> None:
    folder = tiny_shards.write("a", [2], persons=(0,), detections=1)
    with pytest.raises(ValueError, match="holds no persons"):
        contact_sheet(open_address(str(folder)), tiny_shards.config("a"), num_persons=2)


def frames(num_videos: int, num_frames: int) -> list[str]:
    return [f"clips/video_{video}/{frame:04d}.png" for video in range(num_videos) for frame in range(num_frames)]


def shuffled(names: list[str]) -> list[str]:
    return np.random.default_rng(0).permutation(names).tolist()


@pytest.mark.parametrize(
    ("shards", "expected"),
    [
        pytest.param([frames(10, 20)], 190 / 199, id="videos one after the other"),
        pytest.param([[f"{video}_{i:03d}.jpg" for i in range(50)] for video in "ab"], 1.0, id="prefixes"),
        pytest.param([shuffled(frames(10, 20))], None, id="shuffled"),
        pytest.param([shuffled(frames(1, 99)), shuffled([f"b{i}" for i in range(99)])], None, id="long ones, shuffled"),
        pytest.param([[f"{i:012d}.jpg" for i in range(200)]], None, id="photographs by number"),
        pytest.param([["one.jpg"]], None, id="one"),
        pytest.param([["", "\n1.jpg"]], None, id="no names"),
    ],
)
def test_pictures_behind_their_like_are_known_by_their_names(shards: list[list[str]], expected: float | None) -> None:
    assert share_behind_their_like(shards) == (expected and pytest.approx(expected))


def test_inspect_advises_a_shuffle_of_the_frames_of_videos(
    tiny_shards: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, names = tiny_shards.write("a", [12, 12]), iter(frames(4, 6) * 2)
    arguments = (folder, "--preset", "cigpose-m_coco_256x192", "--persons", 1, "--sheet", tmp_path / "sheet.jpg")
    assert inspect(*arguments) == 0
    assert "order:" not in capsys.readouterr().out
    read = sheet_module.read_record
    monkeypatch.setattr(sheet_module, "read_record", lambda sample: {**read(sample), "file_name": next(names)})
    assert inspect(*arguments) == 0
    assert "order: 91% of the pictures stand behind the one before of their folder" in capsys.readouterr().out
