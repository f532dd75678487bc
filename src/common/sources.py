"""
The sources of a setting's value: the command line, the environment, a TOML file. Each is read into words with the place
they came from, so that precedence is a merge of dictionaries and every error can name its place.
"""

import argparse
import difflib
import shlex
import tomllib
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from simple_parsing.wrappers.field_parsing import get_parsing_fn

from src.common.errors import InputError
from src.common.settings import Setting

PREFIX = "TILLER_"
# TILLER_CACHE_DIR is the root of every cache; it never sets the field `cache_dir`, which is one run's API answers.
VARIABLES_THAT_ARE_NO_FIELD = ("TILLER_CACHE_DIR",)


@dataclass(frozen=True)
class Given:
    """The words given for one setting. `source` is the kind of source, `place` the flag, variable or key itself."""

    source: str
    place: str
    words: tuple[str, ...]


def nearest(name: str, known: Iterable[str]) -> str:
    """The known name that is most like `name`."""
    return difflib.get_close_matches(name, list(known), n=1, cutoff=0.0)[0]


def read_command_line(argv: Sequence[str], settings: Sequence[Setting]) -> dict[str, Given]:
    """
    The words after each flag, as `name -> Given`. A later flag wins over an earlier one, except that a list grows.
    Raises InputError for an unknown flag, a flag without its value, and a word that belongs to no flag.
    """
    given: dict[str, Given] = {}
    positional = next((setting for setting in settings if setting.positional), None)
    rest = deque(argv)
    while rest:
        word = rest.popleft()
        if word.startswith("--"):
            flag, equals, value = word.partition("=")
            setting, negated = _find_flag(flag, settings)
            if negated and equals:
                raise InputError(f"{word}: {flag} takes no value; write {flag} or --{setting.name}={value}")
            words = ("false",) if negated else (value,) if equals else _take_values(rest, flag, setting)
        elif positional:
            setting, flag, words = positional, f"--{positional.name}", (word,)
        else:
            raise InputError(f"{word!r} belongs to no flag; a value stands directly after its --flag")
        earlier = given[setting.name].words if setting.is_list and setting.name in given else ()
        given[setting.name] = Given("command line", flag, (*earlier, *words))
    return given


def _find_flag(flag: str, settings: Sequence[Setting]) -> tuple[Setting, bool]:
    """The setting that a flag names, and whether the flag is its negation (--noX, --no_X)."""
    name = flag[2:].replace("-", "_")
    by_name = {known: setting for setting in settings for known in (setting.name, *setting.aliases)}
    if name in by_name:
        return by_name[name], False
    for prefix in ("no_", "no"):
        positive = by_name.get(name.removeprefix(prefix))
        if name.startswith(prefix) and positive is not None and positive.is_bool:
            return positive, True
    raise InputError(f"unknown flag {flag}; the nearest is --{nearest(name, by_name)}")


def _take_values(rest: deque[str], flag: str, setting: Setting) -> tuple[str, ...]:
    """Removes from `rest` the words that are this flag's values."""
    if setting.is_bool and not setting.is_list:
        return (rest.popleft(),) if rest and _is_bool(rest[0]) else ("true",)
    words: list[str] = []
    while rest and not rest[0].startswith("--") and (setting.is_list or not words):
        words.append(rest.popleft())
    if not words:
        raise InputError(f"{flag} expects {setting.expected} after it (one that starts with -- as {flag}=VALUE)")
    return tuple(words)


def _is_bool(word: str) -> bool:
    try:
        get_parsing_fn(bool)(word)
    except argparse.ArgumentTypeError:
        return False
    return True


def read_environment(environment: Mapping[str, str], settings: Sequence[Setting]) -> dict[str, Given]:
    """
    The settings named by TILLER_<FIELD> variables. An empty variable counts as unset; a list is split as a shell would.
    Raises InputError for a TILLER_ variable that names no setting.
    """
    by_variable = {PREFIX + setting.name.upper(): setting for setting in settings}
    for variable in VARIABLES_THAT_ARE_NO_FIELD:
        by_variable.pop(variable, None)
    given = {}
    for variable, value in environment.items():
        if not variable.startswith(PREFIX) or variable in VARIABLES_THAT_ARE_NO_FIELD or not value:
            continue
        if variable not in by_variable:
            known = (*by_variable, *VARIABLES_THAT_ARE_NO_FIELD)
            raise InputError(f"environment: unknown variable {variable}; the nearest is {nearest(variable, known)}")
        setting = by_variable[variable]
        words = _shell_words(variable, value) if setting.is_list else (value,)
        given[setting.name] = Given("environment", variable, words)
    return given


def _shell_words(variable: str, value: str) -> tuple[str, ...]:
    try:
        return tuple(shlex.split(value))
    except ValueError as error:
        raise InputError(f"{variable}: {value!r}: {error}; expected words separated by spaces") from error


def read_toml(path: Path, settings: Sequence[Setting]) -> dict[str, Given]:
    """
    The settings named by the keys of a flat TOML file.
    Raises InputError for a file that is missing or no TOML, an unknown key, and a value that is a table or a date.
    """
    by_name = {setting.name: setting for setting in settings}
    given = {}
    for key, value in _load_toml(path).items():
        if key not in by_name:
            raise InputError(f"{path}: unknown key {key!r}; the nearest is {nearest(key, by_name)!r}")
        values = value if isinstance(value, list) else [value]
        given[key] = Given("file", f"{path}: {key}", tuple(_toml_word(item, f"{path}: {key}") for item in values))
    return given


def _load_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"--config_path {path}: {error.strerror}; expected a TOML file") from error
    except ValueError as error:
        raise InputError(f"{path}: {error}; expected TOML, one `name = value` a line") from error


def _toml_word(value: Any, place: str) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str | int | float):
        return str(value)
    raise InputError(
        f"{place}: {value!r} is a {type(value).__name__}; expected text, a number, true or false, or a list"
    )


def convert(given: Given, setting: Setting) -> Any:
    """The value of a setting from its words. Raises InputError naming the place, the word and what is expected."""
    if given.words == ("none",) and setting.takes_none:
        return None
    if given.words == ("auto",) and setting.auto:
        return setting.auto()
    if not setting.is_list and len(given.words) != 1:
        raise InputError(f"{given.place}: {len(given.words)} values; expected {setting.expected}")
    values = [_convert_word(word, given.place, setting) for word in given.words]
    return values if setting.is_list else values[0]


def _convert_word(word: str, place: str, setting: Setting) -> Any:
    try:
        value = get_parsing_fn(setting.item_type)(word)
    except (ValueError, argparse.ArgumentTypeError) as error:
        raise InputError(f"{place}: {word!r} is not {setting.expected}") from error
    if setting.choices and word not in setting.choices:
        raise InputError(
            f"{place}: {word!r} is not {setting.expected} (the nearest is {nearest(word, setting.choices)})"
        )
    # An empty path would mean the current folder, which nobody who wrote "$UNSET" wanted.
    if setting.item_type is Path and not word:
        raise InputError(f"{place}: the path is empty; expected a path")
    return value
