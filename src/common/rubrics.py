"""
Rubrics: a text file that says what to ask a judge about a row, and how its answer is read.

    name: coherence
    score: number 0 100
    ---
    … {prompt} … {response} …
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from src.common.api_types import Answer
from src.common.errors import InputError
from src.common.row_files import read_text
from src.common.sources import nearest

NUMBER, PROBABILITIES, CHOICE = "number", "probabilities", "choice"
PLACEHOLDER = re.compile(r"\{([A-Za-z_]\w*)\}")
NAME = re.compile(r"[a-z][a-z0-9_]*")
TOP_LOGPROBS = 20
"""As many as OpenAI's protocol gives."""
WITHOUT_LOGPROBS = ("anthropic", "openai-responses")
"""Providers whose protocol, as it is spoken here, has none."""
CUT = ("length", "max_tokens", "max_output_tokens")
"""What the protocols call an answer that ended at its limit."""
EXPECTED = (
    "expected `name: NAME`, `score: number LOW HIGH | probabilities LOW HIGH | choice WORD, WORD, …`, `---`, the text"
)


@dataclass(frozen=True)
class Rubric:
    """What is asked, and what an answer may be."""

    name: str
    kind: str
    """number: a whole number; probabilities: the mean over the judge's distribution of one; choice: one of words."""
    text: str
    low: int = 0
    high: int = 0
    choices: tuple[str, ...] = ()

    @property
    def is_numeric(self) -> bool:
        return self.kind != CHOICE


class Reading(NamedTuple):
    """What an answer says."""

    value: float | str | None
    """The number or the word; None where the answer says none that can be told for sure."""
    mass: float | None
    """probabilities: how probable it was that the answer is a number of the range at all."""
    read_from: str
    """text or probabilities."""


def read_rubric(path: Path) -> Rubric:
    """Raises InputError: no such file, a missing or wrong head, an empty text, a text without a place for a column."""
    head, separator, text = read_text(path).replace("\r\n", "\n").partition("\n---\n")
    lines = [line.partition(":") for line in head.split("\n") if line.strip()]
    fields = {name.strip(): value.strip() for name, _, value in lines}
    if not separator or set(fields) != {"name", "score"} or len(lines) != 2:
        raise InputError(f"{path}: no rubric; {EXPECTED}")
    if not NAME.fullmatch(fields["name"]):
        raise InputError(f"{path}: name {fields['name']!r}; expected lower-case letters, digits and _")
    if not PLACEHOLDER.search(text):
        raise InputError(f"{path}: the text names no column; expected at least {{response}} in it")
    return Rubric(fields["name"], text=text.strip(), **_scale(path, fields["score"]))


def _scale(path: Path, score: str) -> dict[str, Any]:
    kind, _, rest = score.partition(" ")
    if kind == CHOICE:
        choices = tuple(word.strip() for word in rest.split(","))
        if len(choices) < 2 or not all(choices) or len({_plain(word) for word in choices}) < len(choices):
            raise InputError(f"{path}: score {score!r}; expected two or more different words, separated by commas")
        return {"kind": kind, "choices": choices}
    bounds = re.fullmatch(r"\s*(\d+)\s+(\d+)\s*", rest)
    if kind not in (NUMBER, PROBABILITIES) or not bounds or int(bounds[1]) >= int(bounds[2]):
        raise InputError(f"{path}: score {score!r}; {EXPECTED}")
    return {"kind": kind, "low": int(bounds[1]), "high": int(bounds[2])}


def judge_prompt(rubric: Rubric, values: Mapping[str, Any], place: str) -> str:
    """
    The rubric's text with the row's columns in it; what a column holds is never looked at for further places.
    Raises InputError for a column that the row lacks, or that holds nothing that can be written as text.
    """

    def fill(match: re.Match[str]) -> str:
        name = match[1]
        if name not in values:
            close = nearest(name, values) if values else "none"
            raise InputError(f"{place}: rubric {rubric.name} wants {{{name}}}; the nearest column is {close!r}")
        value = values[name]
        if not isinstance(value, str | int | float):
            raise InputError(f"{place}: {name} is {value!r:.60}; rubric {rubric.name} wants a text")
        # Half of a surrogate pair, which a tokenizer can produce, cannot be sent.
        return str(value).encode("utf-8", "backslashreplace").decode()

    return PLACEHOLDER.sub(fill, rubric.text)


def reading_parameters(rubric: Rubric, provider: str) -> dict[str, Any]:
    """What is asked for beside the answer: log-probabilities, where the rubric reads them and the protocol has them."""
    offered = rubric.kind == PROBABILITIES and provider not in WITHOUT_LOGPROBS
    return {"logprobs": True, "top_logprobs": TOP_LOGPROBS} if offered else {}


