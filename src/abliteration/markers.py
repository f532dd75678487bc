"""The phrases by which a response shows the behaviour, and where a text holds one."""

import unicodedata
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from src.common.errors import InputError
from src.common.json_rows import json_rows
from src.common.row_files import read_text

EXPECTED = "expected a text file (.txt), one marker a line, or a JSON list of them (.json)"
STRAIGHT = str.maketrans({**dict.fromkeys("‘’‚‛ʼ", "'"), **dict.fromkeys("“”„‟", '"'), "*": None, "_": None})
"""Curly quotes made straight, and the signs of markdown's emphasis left out."""


class Counts(NamedTuple):
    """Of the responses to a set of prompts."""

    n_shown: int
    """Responses that hold a marker."""
    n_empty: int
    """Responses without a visible character: they show nothing, and are no good either."""
    n: int


class Markers:
    """Markers to look for; capitals, emphasis, curly quotes and the width of white space make no difference."""

    def __init__(self, markers: Sequence[str]) -> None:
        """Raises InputError where there is none, or one is of fewer than two characters."""
        self._markers = {normalised(marker): marker for marker in markers}
        for text, marker in self._markers.items():
            if len(text) < 2:
                raise InputError(f"marker {marker!r}: it is in nearly every text; expected two characters or more")
        if not self._markers:
            raise InputError("there are no markers; expected at least one")

    def find(self, text: str) -> str | None:
        """
        The marker that begins first in the text, the longest of those that begin there, as it was given; None where
        there is none. At a letter or digit a marker ends where the word does: "i cannot" is not in "hi cannoty".
        Scripts without capitals, many of which do not part words, are matched inside words too.
        """
        within = normalised(text)
        found = [
            (at, -len(phrase), marker) for phrase, marker in self._markers.items() for at in _first(phrase, within)
        ]
        return min(found)[2] if found else None

    def shows(self, text: str) -> bool:
        """Whether the text holds a marker; an empty one does not."""
        return self.find(text) is not None

    def count(self, texts: Sequence[str]) -> Counts:
        """How many of the texts hold a marker, and how many hold nothing."""
        return Counts(sum(map(self.shows, texts)), sum(map(is_empty, texts)), len(texts))


def is_empty(text: str) -> bool:
    """Whether nothing but white space and signs of emphasis is there."""
    return not normalised(text)


def normalised(text: str) -> str:
    """The text as it is compared: case folded, without * and _, straight quotes, single spaces, composed characters."""
    folded = unicodedata.normalize("NFD", text).casefold().translate(STRAIGHT)
    return " ".join(unicodedata.normalize("NFC", folded).split())


def read_markers(path: Path) -> tuple[str, ...]:
    """
    The markers of a file, in its order. Raises InputError, with the line: no such file, another kind of file, not
    UTF-8, malformed, no marker, one that is blank, of a single character, no text, or there twice.
    """
    places: dict[str, str] = {}
    markers = []
    for place, value in _rows(path):
        if not isinstance(value, str):
            raise InputError(f"{place}: {value!r} is no text; {EXPECTED}")
        text = normalised(value)
        if len(text) < 2:
            what = f"marker {value!r} is a single character and in nearly every text" if text else "a blank marker"
            raise InputError(f"{place}: {what}; expected a word or a phrase")
        if text in places:
            raise InputError(f"{place}: marker {value!r} is there already, at {places[text]}; drop one of the two")
        places[text] = place
        markers.append(value.strip())
    if not markers:
        raise InputError(f"{path}: no markers; {EXPECTED}")
    return tuple(markers)


def _rows(path: Path) -> Iterator[tuple[str, object]]:
    if path.suffix == ".json":
        yield from json_rows(path)
        return
    text = read_text(path)
    if path.suffix != ".txt":
        raise InputError(f"{path}: not known by its ending; {EXPECTED}")
    # Not splitlines: U+2028 and its like end no line of a file.
    for number, line in enumerate(text.rstrip().split("\n") if text.strip() else [], start=1):
        yield f"{path}:{number}", line


def _first(phrase: str, text: str) -> list[int]:
    """Where the phrase first stands in the text as words of its own: one place or none."""
    at = text.find(phrase)
    while at >= 0:
        end = at + len(phrase)
        if not _is_joined(text[:at][-1:], phrase[0]) and not _is_joined(phrase[-1], text[end : end + 1]):
            return [at]
        at = text.find(phrase, at + 1)
    return []


def _is_joined(left: str, right: str) -> bool:
    return _is_in_word(left) and _is_in_word(right)


def _is_in_word(character: str) -> bool:
    return character.isalnum() and unicodedata.category(character) != "Lo"
