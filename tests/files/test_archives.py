from __future__ import annotations

import io
import os
import stat
import tarfile
import tracemalloc
import zipfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cigpose.files import archives
from cigpose.files.archives import Extent, ExtentReader, MemberLookup, list_members, open_spec, split_spec
from cigpose.files.digest import sha256_of
from cigpose.files.errors import DataError


def make_zip(path: Path, files: dict[str, bytes], method: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return path


def make_tar(path: Path, files: dict[str, bytes], mode: str = "w") -> Path:
    with tarfile.open(path, mode) as archive:  # type: ignore[call-overload]
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


FILES = {"b/2.bin": os.urandom(3000), "a/1.bin": b"", "b/k\u00e4se.bin": bytes(5000), "big.bin": os.urandom(5 << 20)}


@pytest.mark.parametrize("kind", ["stored", "deflated", "tar", "folder", "behind other bytes"])
def test_every_member_is_read_whole_in_any_order(kind: str, tmp_path: Path) -> None:
    if kind == "tar":
        path = make_tar(tmp_path / "x.tar", FILES)
    elif kind == "folder":
        path = tmp_path / "x"
        for name, data in FILES.items():
            (path / name).parent.mkdir(parents=True, exist_ok=True)
            (path / name).write_bytes(data)
    else:
        path = make_zip(tmp_path / "x.zip", FILES, zipfile.ZIP_DEFLATED if kind == "deflated" else zipfile.ZIP_STORED)
        if kind == "behind other bytes":
            path.write_bytes(b"#!self-extracting\n" + path.read_bytes())
    found = list_members(path)
    assert sorted(found) == sorted(FILES)
    with ExtentReader() as reader:
        for name in reversed(FILES):
            assert bytes(reader.read(found[name])) == FILES[name]
            assert b"".join(reader.chunks(found[name])) == FILES[name]
            head = reader.head(found[name], 100)
            assert FILES[name].startswith(head)
            assert len(head) >= min(len(FILES[name]), 90)


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_a_flipped_bit_is_noticed(method: int, tmp_path: Path) -> None:
    data = bytes(range(256)) * 40
    path = make_zip(tmp_path / "x.zip", {"a.bin": data}, method)
    raw = bytearray(path.read_bytes())
    raw[60] ^= 16
    path.write_bytes(raw)
    extent = list_members(path)["a.bin"]
    with ExtentReader() as reader:
        with pytest.raises(DataError, match=r"x.zip:a.bin: .*Download it again"):
            reader.read(extent)
        with pytest.raises(DataError, match=r"x.zip:a.bin: .*Download it again"):
            list(reader.chunks(extent))


def test_a_zip_whose_directory_points_elsewhere_is_refused(tmp_path: Path) -> None:
    path = make_zip(tmp_path / "x.zip", {"a.bin": b"abc"})
    extent = list_members(path)["a.bin"]
    raw = bytearray(path.read_bytes())
    raw[:4] = b"none"
    path.write_bytes(raw)
    with ExtentReader() as reader, pytest.raises(DataError, match=r"no zip member at byte 0"):
        reader.read(extent)


@pytest.mark.parametrize("name", ["../a", "a/../../b", "/etc/a", "C:/a", "\\\\host\\a", "a\\..\\..\\b"])
@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_a_member_outside_is_refused(name: str, kind: str, tmp_path: Path) -> None:
    make = make_zip if kind == "zip" else make_tar
    with pytest.raises(DataError, match=r"points outside the archive; this archive is refused"):
        list_members(make(tmp_path / f"x.{kind}", {"good": b"1", name: b"2"}))


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE])
def test_a_link_in_a_tar_is_refused(kind: bytes, tmp_path: Path) -> None:
    path = make_tar(tmp_path / "x.tar", {"good": b"1"})
    with tarfile.open(path, "a") as archive:
        info = tarfile.TarInfo("link")
        info.type, info.linkname = kind, "good"
        archive.addfile(info)
    with pytest.raises(DataError, match=r"member 'link' is a link"):
        list_members(path)


def test_a_link_in_a_zip_is_refused(tmp_path: Path) -> None:
    info = zipfile.ZipInfo("link")
    info.external_attr = (stat.S_IFLNK | 0o777) << 16
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        archive.writestr(info, "/etc/passwd")
    with pytest.raises(DataError, match=r"member 'link' is a link"):
        list_members(tmp_path / "x.zip")


def test_archives_that_cannot_be_read_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"compression method 12"):
        list_members(make_zip(tmp_path / "b.zip", {"a": b"1"}, zipfile.ZIP_BZIP2))
    with pytest.raises(DataError, match=r"not a whole uncompressed tar .*unpack a .tar.gz into a folder"):
        list_members(make_tar(tmp_path / "c.tar.gz", {"a": b"1"}, "w:gz"))
    whole = make_tar(tmp_path / "d.tar", {"a": os.urandom(9000)})
    (tmp_path / "cut.tar").write_bytes(whole.read_bytes()[:5000])
    with pytest.raises(DataError, match=r"cut.tar"):
        list_members(tmp_path / "cut.tar")
    (tmp_path / "page.zip").write_text("<html>quota exceeded</html>")
    with pytest.raises(DataError, match=r"page.zip: not a whole zip \(it is a web page"):
        list_members(tmp_path / "page.zip")
    with pytest.raises(FileNotFoundError, match=r"none.zip: not found"):
        list_members(tmp_path / "none.zip")


