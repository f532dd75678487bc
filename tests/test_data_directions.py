"""The contrast sets in data/directions: sizes, ids, pairs, no prompt twice or nearly so; disjoint function words."""

import difflib
import json
import re
from itertools import combinations

import pytest

from src.common.rows import read_prompts
from tests.conftest import ROOT

FOLDER = ROOT / "data" / "directions"
PAIRED = {"french_english": 96, "formal_casual": 64, "hedging_direct": 64}
SIZES = {**PAIRED, "cooking_other": 64}
NEARLY = 0.85
"""Share of equal characters (difflib) from which two prompts of a side count as one."""


def sides(name: str) -> tuple[dict[str, str], dict[str, str]]:
    target, control = (
        {prompt.id: prompt.text for prompt in read_prompts(FOLDER / name / f"{side}.jsonl")}
        for side in ("target", "control")
    )
    return target, control


def near_duplicates(prompts: list[str]) -> list[tuple[str, str]]:
    found = []
    for a, b in combinations(prompts, 2):
        matcher = difflib.SequenceMatcher(None, a.lower(), b.lower(), autojunk=False)
        # Upper bounds first: the exact ratio takes a hundred times as long.
        if min(matcher.real_quick_ratio(), matcher.quick_ratio()) >= NEARLY and matcher.ratio() >= NEARLY:
            found.append((a, b))
    return found


def words(text: str) -> list[str]:
    return re.findall(r"[^\W\d_]+", text.lower())


def function_words() -> tuple[set[str], set[str]]:
    lists = json.loads((FOLDER / "function_words.json").read_text(encoding="utf-8"))
    assert set(lists) == {"french", "english"}
    assert all(len(each) == len(set(each)) for each in lists.values())
    return set(lists["french"]), set(lists["english"])


def test_every_folder_is_known() -> None:
    assert {path.name for path in FOLDER.iterdir() if path.is_dir()} == set(SIZES)


@pytest.mark.parametrize("name", SIZES)
def test_sizes_and_rows(name: str) -> None:
    for prompts in sides(name):
        assert len(prompts) >= SIZES[name]
        assert all(text == text.strip() and "  " not in text for text in prompts.values())
    for side in ("target", "control"):
        for line in (FOLDER / name / f"{side}.jsonl").read_text(encoding="utf-8").splitlines():
            assert set(json.loads(line)) == {"id", "prompt"}


@pytest.mark.parametrize("name", PAIRED)
def test_pairs_have_one_id_in_the_same_line(name: str) -> None:
    target, control = sides(name)
    assert list(target) == list(control)


def test_classes_that_are_not_paired_share_no_id() -> None:
    target, control = sides("cooking_other")
    assert not set(target) & set(control)


@pytest.mark.parametrize("name", SIZES)
def test_no_prompt_twice_over_both_sides_nor_nearly_so_within_one(name: str) -> None:
    target, control = sides(name)
    texts = [text.lower() for text in (*target.values(), *control.values())]
    assert len(set(texts)) == len(texts)
    for prompts in (target, control):
        assert near_duplicates(list(prompts.values())) == []


def test_near_duplicates_are_found() -> None:
    assert near_duplicates(["How do I boil an egg?", "How do I boil the egg?", "Why do cats purr?"])


def test_function_words_are_disjoint_plain_words() -> None:
    french, english = function_words()
    assert len(french) >= 60 and len(english) >= 60
    assert not french & english
    assert not (french | english) & {"on", "a", "me", "as"}
    assert all(words(word) == [word] for word in french | english)


def test_function_words_tell_the_prompts_languages_apart() -> None:
    french, english = function_words()
    for prompts, own, other in zip(sides("french_english"), (french, english), (english, french), strict=True):
        counts = [(sum(w in own for w in words(t)), sum(w in other for w in words(t))) for t in prompts.values()]
        assert sum(a > b for a, b in counts) >= 0.95 * len(counts)
        assert all(a >= b for a, b in counts)
