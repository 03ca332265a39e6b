from __future__ import annotations

import json
import threading
import time
from pathlib import Path

import pytest

from cigpose.download.http import Patience, TransferError
from cigpose.download.transfer import Origin, PartialFile, StoppedError, Transfer

CONTENT = bytes(i * i % 251 for i in range(200_000))
OTHER = bytes(i * 7 % 253 for i in range(200_000))
QUICK = Patience(max_attempts=3, timeout_s=5, first_wait_s=0.01)


@pytest.fixture
def partial(tmp_path: Path) -> PartialFile:
    return PartialFile(tmp_path / ".partial" / "a.bin")


def run(url: str, partial: PartialFile, patience: Patience = QUICK, **options) -> Transfer:
    transfer = Transfer(url=url, partial=partial, patience=patience, **options)
    transfer.run()
    return transfer


def stop_after_first_piece(url: str, partial: PartialFile) -> None:
    stop = threading.Event()
    with pytest.raises(StoppedError):
        run(url, partial, stop=stop, on_progress=lambda have, total: stop.set() if have else None)


@pytest.mark.parametrize(
    ("acts", "ranges"),
    [
        pytest.param([{}], [None], id="whole"),
        pytest.param([{"status": 503}, {"status": 429}], [None, None, None], id="overloaded twice"),
        pytest.param([{"drop_after": 1000}, {"drop_after": 70_000}], [None, "bytes=1000-", "bytes=71000-"], id="drops"),
        pytest.param([{"drop_after": 0}], [None, None], id="dropped before the first byte"),
        pytest.param(
            [{"drop_after": 1000}, {"status": 503}, {"status": 500}],
            [None, "bytes=1000-", "bytes=1000-", "bytes=1000-"],
            id="drop, then overloaded",
        ),
        pytest.param([{"drop_after": 1000}, {"ignore_range": True}], [None, "bytes=1000-"], id="Range ignored"),
        pytest.param(
            [{"drop_after": 1000}, {"shift": 5}], [None, "bytes=1000-", None], id="206 from elsewhere: starts anew"
        ),
    ],
)
def test_the_same_bytes_arrive_whatever_happens_on_the_way(host, act, partial, acts, ranges) -> None:
    run(host.put("/a.bin", CONTENT, *(act(**a) for a in acts)), partial)
    assert partial.path.read_bytes() == CONTENT
    assert host.ranges() == ranges


def test_a_server_that_drips_is_given_up(host, partial) -> None:
    patience = Patience(max_attempts=2, timeout_s=0.3, first_wait_s=0.01)
    host.bytes_per_s = 100
    begin = time.monotonic()
    with pytest.raises(TransferError, match=r"gave \d+ bytes in 0 s \(given up after 2 attempts as slow\)"):
        run(host.put("/a.bin", CONTENT), partial, patience)
    assert time.monotonic() - begin < 10
    host.bytes_per_s = None
    run(host.put("/a.bin", CONTENT), partial, patience)
    assert partial.path.read_bytes() == CONTENT


def test_a_silent_server_is_left_and_asked_for_the_rest(host, act, partial) -> None:
    patience = Patience(max_attempts=3, timeout_s=0.2, first_wait_s=0.01)
    reasons: list[str] = []
    url = host.put("/a.bin", CONTENT, act(stall_after=5000))
    run(url, partial, patience, on_wait=lambda reason, wait_s: reasons.append(reason))
    assert partial.path.read_bytes() == CONTENT
    assert host.ranges() == [None, "bytes=5000-"]
    assert "was silent for 0.2 s" in reasons[0]


def test_a_resumed_transfer_is_conditional_on_the_etag(host, act, partial) -> None:
    url = host.put("/a.bin", CONTENT, act(drop_after=1000), etag='"v1"')
    assert run(url, partial).resumed
    assert host.requests[1] == ("/a.bin", "bytes=1000-", '"v1"')


def test_a_file_that_changed_on_the_server_is_fetched_anew(host, act, partial) -> None:
    url = host.put("/a.bin", CONTENT, act(drop_after=1000), etag='"v1"')
    stop_after_first_piece(url, partial)
    host.put("/a.bin", OTHER, etag='"v2"')
    transfer = run(url, partial)
    assert partial.path.read_bytes() == OTHER
    assert not transfer.resumed


