"""The one way to a file wherever it lies: on a disk, at an s3:// address, or (for reading) at an http(s):// one.

Shards, their index, checkpoints and pretrained weights all come and go through here. What may fail for a while is tried
again, what a server gives is bounded in size and in patience, and no message shows a password.

Beneath it are requests and pyarrow (`s3`), which the library has anyway. fsspec would be one name for both, but over
s3fs and aiohttp: two more clients, and no bound on a server that drips bytes, for which we need the raw stream.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from pathlib import Path
from typing import TypeVar

import requests
import tenacity
import urllib3

from cigpose.files import s3
from cigpose.files.addresses import is_remote, without_credentials
from cigpose.files.atomic import written_file
from cigpose.files.errors import FetchError, MissingError, TemporaryFetchError

CHUNK = 1 << 20
ATTEMPTS = 5
TIMEOUT_S = 30.0
LARGEST_TRUTH = 4 << 30
LEAST_BYTES_PER_S = 1024
"""Of a whole transfer: a server that drips a byte at a time would keep a training waiting for ever."""
Given = TypeVar("Given")


def local_path(address: str) -> Path:
    """The path that a local address means.

    Raises:
        FetchError: it has a scheme, and none that is known here.
    """
    path = address.removeprefix("file://")
    if "://" in path:
        raise FetchError(
            f"{without_credentials(address)}: no kind of address that is known here; expected a folder, s3://,"
            " http:// or https://."
        )
    return Path(path).expanduser()


def read_object(address: str, largest: int) -> bytes:
    """A file of at most `largest` bytes.

    Raises:
        MissingError, FileNotFoundError: nothing is there.
        FetchError: the address does not give it, also after several attempts, or gives more.
    """
    return _retry(lambda: b"".join(_chunks(address, largest)))


def stream_object(address: str, largest: int) -> Iterator[bytes]:
    """The bytes of a file of at most `largest`, in pieces, as they come.

    A transfer that breaks off is begun again, and what was given already is passed over. Who must know that all of it
    is of one version takes its sha256.

    Raises:
        MissingError, FileNotFoundError: nothing is there.
        FetchError: the address does not give it, also after several attempts in which nothing more came, or gives more.
    """
    given = 0
    chunks: Iterator[bytes] | None = None

    def next_chunk() -> bytes | None:
        nonlocal chunks
        chunks = chunks or _behind(_chunks(address, largest), given)
        try:
            return next(chunks, None)
        except TemporaryFetchError:
            chunks = None
            raise

    while (chunk := _retry(next_chunk)) is not None:
        given += len(chunk)
        yield chunk


def fetch_object(address: str, target: Path, largest: int, check: Callable[[str], None] = lambda sha256: None) -> None:
    """Copy a file of at most `largest` bytes to a local path, whole or not at all.

    Args:
        address: of the file.
        target: where it is to be.
        largest: bytes.
        check: gets the sha256, taken on the way, and raises if the file must not be taken.

    Raises:
        MissingError, FileNotFoundError: nothing is there.
        FetchError: the address does not give it, also after several attempts, or gives more.
    """

    def fetch() -> None:
        digest = hashlib.sha256()
        with written_file(target) as part, part.open("wb") as file:
            for chunk in _chunks(address, largest):
                digest.update(chunk)
                file.write(chunk)
            check(digest.hexdigest())

    _retry(fetch)


def names_in(address: str) -> list[str]:
    """Names of the files and folders directly in a folder; none where there is no such folder.

    Raises:
        FetchError: it cannot be listed.
    """
    if address.startswith("s3://"):
        return _retry(lambda: s3.names(address))
    folder = _writable(address)
    return os.listdir(folder) if folder.is_dir() else []


def size_of(address: str) -> int | None:
    """Bytes of a file; None where there is none.

    Raises:
        FetchError: it is not told.
    """
    if address.startswith("s3://"):
        return _retry(lambda: s3.size(address))
    path = _writable(address)
    return path.stat().st_size if path.is_file() else None


def put_object(path: Path, address: str) -> None:
    """Copy a local file to an address, whole or not at all.

    Raises:
        OSError: it is not taken, also after several attempts.
    """
    if address.startswith("s3://"):
        return _retry(lambda: s3.put(path, address))
    with written_file(_writable(address)) as part:
        shutil.copyfile(path, part)


def remove_object(address: str) -> None:
    """Remove a file, or a folder with all that is in it; nothing where there is none.

    Raises:
        OSError: it is not allowed.
    """
    if address.startswith("s3://"):
        return _retry(lambda: s3.remove(address))
    path = _writable(address)
    if path.is_dir():
        shutil.rmtree(path)
    else:
        with suppress(FileNotFoundError, NotADirectoryError):
            path.unlink()


def _retry(attempt: Callable[[], Given]) -> Given:
    try:
        return tenacity.Retrying(
            retry=tenacity.retry_if_exception_type(TemporaryFetchError),
            stop=tenacity.stop_after_attempt(ATTEMPTS),
            wait=tenacity.wait_exponential(multiplier=0.5, max=20),
            reraise=True,
        )(attempt)
    except TemporaryFetchError as err:
        raise TemporaryFetchError(f"{err} Tried {ATTEMPTS} times.") from err


def _writable(address: str) -> Path:
    """The path of what is on no server."""
    if is_remote(address):
        raise FetchError(
            f"{without_credentials(address)}: can only be read. Where files are written, name a folder or s3://."
        )
    return local_path(address)


def _chunks(address: str, largest: int) -> Iterator[bytes]:
    """The bytes of an address, which may be no more than `largest` and must not drip."""
    received, seconds, shown = 0, 0.0, without_credentials(address)
    begin = time.monotonic()
    for chunk in _opened(address):
        seconds += time.monotonic() - begin  # waited for the server, and not for who takes the chunks
        received += len(chunk)
        if received > largest:
            raise FetchError(f"{shown}: gives more than {largest} bytes, which is all that it may. Correct the file.")
        if is_remote(address) and seconds > TIMEOUT_S and received < LEAST_BYTES_PER_S * seconds:
            raise TemporaryFetchError(f"{shown}: {received} bytes in {seconds:.0f} s, too slow to be waited for.")
        yield chunk
        begin = time.monotonic()


def _behind(chunks: Iterator[bytes], passed: int) -> Iterator[bytes]:
    """What comes after the first `passed` bytes."""
    for chunk in chunks:
        if len(chunk) > passed:
            yield chunk[passed:]
        passed = max(passed - len(chunk), 0)


def _opened(address: str) -> Iterator[bytes]:
    if address.startswith("s3://"):
        return s3.chunks(address)
    return _http_chunks(address) if is_remote(address) else _file_chunks(local_path(address))


def _file_chunks(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            yield chunk


def _http_chunks(address: str) -> Iterator[bytes]:
    shown = without_credentials(address)
    try:
        with closing(
            requests.get(address, stream=True, timeout=TIMEOUT_S, headers={"Accept-Encoding": "identity"})
        ) as answer:
            status = answer.status_code
            if status >= 500 or status in (408, 425, 429):
                raise TemporaryFetchError(f"{shown}: HTTP {status}. Try again later.")
            if status != 200:
                error = MissingError if status in (404, 410) else FetchError
                raise error(f"{shown}: HTTP {status}. Correct the address in params.yaml.")
            length, received = answer.headers.get("Content-Length"), 0
            # Not iter_content: it waits until a whole chunk is there, for ever where bytes drip.
            while chunk := answer.raw.read1(CHUNK, decode_content=False):
                received += len(chunk)
                yield chunk
            if length is not None and received != int(length):
                raise TemporaryFetchError(f"{shown}: broke off after {received} of {length} bytes.")
    except (requests.RequestException, urllib3.exceptions.HTTPError) as err:
        raise TemporaryFetchError(f"{shown}: not reached ({type(err).__name__}).") from err
