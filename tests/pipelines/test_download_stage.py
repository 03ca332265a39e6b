"""`python -m pipelines.download KEY` as a user runs it, against a mirror of the real hosts with faults on demand."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from cigpose.config import load_params, preset_text
from cigpose.download.sources import TABLE
from cigpose.train.build import pretrained_path
from pipelines.download import main

COCO = [
    "train2017.zip",
    "val2017.zip",
    "annotations_trainval2017.zip",
    "coco_wholebody_train_v1.0.json",
    "coco_wholebody_val_v1.0.json",
    "COCO_val2017_detections_AP_H_56_person.json",
]
SOURCES = {
    "coco": COCO,
    "crowdpose": [
        "images.zip",
        "crowdpose_annotations.tar",
        *(f"crowdpose_{s}.json" for s in ("train", "val", "test")),
    ],
    "ubody": ["videos.zip", "annotations.zip", "splits.zip"],
}
UBODY_IDS = {f"{name}.zip": f"UBODY-{name.upper()}-ID" for name in ("videos", "annotations", "splits")}


class Project:
    """A folder with a params.yaml, and the stage run in it."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self.folder, self._monkeypatch, self._capsys = folder, monkeypatch, capsys
        monkeypatch.chdir(folder)

    def params(self, **download) -> None:
        """The quickstart's params.yaml with another download section."""
        params = yaml.safe_load(preset_text("quickstart"))
        params["data"]["download"] = {"sources": SOURCES, "drive_ids": UBODY_IDS, "timeout_s": 5.0, **download}
        (self.folder / "params.yaml").write_text(yaml.safe_dump(params))

    def start(self, key: str) -> subprocess.Popen:
        """The stage as a process."""
        environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
        return subprocess.Popen(
            [sys.executable, "-m", "pipelines.download", key],
            cwd=self.folder,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, key: str) -> tuple[int, str, str]:
        """Exit status, stdout, stderr of the stage, in this process: no second start of Python."""
        status = main([key])
        out, err = self._capsys.readouterr()
        return status, out, err

    def raw(self, key: str) -> Path:
        return self.folder / "data/raw" / key

    def files(self, key: str) -> list[str]:
        return sorted(str(path.relative_to(self.raw(key))) for path in self.raw(key).rglob("*"))


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Project:
    return Project(tmp_path, monkeypatch, capsys)


@pytest.fixture
def digests(shared: Path) -> dict[str, str]:
    """sha256 of the mirror's good files, by file name (crowdpose and ubody have no name in common)."""
    items = json.loads((shared / "mirror/manifest.json").read_text())
    return {item["path"].rpartition("/")[2]: item["sha256"] for item in items}


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.slow
def test_no_sources_give_a_folder_that_dvc_can_track(project: Project) -> None:
    project.params(sources={})
    process = project.start("pretrained")
    out, err = process.communicate()
    assert (process.returncode, out, err) == (0, "data/raw/pretrained: nothing to download.\n", "")
    assert project.files("pretrained") == ["manifest.json"]


def test_first_weights_come_from_any_address_and_a_missing_file_is_named(project: Project, host) -> None:
    project.params(sources={})
    params = yaml.safe_load((project.folder / "params.yaml").read_text())
    params["model"]["backbone"]["pretrained"] = host.put("/models/mine.pth", b"weights") + "?sig=SECRET"
    (project.folder / "params.yaml").write_text(yaml.safe_dump(params))
    status, out, err = project.run("pretrained")
    assert (status, err) == (0, "")
    assert out.endswith(f"data/raw/pretrained/mine.pth: from {host.address}/models/mine.pth\n")
    assert (project.raw("pretrained") / "mine.pth").read_bytes() == b"weights"
    assert pretrained_path(load_params(), project.folder) == project.raw("pretrained") / "mine.pth"
    del host.files["/models/mine.pth"]
    status, out, err = project.run("pretrained")
    assert (status, err) == (
        1,
        f"download: {host.address}/models/mine.pth: HTTP 404. Correct the address in params.yaml.\n",
    )
    assert (project.raw("pretrained") / "mine.pth").is_file()


