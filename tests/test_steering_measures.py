import json
from pathlib import Path

import pytest

from src.common.errors import InputError
from src.steering.measures import count_words, read_word_lists, words_of
from tests.conftest import ROOT

LISTS = {"french": frozenset(["le", "où", "et"]), "english": frozenset(["the", "and"])}


def test_words_are_runs_of_letters_in_lower_case() -> None:
    assert words_of("L'ŒUF — don't 3x_y, Où?") == ["l", "œuf", "don", "t", "x", "y", "où"]
    assert words_of("ou\u0300") == ["où"]


def test_words_are_counted_by_list_and_the_longer_count_wins() -> None:
    assert count_words("Le chat et THE dog.", LISTS) == {
        "n_words": 5, "words_french": 2, "words_english": 1, "most_words": "french",
    }  # fmt: skip
    assert count_words("le the", LISTS)["most_words"] is None
    assert count_words("", LISTS) == {"n_words": 0, "words_french": 0, "words_english": 0, "most_words": None}
    assert count_words("le", {}) == {}


def test_the_shipped_lists_are_read_and_tell_the_contrast_sets_apart() -> None:
    lists = read_word_lists(ROOT / "data/directions/function_words.json")
    assert list(lists) == ["french", "english"] and read_word_lists(None) == {}
    for name, side in (("french", "target"), ("english", "control")):
        path = ROOT / f"data/directions/french_english/{side}.jsonl"
        prompts = [json.loads(line)["prompt"] for line in path.read_text().splitlines()]
        most = [count_words(prompt, lists)["most_words"] for prompt in prompts]
        other = "english" if name == "french" else "french"
        assert most.count(name) > 0.8 * len(most) and other not in most


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{"a": ["x"], "b": ["y"]', "words.json:1"),
        ("[]", "no lists"),
        ('{"a": ["x"]}', "fewer than two lists"),
        ('{"a": ["x"], "b": []}', "b is no list of words, or empty"),
        ('{"a": ["x"], "b": "y"}', "b is no list of words"),
        ('{"a": ["x"], "b": ["Y"]}', "b holds 'Y'"),
        ('{"a": ["x"], "b": ["two words"]}', "b holds 'two words'"),
        ('{"a": ["x"], "b": [3]}', "b holds 3"),
        ('{"a": ["x"], "b c": ["y"]}', "named 'b c'"),
    ],
)
def test_bad_lists_are_named_with_their_place(tmp_path: Path, text: str, expected: str) -> None:
    (tmp_path / "words.json").write_text(text)
    with pytest.raises(InputError, match=r"words\.json") as error:
        read_word_lists(tmp_path / "words.json")
    assert expected in str(error.value)


def test_a_missing_file_of_lists_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nowhere.json: no such file"):
        read_word_lists(tmp_path / "nowhere.json")
