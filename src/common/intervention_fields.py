"""The fields of an interventions spec: what each may hold, and how what is wrong with one is said."""

import difflib
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

from pydantic import BeforeValidator

from src.common.directions_file import HOOK_POINTS, PERCENTILE_SYNTAX, PERCENTILES

LAYERS_SYNTAX = "14, 8-12, 8,12, all or best"
LARGEST = 3.4e38
"""About the largest float32."""


def parse_layers(text: str) -> tuple[int, ...] | str:
    """
    The layers that `14`, `8-12`, `8,12` or a mixture names, rising; `all` and `best` as they are.
    Raises ValueError: nothing, another word, a range that falls, a layer twice.
    """
    if text in ("all", "best"):
        return text
    layers: list[int] = []
    for part in text.split(","):
        found = re.fullmatch(r"\s*(\d{1,6})(?:\s*-\s*(\d{1,6}))?\s*", part)
        if not found:
            raise ValueError(f"{text!r}; expected layers such as {LAYERS_SYNTAX}")
        first, last = int(found[1]), int(found[2] or found[1])
        if last < first:
            raise ValueError(f"{text!r} falls from {first} to {last}; expected {last}-{first}")
        layers += range(first, last + 1)
    if len(set(layers)) < len(layers):
        raise ValueError(f"{text!r} names a layer twice; expected each once")
    return tuple(sorted(layers))


def word(words: tuple[str, ...], what: str) -> BeforeValidator:
    def check(value: object) -> object:
        if value not in words:
            raise ValueError(f"{shown(value)}{meant(value, words)}; expected {what} {', '.join(words)}")
        return value

    return BeforeValidator(check)


def _check_layers(value: object) -> object:
    text = str(value) if type(value) is int else value
    if not isinstance(text, str):
        raise ValueError(f"{shown(value)}; expected layers such as {LAYERS_SYNTAX}")
    parse_layers(text)
    return text


def _check_number(value: object) -> object:
    # Not abs(value) <= LARGEST alone: a whole number may be too large to become a float.
    if type(value) not in (int, float) or not -LARGEST <= value <= LARGEST:
        raise ValueError(f"{shown(value)}; expected a finite number")
    return float(value)


def _check_bound(value: object) -> object:
    if not isinstance(value, str):
        return _check_number(value)
    found = PERCENTILE_SYNTAX.fullmatch(value)
    if not found or int(found[2]) not in PERCENTILES:
        known = ", ".join(f"p{p}" for p in PERCENTILES)
        raise ValueError(
            f"{shown(value)}; expected a number or a percentile: {known}, perhaps after target: or control:"
        )
    return value


def _check_path(value: object) -> object:
    if not isinstance(value, str | Path) or not str(value).strip():
        raise ValueError(f"{shown(value)}; expected the path of a directions file")
    return str(value)


def _check_index(value: object) -> object:
    if type(value) is not int or value < 0:
        raise ValueError(f"{shown(value)}; expected a whole number from 0")
    return value


def _check_same_or_index(value: object) -> object:
    if value != "same" and (type(value) is not int or value < 0):
        raise ValueError(f'{shown(value)}; expected "same" or a layer')
    return value


def _check_flag(value: object) -> object:
    if type(value) is not bool:
        raise ValueError(f"{shown(value)}; expected true or false")
    return value


def _check_position(value: object) -> object:
    if type(value) is not int or abs(value) > 2**31:
        raise ValueError(f"{shown(value)}; expected a whole number, negative to count from the prompt's end")
    return value


Number = Annotated[float, BeforeValidator(_check_number)]
Bound = Annotated[float | str, BeforeValidator(_check_bound)]
Index = Annotated[int, BeforeValidator(_check_index)]
SameOrIndex = Annotated[int | str, BeforeValidator(_check_same_or_index)]
FilePath = Annotated[str, BeforeValidator(_check_path)]
Layers = Annotated[str, BeforeValidator(_check_layers)]
Flag = Annotated[bool, BeforeValidator(_check_flag)]
Position = Annotated[int, BeforeValidator(_check_position)]
HookPointName = Annotated[str, word(HOOK_POINTS, "one of")]


def shown(value: object) -> str:
    # Python refuses to write out a whole number of more than 4300 digits.
    shown = repr(value) if not isinstance(value, int) or abs(value) < 10**60 else "a number of over 60 digits"
    return shown if len(shown) <= 60 else shown[:59] + "…"


def meant(word: object, words: Iterable[str]) -> str:
    nearest = difflib.get_close_matches(str(word), list(words), n=1)
    return f", perhaps {nearest[0]!r}" if nearest else ""