@pytest.mark.parametrize("etag", [None, 'W/"weak"'], ids=["none", "weak"])
def test_without_a_strong_validator_nothing_is_continued_on_trust(host, act, partial, etag) -> None:
    url = host.put("/a.bin", CONTENT, act(drop_after=1000), etag=etag)
    run(url, partial)
    assert host.ranges() == [None, None]
    assert partial.path.read_bytes() == CONTENT


def test_without_a_validator_bytes_are_continued_where_a_digest_will_tell(host, act, partial) -> None:
    url = host.put("/a.bin", CONTENT, act(drop_after=1000), etag=None)
    assert run(url, partial, checked_after=True).resumed
    assert host.requests[1] == ("/a.bin", "bytes=1000-", None)
    assert partial.path.read_bytes() == CONTENT


def test_last_modified_serves_as_validator(host, act, partial) -> None:
    modified = {"Last-Modified": "Wed, 11 Jul 2018 05:02:03 GMT"}
    url = host.put("/a.bin", CONTENT, act(drop_after=1000, headers=modified), etag=None)
    run(url, partial)
    assert host.requests[1] == ("/a.bin", "bytes=1000-", modified["Last-Modified"])
    assert partial.path.read_bytes() == CONTENT  # this host does not know the condition and sends all


def test_a_206_of_another_version_is_not_appended(host, act, partial) -> None:
    url = host.put("/a.bin", CONTENT, act(drop_after=1000), act(headers={"ETag": '"another"'}), etag='"v1"')
    run(url, partial)
    assert host.ranges() == [None, "bytes=1000-", None]
    assert partial.path.read_bytes() == CONTENT


def test_a_server_that_tells_no_length_is_read_to_its_end(host, partial) -> None:
    host.length_told = False
    seen: list[tuple[int, int | None]] = []
    run(host.put("/a.bin", CONTENT), partial, on_progress=lambda *at: seen.append(at))
    assert partial.path.read_bytes() == CONTENT
    assert seen[-1] == (len(CONTENT), None)


def test_killed_between_last_byte_and_new_name_asks_for_nothing(host, partial) -> None:
    url = host.put("/a.bin", CONTENT)
    run(url, partial)
    run(url, partial)
    assert len(host.requests) == 1


def test_a_416_at_the_end_of_the_file_means_whole(host, partial) -> None:
    url = host.put("/a.bin", CONTENT)
    partial.begin(Origin(url=url, validator='"one"', total=None))
    partial.path.write_bytes(CONTENT)
    assert run(url, partial).resumed
    assert host.ranges() == [f"bytes={len(CONTENT)}-"]


def test_a_416_of_a_shorter_file_starts_anew(host, partial) -> None:
    url = host.put("/a.bin", CONTENT)
    partial.begin(Origin(url=url, validator='"one"', total=None))
    partial.path.write_bytes(CONTENT + b"more")
    run(url, partial)
    assert partial.path.read_bytes() == CONTENT


def test_bytes_of_unknown_origin_are_worth_nothing(host, partial) -> None:
    partial.path.parent.mkdir()
    partial.path.write_bytes(OTHER[:1000])
    partial.path.with_name("a.bin.json").write_text("{")
    run(host.put("/a.bin", CONTENT), partial)
    assert host.ranges() == [None]
    assert partial.path.read_bytes() == CONTENT


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        pytest.param({"status": 404}, "answers 404 Not Found", id="404"),
        pytest.param({"status": 403}, "answers 403 Forbidden", id="403"),
        pytest.param({"headers": {"Content-Encoding": "gzip"}}, "sends the file compressed", id="compressed"),
        pytest.param({"status": 302, "headers": {"Location": "file:///etc/passwd"}}, "not http: refused", id="file:"),
        pytest.param({"status": 302, "headers": {"Location": "ftp://127.0.0.1/a"}}, "not http: refused", id="ftp:"),
        pytest.param(
            {"status": 200, "headers": {"Content-Type": "text/html"}, "body": b"<title>Portal</title>"},
            "a web page came in place of the file ('Portal')",
            id="page",
        ),
    ],
)
def test_what_waiting_does_not_mend_is_told_at_once(host, act, partial, answer, message) -> None:
    with pytest.raises(TransferError) as error:
        run(host.put("/a.bin", CONTENT, act(**answer)), partial)
    assert message in str(error.value)
    assert len(host.requests) == 1
    assert partial.size == 0