@pytest.mark.parametrize(
    ("asked", "found"),
    [
        ("train/1.jpg", "train/1.jpg"),
        ("1.jpg", "train/1.jpg"),
        ("/1.jpg", "train/1.jpg"),
        ("./1.jpg", "train/1.jpg"),
        ("c/2.jpg", "train/b/c/2.jpg"),
        ("3.jpg", None),
        ("b/3.jpg", "train/b/3.jpg"),
        ("4.jpg", None),
        ("jpg", None),
    ],
)
def test_pictures_are_found_by_the_end_of_their_path_if_that_is_clear(asked: str, found: str | None) -> None:
    names = ["train/1.jpg", "train/b/c/2.jpg", "train/b/3.jpg", "train/c/3.jpg"]
    lookup = MemberLookup({name: Extent(path="x", name=name, offset=0, stored=0, size=0) for name in names})
    extent = lookup.find(asked)
    assert (extent and extent.name) == found


@given(st.lists(st.binary(max_size=40), max_size=6), st.lists(st.integers(0, 50), max_size=12))
def test_a_stream_of_chunks_reads_like_a_file(chunks: list[bytes], sizes: list[int]) -> None:
    file = io.BytesIO(b"".join(chunks))
    stream = archives._ChunkStream(iter(chunks))
    for size in sizes:
        assert stream.read(size) == file.read(size)
    assert stream.read() == file.read()


@settings(max_examples=20)
@given(st.sampled_from(["a.json", "b/c.json"]))
def test_specs_name_a_file_or_a_member(name: str) -> None:
    assert split_spec(name) == (name, None)
    assert split_spec(f"x/y.zip:{name}") == ("x/y.zip", name)
    assert split_spec(f"y.tar:{name}") == ("y.tar", name)


def test_a_spec_opens_files_and_members(tmp_path: Path) -> None:
    make_zip(tmp_path / "x.zip", {"m.json": b"zip"}, zipfile.ZIP_DEFLATED)
    make_tar(tmp_path / "x.tar", {"m.json": b"tar"})
    (tmp_path / "m.json").write_bytes(b"file")
    for spec, content in (("x.zip:m.json", b"zip"), ("x.tar:m.json", b"tar"), ("m.json", b"file")):
        with open_spec(tmp_path, spec) as stream:
            assert stream.read(100) == content
    with pytest.raises(FileNotFoundError, match=r"none.json: not found"), open_spec(tmp_path, "none.json"):
        pass


def test_the_digest_of_a_folder_is_that_of_its_names_and_contents(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name / "sub").mkdir(parents=True)
        (tmp_path / name / "sub" / "a").write_bytes(b"1")
        (tmp_path / name / "b").write_bytes(b"2")
    assert sha256_of(tmp_path / "one") == sha256_of(tmp_path / "two")
    (tmp_path / "two" / "b").rename(tmp_path / "two" / "c")
    assert sha256_of(tmp_path / "one") != sha256_of(tmp_path / "two")


@pytest.mark.parametrize("how", ["read", "chunks"])
def test_a_member_that_unpacks_to_more_than_it_promises_is_stopped(tmp_path: Path, how: str) -> None:
    path = make_zip(tmp_path / "a.zip", {"1.jpg": bytes(300 << 20)}, zipfile.ZIP_DEFLATED)
    with zipfile.ZipFile(path) as archive:
        (info,) = archive.infolist()
    liar = Extent(str(path), "1.jpg", info.header_offset, info.compress_size, 1000, info.CRC, True, True)
    tracemalloc.start()
    with (
        ExtentReader() as reader,
        pytest.raises(DataError, match=r"1.jpg: (1001 bytes, expected 1000|more than the 1000)"),
    ):
        if how == "read":
            reader.read(liar)
        for _ in reader.chunks(liar):
            pass
    assert tracemalloc.get_traced_memory()[1] < 50 << 20
    tracemalloc.stop()


def test_a_bomb_is_refused_before_it_is_unpacked(tmp_path: Path) -> None:
    path = make_zip(tmp_path / "a.zip", {"1.json": bytes(100 << 20)}, zipfile.ZIP_DEFLATED)
    with pytest.raises(DataError, match=r"a.zip: member 1.json would unpack \d+ bytes to 104857600; this archive is"):
        list_members(path)


def test_a_member_larger_than_any_picture_is_not_read_at_once(tmp_path: Path) -> None:
    path = tmp_path / "pictures" / "1.jpg"
    path.parent.mkdir()
    with path.open("wb") as file:
        file.truncate(40 << 30)
    extent = list_members(path.parent)["1.jpg"]
    with ExtentReader() as reader, pytest.raises(DataError, match=r"1.jpg: 42949672960 bytes, more than any picture"):
        reader.read(extent)


def test_a_pipe_among_the_pictures_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "1.jpg")
    with pytest.raises(DataError, match=r"1.jpg: not a file \(a pipe"):
        list_members(tmp_path)
