"""Shards of noise, written directly, for tests of what reads shards."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from cigpose.config import Config, DatasetConfig, LoaderConfig, load_preset


@dataclass
class TinyShards:
    """Shards of noise, written directly: 17 keypoints, pictures of 96 x 80, crops of 32 x 64."""

    root: Path

    def write(
        self,
        name: str,
        images: Sequence[int],
        *,
        persons: Sequence[int] = (2, 1, 3),
        seed: int = 0,
        detections: int = 0,
    ) -> Path:
        """A dataset with so many `images` in each shard; `persons` of each in turn, `detections` of every second."""
        rng, folder = np.random.default_rng(seed), self.root / name
        folder.mkdir(parents=True)
        number, entries = 0, []
        for shard, num_images in enumerate(images):
            entry = {"name": f"{name}-{shard:05d}.tar", "images": num_images, "persons": 0, "detections": 0}
            samples = {}
            for _ in range(num_images):
                record = self._record(rng, number, persons[number % len(persons)], detections * (number % 2))
                entry["persons"] += len(record["persons"])
                entry["detections"] += len(record["detections"])
                picture = cv2.resize(rng.integers(0, 256, (10, 12, 3), dtype=np.uint8), (96, 80))
                samples[f"{number:06d}.jpg"] = cv2.imencode(".jpg", picture)[1].tobytes()
                samples[f"{number:06d}.json"] = json.dumps(record, separators=(",", ":")).encode()
                number += 1
            self.pack(folder / entry["name"], samples)
            entries.append(entry)
        self.index(folder, entries)
        return folder

    @staticmethod
    def _record(rng: np.random.Generator, number: int, num_persons: int, num_detections: int) -> dict[str, Any]:
        def box() -> list[float]:
            x, y, width, height = rng.uniform([0, 0, 20, 20], [50, 40, 45, 40]).round(2).tolist()
            return [x, y, x + width, y + height]

        people = [
            {
                "id": 10 * number + i,
                "bbox_xyxy": box(),
                "area": 400.0,
                "keypoints": np.column_stack([rng.uniform(0, 90, (17, 2)).round(2), rng.integers(0, 3, 17)]).tolist(),
            }
            for i in range(num_persons)
        ]
        detections = [{"bbox_xyxy": box(), "score": 0.5} for _ in range(num_detections)]
        size = {"width": 96, "height": 80}
        names = {"image_id": 1000 + number, "file_name": f'a "keypoints": {number}.jpg'}
        return {**names, **size, "persons": people, "detections": detections}

    @staticmethod
    def pack(path: Path, samples: Mapping[str, bytes]) -> None:
        """A tar of these members."""
        with tarfile.open(path, "w") as tar:
            for name, data in samples.items():
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))

    def index(self, folder: Path, entries: list[dict[str, Any]]) -> None:
        """Write index.json for the tars as they are now."""
        for entry in entries:
            data = (folder / entry["name"]).read_bytes()
            entry.update(sha256=hashlib.sha256(data).hexdigest(), bytes=len(data))
        totals = {what: sum(entry[what] for entry in entries) for what in ("images", "persons", "detections")}
        facts = {"format": 1, "dataset": folder.name, "keypoints": "coco", "num_keypoints": 17}
        rest = {"dropped": {}, "sources": {}, "ground_truth": None, "shards": entries}
        (folder / "index.json").write_text(json.dumps({**facts, **totals, **rest}))

    def config(
        self,
        *train: str,
        loader: Mapping[str, Any] | None = None,
        evaluate: Mapping[str, Any] | None = None,
        locations: Mapping[str, str] | None = None,
        batch: int = 4,
        workers: int = 1,
        input_size: tuple[int, int] = (32, 64),
        **changes: Any,
    ) -> Config:
        """An experiment on these datasets, with batches of `batch` a worker."""
        base = load_preset("cigpose-m_coco_256x192")
        data = replace(
            base.data,
            datasets={name: DatasetConfig(raw=".", reader="coco", images=".", annotations=".") for name in train},
            train=train,
            val=train[0],
            locations=dict(locations or {}),
        )
        options = {"shuffle_buffer": 6, "open_shards": 2, **(loader or {})}
        training = replace(
            base.train,
            batch_total=batch * workers,
            accumulate_steps=1,
            loader=LoaderConfig(**options),
            cluster=replace(base.train.cluster, num_workers=workers),
        )
        return replace(
            base,
            data=data,
            model=replace(base.model, input_size=input_size),
            train=training,
            evaluate=replace(base.evaluate, **{"batch": batch, "boxes": "ground_truth", **(evaluate or {})}),
            **changes,
        )


@pytest.fixture
def tiny_shards(tmp_path: Path) -> TinyShards:
    """Writes small datasets below `root`, and configurations that read them."""
    return TinyShards(tmp_path / "shards")
