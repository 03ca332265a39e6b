from __future__ import annotations

import pytest

from cigpose.files.addresses import without_credentials


@pytest.mark.parametrize(
    ("address", "shown"),
    [
        ("https://user:pw@host:80/x", "https://host:80/x"),
        ("https://token@host/x", "https://host/x"),
        ("https://h/x?X-Amz-Signature=abc&a=1", "https://h/x"),
        ("https://h/x?next=https://u:p@k/y", "https://h/x"),
        ("https://h:5000/#token=abc", "https://h:5000/"),
        ("https://u:p#w@h/x", "https://u"),
        ("https://u:p@h/https://v:w@k/z", "https://h/https://k/z"),
        ("simplecache::https://u:p@h/x?sig=1", "simplecache::https://h/x"),
        ("s3://key:secret@bucket/x", "s3://bucket/x"),
        ("postgresql+psycopg://u:p/w#1@host/db?password=3", "postgresql+psycopg://host/db"),
        ("http://[::1]:80/a@2x.png", "http://[::1]:80/a@2x.png"),
        ("sqlite:////folder/mlflow.db", "sqlite:////folder/mlflow.db"),
        ("/folder/a@b?c", "/folder/a@b?c"),
        ("'s3://k:s@b/x': 3 there, 's3://k:s@b/y' now", "'s3://b/x': 3 there, 's3://b/y' now"),
        ("(https://u:p@h/x?sig=1): HTTP 404. Again.", "(https://h/x): HTTP 404. Again."),
    ],
)
def test_an_address_is_shown_without_what_lets_one_in(address: str, shown: str) -> None:
    assert without_credentials(address) == shown
    assert without_credentials(shown) == shown
