"""The pages that Google Drive sends, with status 200, in place of a file."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from urllib.parse import urlencode, urljoin, urlsplit, urlunsplit


class _Page(HTMLParser):
    """Title, visible text and the download form of a page."""

    def __init__(self) -> None:
        super().__init__()
        self.title = ""
        self.text: list[str] = []
        self.action: str | None = None
        self.fields: dict[str, str] = {}
        self._within: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attrs}
        if tag == "form" and (values.get("id") == "download-form" or "download" in values.get("action", "")):
            self.action = values.get("action", "")
        elif tag == "input" and self.action is not None and values.get("name"):
            self.fields[values["name"]] = values.get("value", "")
        elif tag in ("title", "script", "style"):
            self._within.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if self._within and self._within[-1] == tag:
            self._within.pop()

    def handle_data(self, data: str) -> None:
        if not self._within:
            self.text.append(data)
        elif self._within[-1] == "title":
            self.title += data


def is_drive(url: str) -> bool:
    """Whether an address belongs to Google Drive."""
    host = urlsplit(url).hostname or ""
    return host in ("drive.google.com", "drive.usercontent.google.com")


def drive_id(url: str) -> str | None:
    """The id of the shared file in a Drive address."""
    parts = urlsplit(url)
    match = re.search(r"(?:^|&)id=([\w-]+)", parts.query) or re.search(r"/file/d/([\w-]+)", parts.path)
    return match.group(1) if match else None


def confirmed_address(html: str, base: str) -> str | None:
    """Where the form of the "Virus scan warning" page leads, or None on any other page.

    Args:
        html: the page.
        base: its address, for a relative form.
    """
    page = _read(html)
    if page.action is None or "confirm" not in page.fields:
        return None
    parts = urlsplit(urljoin(base, page.action))
    query = "&".join(filter(None, [parts.query, urlencode(page.fields)]))
    return urlunsplit((parts.scheme, parts.netloc, parts.path, query, ""))


def explain_page(html: str) -> str:
    """One sentence on what a page in place of a file means."""
    page = _read(html)
    text = " ".join(" ".join(page.text).split()).lower()
    title = " ".join(page.title.split())
    about = f"{title.lower()} {text}"
    if "quota exceeded" in about or "too many users have viewed or downloaded" in about:
        return "Google Drive's daily quota for this file is used up; try again in a day"
    if "need access" in about or "request access" in about or "sign in" in about:
        return "Google Drive asks for a sign-in: the file is not shared with everybody"
    if "virus scan warning" in about or "can't scan this file" in about:
        return "Google Drive's virus-scan page has no form that could be answered"
    return f"a web page came in place of the file{f' ({title!r})' if title else ''}"


def _read(html: str) -> _Page:
    page = _Page()
    page.feed(html)
    page.close()
    return page
