"""Errors that end in one sentence for the user."""

from __future__ import annotations


class DataError(ValueError):
    """Raw data that cannot be used; the message says where, what, and what to do."""