def test_redirects_in_circles_are_told(host, act, partial) -> None:
    url = host.put("/a.bin", CONTENT, *[act(status=302, headers={"Location": "/a.bin"})] * 40)
    with pytest.raises(TransferError, match="redirects in circles"):
        run(url, partial)


def test_a_redirect_is_followed_with_the_range(host, act, partial) -> None:
    host.put("/moved.bin", CONTENT, act(drop_after=1000))
    url = host.put("/a.bin", b"", *[act(status=303, headers={"Location": "/moved.bin"})] * 2)
    run(url, partial)
    assert partial.path.read_bytes() == CONTENT
    assert host.ranges() == [None, None, "bytes=1000-", "bytes=1000-"]


def test_a_file_of_another_size_is_refused_before_it_is_read(host, partial) -> None:
    with pytest.raises(TransferError, match="announces 200,000 bytes in place of 123"):
        run(host.put("/a.bin", CONTENT), partial, expected_bytes=123)
    assert partial.size == 0


def test_an_endless_body_ends_at_the_expected_size(host, partial) -> None:
    host.length_told = False
    with pytest.raises(TransferError, match="sends more than the 1,000 bytes"):
        run(host.put("/a.bin", CONTENT), partial, expected_bytes=1000)
    assert partial.size <= 1000


def test_attempts_that_bring_nothing_are_counted_and_end(host, act, partial) -> None:
    waits: list[float] = []
    url = host.put("/a.bin", CONTENT, *[act(status=503)] * 9)
    with pytest.raises(TransferError, match=r"503 Service Unavailable \(given up after 3 attempts without a byte more"):
        run(url, partial, on_wait=lambda reason, wait_s: waits.append(wait_s))
    assert len(host.requests) == 3
    assert waits == pytest.approx([0.01, 0.02])  # doubling


def test_attempts_that_bring_bytes_are_not_counted(host, act, partial) -> None:
    url = host.put("/a.bin", CONTENT, *[act(drop_after=1000)] * 9)
    run(url, partial)
    assert partial.path.read_bytes() == CONTENT


def test_a_server_without_ranges_that_always_breaks_off_is_given_up(host, act, partial) -> None:
    url = host.put("/a.bin", CONTENT, *[act(drop_after=1000, ignore_range=True)] * 99)
    with pytest.raises(TransferError, match="given up after 3 attempts"):
        run(url, partial)


def test_retry_after_is_the_least_wait(host, act, partial) -> None:
    waits: list[float] = []
    stop = threading.Event()

    def note(reason: str, wait_s: float) -> None:
        waits.append(wait_s)
        stop.set()

    url = host.put("/a.bin", CONTENT, act(status=503, headers={"Retry-After": "17"}))
    with pytest.raises(StoppedError):
        run(url, partial, on_wait=note, stop=stop)
    assert waits == [17.0]


def test_a_refused_connection_is_tried_again_and_told(partial) -> None:
    with pytest.raises(TransferError, match=r"127\.0\.0\.1:9 refuses the connection \(given up after 3"):
        run("http://127.0.0.1:9/a.bin", partial)


def test_a_stopped_transfer_keeps_its_bytes(host, partial) -> None:
    url = host.put("/a.bin", CONTENT)
    stop_after_first_piece(url, partial)
    kept = partial.size
    assert 0 < kept <= len(CONTENT)
    run(url, partial)
    assert partial.path.read_bytes() == CONTENT


def test_proxies_of_the_environment_are_honoured(host, partial, monkeypatch) -> None:
    monkeypatch.setenv("http_proxy", host.address)
    monkeypatch.setenv("no_proxy", "")
    host.put("/zips/a.bin", CONTENT)
    run("http://images.example.org/zips/a.bin", partial)
    assert host.requests[0][0] == "http://images.example.org/zips/a.bin"
    assert partial.path.read_bytes() == CONTENT


def test_a_partial_file_becomes_the_whole_one_and_leaves_no_trace(partial, tmp_path) -> None:
    partial.begin(Origin(url="http://a/b", validator=None, total=3))
    assert json.loads(partial.path.with_name("a.bin.json").read_text())["total"] == 3
    partial.path.write_bytes(b"abc")
    partial.place(tmp_path / "a.bin")
    assert (tmp_path / "a.bin").read_bytes() == b"abc"
    assert list(partial.path.parent.iterdir()) == []
