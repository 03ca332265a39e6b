"""Writes a rendered dataset: a zip of JPEGs and a COCO-WholeBody annotation file."""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import cv2

from cigpose.config import RenderConfig
from cigpose.files.atomic import claimed, clear_leftovers, written_folder
from cigpose.pool import map_in_processes
from cigpose.progress import progress
from cigpose.render.annotate import CATEGORY
from cigpose.render.scene import render_image

_EPOCH = (1980, 1, 1, 0, 0, 0)
"""Time stamp of every member: the same pictures give the same bytes."""
_CHUNK = 16
IMAGES = "images.zip"
ANNOTATIONS = "annotations.json"
_FILES = {IMAGES, ANNOTATIONS}

Rendered = tuple[bytes, list[dict[str, Any]]]


def render_dataset(config: RenderConfig, folder: Path, *, processes: int | None = None) -> dict[str, int]:
    """Render a dataset into `folder`, as a whole or not at all, by one process at a time.

    Args:
        config: what to draw.
        folder: becomes a folder with `images.zip` and `annotations.json`, in place of an earlier one, once both are
            whole.
        processes: how many share the work; None for one per core. The files do not depend on it.

    Returns:
        The numbers of `images` and `persons`.

    Raises:
        ClaimedError: another process renders this dataset.
        ChildProcessError: a process of several was killed.
        FileExistsError: the folder holds something else.
    """
    folder = folder.resolve()  # a link to another disk stays one
    with claimed(folder.with_name(f".{folder.name}.lock"), f"a rendering of {folder.name}"):
        clear_leftovers(folder)
        _refuse_other_files(folder)
        with written_folder(folder) as part:
            return _render(config, part, folder.name, min(processes or _cores(), config.num_images))


def _refuse_other_files(folder: Path) -> None:
    """The folder is replaced as a whole, so that nothing of anybody else's may be in it."""
    if not folder.exists():
        return
    for path in folder.iterdir():
        if path.name.removesuffix(".part") not in _FILES:
            raise FileExistsError(f"{path}: not made by a rendering, and the folder is replaced whole. Move it away.")


def _render(config: RenderConfig, folder: Path, name: str, processes: int) -> dict[str, int]:
    width, height = config.image_size
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    with zipfile.ZipFile(folder / IMAGES, "w", zipfile.ZIP_STORED) as file:
        bar = progress(_rendered(config, processes), total=config.num_images, desc=f"render {name}", unit="image")
        for image_id, (jpeg, persons) in enumerate(bar, start=1):
            file_name = f"{image_id:012d}.jpg"
            member = zipfile.ZipInfo(f"images/{file_name}", _EPOCH)
            member.external_attr = 0o644 << 16
            file.writestr(member, jpeg)
            images.append({"id": image_id, "file_name": file_name, "width": width, "height": height})
            for person in persons:
                annotations.append({"id": len(annotations) + 1, "image_id": image_id, **person})
    document = {
        "info": {"description": "Rendered people with COCO-WholeBody labels", "version": "1", "seed": config.seed},
        "licenses": [],
        "images": images,
        "categories": [CATEGORY],
        "annotations": annotations,
    }
    (folder / ANNOTATIONS).write_text(json.dumps(document, separators=(",", ":")), encoding="utf-8")
    return {"images": len(images), "persons": len(annotations)}


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _rendered(config: RenderConfig, processes: int) -> Iterator[Rendered]:
    """The pictures in order, drawn by one or more processes.

    Raises:
        ChildProcessError: a process of several was killed.
    """
    if processes <= 1:
        yield from map(partial(render_jpeg, config), range(config.num_images))
        return
    chunks = [range(i, min(i + _CHUNK, config.num_images)) for i in range(0, config.num_images, _CHUNK)]
    try:
        for _, pictures in map_in_processes(partial(_render_chunk, config), chunks, processes):
            yield from pictures
    except ChildProcessError as err:
        raise ChildProcessError(f"{err}. Nothing was changed; run again.") from err


def _render_chunk(config: RenderConfig, numbers: range) -> list[Rendered]:
    cv2.setNumThreads(1)  # the processes already fill the cores
    return [render_jpeg(config, number) for number in numbers]


def render_jpeg(config: RenderConfig, index: int) -> Rendered:
    """Picture number `index` as JPEG bytes, with its annotations without ids."""
    picture, persons = render_image(config, index)
    ok, jpeg = cv2.imencode(
        ".jpg", cv2.cvtColor(picture, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, config.jpeg_quality]
    )
    assert ok
    return jpeg.tobytes(), persons
