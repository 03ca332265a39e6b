from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from cigpose.files.errors import FetchError, MissingError
from cigpose.files.objects import fetch_object, names_in, put_object, read_object, remove_object, size_of, stream_object

SECRET = "moreSecretThanOthers"


@pytest.fixture(params=["folder", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty folder, on the disk and in a bucket."""
    if request.param == "folder":
        return str(tmp_path / "place")
    request.getfixturevalue("s3").create_bucket(Bucket="objects")
    return "s3://objects/place"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "file"
    path.write_bytes(b"content")
    return path


def test_what_is_put_is_listed_measured_read_fetched_and_removed(place: str, file: Path, tmp_path: Path) -> None:
    assert names_in(place) == []
    put_object(file, f"{place}/a/one")
    put_object(file, f"{place}/two")
    file.write_bytes(b"newer content")
    put_object(file, f"{place}/two")
    assert sorted(names_in(place)) == ["a", "two"]
    assert (size_of(f"{place}/a/one"), size_of(f"{place}/two"), size_of(f"{place}/three")) == (7, 13, None)
    assert size_of(f"{place}/a") is None
    assert read_object(f"{place}/two", 13) == b"newer content"
    fetch_object(f"{place}/a/one", tmp_path / "new" / "copy", 7)
    assert (tmp_path / "new" / "copy").read_bytes() == b"content"
    for gone in ("a", "two", "never there", "two/below"):
        remove_object(f"{place}/{gone}")
    assert names_in(place) == []


def test_what_is_not_there_or_is_too_large_leaves_no_file(place: str, file: Path, tmp_path: Path) -> None:
    put_object(file, f"{place}/one")
    copies = tmp_path / "copies"
    with pytest.raises(FileNotFoundError):
        fetch_object(f"{place}/none", copies / "none", 9)
    with pytest.raises(FetchError, match="one: gives more than 6 bytes"):
        fetch_object(f"{place}/one", copies / "one", 6)

    def refuse(sha256: str) -> None:
        raise ValueError(f"not {sha256[:6]}")

    with pytest.raises(ValueError, match="not ed7002"):
        fetch_object(f"{place}/one", copies / "one", 7, refuse)
    assert not list(copies.iterdir())


def test_a_web_server_is_read_and_never_written_to(host: Any, file: Path) -> None:
    address = host.put("/one", b"content")
    assert read_object(address, 7) == b"content"
    with pytest.raises(MissingError, match="HTTP 404"):
        read_object(f"{address}-not", 7)
    for write in (lambda: put_object(file, address), lambda: remove_object(address), lambda: names_in(address)):
        with pytest.raises(FetchError, match=r"/one: can only be read\. .* name a folder or s3://"):
            write()


@pytest.mark.usefixtures("fast_retries")
def test_a_stream_that_breaks_off_goes_on_where_it_was(host: Any, act: Any) -> None:
    content = bytes(range(256)) * 20_000  # 5 MB, in pieces of at most one
    acts = [act(drop_after=1_500_000), act(drop_after=1_500_000), act(status=503), act(drop_after=4_000_000)]
    assert b"".join(stream_object(host.put("/one", content, *acts), len(content))) == content
    with pytest.raises(FetchError, match="Tried 5 times"):
        list(stream_object(host.put("/one", content, *[act(drop_after=9)] * 9), len(content)))


@pytest.mark.usefixtures("fast_retries")
@pytest.mark.parametrize(
    ("address", "message"),
    [
        (f"http://me:{SECRET}@127.0.0.1:9/x?token={SECRET}", r"^http://127\.0\.0\.1:9/x: not reached .* 5 times"),
        (f"s3://me:{SECRET}@bucket/x", r"^s3://bucket/x: an s3:// address holds no keys here"),
        (f"ftp://me:{SECRET}@host/x", r"^ftp://host/x: no kind of address that is known here"),
    ],
)
def test_no_error_shows_a_password(address: str, message: str) -> None:
    with pytest.raises(FetchError, match=message) as error:
        read_object(address, 9)
    assert SECRET not in str(error.value)


@pytest.mark.usefixtures("s3")
def test_a_bucket_that_is_not_there_is_not_asked_for_again_and_again() -> None:
    begin = time.monotonic()
    with pytest.raises(FetchError, match=r"s3://nowhere/x: the server says NO_SUCH_BUCKET\. Correct the address"):
        names_in("s3://nowhere/x")
    assert time.monotonic() - begin < 2


@pytest.mark.usefixtures("fast_retries")
def test_an_s3_server_that_does_not_answer_is_named_with_the_address(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setattr("cigpose.files.objects.ATTEMPTS", 1)
    with pytest.raises(FetchError, match=r"^s3://bucket/x: S3 gives no answer: "):
        size_of("s3://bucket/x")
