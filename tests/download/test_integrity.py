from __future__ import annotations

import hashlib
import io
import tarfile
import zipfile
from pathlib import Path

import pytest

from cigpose.download.integrity import Expected, IntegrityError, check_file, digest_file


def zip_of(*names: str, method: int = zipfile.ZIP_STORED) -> bytes:
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w", method) as archive:
        for name in names:
            archive.writestr(name, b"x" * 2000)
    return data.getvalue()


def tar_of(*names: str, link: str | None = None) -> bytes:
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w") as archive:
        for name in names:
            info = tarfile.TarInfo(name)
            info.size = 2000
            archive.addfile(info, io.BytesIO(b"x" * 2000))
        if link:
            info = tarfile.TarInfo("link")
            info.type, info.linkname = tarfile.SYMTYPE, link
            archive.addfile(info)
    return data.getvalue()


def damaged(archive: bytes) -> bytes:
    return archive.replace(b"x" * 2000, b"x" * 999 + b"y" + b"x" * 1000, 1)


def with_hole(archive: bytes) -> bytes:
    return archive.replace(b"x" * 2000, bytes(2000), 1)


def bomb() -> bytes:
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.json", bytes(100 << 20))
    return data.getvalue()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        pytest.param("a.zip", zip_of("train/", "train/1.jpg"), id="stored zip"),
        pytest.param("a.zip", zip_of("a/1.json", method=zipfile.ZIP_DEFLATED), id="deflated zip"),
        pytest.param("a.tar", tar_of("top/a.json", "top/b.json"), id="tar"),
        pytest.param("a.json", b' \n{"images": []}\n', id="JSON object"),
        pytest.param("a.json", b"[]", id="JSON list"),
        pytest.param(
            "a.json", b'{"a": [1, [2, "]"], {"b": "\\\\"}], "c": {"d": [[]]}, "e": null}', id="JSON of any form"
        ),
        pytest.param("a.pth", zip_of("archive/data.pkl"), id="weights in a zip"),
        pytest.param("a.pth", bytes(range(256)), id="weights of any format"),
    ],
)
def test_a_whole_file_is_accepted(tmp_path: Path, name: str, content: bytes) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    found = check_file(path, Expected(bytes=len(content)))
    assert (found.bytes, found.sha256) == (len(content), hashlib.sha256(content).hexdigest())


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        pytest.param("a.zip", b"", "it is empty", id="empty"),
        pytest.param("a.zip", zip_of("a", "b")[:-100], "not a whole zip", id="zip cut at the end"),
        pytest.param("a.zip", zip_of("a", "b")[:1500], "not a whole zip", id="zip cut in a member"),
        pytest.param("a.zip", zip_of("a", "../escaped.txt"), "'../escaped.txt' points outside", id="zip slip"),
        pytest.param("a.zip", zip_of("/etc/passwd"), "'/etc/passwd' points outside", id="absolute member"),
        pytest.param("a.tar", tar_of("a", "b")[:2200], "not a whole uncompressed tar", id="tar cut in a member"),
        pytest.param("a.tar", tar_of("a", "b")[:3000], "the tar is cut", id="tar cut in a header"),
        pytest.param("a.tar", tar_of("a", "b")[:2560], "the tar is cut", id="tar cut between members"),
        pytest.param("a.tar", tar_of("../escaped.txt"), "'../escaped.txt' points outside", id="tar slip"),
        pytest.param("a.tar", tar_of("a", link="../../b"), "'link' is a link", id="link"),
        pytest.param("a.tar", b"\0" * 100 + b"x" * 900, "not a whole uncompressed tar", id="no tar"),
        pytest.param("a.json", b'{"images": [1, 2', "JSON is cut", id="cut JSON"),
        pytest.param("a.json", b'[{"bbox": [1, 2]}', "JSON is cut", id="cut JSON list"),
        pytest.param("a.json", b"PK\3\4", "it is not JSON: it begins with", id="zip named JSON"),
        pytest.param("a.json", b"\n<!DOCTYPE html><html>", "it is a web page", id="page named JSON"),
        pytest.param("a.json", b'{"a": [{"b": 1}', "JSON is cut", id="JSON cut at an inner bracket"),
        pytest.param("a.json", b'{"a": [' + b"[1], " * 10 + b'{"b": {"c": 1}', "JSON is cut", id="JSON cut in nesting"),
        pytest.param("a.json", b'{"a": "' + bytes(2000) + b'"}', "zero bytes", id="JSON with a hole"),
        pytest.param("a.json", bytes(5000), "nothing but zeros", id="zeros named JSON"),
        pytest.param("a.tar", bytes(10_240), "nothing but zeros", id="zeros named tar"),
        pytest.param("a.pth", bytes(10_240), "nothing but zeros", id="zeros named weights"),
        pytest.param("a.tar", tar_of("a") + bytes(2 << 20), "behind its last member", id="tar whose rest is zeros"),
        pytest.param("a.zip", damaged(zip_of("a", "b")), "CRC-32 is", id="zip with one byte changed"),
        pytest.param("a.zip", with_hole(zip_of("a", "b")), "CRC-32 is", id="zip with a hole"),
        pytest.param("a.pth", damaged(zip_of("a", "b")), "CRC-32 is", id="weights with one byte changed"),
        pytest.param("a.pth", zip_of("a", "b")[:-100], "not a whole zip", id="cut weights"),
        pytest.param("a.zip", bomb(), "would unpack", id="zip bomb"),
        pytest.param("a.pth", b"<html></html>", "it is a web page", id="page named weights"),
    ],
)
def test_a_broken_file_is_refused_with_how(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(IntegrityError) as error:
        check_file(path, Expected())
    assert message in str(error.value)
    assert str(tmp_path) not in str(error.value)


@pytest.mark.parametrize(
    ("expected", "message"),
    [
        pytest.param({"bytes": 3}, "it has 2 bytes, published: 3", id="size"),
        pytest.param(
            {"sha256": "0" * 64}, f"its sha256 is {hashlib.sha256(b'[]').hexdigest()}, published: 000", id="sha"
        ),
        pytest.param({"md5": "0" * 32}, f"its md5 is {hashlib.md5(b'[]').hexdigest()}, published: 000", id="md5"),
    ],
)
def test_a_wrong_size_or_digest_is_told_with_both_values(tmp_path: Path, expected: dict, message: str) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(b"[]")
    with pytest.raises(IntegrityError) as error:
        check_file(path, Expected(**expected))
    assert message in str(error.value)


def test_one_of_several_expectations_suffices_if_it_has_a_digest(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(b"[]")
    wrong, right = Expected(bytes=3, sha256="0" * 64), Expected(bytes=2, sha256=hashlib.sha256(b"[]").hexdigest())
    check_file(path, wrong, right)
    check_file(path, Expected(bytes=2, sha256="0" * 64), right)
    with pytest.raises(IntegrityError, match="it has 2 bytes"):
        check_file(path, wrong, Expected())


def test_digests_are_of_every_byte_and_reported_as_they_are_read(tmp_path: Path) -> None:
    content = bytes(i % 251 for i in range(3_000_000))
    path = tmp_path / "a.bin"
    path.write_bytes(content)
    pieces: list[int] = []
    found = digest_file(path, with_md5=True, on_bytes=pieces.append)
    assert sum(pieces) == len(content) and len(pieces) > 1
    assert found.md5 == hashlib.md5(content).hexdigest()
    assert found.sha256 == hashlib.sha256(content).hexdigest()