@pytest.mark.parametrize(
    ("key", "message"),
    [
        pytest.param(
            "coko",
            "download: params.yaml: data.download.sources has no 'coko'. Known: coco, crowdpose, ubody, pretrained.",
            id="key",
        ),
        pytest.param(
            "ubody", "download: videos.zip is handed out personally. Fill the form at https://docs.google", id="ubody"
        ),
    ],
)
def test_a_mistake_ends_the_stage_with_one_sentence(project: Project, key: str, message: str) -> None:
    project.params(drive_ids={})
    status, _, err = project.run(key)
    assert status == 1
    assert err.startswith(message) and err.count("\n") == 1
    assert not project.raw(key).exists() or project.files(key) == []


def test_without_params_the_stage_says_how_to_get_them(project: Project) -> None:
    status, _, err = project.run("coco")
    assert (status, err) == (1, "download: params.yaml: not found. `cigpose use quickstart` writes it.\n")


@pytest.mark.slow
@pytest.mark.parametrize("key", SOURCES)
@pytest.mark.parametrize(
    "faults",
    [
        pytest.param([], id="plain"),
        pytest.param(["--drop-after", "10000", "--drive-confirm"], id="drops, Drive asks"),
        pytest.param(["--drop-after", "10000", "--no-range", "--error-rate", "0.2", "--seed", "5"], id="no Range, 503"),
    ],
)
def test_every_data_set_comes_whole_through_any_fault(
    project: Project, start_mirror: Callable[..., str], digests: dict[str, str], key: str, faults: list[str]
) -> None:
    project.params(mirror=start_mirror(*faults), timeout_s=5.0)
    status, out, err = project.run(key)
    assert (status, err) == (0, "")
    assert project.files(key) == sorted([*SOURCES[key], "manifest.json"])
    for name in SOURCES[key]:
        assert sha256(project.raw(key) / name) == digests[name]
        assert TABLE[name].licence in out
    manifest = (project.raw(key) / "manifest.json").read_text()
    assert "127.0.0.1" not in manifest
    assert {item["file"]: item["sha256"] for item in json.loads(manifest)["files"]} == {
        name: digests[name] for name in SOURCES[key]
    }


@pytest.mark.slow
def test_the_manifest_is_the_same_whatever_the_way(project: Project, start_mirror: Callable[..., str]) -> None:
    seen = set()
    for faults in ([], ["--drop-after", "30000", "--drive-confirm"]):
        project.params(mirror=start_mirror(*faults))
        assert project.run("coco")[0] == 0
        seen.add((project.raw("coco") / "manifest.json").read_bytes())
        shutil.rmtree(project.raw("coco"))
    assert len(seen) == 1


@pytest.mark.slow
def test_killed_at_any_moment_a_rerun_goes_on_and_ends_with_the_same_bytes(
    project: Project, start_mirror: Callable[..., str], digests: dict[str, str]
) -> None:
    project.params(mirror=start_mirror("--slow", "200"))  # train2017.zip alone takes 2 s
    pause, most, kills = random.Random(7), 0, 0
    deadline = time.monotonic() + 60
    partial = project.raw("coco") / ".partial/train2017.zip"
    while True:
        process = project.start("coco")
        # A kill while the bytes come in: some time after the file has grown, if it is not whole before that.
        until = time.monotonic() + 10
        while process.poll() is None and time.monotonic() < until:
            if partial.exists() and partial.stat().st_size > most:
                time.sleep(pause.uniform(0.0, 0.8))
                break
            time.sleep(0.02)
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            kills += 1
        process.communicate()
        if process.returncode == 0:
            break
        assert process.returncode == -signal.SIGKILL
        have = partial.stat().st_size if partial.exists() else most
        assert have >= most, "bytes at hand were thrown away"
        most = have
        for name in COCO:  # what has its name is whole
            file = project.raw("coco") / name
            assert not file.exists() or sha256(file) == digests[name]
        assert time.monotonic() < deadline
    assert kills >= 3
    assert {name: sha256(project.raw("coco") / name) for name in COCO} == {name: digests[name] for name in COCO}
    assert project.files("coco") == sorted([*COCO, "manifest.json"])


@pytest.mark.slow
def test_interrupted_the_stage_says_that_it_can_go_on(project: Project, start_mirror: Callable[..., str]) -> None:
    project.params(mirror=start_mirror("--slow", "50"))
    process = project.start("coco")
    partial = project.raw("coco") / ".partial/train2017.zip"
    until = time.monotonic() + 20
    while not (partial.exists() and partial.stat().st_size) and time.monotonic() < until:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=20)
    assert process.returncode == 130
    assert err == "download: stopped. The same command goes on from where it stopped.\n"
    assert partial.stat().st_size > 0


