"""A file appears whole or not at all, whatever happens while it is written."""

import hashlib
import json
import os
import re
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from src.common.files import encode_json, open_atomic, safe_name, sha256_file, write_json_atomic, write_text_atomic

ROOT = Path(__file__).resolve().parents[1]


def test_an_exception_leaves_the_old_file_and_no_other(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    write_text_atomic(path, "old")
    for error in (ValueError, KeyboardInterrupt):
        with pytest.raises(error), open_atomic(path) as file:
            file.write("new")
            file.flush()
            raise error
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.txt"]


def test_the_old_file_stands_until_the_block_ends(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")
    with open_atomic(path, "wb") as file:
        file.write(b"new" * 100_000)
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"new" * 100_000


def test_the_file_has_the_mode_of_an_ordinary_one(tmp_path: Path) -> None:
    (tmp_path / "ordinary").write_text("x")
    write_text_atomic(tmp_path / "atomic", "x")
    modes = {stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("ordinary", "atomic")}
    assert len(modes) == 1


def test_a_kill_never_leaves_half_a_file(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from src.common.files import write_text_atomic\n"
        "n = 0\n"
        "while True:\n    n += 1; write_text_atomic(Path(sys.argv[1]), str(n % 10) * 300_000)"
    )
    path = tmp_path / "a.txt"
    for delay in (0.05, 0.11, 0.17):
        process = subprocess.Popen([sys.executable, "-c", code, str(path)], cwd=ROOT)
        while not path.exists():
            time.sleep(0.01)
        time.sleep(delay)
        process.send_signal(signal.SIGKILL)
        process.wait()
        text = path.read_text()
        assert len(text) == 300_000 and len(set(text)) == 1


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=10,
)
# Lone surrogates too; but a high one before a low one is in JSON the same as the one character they encode.
PAIR = re.compile("[\ud800-\udbff][\udc00-\udfff]")
ANY_TEXT = st.text(alphabet=st.characters(exclude_categories=[])).filter(lambda text: not PAIR.search(text))


@given(JSON | ANY_TEXT | st.lists(ANY_TEXT))
def test_json_of_any_value_is_utf8_and_the_same_value(value: object) -> None:
    assert json.loads(encode_json(value).encode("utf-8")) == value


def test_json_is_readable_and_never_nan(tmp_path: Path) -> None:
    write_json_atomic(tmp_path / "a.json", {"é": "ü\u2028"})
    assert (tmp_path / "a.json").read_text(encoding="utf-8") == '{\n  "é": "ü\u2028"\n}\n'
    for value in (float("nan"), float("inf")):
        with pytest.raises(ValueError):
            write_json_atomic(tmp_path / "b.json", [value])
    assert os.listdir(tmp_path) == ["a.json"]


@given(st.binary(max_size=100))
def test_sha256_is_that_of_the_bytes(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    path = tmp_path_factory.mktemp("sha") / "a"
    path.write_bytes(content)
    assert sha256_file(path) == hashlib.sha256(content).hexdigest()


@given(st.text(alphabet="ab/ \t\n.-:"))
def test_safe_names_have_no_slash_and_no_white_space(name: str) -> None:
    safe = safe_name(name)
    assert "/" not in safe and safe.split() == [safe] * bool(safe)
    assert safe_name(safe) == safe


def test_safe_names_are_as_people_know_them() -> None:
    assert safe_name("Qwen/Qwen3 0.6B") == "Qwen_Qwen3_0.6B"
