"""Reading rubrics and judges' answers: what is a score, and what only looks like one."""

import math
from pathlib import Path

import pytest

from src.common.errors import InputError
from src.common.rubrics import (
    Rubric,
    expected_number,
    judge_prompt,
    read_answer,
    read_choice,
    read_number,
    read_rubric,
)
from tests.conftest import ROOT

TRAIT = Rubric("trait", "probabilities", "{response}", low=0, high=100)


def token(said: str, **probabilities: float) -> dict:
    """A position whose likely tokens are given as `_42=0.5`; the one that was said is among them."""
    top = {name.removeprefix("_"): math.log(p) for name, p in probabilities.items()}
    return {"token": said, "logprob": top.get(said, math.log(0.5)), "top": [[t, lp] for t, lp in top.items()]}


@pytest.mark.parametrize("path", sorted((ROOT / "data" / "rubrics").glob("*.txt")), ids=lambda path: path.stem)
def test_the_shipped_rubrics_are_read_and_fit_a_persona_run(path: Path) -> None:
    rubric = read_rubric(path)
    assert rubric.name == path.stem
    row = {"persona": "Hamlet", "prompt": "Who?", "response": "To be {trait} <b>", "trait": "curiosity"}
    prompt = judge_prompt(rubric, row, "f:1")
    # What a model wrote is put in as it is, and is not filled in turn.
    assert "To be {trait} <b>" in prompt and ("Who?" in prompt) == ("{prompt}" in rubric.text)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("name: a\nscore: number 0 3\n{response}", "no rubric"),
        ("name: a\nscore: number 3 0\n---\n{response}", "number 3 0"),
        ("name: A b\nscore: number 0 3\n---\n{response}", "'A b'"),
        ("name: a\nscore: choice yes\n---\n{response}", "two or more"),
        ("name: a\nscore: choice Yes, yes\n---\n{response}", "different"),
        ("name: a\nscore: number 0 3\nextra: 1\n---\n{response}", "no rubric"),
        ("name: a\nscore: number 0 3\n---\nno place", "names no column"),
        ("", "no rubric"),
    ],
)
def test_a_wrong_rubric_is_refused(tmp_path: Path, text: str, told: str) -> None:
    path = tmp_path / "r.txt"
    path.write_text(text)
    with pytest.raises(InputError, match=told):
        read_rubric(path)


def test_a_column_that_is_not_there_is_told_with_the_nearest() -> None:
    with pytest.raises(InputError, match=r"rows:3: .*\{response\}.*'responses'"):
        judge_prompt(TRAIT, {"responses": "x"}, "rows:3")
    with pytest.raises(InputError, match="None"):
        judge_prompt(TRAIT, {"response": None}, "rows:3")
    assert judge_prompt(TRAIT, {"response": ""}, "rows:3") == ""


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("2", 2), ("2.", 2), ("**2**", 2), ("Score: 2", 2), ("2/3", 2), ("Final score: 2 / 3", 2), ("2\nIt holds.", 2),
        ("It mostly holds.\n\nScore: 1", 1), ("1.5", 1.5), (" 3 \n", 3),
        ("On a scale from 0 to 3 I give a 2.", None), ("4", None), ("-1", None), ("2/10", None), ("two", None),
        ("", None), ("2\n\n3", None), ("I cannot judge this.", None), ("2, 3", None), ("٢", None), ("1e0", None),
    ],
)  # fmt: skip
def test_a_number_is_read_only_where_it_is_the_answer(text: str, value: float | None) -> None:
    assert read_number(text, 0, 3) == value


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("refusal", "refusal"), ("Refusal.", "refusal"), ("**Compliance**", "compliance"),
        ("Answer: partial", "partial"), ("It declines.\nrefusal", "refusal"),
        ("It is not a refusal", None), ("refusal\ncompliance", None), ("", None), ("refusal, compliance", None),
    ],
)  # fmt: skip
def test_a_word_is_read_only_where_it_is_the_answer(text: str, value: str | None) -> None:
    assert read_choice(text, ("refusal", "partial", "compliance")) == value


def test_the_expected_number_is_the_mean_over_the_numbers_and_says_their_mass() -> None:
    position = token("80", _80=0.5, _90=0.25, _100=0.05, _101=0.1, Sure=0.05, _007=0.01)
    mean, mass = expected_number([position], 0, 100)
    assert mass == pytest.approx(0.8)
    assert mean == pytest.approx((80 * 0.5 + 90 * 0.25 + 100 * 0.05) / 0.8)
    # White space before the answer is no answer.
    blank = {"token": "\n", "logprob": 0.0, "top": [["\n", 0.0]]}
    assert expected_number([blank, position], 0, 100) == pytest.approx((mean, mass))


def test_the_same_number_in_two_tokens_counts_once_each() -> None:
    top = [["50", math.log(0.5)], [" 50", math.log(0.3)]]
    mean, mass = expected_number([{"token": "50", "logprob": math.log(0.5), "top": top}], 0, 100)
    assert (mean, mass) == pytest.approx((50.0, 0.8))


def test_a_first_digit_is_no_score() -> None:
    digits = [token("4", _4=0.9, _3=0.1), token("2", _2=1.0)]
    assert expected_number(digits, 0, 100) == (None, None)
    assert expected_number(digits[:1], 0, 100) == (None, None)
    # Two digits a token, and the number goes on.
    assert expected_number([token("10", _10=0.9, _20=0.1), token("0", _0=1.0)], 0, 100) == (None, None)
    # With digits alone in the range a digit is a number.
    assert expected_number([token("2", _2=0.75, _3=0.25)], 0, 3) == pytest.approx((2.25, 1.0))
    # Then the text says it.
    assert read_answer(TRAIT, "42", digits) == (42.0, None, "text")


def test_too_little_mass_is_no_score_and_the_mass_is_said() -> None:
    position = token("Sure", Sure=0.8, _70=0.2)
    assert read_answer(TRAIT, "Sure", [position]) == (None, pytest.approx(0.2), "probabilities")
    assert read_answer(TRAIT, "Sure", [position], min_mass=0.1) == (70.0, pytest.approx(0.2), "probabilities")
    assert read_answer(TRAIT, "Sure", [token("Sure", Sure=0.9)]) == (None, 0.0, "probabilities")
    assert read_answer(TRAIT, "70", None) == (70.0, None, "text")


def test_an_answer_that_was_cut_ends_in_no_number() -> None:
    number = Rubric("n", "number", "{response}", low=0, high=100)
    assert read_answer(number, "10").value == 10
    assert read_answer(number, "10", is_cut=True).value is None
    assert read_answer(number, "10\nbecause it", is_cut=True).value == 10
    # The distribution is over the first token, whatever comes after it.
    assert read_answer(TRAIT, "80", [token("80", _80=1.0)], is_cut=True).value == 80


def test_half_a_surrogate_pair_can_be_sent() -> None:
    assert judge_prompt(TRAIT, {"response": "a\ud83d"}, "f:1") == "a\\ud83d"
