"""What a sharding keeps in memory of each person and picture."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from cigpose.files.archives import Extent
from cigpose.shard.intake import SeenIds
from cigpose.shard.pictures import Frame, Picture
from cigpose.shard.spill import SpilledPictures


def test_an_id_is_known_again_wherever_it_is_kept() -> None:
    ids = [*np.random.default_rng(0).integers(0, 30_000, 60_000).tolist(), 2**63 - 1, 2**63 - 1]
    seen, known = SeenIds(), set[int]()
    for identity in ids:
        assert seen.add(identity) == (identity not in known)
        known.add(identity)
    assert len(seen) == len(known)


def test_pictures_come_back_from_the_disk_as_they_were(tmp_path: Path) -> None:
    member = Extent(path="a.zip", name="caf\u00e9/\udcff.jpg", offset=2**40, stored=7, size=9, crc=1, in_zip=True)
    sources = (member, Frame(member, 12), None)
    pictures = [
        Picture(key=f"{i:012d}", image_id=i << 40, file_name="\u00e9.jpg", width=64 + i, height=48, source=source)
        for i, source in enumerate(sources)
    ]
    spilled = SpilledPictures(tmp_path / "pictures.bin")
    for number, picture in enumerate(pictures):
        spilled.append(picture)
        assert spilled[number] == picture and spilled.size(number) == (64 + number, 48)
    assert list(spilled) == pictures
