"""`data` in params.yaml: what is fetched, drawn, sharded and read."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from cigpose.config.schema import ADDRESS, HOW, LARGEST, PRIVATE, affects, require, require_between, require_name


@dataclass(frozen=True, kw_only=True, slots=True)
class DownloadConfig:
    """What to fetch, and from where."""

    sources: dict[str, tuple[str, ...]] = field(metadata=affects("download"))
    """Folder under data/raw -> names of files in the download table (`cigpose.download.fetch`). May be empty."""
    mirror: str | None = field(default=None, metadata=PRIVATE)
    """Address that replaces the hosts: <mirror>/<host>/<path>."""
    parallel_files: int = 3
    timeout_s: float = 30.0
    """Seconds without a byte before a transfer is tried again."""
    max_attempts: int = 8
    drive_ids: dict[str, str] = field(default_factory=dict, metadata=PRIVATE)
    """File -> Google Drive id, for files handed out personally (UBody)."""

    def __post_init__(self) -> None:
        for key, files in self.sources.items():
            require_name(key, "sources")
            for file in files:
                require_name(file, f"sources.{key}", "path")
        for file in self.drive_ids:
            require_name(file, "drive_ids", "path")
        require_between(self, 1, 64, "parallel_files")
        require_between(self, 0, 86400, "timeout_s", positive=True)
        require_between(self, 1, 1000, "max_attempts")


@dataclass(frozen=True, kw_only=True, slots=True)
class RenderConfig:
    """A rendered dataset: articulated people drawn with OpenCV."""

    seed: int
    num_images: int
    image_size: tuple[int, int]
    """(width, height) in pixels."""
    max_persons: int = 3
    clutter: float = 0.5
    """0: plain backgrounds, 1: crowded ones."""
    turn: float = 1.0
    """0: everyone faces the camera, 1: people are seen from all sides."""
    bent_legs: float = 0.33
    """Share of persons who sit, crouch or have a foot up; the others stand or walk."""
    close_ups: float = 0.26
    """Share of persons alone in the picture who are so near that it cuts them."""
    occlusion: float = 0.3
    """Share of persons with an occluder before them."""
    spurious_context: float = 0.5
    """Probability that the context object agrees with the pose of the right arm; 0.5: no relation."""
    context: float = 0.5
    """Share of persons with a context object beside them."""
    hide_arm: float = 0.0
    """Share of persons whose right arm is covered, labels kept."""
    jpeg_quality: int = 92

    def __post_init__(self) -> None:
        require_between(self, 0, LARGEST, "seed")
        require_between(self, 1, 10_000_000, "num_images")
        require(
            min(self.image_size) >= 64 and max(self.image_size) <= 8192,
            f"image_size must be at least 64 x 64 and at most 8192 x 8192, got {self.image_size}.",
        )
        require_between(self, 1, 100, "max_persons", "jpeg_quality")
        shares = ("clutter", "turn", "bent_legs", "close_ups", "occlusion", "spurious_context", "context", "hide_arm")
        require_between(self, 0, 1, *shares)


@dataclass(frozen=True, kw_only=True, slots=True)
class DatasetConfig:
    """One set of shards: which pictures, which people."""

    raw: str
    """Folder under data/raw."""
    reader: Literal["coco", "crowdpose", "ubody"]
    """`coco` reads any COCO-keypoints JSON: COCO, COCO-WholeBody, rendered people, a user's own."""
    images: str
    """Zip or folder of pictures (UBody: of videos), relative to the raw folder."""
    annotations: str
    """JSON file, or `archive.zip:member` / `archive.tar:member` (UBody: zip of scenes)."""
    detections: str | None = None
    """JSON list of person boxes, for evaluation on detected boxes."""
    frame_interval: int = 1
    """UBody: an image is used when its id is a multiple of this."""
    split: Literal["train", "val"] | None = None
    """UBody: which side of the split file."""
    split_file: str | None = None
    """UBody: `splits.zip:member` or .npy with the names of the test videos."""
    scenes: tuple[str, ...] = ()
    """UBody: scenes in order; empty for all."""
    ground_truth: bool = False
    """Write annotations.json (every person, crowds too) beside the shards: what pycocotools scores against."""
    first_person_only: bool = False
    """UBody: keep only the first person of a frame, as the original converter does by accident."""

    def __post_init__(self) -> None:
        for name in ("raw", "images", "annotations", "detections", "split_file"):
            if (path := getattr(self, name)) is not None:
                require_name(path, name, "path")
        require_between(self, 1, 1_000_000, "frame_interval")


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardingConfig:
    """How shards are written."""

    images_per_shard: int = 1000
    jpeg_quality: int = 95
    """Of frames taken from videos; photographs keep their bytes."""
    max_bad_share: float = 0.0
    """Share of persons that may be unreadable before the stage fails."""
    verify_images: bool = False
    """Decode every picture. Headers, ends and checksums are looked at in any case."""
    shuffle: bool = False
    """Write the pictures of each shard in random order: for sources where like stands beside like, as in videos."""
    processes: int = field(default=0, metadata=HOW)
    """0: one per core, fewer where there is little to copy."""

    def __post_init__(self) -> None:
        require_between(self, 1, 1_000_000, "images_per_shard")
        require_between(self, 1, 100, "jpeg_quality")
        require_between(self, 0, 1, "max_bad_share")
        require_between(self, 0, 1024, "processes")


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    """Where people come from."""

    download: DownloadConfig = field(metadata=HOW)
    render: dict[str, RenderConfig] = field(metadata=affects("render"))
    """Folder under data/raw -> a rendered dataset. May be empty."""
    datasets: dict[str, DatasetConfig] = field(metadata=affects("shard"))
    """Folder under data/shards -> a set of shards."""
    train: tuple[str, ...] = field(metadata=affects("train"))
    """Datasets trained on; each person once per epoch."""
    val: str = field(metadata=affects("train", "robustness", "evaluate", "register"))
    """Dataset evaluated on."""
    sharding: ShardingConfig = field(default_factory=ShardingConfig, metadata=affects("shard"))
    locations: dict[str, str] = field(
        default_factory=dict, metadata=ADDRESS | affects("locate", "train", "robustness", "evaluate")
    )
    """Dataset -> address of its shards (s3://, http://, a folder) in place of data/shards/<dataset>."""

    def __post_init__(self) -> None:
        for table in ("render", "datasets", "locations"):
            for key in getattr(self, table):
                require_name(key, table)
        for name in (*self.train, self.val):
            require(
                name in self.datasets or name in self.locations,
                f"train/val: dataset {name!r} is neither in datasets nor in locations: {sorted(self.datasets)}.",
            )
        require(len(self.train) > 0, "train: name at least one dataset.")
