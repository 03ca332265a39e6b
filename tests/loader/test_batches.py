from __future__ import annotations

import dataclasses
import io
import json
import multiprocessing
import os
import shutil
import tarfile
import threading
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch

from cigpose.config import Config
from cigpose.crop import crop_image, crop_matrix, crop_to_image
from cigpose.files import objects as remote
from cigpose.files.errors import DataError, FetchError, MissingError
from cigpose.loader import crops as crops_module
from cigpose.loader import shards as shardset
from cigpose.loader.batches import eval_loader, train_loader
from cigpose.loader.crops import Crops, reduced_matrix


def keys_of(batches: Iterable[dict[str, Any]]) -> list[str]:
    return [key for batch in batches for key in batch["keys"]]


def assert_same(left: Iterable[dict[str, Any]], right: Iterable[dict[str, Any]]) -> None:
    left, right = list(left), list(right)
    assert len(left) == len(right) > 0
    for a, b in zip(left, right, strict=True):
        assert a.keys() == b.keys()
        for name in a:
            assert a[name] == b[name] if name == "keys" else torch.equal(a[name], b[name])


def records(root: Path, dataset: str) -> dict[str, Any]:
    """Image key -> record, read without our reader."""
    found = {}
    for path in sorted((root / dataset).glob("*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                if member.name.endswith(".json"):
                    found[member.name.removesuffix(".json")] = json.load(tar.extractfile(member) or io.BytesIO())
    return found


def all_keys(root: Path, *datasets: str) -> list[str]:
    return sorted(
        f"{dataset}/{key}#{person['id']}"
        for dataset in datasets
        for key, record in records(root, dataset).items()
        for person in record["persons"]
    )


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Keys of the pictures decoded so far."""
    seen: list[str] = []
    decode = crops_module.decode_picture

    def spy(where: str, *rest: Any) -> np.ndarray:
        tar, _, picture = where.partition(": ")
        seen.append(f"{Path(tar).parent.name}/{picture.removesuffix('.jpg')}")
        return decode(where, *rest)

    monkeypatch.setattr(crops_module, "decode_picture", spy)
    return seen


# Training


def test_training_batches_have_the_agreed_form(tiny_shards: Any) -> None:
    tiny_shards.write("a", [3, 2])
    loader = train_loader(tiny_shards.config("a"), epoch=0, rank=0, world=1, root=tiny_shards.root)
    batches = list(loader)
    assert len(batches) == len(loader) == 3  # 9 persons in batches of 4
    assert [len(batch["keys"]) for batch in batches] == [4, 4, 1]
    batch = batches[0]
    assert set(batch) == {"crops", "keypoints", "visible", "keys"}
    assert (batch["crops"].shape, batch["crops"].dtype) == ((4, 64, 32, 3), torch.uint8)
    assert (batch["keypoints"].shape, batch["keypoints"].dtype) == ((4, 17, 2), torch.float32)
    assert (batch["visible"].shape, batch["visible"].dtype) == ((4, 17), torch.float32)
    assert set(batch["visible"].unique().tolist()) <= {0.0, 1.0}


@pytest.mark.parametrize("world", [1, 2, 3, 5, 8])
def test_an_epoch_over_two_datasets_holds_every_person_once(tiny_shards: Any, world: int) -> None:
    tiny_shards.write("a", [5, 1, 3])
    tiny_shards.write("b", [1, 4], persons=(0, 4), seed=1)
    config = tiny_shards.config("a", "b", batch=3, workers=world)
    loaders = [train_loader(config, epoch=2, rank=rank, world=world, root=tiny_shards.root) for rank in range(world)]
    assert len({len(loader) for loader in loaders}) == 1
    batches = [list(loader) for loader in loaders]
    assert [len(rank) for rank in batches] == [len(loader) for loader in loaders]
    assert sorted(keys_of(batch for rank in batches for batch in rank)) == all_keys(tiny_shards.root, "a", "b")


@pytest.mark.parametrize("streams", [1, 4])
def test_each_picture_is_decoded_once_for_all_of_its_persons_but_where_two_streams_meet(
    tiny_shards: Any, decoded: list[str], streams: int
) -> None:
    tiny_shards.write("a", [6, 7])
    config = tiny_shards.config("a", loader={"open_shards": streams})
    list(train_loader(config, epoch=0, rank=0, world=1, root=tiny_shards.root))
    assert set(decoded) == {f"a/{i:06d}" for i in range(13)}
    assert len(decoded) <= 13 + streams - 1


@pytest.mark.parametrize("start", [1, 4, 6])
def test_an_epoch_entered_in_the_middle_gives_the_same_batches_without_decoding_what_was_seen(
    tiny_shards: Any, decoded: list[str], start: int
) -> None:
    tiny_shards.write("a", [6, 5, 4])
    options: dict[str, Any] = {"epoch": 1, "rank": 0, "world": 1, "root": tiny_shards.root}
    config = tiny_shards.config("a")
    whole = list(train_loader(config, **options))
    decoded.clear()
    loader = train_loader(config, start_batch=start, **options)
    rest = list(loader)
    assert len(loader) == len(rest)
    assert_same(rest, whole[start:])
    assert set(decoded) == {key.partition("#")[0] for key in keys_of(rest)}


def test_an_epoch_entered_at_its_end_gives_nothing_and_beyond_it_is_refused(tiny_shards: Any) -> None:
    tiny_shards.write("a", [4])
    config = tiny_shards.config("a")
    loader = train_loader(config, epoch=0, rank=0, world=1, start_batch=2, root=tiny_shards.root)
    assert (len(loader), list(loader)) == (0, [])
    with pytest.raises(ValueError, match="start_batch is 3, but the epoch has 2 batches"):
        train_loader(config, epoch=0, rank=0, world=1, start_batch=3, root=tiny_shards.root)


def test_order_and_augmentation_are_functions_of_seed_and_epoch(tiny_shards: Any) -> None:
    tiny_shards.write("a", [6, 5])

    def batches(epoch: int = 0, **changes: Any) -> list[dict[str, Any]]:
        config = tiny_shards.config("a", **changes)
        return list(train_loader(config, epoch=epoch, rank=0, world=1, root=tiny_shards.root))

    base = batches()
    assert_same(batches(), base)
    for other in (batches(epoch=1), batches(seed=99)):
        assert keys_of(other) != keys_of(base)
        assert sorted(keys_of(other)) == sorted(keys_of(base))
        crops = {key: crop for batch in other for key, crop in zip(batch["keys"], batch["crops"], strict=True)}
        assert not torch.equal(crops[base[0]["keys"][0]], base[0]["crops"][0])


def test_a_person_is_augmented_alike_whatever_the_number_of_workers(tiny_shards: Any) -> None:
    tiny_shards.write("a", [6, 5])
    crops: list[dict[str, torch.Tensor]] = []
    for world in (1, 3):
        config = tiny_shards.config("a", workers=world)
        crops.append({})
        for rank in range(world):
            for batch in train_loader(config, epoch=0, rank=rank, world=world, root=tiny_shards.root):
                crops[-1].update(zip(batch["keys"], batch["crops"], strict=True))
    assert crops[0].keys() == crops[1].keys()
    assert all(torch.equal(crops[0][key], crops[1][key]) for key in crops[0])


def test_the_second_stage_begins_at_its_epoch(tiny_shards: Any) -> None:
    tiny_shards.write("a", [8])
    base = tiny_shards.config("a")
    still = dataclasses.replace(
        base.augmentation.stage2, flip_prob=0.0, half_body_prob=0.0, shift_prob=0.0, scale_prob=0.0, rotate_prob=0.0
    )
    augmentation = dataclasses.replace(base.augmentation, stage2=still, stage2_from_epoch=3)
    config = dataclasses.replace(base, augmentation=augmentation)
    plain = {}
    for batch in eval_loader(config, "a", rank=0, world=1, root=tiny_shards.root):
        plain.update(zip(batch["keys"], batch["keypoints"], strict=True))
    for epoch, is_still in ((2, False), (3, True)):
        for batch in train_loader(config, epoch=epoch, rank=0, world=1, root=tiny_shards.root):
            expected = torch.stack([plain[key] for key in batch["keys"]])
            assert torch.allclose(batch["keypoints"], expected, atol=1e-4) == is_still


@pytest.mark.parametrize("start", [0, 3])
def test_any_number_of_processes_makes_the_same_crops_each_person_in_one_of_them(tiny_shards: Any, start: int) -> None:
    tiny_shards.write("a", [9, 8, 3])
    tiny_shards.write("b", [5], seed=1)
    config = tiny_shards.config("a", "b", workers=2, loader={"open_shards": 4})
    epoch = train_loader(config, epoch=0, rank=1, world=2, start_batch=start, root=tiny_shards.root).epoch
    (whole, shares), *others = (
        (
            {place: crop.tobytes() for crops in shares for made in crops for place, crop in paired(made)},
            [sum(len(made.places) for made in crops) for crops in shares],
        )
        for processes in (1, 2, 3, 4, 5, 11)
        for shares in [[list(map(epoch.make, epoch.feed.pictures(p, processes))) for p in range(processes)]]
    )
    assert sorted(whole) == list(range(4 * start, epoch.plan.num_persons)) and shares == [len(whole)]
    for made, shares in others:
        assert made == whole and sum(shares) == len(whole)
        assert max(shares) - min(shares) <= 9


def paired(made: Crops) -> Iterable[tuple[int, np.ndarray]]:
    return zip(made.places, made.arrays["crops"], strict=True)


@pytest.mark.slow
def test_loader_processes_give_the_same_batches(tiny_shards: Any) -> None:
    tiny_shards.write("a", [9, 8, 3])
    tiny_shards.write("b", [5], seed=1)
    for start in (0, 3):
        options: dict[str, Any] = {"epoch": 0, "rank": 1, "world": 2, "start_batch": start, "root": tiny_shards.root}
        inline, parallel = (
            list(train_loader(tiny_shards.config("a", "b", workers=2, loader={"processes": n}), **options))
            for n in (0, 2)
        )
        assert_same(parallel, inline)


def test_an_iteration_given_up_leaves_no_thread_and_no_process(tiny_shards: Any) -> None:
    tiny_shards.write("a", [9, 9])
    threads = threading.active_count()
    for processes in (0, 1):
        config = tiny_shards.config("a", loader={"processes": processes, "prefetch_batches": 1})
        iterator = iter(train_loader(config, epoch=0, rank=0, world=1, root=tiny_shards.root))
        next(iterator)
        iterator.close()
        deadline = time.monotonic() + 10
        while (threading.active_count() > threads or multiprocessing.active_children()) and time.monotonic() < deadline:
            time.sleep(0.02)
        assert threading.active_count() <= threads
        assert not multiprocessing.active_children()


def test_too_few_persons_for_the_workers_are_refused(tiny_shards: Any) -> None:
    tiny_shards.write("a", [1], persons=(2,))
    with pytest.raises(ValueError, match="hold 2 persons, but 3 workers"):
        train_loader(tiny_shards.config("a", workers=3), epoch=0, rank=0, world=3, root=tiny_shards.root)


# Evaluation


@pytest.mark.parametrize("boxes", ["ground_truth", "detections"])
@pytest.mark.parametrize("world", [1, 2, 3, 7, 8])
def test_an_evaluation_sees_everyone_exactly_once(tiny_shards: Any, boxes: str, world: int) -> None:
    tiny_shards.write("a", [1, 4, 2], detections=1)
    config = tiny_shards.config("a", batch=3, evaluate={"boxes": boxes})
    loaders = [eval_loader(config, "a", rank=rank, world=world, root=tiny_shards.root) for rank in range(world)]
    batches = [list(loader) for loader in loaders]
    assert [len(rank) for rank in batches] == [len(loader) for loader in loaders]
    ids = [i for rank in batches for batch in rank for i in batch["person_id"].tolist()]
    if boxes == "detections":
        assert sorted(ids) == [0, 1, 2]
    else:
        assert sorted(keys_of(b for rank in batches for b in rank)) == all_keys(tiny_shards.root, "a")


def test_more_workers_than_persons_leave_some_without_batches(tiny_shards: Any) -> None:
    tiny_shards.write("a", [2], persons=(1,))
    sizes = [
        len(list(eval_loader(tiny_shards.config("a"), "a", rank=rank, world=8, root=tiny_shards.root)))
        for rank in range(8)
    ]
    assert sorted(sizes) == [0] * 6 + [1] * 2


def test_evaluation_batches_lead_back_to_the_picture(tiny_shards: Any) -> None:
    tiny_shards.write("a", [3])
    batches = list(eval_loader(tiny_shards.config("a", batch=3), "a", rank=0, world=1, root=tiny_shards.root))
    assert [len(batch["keys"]) for batch in batches] == [3, 3]
    people = {
        person["id"]: (record, person)
        for record in records(tiny_shards.root, "a").values()
        for person in record["persons"]
    }
    for batch in batches:
        assert batch["image_id"].dtype == batch["person_id"].dtype == torch.int64
        points = crop_to_image(batch["keypoints"].numpy(), batch["center"].numpy(), batch["scale"].numpy(), (32, 64))
        for i, person_id in enumerate(batch["person_id"].tolist()):
            record, person = people[person_id]
            assert batch["image_id"][i] == record["image_id"]
            np.testing.assert_allclose(batch["bbox_xyxy"][i], person["bbox_xyxy"], rtol=1e-6)
            np.testing.assert_allclose(points[i], np.array(person["keypoints"])[:, :2], atol=1e-3)
            assert batch["box_score"][i] == 1
            assert batch["scale"][i, 0] * 2 == batch["scale"][i, 1]


def test_detected_boxes_are_cropped_with_their_scores(tiny_shards: Any) -> None:
    tiny_shards.write("a", [4], detections=2)
    config = tiny_shards.config("a", evaluate={"boxes": "detections"})
    (batch,) = eval_loader(config, "a", rank=0, world=1, root=tiny_shards.root)
    people = zip(batch["number"].tolist(), batch["person_id"].tolist(), batch["image_id"].tolist(), strict=True)
    assert sorted(people) == [(0, 0, 1001), (1, 1, 1001), (2, 2, 1003), (3, 3, 1003)]
    assert batch["box_score"].tolist() == [0.5] * 4
    assert not batch["visible"].any()


# Decoding


@pytest.mark.parametrize("factor", [1, 2, 4, 8])
def test_pictures_are_decoded_as_rgb(factor: int) -> None:
    blue = np.zeros((40, 56, 3), dtype=np.uint8)
    blue[..., 0] = 255  # as OpenCV writes: BGR
    raw = cv2.imencode(".jpg", blue)[1].tobytes()
    image = crops_module.decode_picture("blue", raw, factor, (56, 40))
    assert image.shape == (40 // factor, 56 // factor, 3)
    assert image[..., 2].min() > 250 and image[..., :2].max() < 5


@pytest.mark.parametrize("mirrored", [False, True])
@pytest.mark.parametrize("factor", [2, 4, 8])
def test_a_reduced_picture_is_cropped_at_the_same_place(factor: int, mirrored: bool) -> None:
    image = np.random.default_rng(0).integers(0, 256, (483, 642, 3), dtype=np.uint8)
    image = cv2.normalize(cv2.GaussianBlur(image, (0, 0), 9), None, 0, 255, cv2.NORM_MINMAX)
    raw = cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, 98])[1]
    flags = {2: cv2.IMREAD_REDUCED_COLOR_2, 4: cv2.IMREAD_REDUCED_COLOR_4, 8: cv2.IMREAD_REDUCED_COLOR_8}
    full, reduced = (cv2.imdecode(raw, flag) for flag in (cv2.IMREAD_COLOR, flags[factor]))
    matrix = crop_matrix(np.array([300.0, 240.0]), np.array([272.0, 544.0]), 20.0, (32, 64))
    expected = crop_image(full, matrix, (32, 64), mirrored).astype(float)
    small = reduced_matrix(matrix, factor, full.shape[1], reduced.shape[1], mirrored)
    error = {}
    for x, y in ((0, 0), (0.5, 0), (-0.5, 0), (0, 0.5), (0, -0.5)):
        shifted = small.copy()
        shifted[:, 2] += small[:, :2] @ [x, y]
        error[x, y] = np.abs(crop_image(reduced, shifted, (32, 64), mirrored) - expected).mean()
    best = error.pop((0, 0))
    assert best < 0.7 * min(error.values())  # half a pixel off, to any side, is clearly worse


def test_scaled_decoding_leaves_keypoints_and_order_alone(tiny_shards: Any) -> None:
    tiny_shards.write("a", [12], persons=(1,))
    plain, scaled = (
        list(
            train_loader(
                tiny_shards.config("a", loader={"scaled_decode": on}, input_size=(32, 32)),
                **{"epoch": 0, "rank": 0, "world": 1, "root": tiny_shards.root},
            )
        )
        for on in (False, True)
    )
    assert keys_of(plain) == keys_of(scaled)
    for a, b in zip(plain, scaled, strict=True):
        assert torch.equal(a["keypoints"], b["keypoints"])
    assert any(not torch.equal(a["crops"], b["crops"]) for a, b in zip(plain, scaled, strict=True))


# What can be wrong with shards


def damage(path: Path, change: str) -> None:
    data = bytearray(path.read_bytes())
    if change == "cut":
        path.write_bytes(data[: len(data) // 2])
    elif change == "flipped bit":
        data[700] ^= 1
        path.write_bytes(data)
    elif change == "web page":
        path.write_bytes(b"<html>quota</html>".ljust(len(data)))
    elif change == "missing":
        path.unlink()


def first_batches(config: Config, root: Path) -> None:
    list(train_loader(config, epoch=0, rank=0, world=1, root=root))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("cut", r"a-00001\.tar: \d+ bytes, index.json says \d+\. Delete it and run"),
        ("flipped bit", r"a-00001\.tar: sha256 is \w{12}\.\.\., index.json says"),
        ("web page", r"a-00001\.tar: sha256 is"),
        ("missing", r"a-00001\.tar: not found, but index.json lists it"),
    ],
)
def test_a_damaged_shard_is_named(tiny_shards: Any, change: str, message: str) -> None:
    folder = tiny_shards.write("a", [3, 3])
    damage(folder / "a-00001.tar", change)
    with pytest.raises((DataError, FileNotFoundError), match=message):
        first_batches(tiny_shards.config("a"), tiny_shards.root)


def test_a_garbage_block_that_ends_a_tar_early_is_noticed_by_counting(tiny_shards: Any) -> None:
    folder = tiny_shards.write("a", [4])
    path = folder / "a-00000.tar"
    data = bytearray(path.read_bytes())
    header = data.index(b"000002.jpg")
    data[header : header + 512] = bytes(range(256)) * 2
    path.write_bytes(data)
    tiny_shards.index(folder, json.loads((folder / "index.json").read_text())["shards"])
    with pytest.raises(DataError, match=r"a-00000\.tar: 2 images found, index.json says 4; the tar is damaged"):
        first_batches(tiny_shards.config("a"), tiny_shards.root)


@pytest.mark.parametrize("processes", [0, 1])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\xff\xd8 no picture", r"a-00000\.tar: bad\.jpg: cannot be decoded; 13 bytes"),
        (cv2.imencode(".jpg", np.zeros((20, 30, 3), np.uint8))[1].tobytes(), "decodes to 30 x 20 pixels, .* 96 x 80"),
    ],
    ids=["not a jpeg", "another size"],
)
def test_a_bad_picture_is_named(tiny_shards: Any, content: bytes, message: str, processes: int) -> None:
    folder = tiny_shards.write("a", [1])
    record = tiny_shards._record(np.random.default_rng(0), 1, 2, 0)
    samples = {"bad.jpg": content, "bad.json": json.dumps(record, separators=(",", ":")).encode()}
    tiny_shards.pack(folder / "a-00000.tar", samples)
    tiny_shards.index(folder, [{"name": "a-00000.tar", "images": 1, "persons": 2, "detections": 0}])
    with pytest.raises(DataError, match=message):
        first_batches(tiny_shards.config("a", loader={"processes": processes}), tiny_shards.root)


def test_a_sample_without_its_picture_is_named(tiny_shards: Any) -> None:
    folder = tiny_shards.write("a", [1])
    tiny_shards.pack(folder / "a-00000.tar", {"000000.json": b"{}"})
    tiny_shards.index(folder, [{"name": "a-00000.tar", "images": 1, "persons": 2, "detections": 0}])
    with pytest.raises(DataError, match=r"a-00000\.tar: 000000 has no \.jpg beside it"):
        first_batches(tiny_shards.config("a"), tiny_shards.root)


def test_verification_by_sha256_can_be_left_out(tiny_shards: Any) -> None:
    folder = tiny_shards.write("a", [3])
    index = json.loads((folder / "index.json").read_text())
    index["shards"][0]["sha256"] = "0" * 64
    (folder / "index.json").write_text(json.dumps(index))
    with pytest.raises(DataError, match="sha256"):
        first_batches(tiny_shards.config("a"), tiny_shards.root)
    first_batches(tiny_shards.config("a", loader={"verify": False}), tiny_shards.root)


def test_shards_of_another_keypoint_set_are_refused(tiny_shards: Any) -> None:
    folder = tiny_shards.write("a", [1])
    index = json.loads((folder / "index.json").read_text())
    (folder / "index.json").write_text(json.dumps({**index, "keypoints": "crowdpose", "num_keypoints": 14}))
    with pytest.raises(DataError, match=r"14 keypoints \(crowdpose\), but params.yaml asks for 17 \(coco\)"):
        train_loader(tiny_shards.config("a"), epoch=0, rank=0, world=1, root=tiny_shards.root)


def test_detections_asked_for_where_there_are_none_are_an_error(tiny_shards: Any) -> None:
    tiny_shards.write("a", [1])
    config = tiny_shards.config("a", evaluate={"boxes": "detections"})
    with pytest.raises(DataError, match=r"holds no detections, but `boxes` \(of evaluate; .*\) is 'detections'"):
        eval_loader(config, "a", rank=0, world=1, root=tiny_shards.root)


def test_a_dataset_that_was_not_sharded_is_an_error(tiny_shards: Any) -> None:
    with pytest.raises(FileNotFoundError, match=r"index\.json: not found"):
        train_loader(tiny_shards.config("a"), epoch=0, rank=0, world=1, root=tiny_shards.root)


# Remote shards


def serve(host: Any, folder: Path, **acts: Any) -> str:
    for path in folder.iterdir():
        host.put(f"/{path.name}", path.read_bytes(), *acts.get(path.suffix[1:], ()))
    return host.address


def test_http_shards_are_fetched_once_and_read_like_local_ones(tiny_shards: Any, host: Any, tmp_path: Path) -> None:
    folder = tiny_shards.write("a", [4, 3])
    options: dict[str, Any] = {"epoch": 0, "rank": 0, "world": 1, "root": tiny_shards.root}
    local = list(train_loader(tiny_shards.config("a"), **options))
    locations = {"a": serve(host, folder)}
    shutil.rmtree(folder)
    config = tiny_shards.config("a", loader={"cache": str(tmp_path / "cache")}, locations=locations)
    assert_same(train_loader(config, **options), local)
    assert_same(train_loader(config, **options), local)
    shardset._verified.clear()
    before = len(host.requests)
    assert_same(train_loader(config, **options), local)
    assert [path for path, _, _ in host.requests[before:]] == ["/index.json"]


@pytest.mark.parametrize("processes", [0, 1])
def test_a_dataset_larger_than_the_cache_gives_the_same_batches(
    tiny_shards: Any, host: Any, tmp_path: Path, processes: int
) -> None:
    folder = tiny_shards.write("a", [1] * 40)
    options: dict[str, Any] = {"epoch": 0, "rank": 0, "world": 1, "root": tiny_shards.root}
    local = list(train_loader(tiny_shards.config("a"), **options))
    loader = {"cache": str(tmp_path / "cache"), "cache_gb": 1e-6, "processes": processes}
    config = tiny_shards.config("a", loader=loader, locations={"a": serve(host, folder)})
    assert_same(train_loader(config, **options), local)
    assert len(list((tmp_path / "cache").glob("*.tar"))) == config.train.loader.open_shards == 2


def test_without_a_cache_shards_are_streamed_and_leave_no_copy(tiny_shards: Any, host: Any, tmp_path: Path) -> None:
    folder = tiny_shards.write("a", [4, 3, 5])
    options: dict[str, Any] = {"epoch": 0, "rank": 0, "world": 1, "root": tiny_shards.root}
    local = list(train_loader(tiny_shards.config("a"), **options))
    loader = {"cache": str(tmp_path / "cache"), "cache_gb": 0}
    config = tiny_shards.config("a", loader=loader, locations={"a": serve(host, folder)})
    assert_same(train_loader(config, **options), local)
    assert_same(train_loader(config, start_batch=4, **options), local[4:])
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("cache_gb", [0, 1])
def test_the_first_batch_waits_for_no_whole_shard(tiny_shards: Any, host: Any, tmp_path: Path, cache_gb: float) -> None:
    folder = tiny_shards.write("a", [400] * 3)
    loader = {"cache": str(tmp_path / "cache"), "cache_gb": cache_gb, "open_shards": 3, "prefetch_batches": 1}
    config = tiny_shards.config("a", loader=loader, locations={"a": serve(host, folder)})
    host.bytes_per_s = 2e6
    batches = iter(train_loader(config, epoch=0, rank=0, world=1, root=tiny_shards.root))
    next(batches)
    for number in range(3):
        assert host.sent[f"/a-{number:05d}.tar"] < (folder / f"a-{number:05d}.tar").stat().st_size / 2
    batches.close()


def test_shards_that_an_epoch_has_passed_are_not_read_again(tiny_shards: Any, host: Any, tmp_path: Path) -> None:
    folder = tiny_shards.write("a", [2] * 20)
    loader = {"cache": str(tmp_path / "cache"), "cache_gb": 0}
    config = tiny_shards.config("a", loader=loader, locations={"a": serve(host, folder)})
    options: dict[str, Any] = {"epoch": 0, "rank": 0, "world": 1, "root": tiny_shards.root}
    whole = train_loader(config, **options)
    host.requests.clear()
    assert len(list(train_loader(config, start_batch=len(whole) - 1, **options))) == 1
    assert len([path for path, _, _ in host.requests if path.endswith(".tar")]) < 10


def test_opening_many_shards_asks_nothing_of_the_file_system_about_any(tiny_shards: Any) -> None:
    folder = tiny_shards.write("a", [2, 2])
    for path in folder.glob("*.tar"):
        path.unlink()
    loader = train_loader(tiny_shards.config("a"), epoch=0, rank=0, world=1, root=tiny_shards.root)
    assert len(loader) == 2
    with pytest.raises(FileNotFoundError, match=r"a-0000\d\.tar: not found, but index\.json lists it"):
        list(loader)


def test_a_folder_may_be_named_in_locations(tiny_shards: Any, tmp_path: Path) -> None:
    folder = tiny_shards.write("a", [2])
    config = tiny_shards.config("a", locations={"a": str(folder)})
    assert len(keys_of(train_loader(config, epoch=0, rank=0, world=1, root=tmp_path / "elsewhere"))) == 3


@pytest.mark.usefixtures("fast_retries")
def test_a_host_that_fails_for_a_while_is_asked_again(tiny_shards: Any, host: Any, act: Any, tmp_path: Path) -> None:
    folder = tiny_shards.write("a", [3])
    address = serve(host, folder, tar=(act(status=503), act(drop_after=100)), json=(act(status=500),))
    config = tiny_shards.config("a", loader={"cache": str(tmp_path / "cache")}, locations={"a": address})
    assert len(keys_of(train_loader(config, epoch=0, rank=0, world=1, root=tiny_shards.root))) == 6
    assert [path.suffix for path in (tmp_path / "cache").iterdir() if path.suffix != ".lock"] == [".tar"]


@pytest.mark.usefixtures("fast_retries")
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ("gone", MissingError, r"a-00000\.tar: HTTP 404\. Correct the address in params\.yaml"),
        ("down", FetchError, r"a-00000\.tar: HTTP 503\. Try again later\. Tried 5 times"),
        ("other version", DataError, r"a-00000\.tar: sha256 is \w+\.\.\., index.json says .* of different versions"),
    ],
)
def test_a_remote_shard_that_cannot_be_had_is_named(
    tiny_shards: Any, host: Any, act: Any, tmp_path: Path, change: str, error: type[Exception], message: str
) -> None:
    folder = tiny_shards.write("a", [1])
    address = serve(host, folder, tar=(act(status=503),) * 9 if change == "down" else ())
    if change == "gone":
        del host.files["/a-00000.tar"]
    elif change == "other version":
        host.files["/a-00000.tar"] = b"x" * len(host.files["/a-00000.tar"])
    config = tiny_shards.config("a", loader={"cache": str(tmp_path / "cache")}, locations={"a": address})
    with pytest.raises(error, match=message):
        first_batches(config, tiny_shards.root)
    assert not list((tmp_path / "cache").glob("*.part")) and not list((tmp_path / "cache").glob("*.tar"))


def test_an_address_without_an_index_is_an_error(tiny_shards: Any, host: Any) -> None:
    config = tiny_shards.config("a", locations={"a": f"{host.address}/nowhere"})
    with pytest.raises(MissingError, match=r"/nowhere/index\.json: HTTP 404"):
        train_loader(config, epoch=0, rank=0, world=1, root=tiny_shards.root)


@pytest.mark.parametrize(
    ("field", "value"), [("sha256", "../../project/dvc"), ("name", "../a-00000.tar")], ids=["digest", "name"]
)
def test_a_hostile_index_touches_no_file_outside_the_cache(
    tiny_shards: Any, host: Any, tmp_path: Path, field: str, value: str
) -> None:
    project = tmp_path / "project"
    project.mkdir()
    for ending in ("lock", "tar"):
        (project / f"dvc.{ending}").write_text("precious")
    folder = tiny_shards.write("a", [1])
    index = json.loads((folder / "index.json").read_text())
    index["shards"][0][field] = value
    (folder / "index.json").write_text(json.dumps(index))
    locations = {"a": serve(host, folder)}
    config = tiny_shards.config("a", loader={"cache": str(tmp_path / "cache" / "shards")}, locations=locations)
    with pytest.raises(DataError, match=rf"{host.address}/index.json: not an index of shards \(.*\.\./"):
        first_batches(config, tiny_shards.root)
    assert [path.read_text() for path in project.iterdir()] == ["precious", "precious"]
    assert [path for path, _, _ in host.requests] == ["/index.json"]


@pytest.mark.usefixtures("fast_retries")
@pytest.mark.parametrize(
    ("change", "message"),
    [("endless", r"a-00000\.tar: gives more than \d+ bytes"), ("dripping", r"\d+ bytes in \d+ s, too slow")],
)
def test_a_server_that_gives_no_end_is_given_up(
    tiny_shards: Any, host: Any, tmp_path: Path, change: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    locations = {"a": serve(host, tiny_shards.write("a", [1]))}
    if change == "endless":
        host.files["/a-00000.tar"] += bytes(50 << 20)
    config = tiny_shards.config("a", loader={"cache": str(tmp_path / "cache")}, locations=locations)
    loader = train_loader(config, epoch=0, rank=0, world=1, root=tiny_shards.root)
    if change == "dripping":
        host.bytes_per_s = 100
        monkeypatch.setattr(remote, "TIMEOUT_S", 0.2)
    begin = time.monotonic()
    with pytest.raises(FetchError, match=message):
        list(loader)
    assert time.monotonic() - begin < 10
    assert {path.suffix for path in (tmp_path / "cache").iterdir()} == {".lock"}
    assert host.sent.get("/a-00000.tar", 0) < 50 << 20


@pytest.mark.slow
def test_s3_shards_are_read_like_local_ones(tiny_shards: Any, tmp_path: Path, s3: Any) -> None:
    folder = tiny_shards.write("a", [3, 2])
    options: dict[str, Any] = {"epoch": 0, "rank": 0, "world": 1, "root": tiny_shards.root}
    local = list(train_loader(tiny_shards.config("a"), **options))
    s3.create_bucket(Bucket="people")
    for path in folder.iterdir():
        s3.upload_file(str(path), "people", f"shards/{path.name}")
    cache = {"cache": str(tmp_path / "cache"), "processes": 2}
    config = tiny_shards.config("a", loader=cache, locations={"a": "s3://people/shards"})
    assert_same(train_loader(config, **options), local)
    s3.delete_object(Bucket="people", Key="shards/index.json")
    with pytest.raises(MissingError, match="not found"):
        train_loader(config, **options)


def test_an_evaluation_starts_no_more_loader_processes_than_there_are_cores(
    tiny_shards: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_shards.write("a", [2])
    config = tiny_shards.config("a")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    for asked, started in ((10, 2), (1, 1), (0, 0)):
        loader = dataclasses.replace(config.train.loader, processes=asked)
        changed = dataclasses.replace(config, train=dataclasses.replace(config.train, loader=loader))
        assert eval_loader(changed, "a", rank=0, world=1, root=tiny_shards.root).options.processes == started
