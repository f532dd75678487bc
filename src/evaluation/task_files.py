"""
Tasks as files: rows of what is asked and what is right, and beside them how it is scored.

`capitalization.jsonl` has a row a sample: {"id", "input", "target"}, or as for finetuning {"input", "output"} or
{"messages"} of which the last is the right answer. `capitalization.task.json` has the settings of `Header`.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from string import ascii_uppercase

from src.common.errors import InputError
from src.common.json_rows import json_rows
from src.common.row_files import jsonl_rows, require_file
from src.common.rows import filled_text, parse_chat
from src.common.rubrics import PLACEHOLDER, Rubric, read_rubric
from src.evaluation.task_header import (
    JUDGE,
    JUDGED_PLACES,
    WITH_OPTIONS,
    Header,
    header_path,
    read_choices,
    read_header,
)

SUFFIXES = (".jsonl", ".ndjson", ".json")
ANSWER_KEYS = ("target", "output")
Message = dict[str, str]


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One row."""

    id: str
    text: str
    """The row's own text, without what the header puts around it."""
    messages: tuple[Message, ...]
    """What is asked."""
    targets: tuple[str, ...]
    """The right answers; of a choice its letter; of a risk the choice that came true."""
    choices: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class TaskFile:
    name: str
    path: Path
    header: Header
    samples: tuple[Sample, ...]
    rubric: Rubric | None = None
    """What a judge is asked."""
    rubric_path: Path | None = None

    @property
    def files(self) -> list[Path]:
        """The files whose content decides what is asked."""
        beside = header_path(self.path)
        return [self.path, *([beside] if beside.exists() else []), *([self.rubric_path] if self.rubric_path else [])]


def read_task_file(path: Path, scorer: str | None = None, rubric_path: Path | None = None) -> TaskFile:
    """
    The rows of a JSONL file or a JSON list, and their header; `scorer` takes the place of the header's, `rubric_path`
    is the rubric where the header names none.

    Raises InputError: no such file, no header and no scorer, an unknown key, a row without what its scorer needs, an id
    twice.
    """
    require_file(path)
    header = read_header(path, scorer)
    rows = json_rows(path) if path.suffix.lower() == ".json" else jsonl_rows(path)
    samples: dict[str, Sample] = {}
    places: dict[str, str] = {}
    for index, (place, value) in enumerate(rows):
        sample = _sample(place, value, index, header)
        if sample.id in samples:
            raise InputError(f"{place}: id {sample.id!r} is already at {places[sample.id]}; expected each once")
        samples[sample.id], places[sample.id] = sample, place
    if not samples:
        raise InputError(f"{path}:1: no rows in it; expected at least one")
    if header.scorer != JUDGE:
        return TaskFile(name=path.stem, path=path, header=header, samples=tuple(samples.values()))
    rubric_path = header_path(path).parent / header.rubric if header.rubric else rubric_path
    if rubric_path is None:
        raise InputError(
            f"{path}: nothing says what the judge is asked; give --judge_rubric, or `rubric` in its header"
        )
    rubric = read_rubric(rubric_path)
    _refuse_unfit(rubric, rubric_path, header, samples.values())
    return TaskFile(
        name=path.stem, path=path, header=header, samples=tuple(samples.values()), rubric=rubric,
        rubric_path=rubric_path,
    )  # fmt: skip


def _refuse_unfit(rubric: Rubric, path: Path, header: Header, samples: Iterable[Sample]) -> None:
    """Raises InputError for a rubric that wants what nobody gives, and for a word to score 1 that it lacks."""
    places, filled = set(PLACEHOLDER.findall(rubric.text)), set(header.fill or {})
    for name in sorted(places - {*JUDGED_PLACES, *filled}):
        raise InputError(f"{path}: {{{name}}} is none of {', '.join(JUDGED_PLACES)}; write it in `fill` of the header")
    for name in sorted(filled - places):
        raise InputError(f"{path}: `fill` names {name!r}, which the rubric lacks; leave it out")
    if "response" not in places:
        raise InputError(f"{path}: {{response}} is not in it, so that no answer would be judged; write it in")
    if "target" in places and (bare := next((each.id for each in samples if not each.targets), None)) is not None:
        raise InputError(f"{path}: it wants {{target}}, and sample {bare!r} has none; take another rubric")
    if header.positive is not None and header.positive not in rubric.choices:
        words = ", ".join(rubric.choices) or "none: it scores a number"
        raise InputError(f"{path}: `positive` is {header.positive!r}; its words are {words}")


