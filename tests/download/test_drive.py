from __future__ import annotations

from urllib.parse import parse_qs, urlsplit

import pytest

from cigpose.download.drive import confirmed_address, drive_id, explain_page, is_drive

WARNING = """<!DOCTYPE html><html><head><title>Google Drive - Virus scan warning</title><style>p{}</style></head><body>
<p>Google Drive can't scan this file for viruses.</p>
<form id="download-form" action="{action}" method="get">
<input type="submit" value="Download anyway"/><input type="hidden" name="id" value="ABC-1_x"/>
<input type="hidden" name="export" value="download"/><input type="hidden" name="confirm" value="t"/>
<input type="hidden" name="uuid" value="a&amp;b"/></form></body></html>"""


@pytest.mark.parametrize(
    ("action", "start"),
    [
        pytest.param(
            "https://drive.usercontent.google.com/download",
            "https://drive.usercontent.google.com/download?",
            id="as Drive sends it",
        ),
        pytest.param("/host/download", "http://mirror:80/host/download?", id="relative"),
        pytest.param("/download?a=1", "http://mirror:80/download?a=1&", id="with a query"),
    ],
)
def test_the_virus_scan_form_is_answered_with_all_its_fields(action: str, start: str) -> None:
    address = confirmed_address(WARNING.replace("{action}", action), "http://mirror:80/x/download?id=1")
    assert address is not None and address.startswith(start)
    fields = parse_qs(urlsplit(address).query)
    fields.pop("a", None)
    assert fields == {"id": ["ABC-1_x"], "export": ["download"], "confirm": ["t"], "uuid": ["a&b"]}


QUOTA = """<html><head><title>Google Drive - Quota exceeded</title></head><body>
<p>Sorry, you can't view or download this file at this time.</p>
<p>Too many users have viewed or downloaded this file recently.</p></body></html>"""


@pytest.mark.parametrize(
    ("html", "message"),
    [
        pytest.param(QUOTA, "daily quota for this file is used up", id="quota"),
        pytest.param("<title>Sign in - Google Accounts</title>", "asks for a sign-in", id="sign-in"),
        pytest.param("<p>You need access</p><p>Request access</p>", "not shared with everybody", id="not shared"),
        pytest.param(
            WARNING.replace("confirm", "c"), "virus-scan page has no form that could be answered", id="form changed"
        ),
        pytest.param(
            "<html><title>\n Wi-Fi  login</title>", "page came in place of the file ('Wi-Fi login')", id="other"
        ),
        pytest.param("", "a web page came in place of the file", id="empty"),
    ],
)
def test_any_other_page_is_explained(html: str, message: str) -> None:
    assert confirmed_address(html, "https://drive.google.com/uc") is None
    assert message in explain_page(html)


@pytest.mark.parametrize(
    ("url", "drive", "file"),
    [
        ("https://drive.google.com/uc?export=download&id=1N6V-g_w", True, "1N6V-g_w"),
        ("https://drive.google.com/file/d/1N6V-g_w/view?usp=sharing", True, "1N6V-g_w"),
        ("https://drive.usercontent.google.com/download?id=1N6V&confirm=t", True, "1N6V"),
        ("https://example.org/drive.google.com/x", False, None),
    ],
)
def test_drive_addresses_are_known_by_host_and_id(url: str, drive: bool, file: str | None) -> None:
    assert is_drive(url) is drive
    assert drive_id(url) == file
