"""Errors that end in one sentence for the user."""

from __future__ import annotations


class DataError(ValueError):
    """Raw data that cannot be used; the message says where, what, and what to do."""


class FetchError(OSError):
    """An address that did not give its file, or did not take it."""


class TemporaryFetchError(FetchError):
    """It may, when asked again."""


class MissingError(FetchError, FileNotFoundError):
    """Nothing is there."""


def shown(value: object, longest: int = 60) -> str:
    """A value as messages quote it: shortened, so that no file fills a screen."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # a number of more digits than Python writes, lists in lists in lists
        return f"a huge {type(value).__name__}"
    return text if len(text) <= longest else f"{text[: longest - 3]}..."
