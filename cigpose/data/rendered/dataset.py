"""Writes a rendered dataset: a zip of JPEGs and a COCO-WholeBody annotation file."""

from __future__ import annotations

import json
import multiprocessing
import os
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import cv2

from cigpose.config import RenderConfig
from cigpose.data.rendered.annotate import CATEGORY
from cigpose.data.rendered.scene import render_image
from cigpose.progress import progress

_EPOCH = (1980, 1, 1, 0, 0, 0)
"""Time stamp of every member: the same pictures give the same bytes."""
_CHUNK = 16

Rendered = tuple[bytes, list[dict[str, Any]]]


def render_dataset(config: RenderConfig, folder: Path, *, processes: int | None = None) -> dict[str, int]:
    """Render a dataset into `folder` (made if needed; its two files are replaced).

    Args:
        config: what to draw.
        folder: gets `images.zip` and `annotations.json`; neither is seen before it is whole.
        processes: how many share the work; None for one per core. The files do not depend on it.

    Returns:
        The numbers of `images` and `persons`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    processes = min(processes or _cores(), config.num_images)
    width, height = config.image_size
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    archive = folder / "images.zip.part"
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_STORED) as file, _renderer(config, processes) as rendered:
        bar = progress(rendered, total=config.num_images, desc=f"render {folder.name}", unit="image")
        for image_id, (jpeg, persons) in enumerate(bar, start=1):
            name = f"{image_id:012d}.jpg"
            member = zipfile.ZipInfo(f"images/{name}", _EPOCH)
            member.external_attr = 0o644 << 16
            file.writestr(member, jpeg)
            images.append({"id": image_id, "file_name": name, "width": width, "height": height})
            for person in persons:
                annotations.append({"id": len(annotations) + 1, "image_id": image_id, **person})
    table = folder / "annotations.json.part"
    document = {
        "info": {"description": "Rendered people with COCO-WholeBody labels", "version": "1", "seed": config.seed},
        "licenses": [],
        "images": images,
        "categories": [CATEGORY],
        "annotations": annotations,
    }
    table.write_text(json.dumps(document, separators=(",", ":")), encoding="utf-8")
    archive.replace(folder / "images.zip")
    table.replace(folder / "annotations.json")
    return {"images": len(images), "persons": len(annotations)}


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def _renderer(config: RenderConfig, processes: int) -> Iterator[Iterator[Rendered]]:
    """The pictures in order, drawn by one or more processes."""
    draw = partial(render_jpeg, config)
    if processes <= 1:
        yield map(draw, range(config.num_images))
        return
    with multiprocessing.get_context("spawn").Pool(processes, _single_thread) as pool:
        yield pool.imap(draw, range(config.num_images), chunksize=_CHUNK)


def _single_thread() -> None:
    """One thread per process: the processes already fill the cores."""
    cv2.setNumThreads(1)


def render_jpeg(config: RenderConfig, index: int) -> Rendered:
    """Picture number `index` as JPEG bytes, with its annotations without ids."""
    picture, persons = render_image(config, index)
    ok, jpeg = cv2.imencode(
        ".jpg", cv2.cvtColor(picture, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, config.jpeg_quality]
    )
    assert ok
    return jpeg.tobytes(), persons
