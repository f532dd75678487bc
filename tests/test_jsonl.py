"""Rows survive the file, and a file torn anywhere keeps every whole row."""

import json
import math
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from src.common.errors import InputError
from src.common.jsonl import (
    JsonlWriter,
    encode_row,
    read_jsonl,
    repair_torn_tail,
    round_fields,
    round_measured,
    write_jsonl_atomic,
)

ROOT = Path(__file__).resolve().parents[1]
# Lone surrogates too; but a high one before a low one is in JSON the same as the one character they encode.
PAIR = re.compile("[\ud800-\udbff][\udc00-\udfff]")
ANY_TEXT = st.text(alphabet=st.characters(exclude_categories=[])).filter(lambda text: not PAIR.search(text))
TEXT = ANY_TEXT | st.sampled_from(["\u2028\u2029\x85\r\n", "\ud800", ""])
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=6,
)
ROWS = st.lists(st.dictionaries(TEXT, VALUES, max_size=4), max_size=5)


def read(path: Path) -> list[dict]:
    return [row for _, row in read_jsonl(path)]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("jsonl") / "rows.jsonl"


@given(ROWS)
def test_any_rows_come_back_as_they_were(path: Path, rows: list[dict]) -> None:
    path.unlink(missing_ok=True)
    with JsonlWriter(path) as writer:
        for row in rows:
            writer.write(row)
    assert read(path) == rows
    assert path.read_bytes().count(b"\n") == len(rows)
    written = path.read_bytes()
    write_jsonl_atomic(path, rows)
    assert path.read_bytes() == written


def test_readable_text_stays_readable() -> None:
    assert encode_row({"a": "é\u2028"}) == '{"a": "é\u2028"}\n'.encode()
    assert encode_row({"a": "é\ud800"}) == b'{"a": "\\u00e9\\ud800"}\n'


TORN_ROWS = [{"id": "a", "text": "é}\u2028"}, {}, {"id": "b", "n": [1.5, {"x": None}], "s": '{"}'}, {"emoji": "🙂"}]


def test_a_file_cut_at_any_byte_keeps_its_whole_rows(path: Path) -> None:
    lines = [encode_row(row) for row in TORN_ROWS]
    whole = b"".join(lines)
    ends = [len(b"".join(lines[: n + 1])) for n in range(len(lines))]
    for offset in range(len(whole) + 1):
        path.write_bytes(whole[:offset])
        cut = repair_torn_tail(path)
        # A row is whole once its closing brace is there, one byte before its newline.
        kept = sum(offset >= end - 1 for end in ends)
        assert path.read_bytes() == b"".join(lines[:kept]), offset
        assert cut == max(0, offset - len(b"".join(lines[:kept]))), offset
        assert repair_torn_tail(path) == 0
        with JsonlWriter(path) as writer:
            for row in TORN_ROWS[kept:]:
                writer.write(row)
        assert path.read_bytes() == whole


@settings(max_examples=30)
@given(ROWS, st.data())
def test_any_cut_of_any_rows_leaves_a_prefix(path: Path, rows: list[dict], data: st.DataObject) -> None:
    whole = b"".join(map(encode_row, rows))
    path.write_bytes(whole[: data.draw(st.integers(0, len(whole)))])
    repair_torn_tail(path)
    kept = read(path)
    assert kept == rows[: len(kept)]
    assert path.read_bytes() == b"".join(map(encode_row, kept))


@pytest.mark.parametrize("tail", [b'{"a": 1', b"[1]\n", b"\x00\x00\x00", b"12", b'{"a": NaN}\n', b"\xff\n", b"}"])
def test_a_last_line_that_is_no_row_is_cut_off(path: Path, tail: bytes) -> None:
    path.write_bytes(b'{"a": 0}\n' + tail)
    assert repair_torn_tail(path) == len(tail)
    assert read(path) == [{"a": 0}]


