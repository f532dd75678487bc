"""What is counted in a response: words of given lists."""

import json
import re
import unicodedata
from collections.abc import Mapping
from pathlib import Path

from src.common.errors import InputError
from src.common.row_files import read_text, require_file

WORD = re.compile(r"[^\W\d_]+")
WordLists = Mapping[str, frozenset[str]]


def words_of(text: str) -> list[str]:
    """The runs of letters of a text, in lower case and composed characters: "L'œuf" is l, œuf."""
    return WORD.findall(unicodedata.normalize("NFC", text).lower())


def count_words(text: str, lists: WordLists) -> dict[str, object]:
    """
    {"n_words", "words_<name>" for each list, "most_words"}: words in all, words of each list, and the list that more
    words are of than of any other, None for a tie and for none at all. Empty without lists.
    """
    if not lists:
        return {}
    words = words_of(text)
    counts = {name: sum(word in known for word in words) for name, known in lists.items()}
    highest = max(counts.values())
    leading = [name for name, count in counts.items() if count == highest]
    most = leading[0] if highest and len(leading) == 1 else None
    return {"n_words": len(words), **{f"words_{name}": n for name, n in counts.items()}, "most_words": most}


def read_word_lists(path: Path | None) -> dict[str, frozenset[str]]:
    """
    {name: words}, in the file's order; {} without a file. Raises InputError: no such file, not a JSON object of lists,
    an empty list, fewer than two lists, what is no single word in lower case.
    """
    if path is None:
        return {}
    require_file(path)
    expected = 'expected {"name": ["word", …], …} with at least two lists'
    try:
        value = json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise InputError(f"{path}:{error.lineno}: {error.msg}; {expected}") from error
    if not isinstance(value, dict) or len(value) < 2:
        raise InputError(f"{path}: {'an object of fewer than two lists' if value else 'no lists'}; {expected}")
    return {name: _word_list(path, name, words) for name, words in value.items()}


def _word_list(path: Path, name: str, words: object) -> frozenset[str]:
    if not name.isidentifier():
        raise InputError(f"{path}: a list named {name!r}; expected letters, digits and _, for it names a column")
    if not isinstance(words, list) or not words:
        raise InputError(f"{path}: {name} is no list of words, or empty; expected at least one word")
    for word in words:
        if not isinstance(word, str) or words_of(word) != [unicodedata.normalize("NFC", word)]:
            raise InputError(f"{path}: {name} holds {word!r}; expected single words of letters in lower case")
    return frozenset(unicodedata.normalize("NFC", word) for word in words)
