"""How the rows of a task file are asked and scored: `NAME.task.json` beside it, or the scorer's name alone."""

import difflib
import json
from dataclasses import dataclass, fields
from pathlib import Path
from string import ascii_uppercase

from src.common.errors import InputError
from src.common.row_files import read_text
from src.common.rows import filled_text

JUDGE = "judge"
SCORER_NAMES = ("exact", "includes", "choice", "risk", JUDGE)
WITH_OPTIONS = ("choice", "risk")
"""Scorers that read the log-probabilities of given answers."""
JUDGED_PLACES = ("prompt", "response", "target", "persona")
"""What a rubric may name of a sample."""
CHOICE_PROMPT = "{input}\n\n{choices}\n\nAnswer with the letter alone."
"""Of files without a header."""


@dataclass(frozen=True, kw_only=True)
class Header:
    """How the rows of a file are asked and scored: the keys of its `.task.json`."""

    scorer: str
    """exact: the answer is a target, white space around both aside. includes: a target is in it. choice: the likeliest
    of the row's `choices` is the one whose letter is the target. risk: the probability of one of two choices. judge: a
    model behind an API says how good the answer is, under a rubric; rows need no target."""
    prompt: str = "{input}"
    """What is asked: {input} is the row's text, {choices} its choices with their letters, one a line."""
    system_prompt: str | None = None
    """A system message before every prompt."""
    max_tokens: int | None = None
    """Generated tokens at most, where the command says nothing."""
    ignore_case: bool = False
    """Whether exact and includes take capital letters for small ones."""
    answers: str = "letters"
    """What the model is asked to give in a choice: `letters` compares A, B, …; `texts` the choices' own texts by their
    log-probability per byte."""
    choices: tuple[str, ...] | None = None
    """The choices of rows that have none."""
    positive: str | None = None
    """risk: the choice whose probability is the risk, the last unless given. judge: of a rubric of words the one that
    scores 1, the first unless given."""
    rubric: str | None = None
    """judge: the rubric's file, from this file's folder."""
    fill: dict[str, str] | None = None
    """judge: what stands for a {NAME} in the rubric that is none of {prompt}, {response}, {target}, {persona}."""


def header_path(path: Path) -> Path:
    """Where the settings of a file of rows are."""
    return path.with_suffix(".task.json")


def read_header(path: Path, scorer: str | None) -> Header:
    beside = header_path(path)
    if not beside.exists():
        if scorer is None:
            known = ", ".join(SCORER_NAMES)
            raise InputError(
                f'{path}: there is no {beside.name} beside it that says how it is scored, {{"scorer": "exact"}} for '
                f"one; write it, or give the task as {path}@SCORER ({known})"
            )
        prompt = CHOICE_PROMPT if scorer == "choice" else "{input}"
        return _checked(Header(scorer=scorer, prompt=prompt), f"--tasks {path}@{scorer}")
    try:
        values = json.loads(read_text(beside))
    except json.JSONDecodeError as error:
        raise InputError(f"{beside}:{error.lineno}: malformed JSON ({error.msg}); expected an object") from None
    if not isinstance(values, dict):
        raise InputError(f"{beside}: no object; expected one with the key 'scorer'")
    if scorer is not None:
        values["scorer"] = scorer
    known = [field.name for field in fields(Header)]
    for key in values:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1, cutoff=0.0)[0]
            raise InputError(f"{beside}: unknown key {key!r}; the nearest is {near!r}")
    if "scorer" not in values:
        raise InputError(f"{beside}: no key 'scorer'; expected one of {', '.join(SCORER_NAMES)}")
    if isinstance(values.get("choices"), list):
        values["choices"] = read_choices(str(beside), values["choices"])
    return _checked(Header(**values), str(beside))


def _checked(header: Header, place: str) -> Header:
    if header.scorer not in SCORER_NAMES:
        near = difflib.get_close_matches(str(header.scorer), SCORER_NAMES, n=1, cutoff=0.0)[0]
        raise InputError(
            f"{place}: scorer {header.scorer!r}; expected {', '.join(SCORER_NAMES)} (the nearest is {near})"
        )
    if not isinstance(header.prompt, str) or "{input}" not in header.prompt:
        raise InputError(f"{place}: prompt {header.prompt!r}; expected a text that holds {{input}}")
    if header.system_prompt is not None:
        filled_text(place, "system_prompt", header.system_prompt)
    n = header.max_tokens
    if n is not None and (type(n) is not int or n < 1):
        raise InputError(f"{place}: max_tokens {n!r}; expected a whole number from 1")
    if type(header.ignore_case) is not bool:
        raise InputError(f"{place}: ignore_case {header.ignore_case!r}; expected true or false")
    if header.answers not in ("letters", "texts"):
        raise InputError(f"{place}: answers {header.answers!r}; expected letters or texts")
    if header.rubric is not None and not isinstance(header.rubric, str):
        raise InputError(f"{place}: rubric {header.rubric!r}; expected the path of a rubric")
    fill = header.fill
    if fill is not None and not (isinstance(fill, dict) and all(isinstance(text, str) for text in fill.values())):
        raise InputError(f"{place}: fill {fill!r}; expected an object, NAME → text")
    if header.choices is not None and not isinstance(header.choices, tuple):
        raise InputError(f"{place}: choices {header.choices!r}; expected a list of texts")
    if header.scorer == "choice" and header.answers == "letters" and "{choices}" not in header.prompt:
        raise InputError(f"{place}: the letters of choices that are not shown mean nothing; put {{choices}} in prompt")
    return header


def read_choices(place: str, value: object) -> tuple[str, ...]:
    if not isinstance(value, list) or not 2 <= len(value) <= len(ascii_uppercase):
        raise InputError(f"{place}: choices {value!r}; expected a list of 2 to {len(ascii_uppercase)} texts")
    texts = tuple(filled_text(place, "a choice", each) for each in value)
    if len(set(texts)) < len(texts):
        raise InputError(f"{place}: a choice is there twice in {', '.join(texts)}; expected each once")
    return texts
