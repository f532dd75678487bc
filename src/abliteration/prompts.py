"""Both kinds of prompts, and their three parts: for directions, for the search, for the report."""

import hashlib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from src.abliteration.answering import Asked
from src.abliteration.settings import AbliterateSettings
from src.common.directions_file import prompt_sha256, read_directions
from src.common.errors import InputError
from src.common.rows import Prompt, read_prompts

LOGGER = logging.getLogger(__name__)
PARTS = ("directions", "search", "report")
SHARE = 0.3
"""Of the prompts, for the search and for the report each where directions are extracted; else it is half of them."""
LEAST = 4
"""Prompts that every part must have."""


@dataclass(frozen=True)
class Split:
    """One kind's prompts; no text is in two parts."""

    directions: list[Prompt]
    """None where --directions_path brings them."""
    search: list[Prompt]
    report: list[Prompt]
    n_left_out: int | None = 0
    """Prompts that the directions of --directions_path were made of; None where the file does not say."""

    def ids(self) -> dict[str, list[str]]:
        """Part → ids, in their order."""
        return {part: [prompt.id for prompt in getattr(self, part)] for part in PARTS}


def read_split(config: AbliterateSettings) -> dict[str, Split]:
    """
    `target` and `control` → their parts. The order of a hash of seed and text decides, so that a prompt that is added
    moves few others. With --directions_path the prompts that its directions were made of are in no part. Raises
    InputError for what the readers refuse, a text that is in both files or also preserved, and too few prompts.
    """
    sources = {"target": config.target_prompts, "control": config.control_prompts}
    prompts = {side: read_prompts(source, config.num_tasks) for side, source in sources.items()}
    _refuse_shared(prompts["control"], config.control_prompts, prompts["target"], config.target_prompts)
    if config.preserve_prompts:
        preserved = read_prompts(config.preserve_prompts)
        for side, source in sources.items():
            _refuse_shared(preserved, config.preserve_prompts, prompts[side], source)
    return {side: _split(some, sources[side], config) for side, some in prompts.items()}


def tell_left_out(split: Mapping[str, Split], path: Path) -> dict[str, int] | None:
    """
    Logs how many prompts of each kind are in no part since the directions of `path` were made of them; kind → that
    number, None where the file does not say which it was made of.
    """
    found = {side: some.n_left_out for side, some in split.items()}
    if None in found.values():
        LOGGER.warning(
            "--directions_path %s does not say of which prompts it was made: the search's and the report's may be "
            "among them", path,
        )  # fmt: skip
        return None
    LOGGER.info(
        "Left out, since --directions_path %s was made of them: %d target and %d control prompts", path,
        found["target"], found["control"],
    )  # fmt: skip
    return found


def _refuse_shared(prompts: Sequence[Prompt], source: str, others: Sequence[Prompt], other_source: str) -> None:
    texts = {_normal(prompt): prompt for prompt in others}
    shared = [prompt for prompt in prompts if _normal(prompt) in texts]
    if shared:
        raise InputError(
            f"{source}: prompt {shared[0].id!r} is the same text as {texts[_normal(shared[0])].id!r} of "
            f"{other_source}, as are {len(shared) - 1} more; leave it out of one of them"
        )


def _split(prompts: Sequence[Prompt], source: str, config: AbliterateSettings) -> Split:
    unique = list({_normal(prompt): prompt for prompt in prompts}.values())
    ordered = sorted(unique, key=lambda prompt: hashlib.sha256(f"{config.seed}:{prompt.text}".encode()).digest())
    if config.directions_path is not None:
        return _split_rest(ordered, source, config, config.directions_path)
    share = int(SHARE * len(ordered))
    n_search, n_report = min(config.n_search, share), min(config.n_report, share)
    if min(n_search, n_report, len(ordered) - n_search - n_report) < LEAST:
        raise InputError(
            f"{source}: {len(ordered)} different prompts, of which {n_search} would be for the search, {n_report} for "
            f"the report; expected at least {LEAST} in each part"
        )
    report, search = ordered[:n_report], ordered[n_report : n_report + n_search]
    return Split(directions=ordered[n_report + n_search :], search=search, report=report)


def _split_rest(ordered: Sequence[Prompt], source: str, config: AbliterateSettings, path: Path) -> Split:
    said = read_directions(path).metadata.prompts_sha256
    known = frozenset(said or ())
    rest = [prompt for prompt in ordered if prompt_sha256(prompt.text) not in known]
    n_search, n_report = (min(wanted, len(rest) // 2) for wanted in (config.n_search, config.n_report))
    n_left_out = len(ordered) - len(rest)
    if min(n_search, n_report) < LEAST:
        raise InputError(
            f"{source}: {len(ordered)} different prompts, of which {n_left_out} are left out since --directions_path "
            f"{path} was made of them, {n_search} would be for the search, {n_report} for the report; expected at "
            f"least {LEAST} in each part: give more prompts, or have the directions extracted here"
        )
    return Split(
        directions=[], search=rest[n_report : n_report + n_search], report=rest[:n_report],
        n_left_out=None if said is None else n_left_out,
    )  # fmt: skip


def _normal(prompt: Prompt) -> str:
    return prompt.text.strip().casefold()


def asked(prompts: Sequence[Prompt], renderer: Any) -> list[Asked]:
    """The prompts as the model gets them; renderer: a `SinglePromptRenderer`."""
    return [Asked(prompt.id, prompt.text, renderer.rendered(prompt.text).token_ids) for prompt in prompts]