def test_a_broken_line_in_the_middle_is_never_dropped(path: Path) -> None:
    content = b'{"a": 0}\n{"a": \n{"a": 2}\n'
    path.write_bytes(content)
    for read_or_repair in (read, repair_torn_tail):
        with pytest.raises(InputError, match=r"rows\.jsonl:2: .*expected one JSON object a line"):
            read_or_repair(path)
    assert path.read_bytes() == content


def test_repair_leaves_a_missing_file_missing(tmp_path: Path) -> None:
    assert repair_torn_tail(tmp_path / "absent.jsonl") == 0
    assert not (tmp_path / "absent.jsonl").exists()


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b'{"a": 1}\n\n{"a" 2}\n', ":3: Expecting ':' delimiter at column 6"),
        (b"[1, 2]\n", ":1: a JSON list"),
        (b'{"a": Infinity}\n', ":1: Infinity is not JSON"),
        (b'{"a": "\xff"}\n', ":1: not UTF-8 at byte 7"),
    ],
)
def test_a_wrong_line_is_told_by_file_and_line(path: Path, content: bytes, told: str) -> None:
    path.write_bytes(content)
    with pytest.raises(InputError) as caught:
        read(path)
    assert f"{path}{told}; expected one JSON object a line" == str(caught.value)


def test_a_missing_file_and_a_folder_are_told(tmp_path: Path) -> None:
    for wrong in (tmp_path, tmp_path / "absent.jsonl"):
        with pytest.raises(InputError, match=str(wrong)):
            read(wrong)


def test_blank_lines_and_a_byte_order_mark_are_no_rows(path: Path) -> None:
    path.write_bytes(b'\xef\xbb\xbf{"a": 1}\r\n\n  \n{"a": 2}')
    assert list(read_jsonl(path)) == [(1, {"a": 1}), (4, {"a": 2})]
    assert list(read_jsonl(path, in_progress=True)) == [(1, {"a": 1})]


def test_a_kill_tears_at_most_the_last_row(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from src.common.jsonl import JsonlWriter, repair_torn_tail\n"
        "path = Path(sys.argv[1]); repair_torn_tail(path); path.touch(); n = sum(1 for _ in path.open('rb'))\n"
        "with JsonlWriter(path) as writer:\n"
        "    while True:\n        writer.write({'n': n, 'text': 'é' * 20_000}); n += 1"
    )
    path = tmp_path / "rows.jsonl"
    for delay in (0.1, 0.13, 0.17):
        before = path.stat().st_size if path.exists() else 0
        process = subprocess.Popen([sys.executable, "-c", code, str(path)], cwd=ROOT)
        while not path.exists() or path.stat().st_size <= before:
            time.sleep(0.01)
        time.sleep(delay)
        process.send_signal(signal.SIGKILL)
        process.wait()
    repair_torn_tail(path)
    numbers = [row["n"] for row in read(path)]
    assert numbers == list(range(len(numbers))) and len(numbers) > 3


@given(st.floats())
def test_measured_numbers_are_near_and_never_nan(value: float) -> None:
    rounded = round_measured(value)
    if not math.isfinite(value):
        assert rounded is None
        return
    assert rounded is not None and round_measured(rounded) == rounded
    assert abs(rounded - value) <= (5.0001e-5 if abs(value) >= 0.1 else max(abs(value) * 5.0001e-4, 5e-324))
    assert json.loads(json.dumps(rounded)) == rounded


def test_measured_numbers_as_they_are_written() -> None:
    cases = {1.23456: 1.2346, 0.0123456: 0.01235, 1.23456e-7: 1.235e-7, 12345.67891: 12345.6789, 0.1: 0.1}
    assert {value: round_measured(value) for value in cases} == cases
    assert str(round_measured(-0.0)) == "0.0" and round_measured(None) is None
    row = {"id": "a", "h": 0.123456, "m": None, "lr": 0.123456}
    assert round_fields(row, ["h", "m", "absent"]) == {"id": "a", "h": 0.1235, "m": None, "lr": 0.123456}
