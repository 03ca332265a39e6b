"""HTTP answers told apart: the file, a page in its place, "later", "never". Over `requests` and `tenacity`."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from http import HTTPStatus

import requests
import tenacity
import urllib3

from cigpose.download.drive import confirmed_address, explain_page, is_drive
from cigpose.files.addresses import host_of

CHUNK = 1 << 16
LONGEST_WAIT_S = 60.0
LEAST_BYTES_PER_S = 1024
"""Of a connection as a whole, after its first `timeout_s`: one that drips would never time out."""
_LARGEST_PAGE = 1 << 20
_TRY_AGAIN = {408, 425, 429, 500, 502, 503, 504}
_HEADERS = {"User-Agent": "cigpose-pipelines", "Accept-Encoding": "identity"}


class TransferError(Exception):
    """This address will not give the file; one clause that says why."""


class TryAgainError(TransferError):
    """It may, later: an overloaded server, a broken connection."""

    def __init__(self, reason: str, *, after_s: float = 0.0) -> None:
        super().__init__(reason)
        self.after_s = after_s
        """The least wait the server asks for, in seconds."""


class TooSlowError(TryAgainError):
    """Its bytes come so slowly that none of them count."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Patience:
    """How long an address is tried."""

    max_attempts: int
    """Attempts in a row that bring nothing new."""
    timeout_s: float
    """Seconds without a byte, or for a connection."""
    first_wait_s: float = 1.0
    """Wait before the second attempt; doubles up to a minute."""


def open_file(
    session: requests.Session, url: str, headers: dict[str, str], patience: Patience, rewrite: Callable[[str], str]
) -> requests.Response:
    """The response whose body is the file, past Google Drive's question about viruses.

    Args:
        session: keeps the connection and Drive's cookies.
        url: http or https address; redirects are followed to such addresses only.
        headers: e.g. Range and If-Range.
        patience: its time-out.
        rewrite: address -> address, for links inside Drive's pages (mirrors).

    Returns: status 200, 206 or 416; the body not read yet.

    Raises:
        TryAgainError: not now.
        TransferError: not at all.
    """
    host = host_of(url)
    try:
        response = _get(session, url, headers, patience, host)
        if not _is_page(response):
            return response
        html, base = _read_page(response), response.url
        address = confirmed_address(html, base)
        if address is not None:
            response = _get(session, rewrite(address), headers, patience, host)
            if not _is_page(response):
                return response
            html = _read_page(response)
    except requests.RequestException as err:
        raise in_words(err, host, patience) from err
    raise TransferError(explain_page(html))


def body(response: requests.Response, host: str, patience: Patience) -> Iterator[bytes]:
    """The pieces of a response as they come in, up to the last byte before a connection breaks.

    `Response.iter_content` would hold back what comes before the break, up to a chunk.

    Raises:
        TryAgainError: the connection broke, or nothing, or next to nothing, came for too long.
    """
    begin, received = time.monotonic(), 0
    try:
        while piece := response.raw.read1(CHUNK, decode_content=False):
            yield piece
            received += len(piece)
            seconds = time.monotonic() - begin
            if seconds > patience.timeout_s and received < LEAST_BYTES_PER_S * seconds:
                raise TooSlowError(f"{host} gave {received:,} bytes in {seconds:.0f} s")
    except urllib3.exceptions.ReadTimeoutError as err:
        raise TryAgainError(f"{host} was silent for {patience.timeout_s:g} s") from err
    except urllib3.exceptions.HTTPError as err:
        raise TryAgainError(f"{host} broke the connection") from err


def get_text(url: str, patience: Patience, on_wait: Callable[[str, float], None]) -> str | None:
    """A small text, or None if the address does not exist (404).

    Args:
        url: http or https address.
        patience: time-out and attempts.
        on_wait: called with (reason, seconds) before a wait.

    Raises:
        TransferError: no answer, or another one.
    """
    host = host_of(url)

    def attempt() -> str | None:
        try:
            response = requests.get(url, headers=_HEADERS, timeout=patience.timeout_s)
        except requests.RequestException as err:
            raise in_words(err, host, patience) from err
        if response.status_code == HTTPStatus.NOT_FOUND:
            return None
        if response.status_code != HTTPStatus.OK:
            raise _refusal(response, host)
        return response.content.decode("utf-8", errors="replace")

    retrying = tenacity.Retrying(
        retry=tenacity.retry_if_exception_type(TryAgainError),
        stop=tenacity.stop_after_attempt(patience.max_attempts),
        wait=tenacity.wait_exponential(multiplier=patience.first_wait_s, max=4 * patience.first_wait_s),
        before_sleep=lambda state: on_wait(str(failure(state)), state.upcoming_sleep),
        reraise=True,
    )
    return retrying(attempt)


def failure(state: tenacity.RetryCallState) -> BaseException | None:
    """What the last attempt raised."""
    return state.outcome.exception() if state.outcome is not None else None


def in_words(err: requests.RequestException, host: str, patience: Patience) -> TransferError:
    """What a failed request means, and whether it is worth another."""
    kinds = requests.exceptions
    text = str(err).lower()
    if isinstance(err, kinds.SSLError):
        return TransferError(f"the certificate of {host} cannot be verified")
    if isinstance(err, kinds.InvalidSchema):
        return TransferError(f"{host} redirects to an address that is not http: refused")
    if isinstance(err, kinds.InvalidURL | kinds.MissingSchema):
        return TransferError(f"{host} is not a web address")
    if isinstance(err, kinds.TooManyRedirects):
        return TransferError(f"{host} redirects in circles")
    if isinstance(err, kinds.ProxyError):
        return TryAgainError(f"the proxy on the way to {host} does not answer")
    if isinstance(err, kinds.Timeout) or "timed out" in text:
        return TryAgainError(f"{host} was silent for {patience.timeout_s:g} s")
    if isinstance(err, kinds.ChunkedEncodingError):
        return TryAgainError(f"{host} broke the connection")
    if isinstance(err, kinds.ConnectionError):
        return TryAgainError(f"{host} {'refuses the connection' if 'refused' in text else 'cannot be reached'}")
    return TransferError(f"{host}: {err}")


def _get(
    session: requests.Session, url: str, headers: dict[str, str], patience: Patience, host: str
) -> requests.Response:
    response = session.get(url, headers=_HEADERS | headers, stream=True, timeout=patience.timeout_s)
    if response.status_code not in (200, 206, 416):
        with response:
            raise _refusal(response, host)
    if response.headers.get("Content-Encoding", "identity") != "identity":
        response.close()
        raise TransferError(f"{host} sends the file compressed, though asked not to")
    return response


def _refusal(response: requests.Response, host: str) -> TransferError:
    answer = f"{host} answers {response.status_code} {response.reason or ''}".rstrip()
    if response.status_code in _TRY_AGAIN:
        after = response.headers.get("Retry-After", "")
        return TryAgainError(answer, after_s=float(after) if after.isdigit() else 0.0)
    if is_drive(response.url) and response.status_code in (401, 403, 404):
        answer += ": the file is not there, not shared with everybody, or over its daily quota"
    return TransferError(answer)


def _is_page(response: requests.Response) -> bool:
    """Whether a web page came where a file was asked for."""
    if "Content-Disposition" in response.headers:
        return False
    return response.headers.get("Content-Type", "").partition(";")[0].strip().lower() == "text/html"


def _read_page(response: requests.Response) -> str:
    with response:
        pieces = itertools.islice(response.iter_content(CHUNK), _LARGEST_PAGE // CHUNK)
        return b"".join(pieces).decode("utf-8", errors="replace")
