"""What is contrasted: the prompts of both classes, and which of them are held out."""

import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from src.common.errors import InputError
from src.common.json_rows import json_rows
from src.common.row_files import Row, csv_rows, jsonl_rows, parquet_rows, require_file
from src.common.rows import Prompt, read_prompts
from src.directions.settings import DirectionSettings

PAIR_KEYS = ("positive", "negative")
LEAST = 2
"""Examples of each class, in either part of the split: what a variance within the classes needs."""


@dataclass(frozen=True, kw_only=True)
class Example:
    """One prompt, or one response of a persona run with what led to it."""

    id: str
    """Unique among all: the side, a colon, and the id in its file."""
    side: str
    """target, control, preserve or against."""
    text: str
    """The user's text."""
    keys: tuple[str, ...]
    """Examples that share one of these stay on one side of the split."""
    row: Mapping[str, Any] | None = None
    """The persona run's row."""


@dataclass(frozen=True, kw_only=True)
class Contrast:
    """Both classes."""

    target: list[Example]
    control: list[Example]
    paired: bool
    """Whether target i and control i belong together."""

    @property
    def examples(self) -> list[Example]:
        return [*self.target, *self.control]


def read_contrast(config: DirectionSettings) -> Contrast:
    """
    The contrast of the config's prompt files. Raises InputError for what the readers refuse, pairs of unequal number or
    in another order, and a text that is on both sides.
    """
    if config.pairs_path is not None:
        place, pairs = str(config.pairs_path), read_pairs(config)
        sides = [[pair[i] for pair in pairs] for i in range(2)]
        places = (place, place)
    else:
        places = (str(config.positive_path), str(config.negative_path))
        sides = [read_prompts(path, config.num_tasks) for path in places]
    paired = config.paired or config.pairs_path is not None
    if paired:
        _check_pairs(sides, places)
    target, control = (
        [_example(side, i, prompt, paired) for i, prompt in enumerate(prompts)]
        for side, prompts in zip(("target", "control"), sides, strict=True)
    )
    refuse_same_text(target, control, places)
    return Contrast(target=target, control=control, paired=paired)


def read_preserved(config: DirectionSettings) -> tuple[list[Example], list[Example]]:
    """Prompts of --preserve_path and --preserve_against_path, two empty lists without. Raises as `read_contrast`."""
    if config.preserve_path is None:
        return [], []
    places = (str(config.preserve_path), str(config.preserve_against_path))
    sides = [
        [_example(side, i, prompt, paired=False) for i, prompt in enumerate(read_prompts(path))]
        for side, path in zip(("preserve", "against"), places, strict=True)
    ]
    refuse_same_text(*sides, places)
    return sides[0], sides[1]


def read_pairs(config: DirectionSettings) -> list[tuple[Prompt, Prompt]]:
    """The rows of --pairs_path. Raises InputError: not a format for pairs, a missing side, blank, an id twice."""
    path = config.pairs_path
    require_file(path)
    check = lambda place, columns: _require_sides(place, columns)  # noqa: E731
    readers = {
        ".json": json_rows, ".jsonl": jsonl_rows, ".ndjson": jsonl_rows,
        ".csv": lambda p: csv_rows(p, check), ".parquet": lambda p: parquet_rows(p, check),
    }  # fmt: skip
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise InputError(f"--pairs_path {path}: not a format for pairs; expected {', '.join(readers)}")
    pairs = _pairs(reader(path))
    if not pairs:
        raise InputError(f"{path}:1: no pairs in it; expected at least one")
    return pairs[: config.num_tasks]


def _pairs(rows: Iterable[Row]) -> list[tuple[Prompt, Prompt]]:
    pairs, seen = [], set()
    for index, (place, value) in enumerate(rows):
        if not isinstance(value, dict):
            raise InputError(f"{place}: {value!r:.40}; expected an object with {' and '.join(PAIR_KEYS)}")
        _require_sides(place, list(value))
        for key in PAIR_KEYS:
            if not isinstance(value[key], str) or not value[key].strip():
                raise InputError(f"{place}: {key} is {value[key]!r:.40}; expected text")
        name = str(index) if value.get("id") is None else str(value["id"])
        if name in seen:
            raise InputError(f"{place}: the id {name!r} is there twice; expected each once")
        seen.add(name)
        pairs.append((Prompt(name, value["positive"]), Prompt(name, value["negative"])))
    return pairs


