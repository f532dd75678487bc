"""Which examples are too long, and what is done about it: refused, or cut from the left of the prompt, and said."""

from collections.abc import Sequence
from dataclasses import replace

from src.common.errors import InputError
from src.training.rendering import Example

LISTED = 5
"""How many of the rows that are too long are named."""


def fitted(examples: Sequence[Example], max_tokens: int | None, truncate: bool) -> tuple[list[Example], list[str]]:
    """
    The examples, those of more than `max_tokens` tokens cut from the left, and one line for each that was cut.

    The last answer stays whole, and a token of the prompt before it; earlier answers that a cut reaches are not learned
    any more, which the line says. Raises InputError that lists the rows which are too long without `truncate`, and
    those whose answer alone is.
    """
    longest = max_tokens or max(map(n_tokens, examples))
    long = [each for each in examples if n_tokens(each) > longest]
    if long and not truncate:
        raise InputError(
            f"{_listed(long)} longer than --max_seq_len {longest}; raise it, or cut prompts from the left with "
            f"--truncate"
        )
    hopeless = [each for each in long if n_tokens(each) - each.answers[-1][0] >= longest]
    if hopeless:
        raise InputError(
            f"{_listed(hopeless)} of an answer that leaves no room for a prompt in --max_seq_len {longest}; raise it, "
            f"or leave the rows out"
        )
    return [_cut(each, longest) for each in examples], [_said(each, longest) for each in long]


def n_tokens(example: Example) -> int:
    """Tokens of the example, with the longer answer of a preference."""
    start, end = example.answers[-1]
    return len(example.token_ids) + max(0, len(example.rejected_ids) - (end - start))


def _cut(example: Example, longest: int) -> Example:
    n_cut = n_tokens(example) - longest
    if n_cut <= 0:
        return example
    answers = tuple((start - n_cut, end - n_cut) for start, end in example.answers if start - n_cut >= 1)
    return replace(example, token_ids=example.token_ids[n_cut:], answers=answers)


def _said(example: Example, longest: int) -> str:
    lost = len(example.answers) - len(_cut(example, longest).answers)
    also = f", and {lost} earlier answers are not learned" if lost else ""
    return f"{example.place}: {n_tokens(example) - longest} of {n_tokens(example)} tokens cut from the left{also}"


def _listed(examples: Sequence[Example]) -> str:
    named = ", ".join(f"{each.place} ({n_tokens(each)} tokens)" for each in examples[:LISTED])
    return f"{named}{' …' if len(examples) > LISTED else ''}: {len(examples)} row(s)"
