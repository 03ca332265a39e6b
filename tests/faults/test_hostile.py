"""Hostile input: a command ends well with plausible counts, or with one sentence that names the file; never else.

Never a traceback, a hang, more than 2 GB, or a changed input. CIGPOSE_HOSTILE is the number of examples of each kind.
"""

from __future__ import annotations

import contextlib
import copy
import io
import json
import os
import resource
import shutil
import signal
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_training import make_config

from cigpose.config import DatasetConfig, load_preset
from cigpose.files.digest import sha256_of
from cigpose.model.estimator import build_model
from cigpose.model.weights import load_checkpoint, save_weights
from cigpose.shard.index import read_index, verify
from cigpose.train.checkpoints import CheckpointError, CheckpointStore
from pipelines import locate, shard

EXAMPLES = int(os.environ.get("CIGPOSE_HOSTILE", "25"))
LONGEST_S, LARGEST = 20, 2 << 30
HOSTILE = settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize=EXAMPLES < 100,
    suppress_health_check=list(HealthCheck),
    database=None,
)
PEOPLE = 5
STICK = {"name": "stick", "names": ["head", "foot"], "sigmas": [0.05, 0.05]}

VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from([-1, 0, 1, 2**31, 2**53 + 1, 2**63 - 1, 2**63, 10**200, 0.5, -0.0, 1e308, 5e-324]),
    st.sampled_from([float("nan"), float("inf"), -float("inf")]),
    st.sampled_from(["", "a.jpg", "../../etc/passwd", "/dev/zero", "\ud800", "\x00", "x" * 5000, "1", "${x}", "é"]),
    st.sampled_from([[], {}, [[]], [None] * 7, {"id": 1}, [1, 2, 3], [0.0] * 4]),
)


@contextlib.contextmanager
def bounded() -> Iterator[None]:
    """At most 2 GB more, and 20 s."""

    def stop(*_: Any) -> None:
        raise TimeoutError(f"no end within {LONGEST_S} s")

    used = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    limits, former = resource.getrlimit(resource.RLIMIT_AS), signal.signal(signal.SIGALRM, stop)
    resource.setrlimit(resource.RLIMIT_AS, (used + LARGEST, limits[1]))
    signal.alarm(LONGEST_S)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, former)
        resource.setrlimit(resource.RLIMIT_AS, limits)


def outcome(main: Callable[[list[str]], int], key: str) -> tuple[int, str]:
    """Exit status of a stage in this process, and what it said; whatever it raises is a traceback for the user."""
    out, err = io.StringIO(), io.StringIO()
    with bounded(), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main([key])
    return code, err.getvalue()


def is_sentence(said: str, name: str, *places: str) -> bool:
    """Whether it is one line of a stage, with one of the places in it."""
    return said.count("\n") == 1 and said.startswith(f"{name}: ") and any(place in said for place in places)