BAD = [
    pytest.param("truncated_val2017.zip", "coco", "val2017.zip", "bytes in place of 135,583", id="cut zip"),
    pytest.param("wrong_checksum_val2017.zip", "coco", "val2017.zip", "its sha256 is a741af796d6c", id="flipped byte"),
    pytest.param("zip_slip_val2017.zip", "coco", "val2017.zip", "bytes in place of 135,583", id="zip slip"),
    pytest.param(
        "html_coco_wholebody_val_v1.0.json", "coco", "coco_wholebody_val_v1.0.json", "bytes in place of", id="page"
    ),
    pytest.param(
        "tar_slip_crowdpose_annotations.tar",
        "crowdpose",
        "crowdpose_annotations.tar",
        "bytes in place of",
        id="tar slip",
    ),
]
BAD_WITHOUT_INDEX = [
    pytest.param("truncated_val2017.zip", "ubody", "videos.zip", "not a whole zip", id="cut zip"),
    pytest.param("zip_slip_val2017.zip", "ubody", "videos.zip", "'../escaped.txt' points outside", id="zip slip"),
    pytest.param(
        "html_coco_wholebody_val_v1.0.json",
        "crowdpose",
        "crowdpose_val.json",
        "it is a web page saved under",
        id="page",
    ),
    pytest.param(
        "tar_slip_crowdpose_annotations.tar", "crowdpose", "crowdpose_annotations.tar", "escaped.txt", id="tar slip"
    ),
    pytest.param(
        "cut_person_keypoints_val2017.json", "crowdpose", "crowdpose_val.json", "its JSON is cut", id="cut JSON"
    ),
]


def copy_mirror(shared: Path, folder: Path, bad: str, name: str) -> None:
    """A copy of the mirror that holds a bad file under the name of a good one, on every host that has it."""
    mirror = shared / "mirror"
    for path in mirror.rglob("*"):
        if path.is_file():
            copy = folder / path.relative_to(mirror)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(mirror / "bad" / bad if path.name == name else path, copy)


@pytest.mark.parametrize(("bad", "key", "name", "message"), BAD)
def test_a_bad_file_on_the_mirror_is_refused_by_its_index(
    project: Project, start_mirror: Callable[..., str], shared: Path, bad: str, key: str, name: str, message: str
) -> None:
    copy_mirror(shared, project.folder / "mirror", bad, name)
    project.params(mirror=start_mirror(folder=project.folder / "mirror"), sources={key: [name]})
    status, _, err = project.run(key)
    assert status == 1
    assert err.startswith(f"download: {name}: ") and message in err and err.count("\n") == 1
    assert project.files(key) == []


@pytest.mark.parametrize(("bad", "key", "name", "message"), BAD_WITHOUT_INDEX)
def test_a_bad_file_without_a_digest_is_refused_by_its_content(
    project: Project, start_mirror: Callable[..., str], shared: Path, bad: str, key: str, name: str, message: str
) -> None:
    copy_mirror(shared, project.folder / "mirror", bad, name)
    for index in ("manifest.json", "SHA256SUMS"):
        (project.folder / "mirror" / index).unlink()
    project.params(mirror=start_mirror(folder=project.folder / "mirror"), sources={key: [name]})
    status, _, err = project.run(key)
    assert status == 1
    assert err.startswith(f"download: {name}: ") and message in err and err.count("\n") == 1
    assert project.files(key) == []
    assert not list(project.folder.rglob("escaped.txt"))


@pytest.mark.parametrize(("bad", "key", "name", "message"), BAD_WITHOUT_INDEX)
def test_a_bad_file_in_place_is_refused_and_left(
    project: Project, shared: Path, bad: str, key: str, name: str, message: str
) -> None:
    project.params(sources={key: [name]})
    project.raw(key).mkdir(parents=True)
    shutil.copy(shared / "mirror/bad" / bad, project.raw(key) / name)
    status, _, err = project.run(key)
    assert status == 1
    assert err.startswith(f"download: data/raw/{key}/{name}: ") and message in err and err.count("\n") == 1
    assert project.files(key) == [name]