def _require_sides(place: str, columns: list[str]) -> None:
    missing = [key for key in PAIR_KEYS if key not in columns]
    if missing:
        raise InputError(f'{place}: no "{missing[0]}" in {columns}; expected {" and ".join(PAIR_KEYS)}')


def _check_pairs(sides: Sequence[Sequence[Prompt]], places: tuple[str, str]) -> None:
    if len(sides[0]) != len(sides[1]):
        raise InputError(
            f"{places[0]} has {len(sides[0])} prompts and {places[1]} {len(sides[1])}; --paired expects as many of both"
        )
    ids = [[prompt.id for prompt in prompts] for prompts in sides]
    if ids[0] != ids[1] and set(ids[0]) == set(ids[1]):
        i = next(i for i, (one, other) in enumerate(zip(*ids, strict=True)) if one != other)
        raise InputError(
            f"{places[1]}: prompt {i + 1} has the id {ids[1][i]!r}, that of {places[0]} {ids[0][i]!r}; pairs are made "
            f"line by line: put both files in one order"
        )


def _example(side: str, index: int, prompt: Prompt, paired: bool) -> Example:
    own = f"pair:{index}" if paired else f"id:{prompt.id}"
    # The same text twice in a class must not be fitted on and held out at once.
    return Example(id=f"{side}:{prompt.id}", side=side, text=prompt.text, keys=(own, f"text:{prompt.text}"))


def refuse_same_text(one: Sequence[Example], other: Sequence[Example], places: tuple[str, str]) -> None:
    """Raises InputError when a text is on both sides, where it could only be noise."""
    texts = {example.text: example for example in one}
    for example in other:
        if example.text in texts:
            first = texts[example.text].id.split(":", 1)[1]
            raise InputError(
                f"{places[1]}: prompt {example.id.split(':', 1)[1]!r} is the same text as {first!r} of {places[0]}: "
                f"{example.text[:60]!r}; leave it out of one of them"
            )


def held_out_ids(contrast: Contrast, val_fraction: float, seed: int) -> frozenset[str]:
    """
    The ids of the examples held out: the first `val_fraction` of the groups in the order of a hash of seed and group,
    taken apart for groups with targets only, controls only and both. Raises InputError when either part would have
    fewer than two examples of a class.
    """
    groups = _groups(contrast.examples)
    strata: dict[tuple[str, ...], list[list[Example]]] = {}
    for members in groups:
        strata.setdefault(tuple(sorted({example.side for example in members})), []).append(members)
    held: set[str] = set()
    for stratum in strata.values():
        ordered = sorted(stratum, key=lambda members: _rank(seed, members))
        for members in ordered[: math.floor(val_fraction * len(ordered) + 0.5)]:
            held |= {example.id for example in members}
    for side, examples in (("target", contrast.target), ("control", contrast.control)):
        n_held = sum(example.id in held for example in examples)
        for what, n in (("held-out", n_held), ("fitted", len(examples) - n_held)):
            if n < LEAST:
                raise InputError(
                    f"--val_fraction {val_fraction} of {len(examples)} {side} examples in {len(groups)} groups of the "
                    f"same prompt or pair leaves {n} {what} ones; expected at least {LEAST}: give more prompts, or "
                    f"another fraction"
                )
    return frozenset(held)


def _rank(seed: int, members: Sequence[Example]) -> str:
    name = json.dumps(sorted(example.id for example in members))
    return hashlib.sha256(f"{seed}:{name}".encode()).hexdigest()


def _groups(examples: Sequence[Example]) -> list[list[Example]]:
    """Examples linked by a shared key, directly or through others, together."""
    parents: dict[str, str] = {}

    def root(key: str) -> str:
        parents.setdefault(key, key)
        while parents[key] != key:
            parents[key] = parents[parents[key]]
            key = parents[key]
        return key

    for example in examples:
        for key in example.keys:
            parents[root(key)] = root(example.keys[0])
    groups: dict[str, list[Example]] = {}
    for example in examples:
        groups.setdefault(root(example.keys[0]), []).append(example)
    return list(groups.values())


def sha256_of(values: Iterable[Any]) -> str:
    """The SHA-256 of JSON values, in hexadecimal."""
    return hashlib.sha256(json.dumps(list(values), ensure_ascii=True).encode()).hexdigest()
