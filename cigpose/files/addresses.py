"""Addresses as they may be shown and kept: without what lets one in."""

from __future__ import annotations

import re
from urllib.parse import urlsplit

_IN_TEXT = re.compile(r"[A-Za-z][\w+.-]*:/{2}[^\s'\"<>|]+")
_USER = re.compile(r"^[^/?#]*@")
_DATABASE = re.compile(r"(?:postgres|mysql|mariadb|mssql|oracle)")
_DATABASE_USER = re.compile(r"^[^:/?#]*:[^@]*@")  # SQLAlchemy takes passwords with / ? and #
_NOT_A_PORT = re.compile(r"^([^/:\[\]]*):(?!\d*(?:/|$))[^/]*")
_END = re.compile(r"[).,;:!\]}]*$")


def is_remote(address: str) -> bool:
    """Whether an address is not a local path."""
    return address.startswith(("s3://", "http://", "https://"))


def file_name_of(address: str) -> str:
    """Name of the file at an address: the last part of its path, without the query."""
    return urlsplit(address).path.rpartition("/")[2]


def host_of(address: str) -> str:
    """Host and port of an address, for messages."""
    return urlsplit(without_credentials(address)).netloc


def without_credentials(text: str) -> str:
    """An address, or a text with addresses in it, without user names, passwords, queries and fragments.

    All of a query is left out: signatures and tokens go by many names (`X-Amz-Signature`, `sig`, `token`, ...).
    What holds no `://` is returned as it is.
    """
    if "://" in text and re.match(r"[A-Za-z][\w+.:-]*://", text) and not re.search(r"\s", text):
        return _shown(text)
    return _IN_TEXT.sub(lambda found: _shown(found[0]), text)


def _shown(address: str) -> str:
    scheme, _, whole = address.partition("://")
    rest = _DATABASE_USER.sub("", whole) if _DATABASE.match(scheme) else whole
    rest = _USER.sub("", rest)
    kept = re.split(r"[?#]", rest, maxsplit=1)[0]
    end = ""
    if kept != rest:
        kept = _NOT_A_PORT.sub(r"\1", kept)  # left of a password with a bare # or ? in it
        end = _END.search(rest)[0]  # type: ignore[index]
    if "://" in kept:  # a mirror's address with another behind it
        kept = _shown(kept)
    return f"{scheme}://{kept}{end}"
