"""index.json of a dataset's shards: what it says, and the one place where that is checked.

An index may come from any server; nothing of it names a file, a size or a count before `parse_index` has let it pass.
"""

from __future__ import annotations

import json
import re
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any

from cigpose.files.addresses import is_remote, without_credentials
from cigpose.files.digest import sha256_of
from cigpose.files.errors import DataError
from cigpose.files.objects import read_object

FORMAT = 2
_READABLE = (1, FORMAT)
"""Format 1 had no digest of the ground truth, which is then read unchecked; everything else is the same."""
INDEX = "index.json"
LARGEST_INDEX = 256 << 20
"""Bytes; a shard takes about 250 of them."""
_LARGEST_SHARD = 1 << 40
_LEAST_SAMPLE = 2048
"""Bytes of an image in a tar: two headers and two blocks."""
_PLAIN_NAME = re.compile(r"(?!\.)[A-Za-z0-9._-]{1,200}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_COUNTS = ("images", "persons", "detections")


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardEntry:
    """One tar as the index lists it."""

    name: str
    sha256: str
    bytes: int
    images: int
    persons: int
    detections: int


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardIndex:
    """index.json: what a dataset's shards hold and where that came from."""

    format: int
    dataset: str
    keypoints: str
    """Name of the keypoint set."""
    num_keypoints: int
    images: int
    persons: int
    detections: int
    dropped: dict[str, int]
    """Reason -> persons (or detections) left out by the rule."""
    sources: dict[str, str]
    """File the shards were made from -> sha256."""
    ground_truth: str | None
    """File beside the index, or None."""
    ground_truth_sha256: str | None = None
    """Of that file; None without one, or in an index of format 1."""
    shards: tuple[ShardEntry, ...]
    bad: dict[str, Any] = field(default_factory=dict)
    """`count` of unreadable persons and the first `examples` in words."""
    mended: dict[str, int] = field(default_factory=dict)
    """What was put right -> how many pictures."""


class _FaultError(ValueError):
    """A clause: what of an index cannot be."""


def parse_index(text: str | bytes, where: str) -> ShardIndex:
    """An index from its JSON, wherever that was read from: every name plain, every digest and number possible.

    Raises:
        DataError: it is not an index of this format.
    """
    try:
        values = json.loads(text)
        if not isinstance(values, dict) or "format" not in values:
            raise _FaultError("no JSON object with a format")
        if values["format"] not in _READABLE or type(values["format"]) is not int:
            found, readable = _short(values["format"]), " and ".join(map(str, _READABLE))
            raise DataError(
                f"{where}: format {found}, this version reads {readable}. Shard the data again: `dvc repro`."
            )
        entries = values.get("shards")
        if not isinstance(entries, list) or not entries:
            raise _FaultError("it lists no shards")
        shards = tuple(_entry(entry, number) for number, entry in enumerate(entries, start=1))
        _check_listed_once(shards)
        return _index(values, shards)
    except RecursionError as err:
        raise DataError(
            f"{where}: not an index of shards (nested too deep). Shard the data again: `dvc repro`."
        ) from err
    except DataError:
        raise
    except ValueError as err:
        raise DataError(f"{where}: not an index of shards ({err}). Shard the data again: `dvc repro`.") from err


def _entry(values: Any, number: int) -> ShardEntry:
    if not isinstance(values, dict):
        raise _FaultError(f"shard {number} is no object")
    _check_keys(values, ShardEntry, f"shard {number}")
    name = values["name"]
    if not _is_plain(name, ".tar"):
        raise _FaultError(
            f"the name of shard {number} is {_short(name)}, expected letters, digits, . _ - and .tar at the end"
        )
    if not _is_sha256(values["sha256"]):
        raise _FaultError(f"the sha256 of {name} is {_short(values['sha256'])}, expected 64 hex digits")
    for key in ("bytes", *_COUNTS):
        if not _is_count(values[key]):
            raise _FaultError(f"{key} of {name} is {_short(values[key])}, expected a whole number from 0")
    size = values["bytes"]
    if size > _LARGEST_SHARD or size < _LEAST_SAMPLE * values["images"]:
        raise _FaultError(f"{name} cannot hold {values['images']} images in {size} bytes")
    if values["persons"] + values["detections"] > size:
        raise _FaultError(
            f"{name} cannot hold {values['persons']} persons and {values['detections']} boxes in {size} bytes"
        )
    return ShardEntry(**values)


def _check_listed_once(shards: tuple[ShardEntry, ...]) -> None:
    for what in ("name", "sha256"):
        seen: dict[str, str] = {}
        for shard in shards:
            value = getattr(shard, what)
            if value in seen:
                other = "" if what == "name" else f" (as {seen[value]} too)"
                raise _FaultError(f"{shard.name} is listed twice{other}; its people would count twice")
            seen[value] = shard.name


def _index(values: dict[str, Any], shards: tuple[ShardEntry, ...]) -> ShardIndex:
    _check_keys(values, ShardIndex, "the index")
    for key in ("dataset", "keypoints"):
        if not isinstance(values[key], str):
            raise _FaultError(f"{key} is {_short(values[key])}, expected a name")
    for key in ("num_keypoints", *_COUNTS):
        if not _is_count(values[key]):
            raise _FaultError(f"{key} is {_short(values[key])}, expected a whole number from 0")
    for key in _COUNTS:
        if values[key] != (total := sum(getattr(shard, key) for shard in shards)):
            raise _FaultError(f"{values[key]} {key} in all, but the shards listed hold {total}")
    truth = values["ground_truth"]
    if truth is not None and (not _is_plain(truth, ".json") or truth == INDEX):
        raise _FaultError(f"ground_truth is {_short(truth)}, expected a plain name that ends in .json")
    digest = values.get("ground_truth_sha256")
    if digest is not None and not _is_sha256(digest):
        raise _FaultError(f"ground_truth_sha256 is {_short(digest)}, expected 64 hex digits")
    if (truth is None and digest is not None) or (truth is not None and digest is None and values["format"] > 1):
        raise _FaultError("ground_truth and ground_truth_sha256 come together or not at all")
    for key, is_right in (("dropped", _is_count), ("mended", _is_count), ("sources", _is_sha256)):
        table = values.get(key, {})
        if not isinstance(table, dict) or not all(map(is_right, table.values())):
            raise _FaultError(
                f"{key} is {_short(table)}, expected {'digests' if key == 'sources' else 'counts'} by name"
            )
    bad = values.get("bad", {})
    if not isinstance(bad, dict) or not _is_count(bad.get("count", 0)) or not _are_texts(bad.get("examples", [])):
        raise _FaultError(f"bad is {_short(bad)}, expected a count and examples")
    return ShardIndex(**{**values, "shards": shards})


def _check_keys(values: dict[str, Any], kind: type, where: str) -> None:
    known = {entry.name for entry in fields(kind)}
    needed = {entry.name for entry in fields(kind) if entry.default_factory is MISSING and entry.default is MISSING}
    if missing := sorted(needed - values.keys()):
        raise _FaultError(f"{where} has no {missing[0]}")
    if unknown := sorted(values.keys() - known):
        raise _FaultError(f"{where} has a key {_short(unknown[0])}, which this version does not know")


def _is_plain(name: Any, ending: str) -> bool:
    return isinstance(name, str) and _PLAIN_NAME.fullmatch(name) is not None and name.endswith(ending)


def _is_sha256(value: Any) -> bool:
    return isinstance(value, str) and _SHA256.fullmatch(value) is not None


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 63


def _are_texts(values: Any) -> bool:
    return isinstance(values, list) and all(isinstance(value, str) for value in values)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def read_index(place: str | Path) -> ShardIndex:
    """The index of the shards in a folder, or at an s3:// or http(s):// address.

    Raises:
        FileNotFoundError: no index there: the folder was not sharded, or not to the end.
        FetchError: the address does not give it.
        DataError: it is not an index of this format.
    """
    address = f"{str(place).rstrip('/')}/{INDEX}"
    try:
        text = read_object(address, LARGEST_INDEX)
    except FileNotFoundError as err:
        if is_remote(address):
            raise
        raise FileNotFoundError(f"{address}: not found. `python -m pipelines.shard KEY` makes the shards.") from err
    return parse_index(text, without_credentials(address))


def verify(folder: Path, *, digests: bool = True) -> ShardIndex:
    """Check that every shard and the ground truth are there as the index says, by size and (slower) by sha256.

    Raises:
        FileNotFoundError: the index, a shard or the ground truth is missing.
        DataError: one of them differs.
    """
    folder = Path(folder)
    index = read_index(folder)
    again = f"Delete {folder} and run `dvc repro shard`."
    for shard in index.shards:
        path = folder / shard.name
        if not path.is_file():
            raise FileNotFoundError(f"{path}: not found, but index.json lists it. {again}")
        if (size := path.stat().st_size) != shard.bytes:
            raise DataError(f"{path}: {size} bytes, index.json says {shard.bytes}. {again}")
        if digests and (digest := sha256_of(path)) != shard.sha256:
            raise DataError(f"{path}: sha256 is {digest[:12]}..., index.json says {shard.sha256[:12]}.... {again}")
    if index.ground_truth is not None:
        path, wanted = folder / index.ground_truth, index.ground_truth_sha256
        if not path.is_file():
            raise FileNotFoundError(f"{path}: not found, but index.json names it. {again}")
        if digests and wanted is not None and (digest := sha256_of(path)) != wanted:
            raise DataError(f"{path}: sha256 is {digest[:12]}..., index.json says {wanted[:12]}.... {again}")
    return index
