"""Drawn pictures and videos of a run: made of its records, so that a run that was stopped draws the same."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from cigpose.deploy.poses import Poses
from cigpose.deploy.results import Results
from cigpose.deploy.sources import Source, utf8
from cigpose.files.atomic import write_bytes, written_file
from cigpose.keypoints import KeypointSet


@dataclass(frozen=True)
class Painter:
    """Draws records into the folder of a run."""

    keypoint_set: KeypointSet
    results: Results
    min_score: float

    def drawn(self, image: np.ndarray, record: Mapping[str, Any]) -> np.ndarray:
        """A picture or frame with the poses of its record."""
        poses = Poses.from_records(record["persons"], (image.shape[1], image.shape[0]), self.keypoint_set)
        return poses.plot(image, min_score=self.min_score)

    def write(self, source: Source, image: np.ndarray, record: Mapping[str, Any]) -> None:
        """Write a drawn picture.

        Raises:
            ValueError: OpenCV cannot encode it.
        """
        target = self.results.place(source.drawing)
        try:
            good, content = cv2.imencode(target.suffix.lower(), self.drawn(image, record))
        except cv2.error:
            good = False
        if not good:
            raise ValueError(f"{utf8(target)}: OpenCV cannot encode it. Use --no-drawings for the JSON alone.")
        write_bytes(target, content.tobytes())


def refuse_existing(target: Path) -> None:
    """See that a drawing would replace nothing.

    Raises:
        ValueError: there is something of this name.
    """
    if os.path.lexists(target):
        raise ValueError(f"{utf8(target)}: exists, and `cigpose predict` did not write it. Move it elsewhere.")


@contextlib.contextmanager
def video_writer(
    path: Path | None, rate: float, size: tuple[int, int], source: Path
) -> Iterator[Callable[[np.ndarray], object]]:
    """Takes frames; at the end there is a video, with the sound of its source where ffmpeg is at hand.

    Args:
        path: of the video, written whole or not at all; None: no video.
        rate: frames a second.
        size: (width, height).
        source: the video whose sound is kept.
    """
    if path is None:
        yield lambda frame: None
        return
    with written_file(path) as part:
        with ascii_link(part, ".mp4") as name:
            writer = cv2.VideoWriter(name, cv2.VideoWriter.fourcc(*"mp4v"), rate, size)
            try:
                if not writer.isOpened():
                    raise ValueError(
                        f"{utf8(path)}: OpenCV cannot encode a video here. Use --no-drawings for JSON alone."
                    )
                yield lambda frame: writer.write(frame)
            finally:
                writer.release()
        _add_sound(part, source)


def _add_sound(video: Path, source: Path) -> None:
    """Put the sound of `source` into a video; nothing happens without ffmpeg, or without sound."""
    ffmpeg = shutil.which("ffmpeg")
    if ffmpeg is None:
        return
    with tempfile.TemporaryDirectory(prefix=".sound-", dir=video.parent) as folder, ascii_link(video, ".mp4") as silent:
        target = Path(folder) / "video.mp4"
        with ascii_link(source, source.suffix) as name:
            for codec in ("copy", "aac"):  # not every sound fits into an mp4 as it is
                command = [ffmpeg, "-v", "error", "-nostdin", "-y", "-i", silent, "-i", name, "-map", "0:v", "-map"]
                command += ["1:a", "-c:v", "copy", "-c:a", codec, str(target)]
                if subprocess.run(command, capture_output=True, check=False).returncode == 0 and target.is_file():
                    os.replace(target, video)
                    return


@contextlib.contextmanager
def ascii_link(path: Path, ending: str) -> Iterator[str]:
    """A link: OpenCV crashes on names that are not UTF-8, and goes by the ending."""
    with tempfile.TemporaryDirectory(prefix="cigpose-") as folder:
        link = Path(folder) / f"video{ending}"
        link.symlink_to(path.resolve())
        yield str(link)
