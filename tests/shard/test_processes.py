"""Stages that share their work among processes: two at once, a killed worker, a killed stage."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import orjson
import psutil
import pytest
import yaml

from cigpose.config import load_params
from cigpose.files.atomic import claimed
from cigpose.render import render_dataset
from cigpose.shard.index import verify

KEYPOINTS = {"name": "stick", "names": ["head", "foot"], "sigmas": [0.05, 0.05]}
OWN = {"keypoints": KEYPOINTS, "images": "images.zip", "annotations": "annotations.json"}


class Stage:
    """A real stage in a folder of its own."""

    def __init__(self, folder: Path, root: Path, name: str, key: str) -> None:
        self.folder = folder
        environment = os.environ | {"PYTHONPATH": str(root)}
        command = [sys.executable, "-m", f"pipelines.{name}", key]
        self.process = subprocess.Popen(
            command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        self.workers: list[psutil.Process] = []

    def wait_for_workers(self, done: Callable[[], bool]) -> None:
        """Until there are two and `done` says that they are at work."""
        until = time.monotonic() + 60
        while time.monotonic() < until and self.process.poll() is None:
            children = psutil.Process(self.process.pid).children()
            self.workers = [child for child in children if "spawn_main" in " ".join(child.cmdline())]
            if len(self.workers) == 2 and done():
                return
            time.sleep(0.01)
        raise AssertionError(f"no workers: {self.process.communicate()}")

    def end(self, timeout_s: float = 30) -> tuple[int, str, str]:
        """Exit code, and what was printed."""
        out, err = self.process.communicate(timeout=timeout_s)
        return self.process.returncode, out, err

    def stop(self) -> None:
        for process in (*self.workers, self.process):
            try:
                process.kill()
            except (psutil.NoSuchProcess, ProcessLookupError):
                continue
        self.process.communicate()


@pytest.fixture
def start(root: Path) -> Iterator[Callable[..., Stage]]:
    """Starts a stage; it is stopped, and its workers too, when the test ends."""
    stages: list[Stage] = []

    def start(folder: Path, name: str, key: str) -> Stage:
        stages.append(Stage(folder, root, name, key))
        return stages[-1]

    yield start
    for stage in stages:
        stage.stop()


def make_experiment(folder: Path, sharder: Any, *, images: int = 24) -> Path:
    """PNGs that take a while to encode, two processes and few pictures a shard."""
    raw = folder / "data" / "raw"
    raw.mkdir(parents=True)
    config = sharder.config(sharding={"images_per_shard": 2, "processes": 2}, **OWN)
    (folder / "params.yaml").write_text(yaml.safe_dump(config.to_mapping()))
    picture = cv2.imencode(
        ".png", np.tile(np.random.default_rng(0).integers(0, 255, (300, 400, 3), np.uint8), (4, 4, 1))
    )
    with zipfile.ZipFile(raw / "images.zip", "w") as archive:
        for number in range(images):
            archive.writestr(f"{number}.png", picture[1].tobytes())
    entries = [{"id": i, "file_name": f"{i}.png", "width": 1600, "height": 1200} for i in range(images)]
    people = [{"id": i, "image_id": i, "bbox": [2, 2, 9, 9], "keypoints": [3, 3, 2, 9, 9, 1]} for i in range(images)]
    (raw / "annotations.json").write_bytes(orjson.dumps({"images": entries, "annotations": people}))
    return folder


def make_rendering(folder: Path, sharder: Any) -> Path:
    """A rendering of very many pictures, and an earlier one in its place."""
    values = sharder.config(**OWN).to_mapping()
    values["data"]["render"]["rendered-val"]["num_images"] = 100_000
    folder.mkdir()
    (folder / "params.yaml").write_text(yaml.safe_dump(values))
    old = folder / "data" / "raw" / "rendered-val"
    old.mkdir(parents=True)
    for name in ("images.zip", "annotations.json"):
        (old / name).write_text("old")
    return folder


def assert_gone(processes: list[psutil.Process]) -> None:
    _, alive = psutil.wait_procs(processes, timeout=10)
    assert not alive


def left_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*") if path.is_file() and not path.name.endswith(".lock"))


@pytest.mark.slow
def test_a_second_sharding_of_a_dataset_is_told_who_is_there_and_harms_nothing(
    tmp_path: Path, sharder: Any, start: Any
) -> None:
    folder = make_experiment(tmp_path / "project", sharder)
    partial = folder / "data" / "shards" / "people.partial"
    first = start(folder, "shard", "people")
    first.wait_for_workers(lambda: any(partial.glob("*.tar")))
    first.process.send_signal(signal.SIGSTOP)
    code, out, err = start(folder, "shard", "people").end()
    first.process.send_signal(signal.SIGCONT)
    assert (code, out) == (1, "")
    assert err.startswith(f"shard: a sharding of people is running already (process {first.process.pid} on ")
    assert err.endswith("Wait until it ends, or stop it.\n") and err.count("\n") == 1
    code, out, err = first.end()
    assert code == 0, err
    assert verify(folder / "data" / "shards" / "people").persons == 24
    assert [path.name for path in (folder / "data" / "shards").iterdir()] == ["people"]


@pytest.mark.parametrize("sign", [signal.SIGKILL, signal.SIGTERM])
@pytest.mark.slow
def test_a_killed_sharding_leaves_no_process_and_no_claim(
    tmp_path: Path, sharder: Any, start: Any, sign: signal.Signals
) -> None:
    folder = make_experiment(tmp_path / "project", sharder)
    partial = folder / "data" / "shards" / "people.partial"
    stage = start(folder, "shard", "people")
    stage.wait_for_workers(lambda: any(partial.glob("*.done")))
    helpers = psutil.Process(stage.process.pid).children(recursive=True)
    stage.process.send_signal(sign)
    assert stage.process.wait(10) == -sign
    assert_gone(helpers)
    assert any(partial.glob("*.done")), "the next goes on from these"
    with claimed(folder / "data" / ".shards-people.lock", "a sharding of people"):
        pass


@pytest.mark.slow
def test_a_worker_of_a_sharding_that_is_killed_is_one_sentence(tmp_path: Path, sharder: Any, start: Any) -> None:
    folder = make_experiment(tmp_path / "project", sharder)
    stage = start(folder, "shard", "people")
    stage.wait_for_workers(lambda: any((folder / "data/shards/people.partial").glob("*.tar")))
    stage.workers[0].kill()
    code, out, err = stage.end()
    assert (code, out, err.count("\n")) == (1, "", 1)
    assert "one of the processes that share the work was killed (out of memory?). Run again" in err
    assert_gone(stage.workers)


def at_work(folder: Path) -> Callable[[], bool]:
    """Whether a rendering has written pictures."""
    return lambda: any(path.stat().st_size > 10_000 for path in (folder / "data/raw").glob(".*.part/images.zip"))


@pytest.mark.slow
def test_a_rendering_whose_worker_is_killed_ends_with_one_sentence_and_the_old_files(
    tmp_path: Path, sharder: Any, start: Any
) -> None:
    folder = make_rendering(tmp_path / "project", sharder)
    stage = start(folder, "render", "rendered-val")
    stage.wait_for_workers(at_work(folder))
    stage.workers[1].kill()
    code, out, err = stage.end()
    assert (code, out) == (1, "")
    assert err == (
        "render: one of the processes that share the work was killed (out of memory?). "
        "Nothing was changed; run again.\n"
    )
    assert_gone(stage.workers)
    assert left_in(folder / "data") == ["annotations.json", "images.zip"]
    assert (folder / "data/raw/rendered-val/images.zip").read_text() == "old"


@pytest.mark.slow
def test_a_terminated_rendering_leaves_no_process_and_what_it_left_is_cleared_by_the_next(
    tmp_path: Path, sharder: Any, start: Any
) -> None:
    folder = make_rendering(tmp_path / "project", sharder)
    stage = start(folder, "render", "rendered-val")
    stage.wait_for_workers(at_work(folder))
    code, out, err = start(folder, "render", "rendered-val").end()
    assert (code, out) == (1, "")
    assert err.startswith(f"render: a rendering of rendered-val is running already (process {stage.process.pid} on ")
    helpers = psutil.Process(stage.process.pid).children(recursive=True)
    stage.process.terminate()
    assert stage.process.wait(10) == -signal.SIGTERM
    assert_gone(helpers)
    config = replace(load_params(folder / "params.yaml").data.render["rendered-val"], num_images=1)
    assert render_dataset(config, folder / "data/raw/rendered-val", processes=1)["images"] == 1
    assert left_in(folder / "data") == ["annotations.json", "images.zip"]
    assert zipfile.is_zipfile(folder / "data/raw/rendered-val/images.zip")


def test_a_rendering_puts_nobodys_files_away(tmp_path: Path, sharder: Any, start: Any) -> None:
    folder = make_rendering(tmp_path / "project", sharder)
    (folder / "data/raw/rendered-val/notes.txt").write_text("precious")
    code, _, err = start(folder, "render", "rendered-val").end()
    assert code == 1 and err.startswith(f"render: {folder}/data/raw/rendered-val/notes.txt: not made by a rendering")
    assert (folder / "data/raw/rendered-val/notes.txt").read_text() == "precious"