def read_reply(rubric: Rubric, answer: Answer, min_mass: float = 0.25) -> Reading:
    """`read_answer` of what an API gave; the log-probabilities of a judge that thinks begin with its thoughts."""
    logprobs = None if answer.reasoning else answer.logprobs
    return read_answer(rubric, answer.completion, logprobs, min_mass, answer.stop_reason in CUT)


def read_answer(
    rubric: Rubric,
    text: str,
    logprobs: Sequence[Mapping[str, Any]] | None = None,
    min_mass: float = 0.25,
    is_cut: bool = False,
) -> Reading:
    """
    What a judge's answer says under a rubric. Numbers come from the log-probabilities where the rubric wants that, they
    are given (as in `Answer.logprobs`) and the judge writes a number as one token; else from the text.

    logprobs: of the answer's own tokens, from its first on; None where the judge thought before it answered.
    is_cut: the answer ended at its limit of tokens. Its last line is not read then: 10 may be the start of 100.
    """
    if is_cut:
        text = text.rpartition("\n")[0]
    if rubric.kind == CHOICE:
        return Reading(read_choice(text, rubric.choices), None, "text")
    if rubric.kind == PROBABILITIES and logprobs:
        mean, mass = expected_number(logprobs, rubric.low, rubric.high)
        if mass is not None:
            return Reading(mean if mass >= min_mass else None, mass, PROBABILITIES)
    return Reading(read_number(text, rubric.low, rubric.high), None, "text")


def expected_number(logprobs: Sequence[Mapping[str, Any]], low: int, high: int) -> tuple[float | None, float | None]:
    """
    The mean over the whole numbers from low to high at the answer's first token, Σ p·n / Σ p, and their mass Σ p (the
    trait score of Chen et al. 2025, "Persona vectors", arXiv:2507.21509, which leaves a mass below 0.25 unscored).

    (None, 0) without any number. (None, None) where a number is more than one token, for a first digit is no score:
    where the range has two-digit numbers and of the likely numbers none has two digits, and where the number that was
    said goes on in the next token.
    """
    position = next((i for i, token in enumerate(logprobs) if token["token"].strip()), None)
    if position is None:
        return None, 0.0
    first = logprobs[position]
    masses: dict[str, float] = {first["token"]: math.exp(first["logprob"])}
    masses |= {token: math.exp(logprob) for token, logprob in first["top"]}
    numbers = [(token.strip(), mass) for token, mass in masses.items() if _is_plain_number(token.strip())]
    following = logprobs[position + 1]["token"] if position + 1 < len(logprobs) else ""
    goes_on = first["token"].strip().isdigit() and following[:1].isdigit()
    if goes_on or (high >= 10 and numbers and all(len(token) == 1 for token, _ in numbers)):
        return None, None
    within = [(int(token), mass) for token, mass in numbers if low <= int(token) <= high]
    mass = math.fsum(mass for _, mass in within)
    if mass == 0.0:
        return None, 0.0
    return math.fsum(number * mass for number, mass in within) / mass, min(mass, 1.0)


def _is_plain_number(token: str) -> bool:
    return token.isascii() and token.isdigit() and str(int(token)) == token


def read_number(text: str, low: int, high: int) -> float | None:
    """
    The number of an answer that is a number, or whose first or last line is one (`Score: 2`, `2/3`, `**2**`); None for
    any other, for a number out of range, and where the first and the last line say different ones. A number inside a
    sentence is not taken: "on a scale from 0 to 3" holds two.
    """
    found = {number for line in _ends(text) if (number := _number_in(line, high)) is not None}
    if len(found) != 1:
        return None
    number = found.pop()
    return number if low <= number <= high else None


def _number_in(line: str, high: int) -> float | None:
    match = re.fullmatch(r"(?:[a-z ]*[a-z]\s*[:=]\s*)?([0-9]+(?:\.[0-9]+)?)\s*(?:/\s*([0-9]+))?\.?", _plain(line))
    if not match or (match[2] and int(match[2]) != high):
        return None
    return float(match[1])


def read_choice(text: str, choices: Sequence[str]) -> str | None:
    """The word of an answer that is one of the choices, or whose first or last line is; None as in `read_number`."""
    by_plain = {_plain(choice): choice for choice in choices}
    found = set()
    for line in _ends(text):
        word = _plain(re.sub(r"^[A-Za-z *_]*:", "", line)).rstrip(".!").strip()
        if word in by_plain:
            found.add(by_plain[word])
    return found.pop() if len(found) == 1 else None


def _ends(text: str) -> list[str]:
    lines = [line for line in text.split("\n") if line.strip()]
    return [lines[0], lines[-1]] if lines else []


def _plain(line: str) -> str:
    """Without the marks of Markdown and quotes, in lower case."""
    return line.strip().strip("*_`\"'“” ").replace("**", "").strip().casefold()
