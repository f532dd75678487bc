"""Both kinds of prompts, and their three parts: for directions, for the search, for the report."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from src.abliteration.answering import Asked
from src.abliteration.settings import AbliterateSettings
from src.common.errors import InputError
from src.common.rows import Prompt, read_prompts

PARTS = ("directions", "search", "report")
SHARE = 0.3
"""Of the prompts, for the search and for the report each."""
LEAST = 4
"""Prompts that every part must have."""


@dataclass(frozen=True)
class Split:
    """One kind's prompts; no text is in two parts."""

    directions: list[Prompt]
    search: list[Prompt]
    report: list[Prompt]

    def ids(self) -> dict[str, list[str]]:
        """Part → ids, in their order."""
        return {part: [prompt.id for prompt in getattr(self, part)] for part in PARTS}


def read_split(config: AbliterateSettings) -> dict[str, Split]:
    """
    `target` and `control` → their parts. The order of a hash of seed and text decides, so that a prompt that is added
    moves few others. Raises InputError for what the readers refuse, a text that is in both files, and too few prompts.
    """
    sources = {"target": config.target_prompts, "control": config.control_prompts}
    prompts = {side: read_prompts(source, config.num_tasks) for side, source in sources.items()}
    texts = {prompt.text.strip().casefold(): prompt for prompt in prompts["target"]}
    shared = [prompt for prompt in prompts["control"] if prompt.text.strip().casefold() in texts]
    if shared:
        first = texts[shared[0].text.strip().casefold()]
        raise InputError(
            f"{config.control_prompts}: prompt {shared[0].id!r} is the same text as {first.id!r} of "
            f"{config.target_prompts}, as are {len(shared) - 1} more; leave it out of one of them"
        )
    return {side: _split(some, sources[side], config) for side, some in prompts.items()}


def _split(prompts: Sequence[Prompt], source: str, config: AbliterateSettings) -> Split:
    unique = list({prompt.text.strip().casefold(): prompt for prompt in prompts}.values())
    ordered = sorted(unique, key=lambda prompt: hashlib.sha256(f"{config.seed}:{prompt.text}".encode()).digest())
    share = int(SHARE * len(ordered))
    n_search, n_report = min(config.n_search, share), min(config.n_report, share)
    if min(n_search, n_report, len(ordered) - n_search - n_report) < LEAST:
        raise InputError(
            f"{source}: {len(ordered)} different prompts, of which {n_search} would be for the search, {n_report} for "
            f"the report; expected at least {LEAST} in each part"
        )
    report, search = ordered[:n_report], ordered[n_report : n_report + n_search]
    return Split(directions=ordered[n_report + n_search :], search=search, report=report)


def asked(prompts: Sequence[Prompt], renderer: Any) -> list[Asked]:
    """The prompts as the model gets them; renderer: a `SinglePromptRenderer`."""
    return [Asked(prompt.id, prompt.text, renderer.rendered(prompt.text).token_ids) for prompt in prompts]