class Project:
    """A folder with a small dataset, `people`, that is put right again for each example."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.raw = folder, folder / "data/raw/people"
        self.raw.mkdir(parents=True)
        base = load_preset("quickstart")
        dataset = DatasetConfig(
            raw="people", reader="coco", images="images.zip", annotations="annotations.json", ground_truth=True
        )
        values = replace(base, data=replace(base.data, datasets={**base.data.datasets, "people": dataset})).to_mapping()
        values["keypoints"] = STICK
        values["data"]["sharding"] |= {"processes": 1, "images_per_shard": 2}
        values["data"]["locations"] = {"people": str(folder / "served/people")}
        values["model"]["causal"]["train_top_k"] = 1
        for section in (values["evaluate"], values["train"]["validation"]):
            section["metric"] = "body/AP"
        (folder / "params.yaml").write_text(yaml.safe_dump(values))
        picture = np.random.default_rng(0).integers(0, 255, (48, 64, 3), np.uint8)
        self.jpeg = cv2.imencode(".jpg", picture)[1].tobytes()
        with zipfile.ZipFile(self.raw / "images.zip", "w") as archive:
            for i in range(3):
                archive.writestr(f"images/{i}.jpg", self.jpeg)
        self.archive = (self.raw / "images.zip").read_bytes()
        images = [{"id": i, "file_name": f"{i}.jpg", "width": 64, "height": 48} for i in range(3)]
        people = [
            {"id": i, "image_id": i % 3, "category_id": 1, "bbox": [2, 3, 20, 30.5], "area": 400.5, "iscrowd": 0,
             "num_keypoints": 2, "keypoints": [3, 4, 2, 12.5, 20, 1]}
            for i in range(PEOPLE)
        ]  # fmt: skip
        self.document = {"images": images, "annotations": people, "categories": [{"id": 1, "name": "person"}]}

    def put(self, *, annotations: bytes | None = None, archive: bytes | None = None) -> dict[str, str]:
        """Write the raw files; their digests."""
        for path in (self.folder / "data").glob("shards*"):
            shutil.rmtree(path)
        text = json.dumps(self.document).encode() if annotations is None else annotations
        (self.raw / "annotations.json").write_bytes(text)
        (self.raw / "images.zip").write_bytes(self.archive if archive is None else archive)
        return self.digests()

    def digests(self) -> dict[str, str]:
        return {path.name: sha256_of(path) for path in self.raw.iterdir()}

    def assert_holds(self, before: dict[str, str], *places: str) -> None:
        """The property, for a sharding of what was put."""
        code, said = outcome(shard.main, "people")
        assert self.digests() == before, "the input was changed"
        made = self.folder / "data/shards/people"
        if code == 0:
            index = verify(made)
            assert 0 < index.persons <= 2 * PEOPLE and 0 < index.images <= 6
        else:
            assert code == 1 and is_sentence(said, "shard", *places), said
            assert not made.exists() and not made.with_name("people.partial").exists()


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Project]:
    folder, before = tmp_path_factory.mktemp("hostile"), Path.cwd()
    os.chdir(folder)
    yield Project(folder)
    os.chdir(before)


def places_in(document: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The path of every value in a document but itself."""
    inside = (
        document.items() if isinstance(document, dict) else enumerate(document) if isinstance(document, list) else ()
    )
    return [place for key, value in inside for place in [(*path, key), *places_in(value, (*path, key))]]


def harm(document: Any, data: st.DataObject) -> Any:
    """A document with one to three of its values replaced, removed or said twice."""
    document = copy.deepcopy(document)
    for _ in range(data.draw(st.integers(1, 3))):
        *parents, last = data.draw(st.sampled_from(places_in(document) or [("x",)]))
        owner = document
        for key in parents:
            owner = owner[key]
        what = data.draw(st.sampled_from(["replace", "replace", "replace", "remove", "repeat"]))
        if what == "remove" and last in (owner if isinstance(owner, dict) else range(len(owner))):
            del owner[last]
        elif what == "repeat" and isinstance(owner, list):
            owner.append(copy.deepcopy(owner[last]))
        else:
            owner[last] = copy.deepcopy(data.draw(VALUES))  # what is drawn is the same object each time
    return document


def harm_bytes(content: bytes, data: st.DataObject) -> bytes:
    """Bytes that are cut, flipped, doubled, or have something in their midst."""
    place = data.draw(st.integers(0, max(len(content) - 1, 0)))
    what = data.draw(st.sampled_from(["cut", "flip", "insert", "zeros", "double", "empty"]))
    piece = data.draw(st.sampled_from([b"\0", b"\xff", b"[" * 5000, b'{"', b"\xef\xbb\xbf", b"NaN", b"9" * 400, b",,"]))
    return {
        "cut": content[:place],
        "flip": content[:place] + bytes([content[place] ^ (1 << data.draw(st.integers(0, 7)))]) + content[place + 1 :],
        "insert": content[:place] + piece + content[place:],
        "zeros": content[:place] + bytes(len(content) - place),
        "double": content + content,
        "empty": b"",
    }[what]


@HOSTILE
@given(data=st.data())
def test_hostile_annotations_are_sharded_or_refused_in_one_sentence(project: Project, data: st.DataObject) -> None:
    text = json.dumps(harm(project.document, data)).encode()
    before = project.put(annotations=text)
    project.assert_holds(before, "annotations.json", "images.zip", "image ", "people: ")


