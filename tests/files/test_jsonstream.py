from __future__ import annotations

import io
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cigpose.files import jsonstream
from cigpose.files.errors import DataError
from cigpose.files.jsonstream import LIST, parse_element, split_arrays

# Everything that a scan for brackets could stumble over: quotes, escapes and brackets inside strings.
TEXT = st.text(alphabet='ab"\\{}[],:\n\u00e9 ', max_size=6)
VALUE = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=8,
)
ELEMENTS = st.lists(st.dictionaries(TEXT, VALUE, max_size=3), max_size=4)
INDENT = st.sampled_from([None, 0, 1])


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jsonstream, "_CHUNK", 5)


def split(text: str | bytes, *wanted: str) -> list[tuple[str, Any]]:
    data = text if isinstance(text, bytes) else text.encode()
    return [(key, json.loads(raw)) for key, raw in split_arrays(io.BytesIO(data), "file.json", wanted)]


@given(info=VALUE, images=ELEMENTS, annotations=ELEMENTS, indent=INDENT, ascii_only=st.booleans())
def test_elements_equal_those_of_a_json_parser(
    info: Any, images: list[Any], annotations: list[Any], indent: int | None, ascii_only: bool
) -> None:
    values = {"info": info, "images": images, "x": [[1], [2]], "annotations": annotations, "version": "1.0"}
    text = json.dumps(values, indent=indent, ensure_ascii=ascii_only)
    found = split(text, "annotations", "images")
    assert [element for key, element in found if key == "images"] == images
    assert [element for key, element in found if key == "annotations"] == annotations


@given(elements=ELEMENTS, indent=INDENT)
def test_a_file_that_is_a_list_gives_its_elements(elements: list[Any], indent: int | None) -> None:
    assert split(json.dumps(elements, indent=indent), LIST) == [(LIST, element) for element in elements]


@given(annotations=ELEMENTS, share=st.floats(0, 1, exclude_max=True))
def test_a_file_cut_anywhere_is_refused(annotations: list[Any], share: float) -> None:
    text = json.dumps({"annotations": annotations, "images": []}).encode()
    with pytest.raises(ValueError, match=r"cut|starts with"):
        split(text[: int(len(text) * share)] or b" ", "annotations", "images")


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("<!DOCTYPE html>", r"file.json: this is a web page, not JSON"),
        ("hello", r"file.json: starts with b'hello', expected JSON"),
        ('{"a": [{}]} {"a": []}', r"file.json: goes on after the end of its JSON"),
        ('{"a": [{}]} tail', r"file.json: goes on after the end of its JSON"),
        ('{"a": [{} {}]}', r"found|b'' after element 1 of 'a', expected a list of objects"),
        ('{"a": [{}, 3]}', r"b', 3' after element 1 of 'a'"),
        ('{"a": [{},]}', r"b',' after element 1 of 'a'"),
        ('{"a": [3, {}]}', r"b'3,' after element 0 of 'a'"),
        ("[{}, 3]", r"after element 1 of the list"),
        ('{"a": [{}]}]', r"goes on after the end"),
    ],
)
def test_what_is_not_such_a_file_is_refused(text: str, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        split(text, "a", LIST)


def test_a_byte_order_mark_is_no_obstacle() -> None:
    assert split(b'\xef\xbb\xbf{"a": [{"b": 1}]}', "a") == [("a", {"b": 1})]


def test_an_object_in_place_of_an_array_has_no_elements() -> None:
    assert split('{"a": {"b": {"c": 1}}, "d": [{}]}', "a", "d") == [("d", {})]


@pytest.mark.parametrize(("raw", "value"), [(b'{"a": Infinity}', float("inf")), (b'{"a": 1e3}', 1000.0)])
def test_numbers_that_are_not_json_are_left_to_the_caller(raw: bytes, value: float) -> None:
    assert parse_element(raw, "here") == {"a": value}


def test_an_element_that_is_not_json_is_named() -> None:
    with pytest.raises(ValueError, match=r"annotation 3: b'\{\"a\": 1 2\}' is not JSON"):
        parse_element(b'{"a": 1 2}', "annotation 3")


def test_an_element_without_end_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jsonstream, "_CHUNK", 4 << 20)
    monkeypatch.setattr(jsonstream, "_LARGEST_ELEMENT", 10 << 20)
    stream = io.BytesIO(b'{"images": [{"a": "' + b"x" * (40 << 20))
    with pytest.raises(DataError, match=r"where: \d+ bytes without the end of an element"):
        list(split_arrays(stream, "where", ("images",)))
    assert stream.tell() < 20 << 20
