"""An index.json without the shards that it lists, for tests of what reads nothing else."""

from __future__ import annotations

from typing import Any


def shard_index(name: str, images: int, digests: tuple[str, ...] = ("cd" * 32,)) -> dict[str, Any]:
    """Plain values of the index: one shard for each of `digests`, all pictures in the first, two people on each."""
    counts = {"images": images, "persons": 2 * images, "detections": 0}
    shards = [
        {
            "name": f"{name}-{number:05d}.tar",
            "sha256": digest,
            "bytes": 4096 * images,
            **(dict.fromkeys(counts, 0) if number else counts),
        }
        for number, digest in enumerate(digests)
    ]
    return {
        "format": 2,
        "dataset": name,
        "keypoints": "coco_wholebody",
        "num_keypoints": 133,
        **counts,
        "dropped": {},
        "sources": {"images.zip": "ab" * 32},
        "ground_truth": None,
        "shards": shards,
    }
