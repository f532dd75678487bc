"""Prompts as token ids, with the place of the user's own text among them."""

from collections.abc import Iterable, Sequence
from datetime import date
from typing import Any

from src.common.errors import InputError
from src.directions.examples import Example
from src.directions.settings import DirectionSettings
from src.models.single_prompts import SinglePromptRenderer
from src.models.token_sequences import TokenSequence

FILLERS = ("x", "0")
"""Texts that begin and end unlike each other: what a prompt shares with the renders of both is not its text."""


class PromptRenderer:
    """Renders single prompts as the settings say. Raises InputError as `SinglePromptRenderer` does."""

    def __init__(self, config: DirectionSettings, tokenizer: Any, today: date) -> None:
        self.config = config
        self.n_cut = 0
        """Prompts that were longer than --max_prompt_tokens."""
        self._texts = SinglePromptRenderer(
            tokenizer, today, raw=config.raw_prompts, system_prompt=config.system_prompt,
            chat_template=config.chat_template, thinking=config.thinking_mode,
        )  # fmt: skip
        self._fillers = [self._texts.rendered(filler).token_ids for filler in FILLERS]

    @property
    def adds_bos(self) -> bool:
        """Whether raw prompts begin with a BOS, which tokenizers of base models often leave out."""
        return self._texts.adds_bos

    def sequences(self, examples: Iterable[Example]) -> list[TokenSequence]:
        """One sequence an example. Raises InputError for a prompt that cannot be cut to --max_prompt_tokens."""
        return [self._sequence(example) for example in examples]

    def _sequence(self, example: Example) -> TokenSequence:
        ids = self._texts.rendered(example.text).token_ids
        span = text_span(ids, self._fillers, example.id)
        excess = len(ids) - self.config.max_prompt_tokens
        if excess > 0:
            ids, span = _cut(ids, span, excess, example.id)
            self.n_cut += 1
        return TokenSequence(
            id=example.id, token_ids=ids, prompt_length=len(ids), text_span=without_first(span, example.id)
        )


def text_span(ids: Sequence[int], fillers: Sequence[Sequence[int]], name: str) -> tuple[int, int]:
    """
    [start, end) of the tokens that are not the same in renders of other texts: the user's, and a token that holds
    some of the user's text and some of the template's. Raises InputError, with `name`, when there are none.
    """
    start = min(_n_shared(ids, filler) for filler in fillers)
    end = len(ids) - min(_n_shared(ids[::-1], filler[::-1]) for filler in fillers)
    if end <= start:
        raise InputError(f"{name!r}: no token of its prompt is its own text's; leave it out")
    return start, end


def without_first(span: tuple[int, int], name: str) -> tuple[int, int]:
    """
    The span without the prompt's very first token, which is no text's own: in many models it has a hundred times the
    norm of the others, whatever it is (massive activations, Sun et al. 2024). InputError when nothing is left.
    """
    start, end = max(span[0], 1), span[1]
    if start >= end:
        raise InputError(f"{name!r}: its only token is the first of all, which says nothing of it; leave it out")
    return start, end


def _cut(
    ids: tuple[int, ...], span: tuple[int, int], excess: int, name: str
) -> tuple[tuple[int, ...], tuple[int, int]]:
    start, end = span
    if excess >= end - start:
        raise InputError(
            f"{name!r}: the chat format alone takes {len(ids) - (end - start)} tokens, and --max_prompt_tokens leaves "
            f"no room for its text; expected at least {len(ids) - (end - start) + 1}"
        )
    return (*ids[:start], *ids[start + excess :]), (start, end - excess)


def _n_shared(one: Sequence[int], other: Sequence[int]) -> int:
    """How many leading tokens agree."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
