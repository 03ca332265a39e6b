from __future__ import annotations

import json
import os
import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch.utils.data import DataLoader

from cigpose.files.errors import DataError
from cigpose.loader.samples import read_record, read_shard
from cigpose.loader.shards import open_address
from cigpose.loader.stream import stream_pictures


def ids(pairs: Any) -> list[int]:
    """Ids of all persons, in order."""
    return [int(person["id"]) for _, persons in pairs for person in persons]


def records(folder: Path) -> list[dict[str, Any]]:
    """The records of a dataset."""
    shards = open_address(str(folder))
    return [read_record(sample) for number in range(len(shards.index.shards)) for sample in read_shard(shards, number)]


def test_pictures_come_with_their_persons_in_the_order_of_the_dataset(tiny_shards: Any) -> None:
    folder = tiny_shards.write("a", [3, 2])
    pairs = list(stream_pictures(folder))
    assert [persons for _, persons in pairs] == [record["persons"] for record in records(folder)]
    assert all(picture.shape == (80, 96, 3) and picture.dtype == np.uint8 for picture, _ in pairs)


@pytest.mark.parametrize("processes", [0, 2])
def test_readers_share_the_pictures_each_coming_once(tiny_shards: Any, processes: int) -> None:
    folder = tiny_shards.write("a", [2, 1, 3, 2, 1])
    shares = [
        ids(DataLoader(stream_pictures(folder, shuffle=4, rank=rank, world=2), batch_size=None, num_workers=processes))
        for rank in range(2)
    ]
    assert all(shares)
    assert sorted(shares[0] + shares[1]) == sorted(ids(stream_pictures(folder)))


def test_the_order_follows_from_seed_and_epoch(tiny_shards: Any) -> None:
    folder = tiny_shards.write("a", [3] * 6)
    first, again, next_epoch, other_seed = (
        stream_pictures(folder, shuffle=8, seed=seed, epoch=epoch) for seed, epoch in ((0, 0), (0, 0), (0, 1), (1, 0))
    )
    assert ids(first) == ids(first) == ids(again)
    assert len({tuple(ids(pairs)) for pairs in (first, next_epoch, other_seed, stream_pictures(folder))}) == 4
    assert Counter(ids(next_epoch)) == Counter(ids(first))


def test_pictures_are_streamed_from_http(tiny_shards: Any, host: Any, tmp_path: Path) -> None:
    folder = tiny_shards.write("a", [2, 2])
    for path in folder.iterdir():
        host.put(f"/a/{path.name}", path.read_bytes())
    assert ids(stream_pictures(f"{host.address}/a/", cache=str(tmp_path / "cache"))) == ids(stream_pictures(folder))


def test_pictures_are_streamed_from_s3(tiny_shards: Any, s3: Any, tmp_path: Path) -> None:
    folder = tiny_shards.write("a", [2, 2])
    s3.create_bucket(Bucket="shards")
    for path in folder.iterdir():
        s3.upload_file(str(path), "shards", f"a/{path.name}")
    assert ids(stream_pictures("s3://shards/a", cache=str(tmp_path / "cache"))) == ids(stream_pictures(folder))


@pytest.mark.parametrize("place", ["disk", "server"])
@pytest.mark.parametrize("change", ["damaged picture", "damaged header", "cut", "swapped", "no tar"])
def test_a_shard_that_is_another_one_is_named_at_its_end_at_the_latest(
    tiny_shards: Any, host: Any, tmp_path: Path, change: str, place: str
) -> None:
    folder = tiny_shards.write("a", [2, 2])
    first, second = folder / "a-00000.tar", folder / "a-00001.tar"
    data = second.read_bytes()
    second.write_bytes(
        {
            "damaged picture": data[:3000] + b"x" + data[3001:],
            "damaged header": bytes(range(256)) * 2 + data[512:],
            "cut": data[:4096],
            "swapped": first.read_bytes(),
            "no tar": b"<html>".ljust(len(data)),
        }[change]
    )
    for path in folder.iterdir():
        host.put(f"/a/{path.name}", path.read_bytes())
    address = f"{host.address}/a" if place == "server" else folder
    pairs = iter(stream_pictures(address, cache=str(tmp_path / "cache")))
    assert len([next(pairs) for _ in range(2)]) == 2
    with pytest.raises(DataError, match=r"a-00001\.tar: (sha256 is|4096 bytes,) .*index\.json says"):
        list(pairs)
    assert len(list((tmp_path / "cache").glob("*.tar"))) == (1 if place == "server" else 0)


def test_a_tar_that_ends_early_without_a_word_is_noticed_by_counting(tiny_shards: Any) -> None:
    folder = tiny_shards.write("a", [4])
    path = folder / "a-00000.tar"
    data = bytearray(path.read_bytes())
    header = data.index(b"000002.jpg")
    data[header : header + 512] = bytes(range(256)) * 2
    path.write_bytes(data)
    tiny_shards.index(folder, json.loads((folder / "index.json").read_text())["shards"])
    with pytest.raises(DataError, match=r"a-00000\.tar: 2 images found, index.json says 4; the tar is damaged"):
        list(stream_pictures(folder))


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        ({"0.jpg": b"x", "0.json": b'{"width":9,"height":9,"persons":[]}'}, r"tar: 0\.jpg: cannot be decoded; 1 bytes"),
        ({"0.jpg": b"x", "0.json": b"no"}, r"a-00000\.tar: 0\.json is not JSON"),
        ({"0.jpg": b"x"}, r"a-00000\.tar: 0 has no \.json beside it"),
        ({"0.json": b"{}"}, r"a-00000\.tar: 0 has no \.jpg beside it"),
    ],
    ids=["no picture", "no json", "json missing", "picture missing"],
)
def test_a_sample_that_cannot_be_read_is_named(tiny_shards: Any, samples: dict[str, bytes], message: str) -> None:
    folder = tiny_shards.write("a", [1])
    tiny_shards.pack(folder / "a-00000.tar", samples)
    tiny_shards.index(folder, [{"name": "a-00000.tar", "images": 1, "persons": 0, "detections": 0}])
    with pytest.raises(DataError, match=message):
        list(stream_pictures(folder))


def test_a_file_that_is_no_tar_is_named(tiny_shards: Any) -> None:
    folder = tiny_shards.write("a", [1])
    (folder / "a-00000.tar").write_bytes(b"<html>" * 1000)
    tiny_shards.index(folder, json.loads((folder / "index.json").read_text())["shards"])
    with pytest.raises(DataError, match=r"a-00000\.tar: cannot be read as a tar: .*Delete it"):
        list(stream_pictures(folder))


def test_the_lines_of_the_documentation_train_on_every_person_of_every_epoch(
    tiny_shards: Any, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tiny_shards.write("coco-train", [2, 3, 1])
    (tmp_path / "data").mkdir()
    os.symlink(folder.parent, tmp_path / "data" / "shards")
    monkeypatch.chdir(tmp_path)
    section = (root / "docs" / "shards.md").read_text().partition("## Training another model")[2]
    code = re.findall(r"```python\n(.*?)```", section, re.DOTALL)[0]
    assert "        ...  " in code
    seen: list[Any] = []
    exec(code.replace("        ...  ", "        seen.append((crop, keypoints))  "), {"seen": seen})
    expected = Counter(str(person["keypoints"]) for record in records(folder) for person in record["persons"])
    assert Counter(str(keypoints) for _, keypoints in seen) == expected + expected
    assert all(crop.ndim == 3 and 0 not in crop.shape for crop, _ in seen)
