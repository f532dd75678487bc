"""README.md of an edited model: what it was made from, how, what was measured, and how to make it again."""

import json
import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from src.abliteration.report import Measures, before_after_rows, counts, interval
from src.models.hub import HUB_ID

SPECIAL = re.compile(r"([\\`*_{}\[\]<>#|~$&:@]|(?<=www)\.)", re.IGNORECASE)
"""Signs that mean something inside a line; escaped text never begins one."""


class Card(NamedTuple):
    """What the card says."""

    base_model: str
    """Hub id, bundled name or folder, as the user gave it; of a folder only the name is written."""
    base_fingerprint: str | None
    command: Sequence[str]
    """The words of the command that made it."""
    chosen: Mapping[str, Any]
    """The trial: {"id", "params", …}."""
    rule: str
    """By which it was chosen, in words."""
    n_trials: int
    measures: Measures
    """Of the report split, as `report` takes them."""
    measured_on: str
    """Which prompts those are, in words."""
    done: Sequence[str]
    """What was done, a sentence each: the directions, the components, the number of tensors that changed."""
    about: Mapping[str, Any]
    """Versions, seed, commit, and what else one needs to make it again."""


def card(given: Card) -> str:
    """The card in markdown, with the hub's metadata on top; nothing in the facts can become markup or metadata."""
    name = base_name(given.base_model)
    sections = [
        _metadata(given.base_model),
        f"# {escaped(name)}, edited",
        f"The weights of {escaped(name)} (fingerprint {code(given.base_fingerprint or 'unknown')}) were edited so that "
        f"one behaviour goes and nothing else changes. {' '.join(map(escaped, given.done))}",
        "## Before and after",
        f"Measured on {escaped(given.measured_on)}; in brackets the 95 % interval.",
        _measures(given.measures),
        "## The edit",
        f"Trial {escaped(given.chosen['id'])} of {given.n_trials}, chosen by this rule: {escaped(given.rule)}.",
        _table(("parameter", "value"), ((key, _text(value)) for key, value in given.chosen["params"].items())),
        "## How to make it again",
        _fenced(shlex.join(given.command)),
        _table(("", ""), ((key, _text(value)) for key, value in given.about.items())),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def base_name(base_model: str) -> str:
    """A hub id, or of a folder the name."""
    # A folder's place says much of a machine and its user, and nothing of the model.
    return Path(base_model).name if Path(base_model).exists() or not HUB_ID.match(base_model) else base_model


def _metadata(base_model: str) -> str:
    is_on_hub = bool(HUB_ID.match(base_model)) and not Path(base_model).exists()
    # JSON strings are YAML strings.
    base = [f"base_model: {json.dumps(base_model)}", "base_model_relation: finetune"] if is_on_hub else []
    return "\n".join(["---", "library_name: transformers", *base, "tags:", "- abliteration", "---"])


def _measures(measures: Measures) -> str:
    rows = []
    for row in before_after_rows(measures):
        sides = [interval(row[side], row[f"{side} low"], row[f"{side} high"]) for side in ("before", "after")]
        rows.append((row["measure"], *sides, counts(row)))
    return _table(("measure", "before", "after", "n"), rows)


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(map(escaped, row))} |" for row in rows]
    return "\n".join([f"| {' | '.join(heads)} |", f"|{'---|' * len(heads)}", *lines]) if lines else ""


def escaped(text: object) -> str:
    """Any value as one line of markdown text, its signs kept from meaning anything."""
    line = " ".join(str(text).encode("utf-8", "backslashreplace").decode().split())
    return SPECIAL.sub(r"\\\1", line)


def code(text: object) -> str:
    """Any value as inline code on one line."""
    line = " ".join(str(text).encode("utf-8", "backslashreplace").decode().split())
    ticks = "`" * (_longest_run(line) + 1)
    pad = " " if line.startswith("`") or line.endswith("`") else ""
    return f"{ticks}{pad}{line}{pad}{ticks}"


def _fenced(text: str) -> str:
    fence = "`" * max(3, _longest_run(text) + 1)
    return f"{fence}sh\n{text.encode('utf-8', 'backslashreplace').decode()}\n{fence}"


def _longest_run(text: str) -> int:
    return max((len(run) for run in re.findall("`+", text)), default=0)


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