def _sample(place: str, value: object, index: int, header: Header) -> Sample:
    if not isinstance(value, dict):
        raise InputError(f'{place}: no object; expected one with "input" and "target", or with "messages"')
    messages, answer = _asked(place, value, index, header.scorer != JUDGE)
    choices = read_choices(place, value["choices"]) if value.get("choices") is not None else header.choices or ()
    if header.scorer in WITH_OPTIONS and not choices:
        raise InputError(f'{place}: no key "choices"; the scorer {header.scorer} needs them, here or in the header')
    text = messages[-1]["content"]
    asked = _filled(header.prompt, text, choices)
    system = [{"role": "system", "content": header.system_prompt}] if header.system_prompt else []
    if system and messages[0]["role"] == "system":
        raise InputError(f"{place}: it has a system message, and so has the header; leave one out")
    return Sample(
        id=_id(place, value.get("id"), index),
        text=text,
        messages=(*system, *messages[:-1], {"role": "user", "content": asked}),
        targets=_targets(place, answer, header, choices),
        choices=choices,
    )


def _asked(place: str, row: dict, index: int, has_right: bool) -> tuple[tuple[Message, ...], object]:
    """The messages up to the answer, the last one the user's, and what the row says is right, if it must."""
    answers = [key for key in ANSWER_KEYS if row.get(key) is not None]
    if ("input" in row) == ("messages" in row):
        raise InputError(f'{place}: keys {", ".join(map(repr, row))}; expected either "input" or "messages"')
    if len(answers) > 1:
        raise InputError(f'{place}: both "target" and "output"; expected one of them')
    if "input" in row:
        if not answers and has_right:
            raise InputError(f'{place}: no key "target" (or "output"), the right answer')
        answer = row[answers[0]] if answers else None
        return ({"role": "user", "content": filled_text(place, "input", row["input"])},), answer
    messages = parse_chat(place, {"messages": row["messages"]}, index).messages
    answer = row[answers[0]] if answers else None
    if messages[-1]["role"] == "assistant":
        if answer is not None:
            raise InputError(f'{place}: the last message is the assistant\'s, and there is "{answers[0]}"; drop one')
        messages, answer = messages[:-1], messages[-1]["content"]
    if answer is None and has_right:
        raise InputError(f'{place}: no right answer; expected "target", or a last message of the assistant')
    if not messages or messages[-1]["role"] != "user":
        raise InputError(f"{place}: nothing is asked; expected a message of the user before the answer")
    return messages, answer


def _filled(prompt: str, text: str, choices: tuple[str, ...]) -> str:
    listed = "\n".join(f"{letter}. {choice}" for letter, choice in zip(ascii_uppercase, choices, strict=False))
    # The row's own text is data: braces in it stay as they are.
    parts = [part.replace("{choices}", listed) for part in prompt.split("{input}")]
    return text.join(parts)


def _targets(place: str, value: object, header: Header, choices: tuple[str, ...]) -> tuple[str, ...]:
    if header.scorer == "choice":
        letters = ascii_uppercase[: len(choices)]
        if not isinstance(value, str) or len(value) != 1 or value not in letters:
            raise InputError(f"{place}: target {value!r}; expected the letter of a choice, {', '.join(letters)}")
        return (value,)
    if header.scorer == "risk":
        return (_came_true(place, value, header, choices),)
    if value is None and header.scorer == JUDGE:
        return ()
    values = value if isinstance(value, list) else [value]
    if not values:
        raise InputError(f"{place}: target is an empty list; expected at least one text")
    texts = [str(each) if type(each) in (int, float) else each for each in values]
    return tuple(filled_text(place, "target", each) for each in texts)


def _came_true(place: str, value: object, header: Header, choices: tuple[str, ...]) -> str:
    if len(choices) != 2:
        raise InputError(f"{place}: {len(choices)} choices; a risk is of one of two")
    positive = header.positive if header.positive is not None else choices[1]
    if positive not in choices:
        raise InputError(f"{place}: the header's positive {positive!r} is none of the choices {', '.join(choices)}")
    negative = choices[0] if positive == choices[1] else choices[1]
    if type(value) in (int, bool) and value in (0, 1):
        return positive if value else negative
    if value not in choices:
        raise InputError(f"{place}: target {value!r}; expected 0, 1, or one of {', '.join(choices)}")
    return str(value)


def _id(place: str, value: object, index: int) -> str:
    if value is None:
        return str(index)
    if type(value) is int:
        return str(value)
    return filled_text(place, "id", value)
