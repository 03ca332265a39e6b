from __future__ import annotations

import fcntl
import hashlib
import io
import json
import os
import shutil
import threading
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from cigpose.config import DownloadConfig, load_preset, presets
from cigpose.config.schema import ConfigError, from_mapping
from cigpose.download import fetch as download
from cigpose.download.board import human_bytes
from cigpose.download.fetch import DownloadError, fetch
from cigpose.download.sources import TABLE, SourceFile, drive_url, table_of

CONTENT = json.dumps({"images": list(range(20_000))}).encode()
OTHER = json.dumps({"images": list(range(19_999, -1, -1))}).encode()


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def row(name: str, *urls: str, content: bytes | None = None, **facts) -> SourceFile:
    """A table row; with `content`, its size and digest are published."""
    if content is not None:
        facts = {"bytes": len(content), "sha256": sha256(content), **facts}
    return SourceFile(name=name, urls=urls, licence=facts.pop("licence", "free"), **facts)


class Room:
    """A raw folder and what was said while it was filled."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.lines: list[str] = []

    def fetch(self, *rows: SourceFile, **options):
        config = DownloadConfig(sources={}, **{"max_attempts": 4, "timeout_s": 5.0, **options})
        names = [row.name for row in rows]
        return fetch(self.folder, names, config, table=table_of(*rows), say=self.lines.append, first_wait_s=0.01)

    @property
    def said(self) -> str:
        return "\n".join(self.lines)

    @property
    def names(self) -> list[str]:
        return sorted(path.name for path in self.folder.iterdir())

    @property
    def manifest(self) -> list[dict]:
        return json.loads((self.folder / "manifest.json").read_text())["files"]


@pytest.fixture
def room(tmp_path: Path) -> Room:
    return Room(tmp_path / "data/raw/coco")


# What a folder holds afterwards.


def test_no_files_give_a_folder_with_an_empty_manifest(room: Room) -> None:
    assert room.fetch() == []
    assert room.names == ["manifest.json"]
    assert room.manifest == []


def test_a_fetched_folder_holds_the_files_and_a_manifest_and_nothing_else(room: Room, host) -> None:
    rows = [row(f"{n}.json", host.put(f"/{n}.json", CONTENT + b" " * n), licence=f"terms {n}") for n in range(5)]
    entries = room.fetch(*rows)
    assert [entry.file for entry in entries] == [r.name for r in rows]
    assert room.names == [*(r.name for r in rows), "manifest.json"]
    for number, item in enumerate(room.manifest):
        assert (room.folder / item["file"]).read_bytes() == CONTENT + b" " * number
        assert item == {
            "file": f"{number}.json",
            "bytes": len(CONTENT) + number,
            "sha256": sha256(CONTENT + b" " * number),
            "published": None,
            "url": f"{host.address}/{number}.json",
            "licence": f"terms {number}",
        }


def test_the_manifest_depends_on_the_files_alone(room: Room, host, tmp_path: Path) -> None:
    rows = [row(name, host.put(f"/{name}", CONTENT), content=CONTENT) for name in ("a.json", "b.json")]
    room.fetch(*rows)
    first = (room.folder / "manifest.json").read_bytes()
    again = Room(tmp_path / "again")
    host.put("/127.0.0.1/a.json", CONTENT)
    again.fetch(*reversed(rows))
    assert (again.folder / "manifest.json").read_bytes() == first


def test_a_second_run_asks_for_nothing_and_leaves_every_file_alone(room: Room, host) -> None:
    rows = [row("a.json", host.put("/a.json", CONTENT))]
    room.fetch(*rows)
    before = {path: path.stat().st_mtime_ns for path in room.folder.iterdir()}
    host.requests.clear()
    room.fetch(*rows)
    assert host.requests == []
    assert {path: path.stat().st_mtime_ns for path in room.folder.iterdir()} == before
    assert room.lines[-1].endswith("1 file, all in place.")


# What is said before anything is fetched.


def test_sizes_and_licences_are_told_before_the_first_request(room: Room, host) -> None:
    rows = [
        row("a.json", host.put("/a.json", CONTENT), content=CONTENT, licence="for research only"),
        row("b.json", host.put("/b.json", CONTENT), licence="free"),
    ]
    heard: list[int] = []
    lines: list[str] = []

    def say(line: str) -> None:
        heard.append(len(host.requests))
        lines.append(line)

    fetch(room.folder, ["a.json", "b.json"], DownloadConfig(sources={}), table=table_of(*rows), say=say)
    before = "\n".join(line for line, requests in zip(lines, heard, strict=True) if requests == 0)
    assert f"2 files, 2 to fetch, at least {human_bytes(len(CONTENT))} (1 of unknown size)" in before
    assert "a.json: for research only" in before
    assert "b.json: free" in before


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (587, "587 B"), (17_626, "17.6 kB"), (999_600, "1 MB"), (815_585_330, "816 MB"),
     (19_336_861_798, "19.3 GB"), (1_500_000_000_000_000, "1500 TB")],
)  # fmt: skip
def test_sizes_are_told_in_decimal_units(count: int, text: str) -> None:
    assert human_bytes(count) == text


# Files in place.


def test_a_file_in_place_is_verified_and_not_fetched(room: Room, host) -> None:
    room.folder.mkdir(parents=True)
    (room.folder / "a.json").write_bytes(CONTENT)
    room.fetch(row("a.json", host.put("/a.json", CONTENT), content=CONTENT))
    assert host.requests == []
    assert room.manifest[0]["published"] is True


def test_a_link_to_a_file_elsewhere_is_in_place_and_stays(room: Room, host, tmp_path: Path) -> None:
    (tmp_path / "mine.json").write_bytes(CONTENT)
    room.folder.mkdir(parents=True)
    (room.folder / "a.json").symlink_to(tmp_path / "mine.json")
    room.fetch(row("a.json", host.put("/a.json", CONTENT), content=CONTENT))
    assert host.requests == []
    assert (room.folder / "a.json").is_symlink()


def test_a_raw_folder_may_be_a_link_to_another_disk(room: Room, host, tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    room.folder.parent.mkdir(parents=True)
    room.folder.symlink_to(tmp_path / "disk")
    room.fetch(row("a.json", host.put("/a.json", CONTENT)))
    assert (tmp_path / "disk/a.json").read_bytes() == CONTENT


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        pytest.param(lambda f: f.write_bytes(OTHER), "its sha256 is", id="other bytes"),
        pytest.param(lambda f: f.write_bytes(CONTENT[:-9]), "bytes, published: ", id="cut"),
        pytest.param(lambda f: f.mkdir(), "is a folder, expected a file. Move it away", id="folder"),
        pytest.param(lambda f: f.symlink_to("/nowhere/a.json"), "links to /nowhere/a.json, which does not", id="link"),
    ],
)
def test_a_wrong_file_in_place_is_told_and_never_overwritten(
    room: Room, host, prepare: Callable[[Path], object], message: str
) -> None:
    room.folder.mkdir(parents=True)
    file = room.folder / "a.json"
    prepare(file)
    before = file.lstat().st_mtime_ns
    with pytest.raises(DownloadError) as error:
        room.fetch(row("a.json", host.put("/a.json", CONTENT), content=CONTENT))
    assert str(error.value).startswith(f"{file}: ") and message in str(error.value)
    assert file.lstat().st_mtime_ns == before
    assert host.requests == []
    assert room.names == ["a.json"]


def test_an_unpacked_archive_is_pointed_out_before_it_is_fetched_again(room: Room, host) -> None:
    (room.folder / "train2017").mkdir(parents=True)
    with pytest.raises(DownloadError, match=r"name train2017 in data\.datasets in place of train2017\.zip"):
        room.fetch(row("train2017.zip", host.put("/train2017.zip", CONTENT)))
    assert host.requests == []


def test_what_was_not_asked_for_is_left_alone(room: Room, host) -> None:
    room.folder.mkdir(parents=True)
    (room.folder / "mine.txt").write_text("precious")
    room.fetch(row("a.json", host.put("/a.json", CONTENT)))
    assert (room.folder / "mine.txt").read_text() == "precious"


# Digests: published, recorded, a mirror's.


def test_an_unpublished_digest_is_recorded_and_checked_since(room: Room, host) -> None:
    source = row("a.json", host.put("/a.json", CONTENT))
    room.fetch(source)
    (room.folder / "a.json").write_bytes(OTHER)
    with pytest.raises(DownloadError, match=rf"its sha256 is {sha256(OTHER)}, recorded in .*manifest.json: "):
        room.fetch(source)
    (room.folder / "a.json").unlink()
    host.put("/a.json", OTHER)
    with pytest.raises(
        DownloadError, match=r"gives a wrong file: .* If its authors changed the file, delete .*manifest\.json"
    ):
        room.fetch(source)
    assert room.names == ["manifest.json"]
    host.put("/a.json", CONTENT)
    room.fetch(source)
    assert (room.folder / "a.json").read_bytes() == CONTENT


def test_a_digest_seen_first_is_pinned_even_where_another_file_fails(room: Room, host) -> None:
    good, gone = row("a.json", host.put("/a.json", CONTENT)), row("b.json", host.address + "/gone.json")
    with pytest.raises(DownloadError, match="404"):
        room.fetch(good, gone)
    (room.folder / "a.json").write_bytes(OTHER)
    host.put("/gone.json", CONTENT)
    with pytest.raises(DownloadError, match=rf"its sha256 is {sha256(OTHER)}, recorded in .*manifest.json"):
        room.fetch(good, gone)


def test_the_line_says_what_was_checked(room: Room, host) -> None:
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as archive:
        archive.writestr("a/1.json", b"[]")
    host.length_told = False
    room.fetch(
        row("known.json", host.put("/known.json", CONTENT), content=CONTENT),
        row("b.json", host.put("/b.json", CONTENT)),
        row("c.zip", host.put("/c.zip", data.getvalue())),
        row("d.pth", host.put("/d.pth", b"weights")),
    )
    recorded, size = "its sha256 is recorded", human_bytes(len(data.getvalue()))
    for line in (
        "known.json: 129 kB, verified (sha256 published)",
        f"b.json: 129 kB, no digest is known: every bracket of its JSON is closed; {recorded}",
        f"c.zip: {size}, no digest is known: all 1 CRC-32 of its members are right; {recorded}",
        f"d.pth: 7 B, no digest is known: its format proves nothing about its end; {recorded}",
    ):
        assert line in room.lines
    assert not any("verified" in line for line in room.lines if "known.json" not in line)


def test_a_wrong_digest_sends_to_the_next_host(room: Room, host) -> None:
    first, second = host.put("/one/a.json", OTHER), host.put("/two/a.json", CONTENT)
    room.fetch(row("a.json", first, second, content=CONTENT, bytes=None))
    assert (room.folder / "a.json").read_bytes() == CONTENT
    assert "gives a wrong file: its sha256 is" in room.said and "Trying the next host" in room.said


def test_a_continued_file_that_fits_not_together_is_fetched_in_one_piece(room: Room, host) -> None:
    source = row("a.json", host.put("/a.json", CONTENT), content=CONTENT)
    part = room.folder / ".partial"
    part.mkdir(parents=True)
    (part / "a.json").write_bytes(b"?" * 1000)
    (part / "a.json.json").write_text(json.dumps({"url": source.urls[0], "validator": '"one"', "total": len(CONTENT)}))
    room.fetch(source)
    assert (room.folder / "a.json").read_bytes() == CONTENT
    assert host.ranges() == ["bytes=1000-", None]


@pytest.mark.parametrize("kind", ["manifest.json", "SHA256SUMS"])
def test_a_mirrors_index_decides_for_the_files_it_lists(room: Room, host, kind: str) -> None:
    host.put("/images.example.org/zips/a.json", OTHER)
    host.put("/images.example.org/zips/b.json", CONTENT)
    path = "images.example.org/zips/a.json"
    index = {
        "manifest.json": json.dumps([{"path": path, "bytes": len(OTHER), "sha256": sha256(OTHER)}]),
        "SHA256SUMS": f"{sha256(OTHER)}  ./{path}\n",
    }
    host.put(f"/{kind}", index[kind].encode())
    url = "https://images.example.org/zips/"
    rows = [row(name, url + name, content=CONTENT) for name in ("a.json", "b.json")]
    room.fetch(*rows, mirror=host.address + "/")
    assert [item["published"] for item in room.manifest] == [False, True]
    assert [item["url"] for item in room.manifest] == [url + "a.json", url + "b.json"]
    assert "by the mirror's index these are not the published files: a.json." in room.said
    with pytest.raises(DownloadError, match=r"a\.json: its sha256 is .*, published: "):
        room.fetch(*rows)  # without the mirror, these are not what was asked for


def test_a_mirror_without_an_index_must_hold_the_published_files(room: Room, host) -> None:
    host.put("/images.example.org/a.json", OTHER + b"  ")
    with pytest.raises(DownloadError, match=r"announces .* bytes in place of .*\. Mend the mirror \(its manifest.json"):
        room.fetch(row("a.json", "https://images.example.org/a.json", content=CONTENT), mirror=host.address)
    assert room.names == []


def test_the_published_file_in_place_is_welcome_whatever_the_mirror_holds(room: Room, host) -> None:
    room.folder.mkdir(parents=True)
    (room.folder / "a.json").write_bytes(CONTENT)
    index = [{"path": "images.example.org/a.json", "bytes": len(OTHER), "sha256": sha256(OTHER)}]
    host.put("/manifest.json", json.dumps(index).encode())
    room.fetch(row("a.json", "https://images.example.org/a.json", content=CONTENT), mirror=host.address)
    assert room.manifest[0]["published"] is True


@pytest.mark.parametrize(
    ("path", "index", "message"),
    [
        pytest.param("/manifest.json", b"{", "expected a JSON list of {path, bytes, sha256}", id="not JSON"),
        pytest.param("/manifest.json", b'[{"path": "a"}]', "expected a JSON list", id="field missing"),
        pytest.param(
            "/manifest.json", b'[{"path": "a", "bytes": 1, "sha256": "x"}]', "sha256 of a is 'x'", id="digest"
        ),
        pytest.param("/SHA256SUMS", b"hello world\n", "expected lines of `<sha256>  <path>`", id="sums"),
    ],
)
def test_a_mirrors_broken_index_is_told(room: Room, host, path: str, index: bytes, message: str) -> None:
    host.put(path, index)
    with pytest.raises(DownloadError) as error:
        room.fetch(row("a.json", "https://x.org/a.json"), mirror=host.address)
    assert message in str(error.value) and host.address + path in str(error.value)


# Mistakes in params.yaml and on the disk.


@pytest.mark.parametrize(
    ("options", "message"),
    [
        pytest.param({"mirror": "shared/mirror"}, "'shared/mirror' is not an http or https address", id="path"),
        pytest.param({"mirror": "ftp://host"}, "'ftp://host' is not an http or https address", id="ftp"),
        pytest.param({"mirror": "http://127.0.0.1:9"}, "127.0.0.1:9 refuses the connection. Is it running", id="down"),
        pytest.param(
            {"drive_ids": {"a.jsn": "x"}}, "'a.jsn' is not in the download table. Did you mean 'a.json'?", id="n"
        ),
        pytest.param(
            {"drive_ids": {"a.json": "https://x"}}, "'https://x' is not a Google Drive id", id="link for an id"
        ),
    ],
)
def test_a_mistake_in_params_is_told_before_anything_is_fetched(room: Room, host, options: dict, message: str) -> None:
    with pytest.raises(DownloadError) as error:
        room.fetch(row("a.json", host.put("/a.json", CONTENT)), **options)
    assert message in str(error.value)
    assert host.requests == []


@pytest.mark.parametrize(
    ("values", "message"),
    [
        pytest.param({"sources": {"../coco": []}}, "sources: '../coco' cannot be used as a key", id="folder"),
        pytest.param(
            {"sources": {}, "timeout_s": 0}, "timeout_s must be more than 0 and at most 86400, got 0", id="time-out"
        ),
        pytest.param(
            {"sources": {}, "parallel_files": 0}, "parallel_files must be between 1 and 64, got 0", id="files"
        ),
        pytest.param(
            {"sources": {}, "max_attempts": -1}, "max_attempts must be between 1 and 1000, got -1", id="attempts"
        ),
    ],
)
def test_a_number_or_key_that_makes_no_sense_is_refused_with_its_path(values: dict, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        from_mapping(DownloadConfig, values, "data.download")
    assert str(error.value).startswith(f"data.download.{message}")


def test_an_unknown_name_names_the_nearest(room: Room) -> None:
    with pytest.raises(DownloadError, match=r"'train2107\.zip' is not in the download table\. Did you mean 'train2017"):
        fetch(room.folder, ["train2107.zip"], DownloadConfig(sources={}))


def test_a_file_handed_out_personally_names_the_form_and_the_key(room: Room) -> None:
    with pytest.raises(DownloadError) as error:
        fetch(room.folder, ["videos.zip"], DownloadConfig(sources={}))
    for part in ("docs.google.com/forms", "data.download.drive_ids: {videos.zip: YOUR-ID}", str(room.folder)):
        assert part in str(error.value)


def test_a_full_disk_is_told_before_the_start(room: Room, host, monkeypatch) -> None:
    usage = shutil.disk_usage("/")._replace(free=10**9)
    monkeypatch.setattr(download.shutil, "disk_usage", lambda folder: usage)
    with pytest.raises(DownloadError, match="20 GB to fetch, but 1 GB free on this disk"):
        room.fetch(row("a.json", host.put("/a.json", CONTENT), about_bytes=20 * 10**9))
    assert host.requests == []


def test_bytes_at_hand_count_towards_the_disk(room: Room, host, monkeypatch) -> None:
    (room.folder / ".partial").mkdir(parents=True)
    (room.folder / ".partial/a.json").write_bytes(b"x" * len(CONTENT))
    usage = shutil.disk_usage("/")._replace(free=1000)
    monkeypatch.setattr(download.shutil, "disk_usage", lambda folder: usage)
    room.fetch(row("a.json", host.put("/a.json", CONTENT), content=CONTENT))


def test_a_disk_that_fills_on_the_way_is_told_and_the_bytes_are_kept(room: Room, host, monkeypatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(download.PartialFile, "place", full)
    with pytest.raises(DownloadError, match=r"the disk is full\. Make room and run again"):
        room.fetch(row("a.json", host.put("/a.json", CONTENT), content=CONTENT))
    monkeypatch.undo()
    host.requests.clear()
    room.fetch(row("a.json", host.address + "/a.json", content=CONTENT))
    assert host.requests == []


def test_a_second_download_into_the_same_folder_is_refused(room: Room, host) -> None:
    room.folder.mkdir(parents=True)
    handle = os.open(room.folder, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    with pytest.raises(DownloadError, match="another download is running here"):
        room.fetch(row("a.json", host.put("/a.json", CONTENT)))
    os.close(handle)
    room.fetch(row("a.json", host.put("/a.json", CONTENT)))


def test_a_file_in_the_place_of_the_folder_is_told(room: Room) -> None:
    room.folder.parent.mkdir(parents=True)
    room.folder.write_text("")
    with pytest.raises(DownloadError, match="is not a folder"):
        room.fetch()


def test_a_manifest_of_somebody_else_is_told(room: Room) -> None:
    room.folder.mkdir(parents=True)
    (room.folder / "manifest.json").write_text("[1, 2]")
    with pytest.raises(DownloadError, match=r"manifest\.json: not a manifest of ours"):
        room.fetch()


# Hosts that fail.


def test_hosts_are_asked_in_order_until_one_gives_the_file(room: Room, host, act) -> None:
    urls = [host.address + "/gone.json", host.put("/busy.json", CONTENT, *[act(status=503)] * 9)]
    room.fetch(row("a.json", *urls, host.put("/a.json", CONTENT), content=CONTENT))
    assert [target for target, _, _ in host.requests] == ["/gone.json", "/busy.json", "/busy.json", "/a.json"]
    assert (room.folder / "a.json").read_bytes() == CONTENT


def test_one_file_that_fails_keeps_no_other_from_coming(room: Room, host) -> None:
    rows = [row("a.json", host.address + "/gone.json"), row("b.json", host.put("/b.json", CONTENT))]
    with pytest.raises(DownloadError) as error:
        room.fetch(*rows)
    assert str(error.value).count("\n") == 0
    assert f"a.json: {host.address[7:]} answers 404 Not Found. Run again later" in str(error.value)
    assert f"put it at {room.folder / 'a.json'}" in str(error.value)
    assert room.names == ["b.json", "manifest.json"]
    assert [entry["file"] for entry in room.manifest] == ["b.json"]


@pytest.mark.parametrize(
    ("content", "name", "message"),
    [
        pytest.param(b"<!doctype html><html>", "a.json", "it is a web page", id="page"),
        pytest.param(CONTENT[:-1], "a.json", "JSON is cut", id="cut JSON"),
        pytest.param(b"PK\3\4" + bytes(100), "a.zip", "not a whole zip", id="cut zip"),
        pytest.param(b"", "a.zip", "it is empty", id="empty"),
    ],
)
def test_a_broken_file_without_a_published_digest_is_refused_too(
    room: Room, host, content: bytes, name: str, message: str
) -> None:
    with pytest.raises(DownloadError, match=message):
        room.fetch(row(name, host.put(f"/{name}", content)))
    assert room.names == []


def test_google_drives_form_is_answered_through_the_mirror(room: Room, host, act) -> None:
    page = b"""<title>Google Drive - Virus scan warning</title><form id="download-form"
    action="https://drive.usercontent.google.com/download"><input name="id" value="ID"><input name="confirm" value="t">
    </form>"""
    html = {"Content-Type": "text/html; charset=utf-8"}
    host.put("/drive.google.com/uc", b"", *[act(status=200, headers=html, body=page)] * 2)
    attached = {"Content-Type": "text/html", "Content-Disposition": 'attachment; filename="a.json"'}
    host.put("/drive.usercontent.google.com/download", CONTENT, act(drop_after=1000), act(headers=attached))
    room.fetch(row("a.json", drive_url("ID"), content=CONTENT), mirror=host.address)
    assert (room.folder / "a.json").read_bytes() == CONTENT
    assert [asked for target, asked, _ in host.requests if "confirm=t" in target] == [None, "bytes=1000-"]


def test_google_drives_quota_page_says_what_to_do(room: Room, host, act) -> None:
    page = b"<title>Google Drive - Quota exceeded</title>Too many users have viewed or downloaded this file recently."
    html = {"Content-Type": "text/html; charset=utf-8"}
    host.put("/manifest.json", b"[]")
    host.put("/drive.google.com/uc", b"", act(status=200, headers=html, body=page))
    with pytest.raises(DownloadError) as error:
        room.fetch(row("a.json", drive_url("ID")), mirror=host.address)
    assert "daily quota for this file is used up; try again in a day" in str(error.value)
    assert str(room.folder / "a.json") in str(error.value)
    assert room.names == []


def test_an_own_drive_id_comes_before_the_tables_hosts(room: Room, host) -> None:
    host.put("/drive.google.com/uc", CONTENT)
    room.fetch(row("a.json", "https://example.org/a.json"), mirror=host.address, drive_ids={"a.json": "MY-own_id"})
    assert host.requests[-1][0] == "/drive.google.com/uc?export=download&id=MY-own_id"
    assert room.manifest[0]["url"] == "https://example.org/a.json"


def test_several_files_come_at_a_time_and_no_more_than_asked(room: Room, host, act) -> None:
    count = 6
    running, most, lock = [0], [0], threading.Lock()
    answer = host.answer

    def counted(request) -> None:
        with lock:
            running[0] += 1
            most[0] = max(most[0], running[0])
        time.sleep(0.05)
        with lock:  # before the body, so that a next request cannot come earlier
            running[0] -= 1
        answer(request)

    host.answer = counted
    room.fetch(*(row(f"{n}.json", host.put(f"/{n}.json", CONTENT)) for n in range(count)), parallel_files=3)
    assert 2 <= most[0] <= 3


# Pretrained weights, from the mirror of the real hosts.

FOLDER = "https://download.openmmlab.com/mmpose/v1/projects/rtmposev1/"
FIXTURE = "cspnext-fixture_udp-aic-coco_210e-256x192-294f3a94_20230130.pth"
REUPLOADED = "cspnext-fixture-reuploaded_udp-aic-coco_210e-256x192-0badc0de_20230130.pth"


def test_the_hex_digits_in_a_name_of_weights_are_no_reason_to_refuse_them(room: Room, start_mirror) -> None:
    mirror = start_mirror()
    entries = room.fetch(row(FIXTURE, FOLDER + FIXTURE), row(REUPLOADED, FOLDER + REUPLOADED), mirror=mirror)
    assert entries[0].sha256.startswith("294f3a94")
    assert not entries[1].sha256.startswith("0badc0de")


def test_weights_with_one_bit_flipped_are_refused_by_what_was_recorded(room: Room, start_mirror, shared: Path) -> None:
    mirror = start_mirror()
    source = row(FIXTURE, FOLDER + FIXTURE)
    room.fetch(source, mirror=mirror)
    shutil.copyfile(shared / "mirror/bad" / FIXTURE, room.folder / FIXTURE)
    for options in ({}, {"mirror": mirror}):
        with pytest.raises(DownloadError, match="its sha256 is a0bcde7b5a45"):
            room.fetch(source, **options)


# The table itself.


def test_every_file_that_a_preset_asks_for_is_in_the_table() -> None:
    asked = {
        name for preset in presets() for names in load_preset(preset).data.download.sources.values() for name in names
    }
    assert asked <= set(TABLE)
    assert {"train2017.zip", "videos.zip", "images.zip"} <= asked


def test_every_pretrained_backbone_of_a_preset_is_in_the_table() -> None:
    for preset in presets():
        backbone = load_preset(preset).model.backbone.pretrained
        assert backbone is None or backbone in TABLE, preset


@pytest.mark.parametrize("source", TABLE.values(), ids=TABLE.keys())
def test_a_row_of_the_table_is_complete(source: SourceFile) -> None:
    assert source.licence
    assert bool(source.urls) != bool(source.form)
    assert all(url.startswith(("https://", "http://images.cocodataset.org/")) for url in source.urls)
    assert source.sha256 is None or len(bytes.fromhex(source.sha256)) == 32
    assert source.md5 is None or len(bytes.fromhex(source.md5)) == 16
    assert source.sha256 is not None or not any(url.startswith("http:") for url in source.urls)
    assert Path(source.name).name == source.name and Path(source.name).suffix in (".zip", ".tar", ".json", ".pth")
