"""A training as it is seen: a bar in the terminal, lines in history.jsonl, points and pictures in MLflow."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from cigpose.config import Config
from cigpose.draw import draw_poses
from cigpose.evaluate.checkpoint import sample_pictures
from cigpose.evaluate.labels import dataset_truth, open_shards
from cigpose.evaluate.report import contact_sheets
from cigpose.progress import progress
from pipelines.tracking.run import Run

IMAGES_SHOWN = 8
COLUMNS_OF_CROPS = 8
BAR = "{desc} {percentage:3.0f}% step {n_fmt}/{total_fmt}{postfix}"


class Watch:
    """Shows what workers tell (`pipelines.training.worker.Messenger`).

    Args:
        config: the experiment.
        run: gets the history, and pictures into its folder.
        shards: folder of the shard folders.

    Raises:
        ConfigError: the labels do not give the figures by which epochs and models are compared.
    """

    def __init__(self, config: Config, run: Run, shards: Path) -> None:
        self.config, self.run = config, run
        self.bar: Any = None
        self._pictures = list(sample_pictures(open_shards(config, config.data.val, shards), IMAGES_SHOWN))
        self._truth = dataset_truth(open_shards(config, config.data.val, shards), config.for_validation())
        config.refuse_unknown_metrics(crowding=self._truth.crowd_index is not None)

    @property
    def shown_images(self) -> list[int]:
        """Ids of the validation images whose predictions are drawn."""
        return [image_id for image_id, _ in self._pictures]

    def on_event(self, event: dict[str, Any]) -> None:
        """Show one event."""
        getattr(self, f"_on_{event['event']}")(event)

    def close(self) -> None:
        """End the bar."""
        if self.bar is not None:
            self.bar.close()

    def _on_start(self, event: dict[str, Any]) -> None:
        """The checkpoint's history is the truth: what was measured after it will be measured again."""
        self.close()
        self.bar = progress(
            total=event["total_steps"], desc="train", unit="step", initial=event["step"], bar_format=BAR
        )
        self.bar.ncols = None  # the figures matter more than the width
        if event["step"]:
            self.bar.write(f"resumed at step {event['step']} of {event['total_steps']} ({self.run.folder})")
        self.run.restart_history(event["history"])

    def _on_log(self, event: dict[str, Any]) -> None:
        record = event["record"]
        self.run.log_record(record)
        parts = " ".join(f"{key.removeprefix('loss_')} {record[key]:.4f}" for key in sorted(record) if "loss" in key)
        self.bar.set_postfix_str(
            f"epoch {record['epoch'] + 1}/{self.config.train.epochs} {parts} lr {record['lr']:.1e} "
            f"{record['images_per_s']:.0f} images/s wait {record['data_wait']:.0%} "
            f"{record.get('gpu_memory_mb', record['memory_mb']) / 1024:.1f} GB ETA {eta(record['eta_s'])}",
            refresh=False,
        )
        self.bar.update(record["step"] - self.bar.n)

    def _on_validation(self, event: dict[str, Any]) -> None:
        record = event["record"]
        self.run.log_record(record)
        figures = " ".join(f"{key} {value:.3f}" for key, value in record.items() if key.endswith("/AP"))
        self.bar.write(f"epoch {record['epoch']}: {figures} ({record['seconds']:.0f} s)")
        pages = contact_sheets(
            self._pictures,
            event["predictions"],
            self.config.keypoint_set,
            self.run.folder / "pictures",
            truth=self._truth,
            name=f"epoch-{record['epoch']:03d}",
        )
        for page in pages:
            self.run.note_file(page, "validation")

    def _on_crops(self, event: dict[str, Any]) -> None:
        path = self.run.folder / "pictures" / "training-crops.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        tiles = [
            draw_poses(np.ascontiguousarray(crop[..., ::-1]), keypoints, visible, self.config.keypoint_set)
            for crop, keypoints, visible in zip(
                event["crops"], event["keypoints"][:, None], event["visible"][:, None], strict=True
            )
        ]
        rows = [tiles[i : i + COLUMNS_OF_CROPS] for i in range(0, len(tiles), COLUMNS_OF_CROPS)]
        blank = np.full_like(tiles[0], 255)
        rows = [row + [blank] * (len(rows[0]) - len(row)) for row in rows]
        cv2.imwrite(str(path), np.vstack([np.hstack(row) for row in rows]))
        self.run.note_file(path, "training")

    def _on_checkpoint(self, event: dict[str, Any]) -> None:
        """Nothing to show."""


def eta(seconds: float) -> str:
    """A duration as h:mm:ss."""
    return str(timedelta(seconds=round(seconds)))
