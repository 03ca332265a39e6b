"""The folder that `cigpose predict` writes, and how it is told from every other folder.

    cigpose-predict.json    what was asked for: model, options, sources; at the end the pictures, their ids, the names
                            of the keypoints: a COCO file without annotations, with which `loadRes` takes poses.json
    poses.jsonl             a record per picture, as they are done
    poses.json              all of them as a COCO result file, at the end
    <video>.jsonl, .json    the same for each video; image_id is the frame, from 0
    drawn/                  drawn pictures and videos, under their own names

A run writes into a folder that is new, empty, or of a run that was asked for the same. So nothing but our own files is
ever replaced, and a run that was stopped goes on.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from cigpose.deploy.poses import pose_entry
from cigpose.deploy.sources import MANIFEST, utf8
from cigpose.files.atomic import claimed, write_json, written_file
from cigpose.keypoints import KeypointSet

DEFAULT = Path("predictions")
DRAWN = "drawn"
_LOCK = ".cigpose-predict.lock"
_WRITTEN_BY, _ASKED = "written_by", "asked"
_FOUND = ("model", "images", "annotations", "categories", "videos", "skipped", "keypoint_set", "keypoints")
_PART = re.compile(r"\.[0-9a-f]{8}\.part$")  # cigpose.files.atomic
_SHOWN_FILES = 3


@dataclass
class Results:
    """A folder that this process writes."""

    path: Path
    asked: Mapping[str, Any]
    found: dict[str, Any]
    """What is known so far: `images` with their ids, `videos` with their frames, `skipped`, `keypoints`."""

    def note(self, **found: Any) -> None:
        """Add to what is known, on the disk too."""
        self.found |= found
        write_json(self.path / MANIFEST, {_WRITTEN_BY: "cigpose predict", _ASKED: self.asked, **self.found})

    def note_video(self, name: str, facts: Mapping[str, Any]) -> None:
        """The same for one video."""
        self.note(videos={**self.found.get("videos", {}), name: facts})

    def place(self, drawing: Path) -> Path:
        """Where a drawing goes.

        Raises:
            ValueError: a link leads from there to elsewhere.
        """
        target = self.path / DRAWN / drawing
        target.parent.mkdir(parents=True, exist_ok=True)
        if not target.parent.resolve().is_relative_to(self.path.resolve()):
            raise ValueError(f"{utf8(target)}: a link leads from there out of {utf8(self.path)}. Remove it.")
        return target


@contextlib.contextmanager
def opened_folder(out: Path | None, asked: Mapping[str, Any]) -> Iterator[Results]:
    """The folder of a run, for as long as it writes there.

    Args:
        out: None: `predictions`, or the first of `predictions-2`, ... that is free or of the same run.
        asked: what makes it the same run: JSON values.

    Raises:
        ClaimedError: another process writes there.
        ValueError: the folder is not empty, and not of a run that was asked for the same.
    """
    folder = _free_folder(asked) if out is None else out
    _refuse(folder, asked)
    with claimed(folder / _LOCK, f"a `cigpose predict` into {utf8(folder)}"):
        _refuse(folder, asked)  # another may have begun meanwhile
        found = _read_manifest(folder) if (folder / MANIFEST).exists() else {}
        results = Results(folder, asked, {key: value for key, value in found.items() if key in _FOUND})
        results.note()
        for path in folder.rglob(".*.part"):  # of a run that was killed; nobody else writes here
            if _PART.search(path.name):
                path.unlink()
        yield results


def _read_manifest(folder: Path) -> dict[str, Any]:
    try:
        content = json.loads((folder / MANIFEST).read_bytes())
    except ValueError as err:
        raise ValueError(f"{utf8(folder / MANIFEST)}: not valid JSON ({err}). Give another --out.") from err
    if not isinstance(content, dict) or not isinstance(content.get(_ASKED), dict):
        raise ValueError(f"{utf8(folder / MANIFEST)}: not written by `cigpose predict`. Give another --out.")
    return content


def file_digest(path: Path) -> str:
    """SHA-256 of a file, in hex.

    Raises:
        FileNotFoundError: there is no such file.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{utf8(path)}: not found.")
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _free_folder(asked: Mapping[str, Any]) -> Path:
    for number in itertools.count(1):
        folder = DEFAULT if number == 1 else DEFAULT.with_name(f"{DEFAULT.name}-{number}")
        with contextlib.suppress(ValueError):
            _refuse(folder, asked)
            return folder
    raise AssertionError


def _refuse(folder: Path, asked: Mapping[str, Any]) -> None:
    if not os.path.lexists(folder):
        return
    if not folder.is_dir():
        raise ValueError(f"{utf8(folder)}: is not a folder. Give a new or empty folder as --out.")
    if (folder / MANIFEST).exists():
        before = _read_manifest(folder)[_ASKED]
        if differing := sorted(key for key in {*before, *asked} if before.get(key) != asked.get(key)):
            raise ValueError(
                f"{utf8(folder)}: holds the results of another run, which differs in {', '.join(differing)}. Give "
                "another --out, or none for a new folder."
            )
        return
    others = sorted(utf8(path.name) for path in folder.iterdir() if not _is_our_beginning(path.name))
    if others:
        more = f" and {len(others) - _SHOWN_FILES} more" if len(others) > _SHOWN_FILES else ""
        raise ValueError(
            f"{utf8(folder)}: holds files that `cigpose predict` did not write ({', '.join(others[:_SHOWN_FILES])}"
            f"{more}), and writes over none. Give a new or empty folder as --out."
        )


def _is_our_beginning(name: str) -> bool:
    """What a run leaves that was killed before it could say whose the folder is."""
    return name == _LOCK or (name.startswith(f".{MANIFEST}.") and _PART.search(name) is not None)


def image_ids(names: Iterable[Path]) -> list[int]:
    """The numbers that the files are named by, as in COCO; if not all are, or not different ones, 1, 2, ..."""
    stems = [name.stem for name in names]
    numbers = [int(stem) for stem in stems if stem.isascii() and stem.isdigit() and len(stem) < 19]
    return numbers if len(set(numbers)) == len(stems) else list(range(1, len(stems) + 1))


def write_pose_results(path: Path, records: Iterable[tuple[int, Mapping[str, Any]]], keypoint_set: KeypointSet) -> None:
    """Write a COCO result file of (image_id, record) pairs, whole."""
    with written_file(path) as part, part.open("wb") as file:
        file.write(b"[")
        count = 0
        for image_id, record in records:
            for person in record["persons"]:
                file.write(b",\n" if count else b"\n")
                file.write(orjson.dumps(pose_entry(image_id, person, keypoint_set)))
                count += 1
        file.write(b"\n]\n")
