from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import webdataset as wds
import yaml

from cigpose.shard import jobs as shard_jobs
from cigpose.shard import tars
from cigpose.shard import write as shards
from cigpose.shard.index import ShardIndex, parse_index, read_index, verify
from cigpose.shard.tars import members
from cigpose.shard.write import write_dataset

KEYPOINTS = {"name": "stick", "names": ["head", "foot"], "sigmas": [0.05, 0.05]}
OWN = {"keypoints": KEYPOINTS, "images": "images.zip", "annotations": "annotations.json"}


def make_raw(folder: Path, *, images: int = 10) -> Path:
    """Pictures 1 to `images`; picture i has i % 3 persons, of which pictures 3, 6, 9 ... have none."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    entries, annotations = [], []
    with zipfile.ZipFile(folder / "images.zip", "w") as archive:
        for image_id in range(images, 0, -1):
            done, data = cv2.imencode(".jpg", rng.integers(0, 255, (24, 32, 3), np.uint8))
            assert done
            archive.writestr(f"set/{image_id}.jpg", data.tobytes())
    for image_id in range(1, images + 1):
        entries.append({"id": image_id, "file_name": f"{image_id}.jpg", "width": 32, "height": 24})
        for _ in range(image_id % 3):
            annotations.append(
                {"id": len(annotations), "image_id": image_id, "bbox": [2, 2, 9, 9], "keypoints": [3, 3, 2, 9, 9, 1]}
            )
    annotations.reverse()
    (folder / "annotations.json").write_text(json.dumps({"images": entries, "annotations": annotations}))
    return folder


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    return make_raw(tmp_path / "raw")


def tree(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_the_same_input_gives_the_same_bytes(raw: Path, sharder: Any) -> None:
    options = {"sharding": {"images_per_shard": 3}, "ground_truth": True, **OWN}
    sharder(raw, **options)
    first = tree(sharder.folder)
    for path in raw.iterdir():
        os.utime(path, (1, 1))
    sharder(raw, **options)
    assert tree(sharder.folder) == first
    assert set(first) == {"annotations.json", "index.json", "people-00000.tar", "people-00001.tar", "people-00002.tar"}


@pytest.mark.slow
def test_several_processes_write_the_same_bytes_as_one(raw: Path, sharder: Any) -> None:
    sharder(raw, sharding={"images_per_shard": 3}, **OWN)
    first = tree(sharder.folder)
    sharder(raw, sharding={"images_per_shard": 3, "processes": 2}, **OWN)
    assert tree(sharder.folder) == first


def test_pictures_can_be_shuffled_within_their_shard_always_in_the_same_way(tmp_path: Path, sharder: Any) -> None:
    raw = make_raw(tmp_path / "raw", images=30)
    sharder(raw, sharding={"images_per_shard": 10}, **OWN)
    plain = [list(members(path)) for path in sorted(sharder.folder.glob("*.tar"))]
    trees = []
    for _ in range(2):
        sharder(raw, sharding={"images_per_shard": 10, "shuffle": True}, **OWN)
        trees.append(tree(sharder.folder))
    mixed = [list(members(path)) for path in sorted(sharder.folder.glob("*.tar"))]
    assert trees[0] == trees[1]
    assert all(one != other and sorted(one) == sorted(other) for one, other in zip(plain, mixed, strict=True))
    keys = [name.partition(".") for name, _ in mixed[0]]
    assert all(one[0] == other[0] for one, other in zip(keys[::2], keys[1::2], strict=True))


@pytest.mark.parametrize(
    ("images", "per_shard", "sizes"), [(10, 3, [2, 2, 3]), (10, 7, [7]), (15, 4, [3, 3, 4]), (1, 9, [1])]
)
def test_shards_are_of_equal_size_and_in_order(
    images: int, per_shard: int, sizes: list[int], tmp_path: Path, sharder: Any
) -> None:
    index = sharder(make_raw(tmp_path / "few", images=images), sharding={"images_per_shard": per_shard}, **OWN)
    assert [shard.images for shard in index.shards] == sizes
    ids = [sample["image_id"] for sample in sharder.samples().values()]
    assert ids == [i for i in range(1, images + 1) if i % 3]
    assert index.images == sum(sizes) == len(ids)
    assert index.persons == sum(i % 3 for i in ids) == sum(shard.persons for shard in index.shards)


def test_webdataset_reads_them(raw: Path, sharder: Any) -> None:
    index = sharder(raw, sharding={"images_per_shard": 3}, **OWN)
    urls = [str(sharder.folder / shard.name) for shard in index.shards]
    seen = list(wds.WebDataset(urls, shardshuffle=False, empty_check=False).decode("rgb8"))
    assert [sample["json"]["image_id"] for sample in seen] == [1, 2, 4, 5, 7, 8, 10]
    assert all(sample["jpg"].shape == (24, 32, 3) for sample in seen)
    assert all("." not in sample["__key__"] for sample in seen)
    two = seen[1]["json"]
    assert [person["id"] for person in two["persons"]] == [2, 1], "in the order of the file"
    assert two["persons"][0] == {
        "area": 0.53 * 9 * 9,
        "bbox_xyxy": [2, 2, 11, 11],
        "id": 2,
        "keypoints": [[3, 3, 2], [9, 9, 1]],
    }


def test_the_index_says_what_is_there(raw: Path, sharder: Any) -> None:
    index = sharder(raw, **OWN)
    assert read_index(sharder.folder) == verify(sharder.folder) == index
    values = json.loads((sharder.folder / "index.json").read_text())
    assert (values["format"], values["dataset"], values["keypoints"], values["num_keypoints"]) == (
        2,
        "people",
        "stick",
        2,
    )
    assert values["ground_truth"] is None
    assert set(values["sources"]) == {"annotations.json", "images.zip"}
    assert values["sources"]["images.zip"] == shards.sha256_of(raw / "images.zip")
    assert values["bad"] == {"count": 0, "examples": []}


def test_a_recorded_digest_of_a_download_is_taken_over_only_for_an_untouched_file(raw: Path, sharder: Any) -> None:
    real = shards.sha256_of(raw / "images.zip")
    size = (raw / "images.zip").stat().st_size
    record = {
        "format": 1,
        "files": [
            {"file": "images.zip", "bytes": size, "sha256": "f" * 64, "published": None, "url": "", "licence": ""}
        ],
    }
    (raw / "manifest.json").write_text(json.dumps(record))
    assert sharder(raw, **OWN).sources["images.zip"] == "f" * 64
    later = (raw / "manifest.json").stat().st_mtime + 10
    os.utime(raw / "images.zip", (later, later))
    assert sharder(raw, **OWN).sources["images.zip"] == real
    record["files"][0]["bytes"] = size + 1
    os.utime(raw / "images.zip", (1, 1))
    (raw / "manifest.json").write_text(json.dumps(record))
    assert sharder(raw, **OWN).sources["images.zip"] == real


class Killed(BaseException):
    pass


def test_a_killed_run_leaves_nothing_that_looks_complete_and_the_next_goes_on(
    raw: Path, sharder: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"sharding": {"images_per_shard": 3}, **OWN}
    expected = sharder(raw, **options)
    whole = tree(sharder.folder)
    shutil.rmtree(sharder.folder)
    written: list[str] = []
    write = tars.write_shard

    def write_one_then_die(job: Any, pictures: Any) -> Any:
        if written:
            (job.path.with_suffix(".tar.part")).write_bytes(b"half a shard")
            raise Killed
        written.append(job.path.name)
        return write(job, pictures)

    monkeypatch.setattr(shard_jobs, "write_shard", write_one_then_die)
    with pytest.raises(Killed):
        sharder(raw, **options)
    assert not sharder.folder.exists()

    def count(job: Any, pictures: Any) -> Any:
        written.append(job.path.name)
        return write(job, pictures)

    monkeypatch.setattr(shard_jobs, "write_shard", count)
    assert sharder(raw, **options) == expected
    assert written == ["people-00000.tar", "people-00001.tar", "people-00002.tar"], "the first was kept"
    assert tree(sharder.folder) == whole
    assert [path.name for path in sharder.root.iterdir()] == ["people"]


@pytest.mark.parametrize("change", ["params", "source", "shard"])
def test_shards_of_a_killed_run_are_not_kept_when_something_changed(
    change: str, raw: Path, sharder: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {"sharding": {"images_per_shard": 3}, **OWN}
    write = tars.write_shard
    with monkeypatch.context() as patch:
        patch.setattr(shards, "_index", lambda *_: (_ for _ in ()).throw(Killed()))
        with pytest.raises(Killed):
            sharder(raw, **options)
    partial = sharder.root / "people.partial"
    assert len(list(partial.glob("*.tar"))) == 3
    if change == "params":
        options["sharding"] = {"images_per_shard": 3, "jpeg_quality": 50}
    elif change == "source":
        os.utime(raw / "images.zip", (5, 5))
    else:
        (partial / "people-00001.tar").write_bytes(b"torn")
    again: list[str] = []
    monkeypatch.setattr(
        shard_jobs, "write_shard", lambda job, pictures: again.append(job.path.name) or write(job, pictures)
    )
    sharder(raw, **options)
    assert len(again) == (1 if change == "shard" else 3)
    verify(sharder.folder)


def test_a_run_that_fails_keeps_the_dataset_of_the_run_before(raw: Path, sharder: Any) -> None:
    sharder(raw, **OWN)
    before = tree(sharder.folder)
    (raw / "images.zip").write_bytes(b"PK not a zip")
    with pytest.raises(ValueError, match="not a whole zip"):
        sharder(raw, **OWN)
    assert tree(sharder.folder) == before


def test_a_full_disk_is_said_with_the_file(raw: Path, sharder: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    write = os.write

    def full(descriptor: int, data: Any) -> int:
        if os.fstat(descriptor).st_size >= 3000:
            raise OSError(28, "No space left on device")
        return write(descriptor, memoryview(data)[:3000])

    monkeypatch.setattr(tars.os, "write", full)
    with pytest.raises(OSError, match=r"No space left on device after 3000 bytes: .*people-00000.tar.part"):
        sharder(raw, **OWN)
    assert not list(sharder.root.glob("*"))


def test_a_write_cut_short_is_finished(raw: Path, sharder: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    expected, write = sharder(raw, **OWN).shards, os.write
    monkeypatch.setattr(tars.os, "write", lambda file, data: write(file, memoryview(data)[:1000]))
    assert sharder(raw, **OWN).shards == expected


def test_a_shard_is_what_the_plain_format_makes_of_its_members(raw: Path, sharder: Any) -> None:
    sharder(raw, **OWN)
    path, plain = sharder.folder / "people-00000.tar", io.BytesIO()
    with tarfile.open(fileobj=plain, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for name, data in members(path):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    assert path.read_bytes() == plain.getvalue()


def test_processes_are_started_only_where_there_is_much_to_do(
    raw: Path, sharder: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    used: list[int] = []
    count = shard_jobs._num_processes

    def note(jobs: Any, wanted: int) -> int:
        used.append(count(jobs, wanted))
        return 1

    monkeypatch.setattr(shard_jobs, "_num_processes", note)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    for sharding in ({"processes": 0}, {"processes": 2}, {"processes": 0, "verify_images": True}):
        sharder(raw, sharding={"images_per_shard": 2, **sharding}, **OWN)
    monkeypatch.setattr(shard_jobs, "_WORTH_A_PROCESS", 5000)
    sharder(raw, sharding={"images_per_shard": 2, "processes": 0}, **OWN)
    assert used[:3] == [1, 2, 4]
    assert 1 < used[3] <= 4


def test_verify_notices_every_change(raw: Path, sharder: Any) -> None:
    sharder(raw, sharding={"images_per_shard": 3}, ground_truth=True, **OWN)
    path = sharder.folder / "people-00001.tar"
    good = path.read_bytes()
    path.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    with pytest.raises(ValueError, match=r"people-00001.tar: sha256 is .*index.json says .*Delete .* and run"):
        verify(sharder.folder)
    verify(sharder.folder, digests=False)
    path.write_bytes(good[:-512])
    with pytest.raises(ValueError, match=r"people-00001.tar: \d+ bytes, index.json says \d+"):
        verify(sharder.folder, digests=False)
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"people-00001.tar: not found, but index.json lists it"):
        verify(sharder.folder)
    path.write_bytes(good)
    truth = sharder.folder / "annotations.json"
    truth.write_bytes(truth.read_bytes().replace(b"[2,2,9,9]", b"[2,2,8,9]").replace(b"[2, 2, 9, 9]", b"[2, 2, 8, 9]"))
    with pytest.raises(ValueError, match=r"annotations.json: sha256 is .*index.json says .*Delete .* and run"):
        verify(sharder.folder)
    truth.unlink()
    with pytest.raises(FileNotFoundError, match=r"annotations.json: not found"):
        verify(sharder.folder)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("{", r"where: not an index of shards"),
        ("{}", r"where: not an index of shards"),
        ("[" * 100_000, r"where: not an index of shards"),
        ('{"format": 7}', r"where: format 7, this version reads"),
        ('{"format": 1, "shards": [{"name": "a"}]}', r"where: not an index of shards \(shard 1 has no bytes\)"),
    ],
)
def test_an_index_of_another_kind_is_refused(text: str, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        parse_index(text, "where")


SHARD = {"name": "people-00000.tar", "sha256": "a" * 64, "bytes": 9_000, "images": 2, "persons": 3, "detections": 0}
FACTS = {"format": 1, "dataset": "people", "keypoints": "stick", "num_keypoints": 2, "dropped": {}, "sources": {}}
TOTALS = {"images": 2, "persons": 3, "detections": 0, "ground_truth": None}


@pytest.mark.parametrize(
    ("changes", "of_shard", "sentence"),
    [
        ({}, {"sha256": "../../../../project/dvc"}, r"sha256 of people-00000.tar is '\.\./.*', expected 64 hex digits"),
        ({}, {"sha256": "a" * 64 + "\n"}, r"expected 64 hex digits"),
        ({}, {"name": "../people-00000.tar"}, r"name of shard 1 is '\.\./people-00000.tar', expected letters"),
        ({}, {"name": "a/b.tar"}, r"name of shard 1 is"),
        ({}, {"name": ".a.tar"}, r"name of shard 1 is"),
        ({}, {"name": "a.tar\n"}, r"name of shard 1 is"),
        ({}, {"name": "people-00000.zip"}, r"name of shard 1 is"),
        ({}, {"name": None}, r"name of shard 1 is None"),
        ({}, {"bytes": -1}, r"bytes of people-00000.tar is -1, expected a whole number"),
        ({}, {"persons": True}, r"persons of people-00000.tar is True"),
        ({}, {"persons": 3.0}, r"persons of people-00000.tar is 3.0"),
        ({}, {"images": 10**200}, r"images of people-00000.tar is 1000"),
        ({}, {"bytes": 1 << 50}, r"people-00000.tar cannot hold 2 images in \d+ bytes"),
        ({}, {"images": 5}, r"people-00000.tar cannot hold 5 images in 9000 bytes"),
        ({}, {"persons": 9_001}, r"people-00000.tar cannot hold 9001 persons"),
        ({}, {"host": "x"}, r"shard 1 has a key 'host'"),
        ({"shards": []}, {}, r"it lists no shards"),
        ({"shards": [SHARD, SHARD]}, {}, r"people-00000.tar is listed twice; its people would count twice"),
        ({"shards": [SHARD, {**SHARD, "name": "b.tar"}]}, {}, r"b.tar is listed twice \(as people-00000.tar too\)"),
        ({"persons": 4}, {}, r"4 persons in all, but the shards listed hold 3"),
        ({"ground_truth": "../annotations.json"}, {}, r"ground_truth is '\.\./annotations.json'"),
        ({"ground_truth": "index.json"}, {}, r"ground_truth is 'index.json'"),
        ({"num_keypoints": "2"}, {}, r"num_keypoints is '2'"),
        ({"dropped": {"crowd": -1}}, {}, r"dropped is \{'crowd': -1\}"),
        ({"sources": {"a.zip": "b"}}, {}, r"sources is \{'a.zip': 'b'\}"),
        ({"format": 2, "ground_truth": "annotations.json"}, {}, r"ground_truth and ground_truth_sha256 come together"),
        ({"ground_truth_sha256": "b" * 64}, {}, r"ground_truth and ground_truth_sha256 come together"),
        ({"ground_truth": "a.json", "ground_truth_sha256": "../a"}, {}, r"ground_truth_sha256 is '../a', expected 64"),
        ({"bad": {"count": "x"}}, {}, r"bad is \{'count': 'x'\}"),
        ({"more": 1}, {}, r"the index has a key 'more'"),
    ],
)
def test_an_index_that_cannot_be_true_is_one_sentence_that_names_it(
    changes: dict[str, Any], of_shard: dict[str, Any], sentence: str
) -> None:
    good = {**FACTS, **TOTALS, "shards": [SHARD]}
    assert parse_index(json.dumps(good), "where").persons == 3
    values = {**good, "shards": [{**SHARD, **of_shard}], **changes}
    with pytest.raises(ValueError, match=sentence) as error:
        parse_index(json.dumps(values), "http://server/index.json")
    assert str(error.value).startswith("http://server/index.json: not an index of shards (")
    assert "\n" not in str(error.value)


def test_a_folder_without_index_was_not_sharded(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"index.json: not found. `python -m pipelines.shard KEY` makes"):
        read_index(tmp_path)


def test_dataset_names_that_cannot_name_shards_are_refused(raw: Path, sharder: Any, tmp_path: Path) -> None:
    config = sharder.config(**OWN)
    with pytest.raises(ValueError, match=r"no dataset 'persons'. There are: .*people"):
        write_dataset(config, "persons", raw, tmp_path)
    config.data.datasets["a.b"] = config.data.datasets["people"]
    with pytest.raises(ValueError, match=r"a.b: a dataset's name must have no dot"):
        write_dataset(config, "a.b", raw, tmp_path)


@pytest.mark.parametrize("verify_images", [False, True])
def test_a_jpeg_that_ends_well_but_does_not_decode_is_found_on_demand(
    verify_images: bool, raw: Path, sharder: Any
) -> None:
    with zipfile.ZipFile(raw / "images.zip") as archive:
        files = {name: archive.read(name) for name in archive.namelist()}
    data = bytearray(files["set/4.jpg"])
    tables = data.index(b"\xff\xc4")
    data[tables + 5 : tables + 21] = b"\xff" * 16  # Huffman tables that no decoder takes
    files["set/4.jpg"] = bytes(data)
    with zipfile.ZipFile(raw / "images.zip", "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    options = {"sharding": {"verify_images": verify_images}, **OWN}
    if not verify_images:
        assert isinstance(sharder(raw, **options), ShardIndex)
        return
    with pytest.raises(ValueError, match=r"image 4 \(4.jpg\): not a picture OpenCV can decode"):
        sharder(raw, **options)


def test_a_jpeg_that_was_cut_and_closed_again_is_found_on_demand(raw: Path, sharder: Any) -> None:
    with zipfile.ZipFile(raw / "images.zip") as archive:
        files = {name: archive.read(name) for name in archive.namelist()}
    files["set/4.jpg"] = files["set/4.jpg"][:-200] + b"\xff\xd9"
    with zipfile.ZipFile(raw / "images.zip", "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    with pytest.raises(ValueError, match=r"image 4 \(4.jpg\): the JPEG's picture data are not whole"):
        sharder(raw, sharding={"verify_images": True}, **OWN)


@pytest.mark.slow
def test_the_stage_says_what_it_did_or_why_not_in_one_line(raw: Path, tmp_path: Path, root: Path, sharder: Any) -> None:
    folder = tmp_path / "experiment"
    (folder / "data").mkdir(parents=True)
    shutil.copytree(raw, folder / "data" / "raw")
    params = sharder.config(**OWN).to_mapping()
    (folder / "params.yaml").write_text(yaml.safe_dump(params))
    command = [sys.executable, "-m", "pipelines.shard", "people"]
    environment = os.environ | {"PYTHONPATH": str(root)}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "people: 10 persons on 7 images in 1 shards; dropped: none; unreadable: 0\n"
    (folder / "data" / "raw" / "images.zip").write_bytes(b"<html>quota</html>")
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith("shard: data/raw/images.zip: not a whole zip (it is a web page;")
    assert done.stderr.count("\n") == 1


def test_members_have_nothing_but_name_and_size_in_their_headers(raw: Path, sharder: Any) -> None:
    sharder(raw, **OWN)
    data = (sharder.folder / "people-00000.tar").read_bytes()
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        for info in tar:
            assert (info.mtime, info.uid, info.gid, info.mode, info.uname, info.gname) == (0, 0, 0, 0o644, "", "")
    assert len(data) % tarfile.RECORDSIZE == 0
