"""The samples of shards, through webdataset's tar reader: checked, counted, and from any person on."""

from __future__ import annotations

import tarfile
from collections.abc import Generator, Iterator
from contextlib import closing
from typing import Any

import orjson
from webdataset.tariterators import base_plus_ext, group_by_keys, tar_file_expander

from cigpose.files.errors import DataError
from cigpose.loader.shards import AGAIN, OpenShard, ShardSet

PERSONS, DETECTIONS = "persons", "detections"
"""What of a picture is counted, by its name in the index."""


def read_shard(shards: ShardSet, number: int) -> Generator[dict[str, Any], None, None]:
    """The samples of one shard as they are: `__key__`, `__url__` (the tar's place), `jpg` and `json` bytes.

    Raises:
        DataError: the tar is not the one the index lists, or does not hold what it says; at its end at the latest.
        OSError: it cannot be read or fetched.
    """
    with closing(shards.read(number)) as shard:
        yield from (sample for sample, _ in _checked(shard, 0, PERSONS))


def read_persons(
    shards: ShardSet, number: int, first: int, last: int, what: str = PERSONS
) -> Iterator[tuple[dict[str, Any], range]]:
    """The samples that hold persons `first` (included) to `last` (excluded) of a shard.

    A shard that this process has not compared with its index yet is read from its beginning to its end. In a file that
    was, what lies before `first` is passed over by its headers and what lies behind `last` is not read.

    Args:
        shards: the dataset.
        number: of the shard.
        first: place in the shard of the first person.
        last: and behind the last one.
        what: `persons` or `detections`.

    Yields: a sample as `read_shard` gives it, and the places of the wanted persons in its record.

    Raises:
        DataError: the tar is not the one the index lists, or does not hold what it says; at its end at the latest.
        OSError: it cannot be read or fetched.
    """
    with closing(shards.read(number)) as shard:
        position = 0
        if first and shard.file is not None and not shard.is_checked:
            position = _go_to_person(shard, first, what)
        for sample, count in _checked(shard, position, what):
            wanted = range(max(first - position, 0), min(last - position, count))
            if wanted:
                yield sample, wanted
            position += count
            if position >= last < getattr(shard.entry, what):
                break
        if position < last:
            raise DataError(f"{shard.place}: ends after {position} {what}, more were expected. {AGAIN}")
        shard.finish()


def _checked(shard: OpenShard, position: int, what: str) -> Iterator[tuple[dict[str, Any], int]]:
    """The samples of a shard, each with its number of `what`; counted to the end if read from the beginning."""
    images = persons = detections = 0
    try:
        for sample in _samples(shard):
            if odd := {"jpg", "json"} - sample.keys():
                raise DataError(f"{shard.place}: {sample['__key__']} has no .{min(odd)} beside it. {AGAIN}")
            num_persons, num_detections = count_people(sample["json"])
            images, persons, detections = images + 1, persons + num_persons, detections + num_detections
            yield sample, num_detections if what == DETECTIONS else num_persons
        if position == 0:
            for kind, number in (("images", images), (PERSONS, persons), (DETECTIONS, detections)):
                if number != (expected := getattr(shard.entry, kind)):
                    raise DataError(
                        f"{shard.place}: {number} {kind} found, index.json says {expected}; the tar is damaged. {AGAIN}"
                    )
    except DataError:
        shard.finish()  # a tar that is another one is named as such
        raise
    if position == 0:
        shard.finish()


def _samples(shard: OpenShard) -> Iterator[dict[str, Any]]:
    try:
        yield from group_by_keys(tar_file_expander([{"url": shard.place, "stream": shard}]))
    except (DataError, OSError) as err:
        err.args = shard.failure or err.args  # webdataset adds its own to them
        raise
    except (tarfile.TarError, ValueError, EOFError, OverflowError) as err:
        reason = str(err.args[0]).partition(" @ ")[0]
        raise DataError(f"{shard.place}: cannot be read as a tar: {reason}. {AGAIN}") from err


def _go_to_person(shard: OpenShard, person: int, what: str) -> int:
    """Go to the picture of a person by the headers and records before it; the place of the picture's first person."""
    position, key, begin = 0, None, 0
    try:
        with tarfile.open(fileobj=shard.file, mode="r:") as tar:
            for member in tar:
                stem, suffix = base_plus_ext(member.name)
                if stem != key:
                    key, begin = stem, member.offset
                if suffix == "json" and (record := tar.extractfile(member)) is not None:
                    count = count_people(record.read())[what == DETECTIONS]
                    if position + count > person:
                        break
                    position += count
            else:
                position = begin = 0
    except tarfile.TarError:
        position = begin = 0  # what is wrong is said by those who read it through
    shard.go_to(begin)
    return position


def count_people(record: bytes) -> tuple[int, int]:
    """Persons and detections of a sample's JSON, by their fields; parsing would take ten times as long.

    No text of a record can look like a field: quotes inside text are escaped.
    """
    persons = record.count(b'"keypoints":')
    return persons, record.count(b'"bbox_xyxy":') - persons


def read_record(sample: dict[str, Any]) -> dict[str, Any]:
    """The JSON of a sample.

    Raises:
        DataError: it is not JSON.
    """
    try:
        record: dict[str, Any] = orjson.loads(sample["json"])
    except orjson.JSONDecodeError as err:
        raise DataError(f"{sample['__url__']}: {sample['__key__']}.json is not JSON ({err}). {AGAIN}") from err
    return record
