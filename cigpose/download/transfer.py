"""One file over HTTP, resumable: kill it at any moment, start it again, and the same bytes arrive.

    .partial/train2017.zip         the bytes so far
    .partial/train2017.zip.json    {"url", "validator", "total"}: whose bytes they are

`requests` speaks HTTP (redirects, proxies, time-outs) and `tenacity` tries again. What neither does is here: going on
with the right bytes, and only with the right ones.
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from http import HTTPStatus
from pathlib import Path

import requests
import tenacity

from cigpose.download.http import (
    LONGEST_WAIT_S,
    Patience,
    TooSlowError,
    TransferError,
    TryAgainError,
    body,
    failure,
    open_file,
)
from cigpose.files.addresses import host_of
from cigpose.files.atomic import sync, write_json


class StoppedError(Exception):
    """The transfer was told to stop. Its bytes are kept."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Origin:
    """Whose bytes a partial file holds."""

    url: str
    validator: str | None
    """Strong ETag, else Last-Modified: what If-Range compares."""
    total: int | None
    """Size of the whole file."""


class PartialFile:
    """The bytes of a file so far, and whose they are."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._record = path.with_name(path.name + ".json")

    @property
    def size(self) -> int:
        """Bytes so far."""
        return self.path.stat().st_size if self.path.exists() else 0

    @property
    def origin(self) -> Origin | None:
        """Whose bytes these are; None where that is not known and they are worth nothing."""
        try:
            return Origin(**json.loads(self._record.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            return None

    def begin(self, origin: Origin) -> None:
        """Empty the file, then note whose bytes will come: in this order a kill between the two is harmless."""
        self.discard()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.touch()
        write_json(self._record, asdict(origin))

    def discard(self) -> None:
        """Forget the bytes."""
        self._record.unlink(missing_ok=True)
        self.path.unlink(missing_ok=True)

    def place(self, target: Path) -> None:
        """Give the whole file its name, safe against a loss of power."""
        sync(self.path)
        self.path.replace(target)
        sync(target.parent)
        self._record.unlink(missing_ok=True)


def _ignore(*_: object) -> None:
    """A listener that does not listen."""


@dataclass(kw_only=True, slots=True)
class Transfer:
    """Brings a partial file to the whole one, going on from the bytes it has if they are this file's."""

    url: str
    """Http or https address."""
    partial: PartialFile
    patience: Patience
    expected_bytes: int | None = None
    """A server that announces another size is refused before its bytes are read."""
    checked_after: bool = False
    """A digest will be checked, so that bytes of a file of the same size may be continued even where the server gives
    nothing to compare (no ETag, another host)."""
    rewrite: Callable[[str], str] = str
    """Address -> address, for links inside Google Drive's pages (mirrors)."""
    on_progress: Callable[[int, int | None], None] = _ignore
    """Called with (bytes so far, total or None) after each piece."""
    on_wait: Callable[[str, float], None] = _ignore
    """Called with (reason, seconds) before a wait."""
    stop: threading.Event = field(default_factory=threading.Event)
    """When set, the transfer ends at the next piece."""
    resumed: bool = False
    """Afterwards: whether bytes of an earlier connection are part of the file."""
    fruitless: int = 0
    """Attempts in a row that brought nothing new."""
    _furthest: int = 0

    @property
    def host(self) -> str:
        """The server's name, for messages."""
        return host_of(self.url)

    def run(self) -> None:
        """Transfer until `partial` is whole. Its digest is the caller's to check.

        Raises:
            TransferError: the address does not give the file, or not within `patience`.
            StoppedError: `stop` was set.
            OSError: the disk does not take it.
        """
        self._furthest = self.partial.size
        retrying = tenacity.Retrying(
            retry=tenacity.retry_if_exception_type(TryAgainError),
            stop=lambda state: self.fruitless >= self.patience.max_attempts,
            wait=self._wait_s,
            sleep=tenacity.sleep_using_event(self.stop),
            before_sleep=lambda state: self.on_wait(str(failure(state)), state.upcoming_sleep),
            reraise=True,
        )
        try:
            with requests.Session() as session:
                retrying(self._attempt, session)
        except TryAgainError as err:
            what = "as slow" if isinstance(err, TooSlowError) else "without a byte more"
            raise TransferError(f"{err} (given up after {self.fruitless} attempts {what})") from err

    def _wait_s(self, state: tenacity.RetryCallState) -> float:
        """Seconds before the next attempt: doubling while nothing comes, short after a transfer that got on."""
        wait = self.patience.first_wait_s * 2.0 ** (self.fruitless - 1)
        return min(max(wait, getattr(failure(state), "after_s", 0.0)), LONGEST_WAIT_S)

    def _attempt(self, session: requests.Session) -> None:
        """One connection, from the bytes at hand to the end of the file."""
        if self.stop.is_set():
            raise StoppedError
        try:
            self._receive(session)
        except TryAgainError as err:
            have = self.partial.size
            got_on = have > self._furthest and not isinstance(err, TooSlowError)
            self.fruitless = 0 if got_on else self.fruitless + 1
            self._furthest = max(self._furthest, have)
            raise

    def _receive(self, session: requests.Session) -> None:
        origin, have = self.partial.origin, self.partial.size
        if origin is not None and origin.url == self.url and origin.total == have > 0:
            self.resumed = True  # killed between the last byte and the new name
            self.on_progress(have, have)
            return
        headers = self._range(origin, have)
        with open_file(session, self.url, headers, self.patience, self.rewrite) as response:
            if response.status_code == HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
                self._settle_416(response, origin, have)
                return
            if response.status_code == HTTPStatus.PARTIAL_CONTENT:
                total = self._continue(response, origin if headers else None, have)
            else:
                total = self._begin(response)
            self._store(response, total)
        if total is not None and self.partial.size != total:
            raise TryAgainError(f"{self.host} broke off after {self.partial.size:,} of {total:,} bytes")

    def _range(self, origin: Origin | None, have: int) -> dict[str, str]:
        """Headers that ask for the rest, or none where the bytes at hand cannot be trusted."""
        if origin is None or have == 0:
            return {}
        if origin.url == self.url and origin.validator is not None:
            return {"Range": f"bytes={have}-", "If-Range": origin.validator}
        if self.checked_after and origin.total is not None:
            return {"Range": f"bytes={have}-"}
        return {}

    def _start_anew(self) -> TryAgainError:
        self.partial.discard()
        return TryAgainError(f"{self.host} has another file than before; starting anew")

    def _settle_416(self, response: requests.Response, origin: Origin | None, have: int) -> None:
        """The server has no bytes after ours: either these are all, or they are not its."""
        span = re.fullmatch(r"bytes \*/(\d+)", response.headers.get("Content-Range", "").strip())
        if span is None or origin is None or int(span.group(1)) != have or origin.total not in (None, have):
            raise self._start_anew()
        self.resumed = True

    def _begin(self, response: requests.Response) -> int | None:
        """Take the whole file from its first byte, whatever was there; its size, if told."""
        length = response.headers.get("Content-Length", "")
        total = int(length) if length.isdigit() else None
        if total is not None and self.expected_bytes not in (None, total):
            raise TransferError(f"{self.host} announces {total:,} bytes in place of {self.expected_bytes:,}")
        self.resumed = False
        self.partial.begin(Origin(url=self.url, validator=_validator(response), total=total))
        return total

    def _continue(self, response: requests.Response, origin: Origin | None, have: int) -> int | None:
        """Take the rest of the same file, or discard what there is; its size, if told."""
        span = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", response.headers.get("Content-Range", "").strip())
        if span is None or origin is None:
            raise self._start_anew()
        same_place, same_size = int(span.group(1)) == have, span.group(2) in ("*", str(origin.total))
        same_file = origin.url != self.url or _validator(response) in (None, origin.validator)
        if not (same_place and same_size and same_file):
            raise self._start_anew()
        self.resumed = True
        return origin.total

    def _store(self, response: requests.Response, total: int | None) -> None:
        """Write the body behind the bytes so far."""
        have = self.partial.size
        most = total if total is not None else self.expected_bytes
        self.on_progress(have, total)
        with self.partial.path.open("ab") as file:
            for piece in body(response, self.host, self.patience):
                if most is not None and have + len(piece) > most:
                    raise TransferError(f"{self.host} sends more than the {most:,} bytes of the file")
                file.write(piece)
                file.flush()
                have += len(piece)
                self.on_progress(have, total)
                if self.stop.is_set():
                    raise StoppedError


def _validator(response: requests.Response) -> str | None:
    etag = response.headers.get("ETag")
    return etag if etag and not etag.startswith("W/") else response.headers.get("Last-Modified")
