"""Markers are found as words, however the text is dressed; a file of them is read or refused by its line."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from src.abliteration.markers import Counts, Markers, is_empty, normalised, read_markers
from src.common.errors import InputError
from tests.conftest import ROOT

MARKERS = Markers(["i cannot", "I can't", "I'm sorry", "as an AI", "(declined)", "不能", "step 1"])


@pytest.mark.parametrize(
    ("text", "marker"),
    [
        ("I cannot do this.", "i cannot"),
        ("Well, I  CANNOT\n\tdo this", "i cannot"),
        ("I **can’t** help; I'm sorry", "I can't"),
        ("_I’m sorry_", "I'm sorry"),
        ("I\u00a0cannot", "i cannot"),
        ("this was (declined), alas", "(declined)"),
        ("so(declined)here", "(declined)"),
        ("我不能说", "不能"),
        ("As an AI, I cannot", "as an AI"),
        ("step 1: stop", "step 1"),
        ("hi cannot, and I cannot", "i cannot"),
    ],
)
def test_a_marker_is_found_however_it_is_dressed(text: str, marker: str) -> None:
    assert MARKERS.find(text) == marker and MARKERS.shows(text)


@pytest.mark.parametrize(
    "text", ["hi cannoty", "hi cannot", "I cannots", "as an AIR", "step 10", "I can not", "", "**"]
)
def test_what_only_looks_like_a_marker_is_none(text: str) -> None:
    assert MARKERS.find(text) is None and not MARKERS.shows(text)


def test_the_first_and_there_the_longest_marker_is_named() -> None:
    markers = Markers(["do not", "I do", "I do not discuss"])
    assert markers.find("no, I do not discuss it") == "I do not discuss"
    assert markers.find("do not, I do") == "do not"
    assert markers.find("I do notice") == "I do"


@given(st.text())
def test_comparing_twice_changes_nothing_and_a_marker_is_in_itself(text: str) -> None:
    assert normalised(normalised(text)) == normalised(text)
    if len(normalised(text)) >= 2:
        assert Markers([text]).find(f"… {text} …") == text


def test_empty_responses_show_nothing_and_are_counted_apart() -> None:
    assert MARKERS.count(["I cannot", "", " \n", "** **", "fine"]) == Counts(n_shown=1, n_empty=3, n=5)
    assert is_empty("\u00a0_") and not is_empty("…")


@pytest.mark.parametrize("name", ["markers.txt", "markers.json"])
def test_files_keep_their_order_and_their_spelling(tmp_path: Path, name: str) -> None:
    given_markers = ["I don't discuss", "as an AI", "不能"]
    text = json.dumps(given_markers) if name.endswith("json") else "\n".join([*given_markers, "", ""])
    (tmp_path / name).write_text(text, encoding="utf-8")
    assert read_markers(tmp_path / name) == tuple(given_markers)


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("m.txt", "i cannot\n\nsorry\n", "m.txt:2: a blank marker"),
        ("m.txt", "i cannot\n**\n", "m.txt:2: a blank marker"),
        ("m.txt", "i cannot\nI  CANNOT\n", "m.txt:2: marker 'I  CANNOT' is there already, at"),
        ("m.txt", "sorry\ni\n", "m.txt:2: marker 'i' is a single character"),
        ("m.txt", "  \n", "m.txt: no markers"),
        ("m.json", "[]", "m.json: no markers"),
        ("m.json", '["sorry",\n 3]', "m.json:2: 3 is no text"),
        ("m.json", '["sorry",\n ""]', "m.json:2: a blank marker"),
        ("m.json", '{"a": 1}', "m.json:1: the top level is an object"),
        ("m.jsonl", '{"prompt": "x"}', "m.jsonl: not known by its ending"),
    ],
)
def test_a_wrong_file_is_refused_by_its_line(tmp_path: Path, name: str, text: str, expected: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(InputError) as error:
        read_markers(tmp_path / name)
    assert expected in str(error.value) and "\n" not in str(error.value)


def test_a_missing_file_and_no_markers_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"none\.txt: no such file"):
        read_markers(tmp_path / "none.txt")
    with pytest.raises(InputError, match="no markers"):
        Markers([])
    with pytest.raises(InputError, match="'x'"):
        Markers(["sorry", "x"])


def test_the_shipped_markers_are_read() -> None:
    assert read_markers(ROOT / "data/abliteration/markers.txt")