@HOSTILE
@given(data=st.data())
def test_annotations_whose_bytes_are_harmed_are_sharded_or_refused(project: Project, data: st.DataObject) -> None:
    before = project.put(annotations=harm_bytes(json.dumps(project.document).encode(), data))
    project.assert_holds(before, "annotations.json", "images.zip", "image ", "people: ")


@HOSTILE
@given(data=st.data())
def test_a_harmed_archive_is_sharded_or_refused(project: Project, data: st.DataObject) -> None:
    before = project.put(archive=harm_bytes(project.archive, data))
    project.assert_holds(before, "images.zip", "image ")


@HOSTILE
@given(data=st.data())
def test_a_harmed_picture_is_sharded_or_refused(project: Project, data: st.DataObject) -> None:
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w", data.draw(st.sampled_from([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED]))) as file:
        for i in range(3):
            name = data.draw(st.sampled_from([f"images/{i}.jpg", f"../{i}.jpg", f"/{i}.jpg", f"a/../{i}.jpg"]))
            file.writestr(name, harm_bytes(project.jpeg, data) if i else project.jpeg)
    before = project.put(archive=archive.getvalue())
    project.assert_holds(before, "images.zip", "image ", ".jpg")


@HOSTILE
@given(data=st.data())
def test_a_hostile_index_of_shards_is_read_or_refused(project: Project, data: st.DataObject) -> None:
    served = project.folder / "served/people"
    if not served.is_dir():
        project.put()
        assert outcome(shard.main, "people")[0] == 0
        shutil.copytree(project.folder / "data/shards/people", served)
        (served / "whole.json").write_bytes((served / "index.json").read_bytes())
    whole = (served / "whole.json").read_bytes()
    if data.draw(st.booleans()):
        (served / "index.json").write_text(json.dumps(harm(json.loads(whole), data)))
    else:
        (served / "index.json").write_bytes(harm_bytes(whole, data))
    code, said = outcome(locate.main, "people")
    if code == 0:
        assert read_index(served).persons <= 2**53
    else:
        assert code == 1 and is_sentence(said, "locate", "index.json", str(served)), said


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    config = make_config()
    path = tmp_path_factory.mktemp("weights") / "model.safetensors"
    save_weights(path, build_model(config).state_dict(), config)
    return path.read_bytes()


@HOSTILE
@given(data=st.data())
def test_harmed_weights_are_loaded_or_refused_with_their_name(
    weights: bytes, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    header = 8 + int.from_bytes(weights[:8], "little")
    if data.draw(st.booleans()):
        harmed = harm_bytes(weights, data)
    else:  # what is said about the tensors
        table = json.dumps(harm(json.loads(weights[8:header]), data)).encode()
        harmed = len(table).to_bytes(8, "little") + table + weights[header:]
    path = tmp_path_factory.mktemp("harmed") / "model.safetensors"
    path.write_bytes(harmed)
    try:
        with bounded():
            load_checkpoint(path)
    except (ValueError, OSError) as err:
        assert path.name in str(err) and str(err).count("\n") == 0, err
    assert path.read_bytes() == harmed
    path.unlink()


@HOSTILE
@given(data=st.data())
def test_of_harmed_checkpoints_none_is_taken_that_is_not_whole(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    import torch

    folder = tmp_path_factory.mktemp("store")
    store = CheckpointStore(folder)
    for step in (1, 2):
        store.save(step, {"x": torch.full((3,), float(step))}, {"step": step, "params": {"seed": 1}})
    file = data.draw(st.sampled_from(sorted(path for path in folder.rglob("*") if path.is_file())))
    whole = file.read_bytes()
    file.write_bytes(harm_bytes(whole, data))
    try:
        with bounded():
            found = store.load_newest()
    except CheckpointError as err:
        assert str(folder) in str(err)
    else:
        assert found is not None
        assert found[1]["x"].tolist() == [float(found[2]["step"])] * 3 and found[0] == f"step-{found[2]['step']:09d}"
    shutil.rmtree(folder)
