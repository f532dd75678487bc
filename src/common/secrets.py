"""Keys: read from the environment or .env, and kept out of every log, file and message."""

import os
import re
from pathlib import Path

WITHHELD = "<withheld>"
SHORTEST = 8
"""A shorter value is no key (servers without keys are given words like `none`) and would mangle ordinary text."""

URL_PASSWORD = re.compile(r"(?<=://)([^/\s:@]*):[^\s@]+(?=@)")
_known: set[str] = set()


def variable(name: str) -> str | None:
    """The environment's value of a variable, else that in .env of the current folder; an empty one counts as unset."""
    if os.environ.get(name):
        return os.environ[name]
    path = Path(".env")
    if not path.is_file():
        return None
    from dotenv import dotenv_values

    return dotenv_values(path).get(name) or None


def secret(name: str) -> str | None:
    """`variable`, the value of which is withheld from then on."""
    value = variable(name)
    if value is not None:
        value = value.strip()
        keep_secret(value)
    return value or None


def keep_secret(value: str) -> None:
    """From here on `withhold` takes this value out of texts."""
    if len(value) >= SHORTEST:
        _known.add(value)


def withhold(text: str) -> str:
    """The text with every known key replaced."""
    for value in sorted(_known, key=len, reverse=True):
        text = text.replace(value, WITHHELD)
    return text


def without_passwords(text: str) -> str:
    """The text with the password of every URL in it withheld, as of sqlalchemy's ://user:password@host."""
    return URL_PASSWORD.sub(rf"\1:{WITHHELD}", text)
