"""
Texts laid end to end in one row, so that nothing is padded: attention, which alone mixes tokens, is taken text by text,
everything else of all tokens at once. For CPUs, where a call for each text costs little.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache
from itertools import groupby
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

NAME = "tiller_unpadded"
HARMLESS = {
    "position_ids", "token_type_ids", "cache_position", "is_causal", "use_cache", "output_attentions",
    "output_hidden_states",
}  # fmt: skip
"""What attention may be told beside its tokens without that changing what it is."""
_runs: ContextVar[tuple["Run", ...]] = ContextVar("runs")
"""Of the row that is computed."""


class NotByText(ValueError):
    """Attention of a kind that is not known to be the same text by text."""


class Run(NamedTuple):
    """Texts of one length, one behind the other, which attention takes in one call."""

    start: int
    n_texts: int
    length: int


@dataclass(frozen=True)
class Row:
    """Texts end to end."""

    input_ids: np.ndarray
    """int64 (1, tokens)."""
    position_ids: np.ndarray
    """int64 (1, tokens), of each text from the first position on."""
    runs: tuple[Run, ...]
    """All tokens; each that fills the row up counts as a text."""

    @staticmethod
    def of(texts: Sequence[np.ndarray], n_tokens: int, pad_id: int, first_position: int) -> "Row":
        """texts: (length,) token ids each, of together at most n_tokens, to which the row is filled up."""
        rest = n_tokens - sum(map(len, texts))
        positions = [_positions(text, first_position) for text in texts] + [np.full(rest, first_position)]
        runs, start = [], 0
        # The filling may be longer than a model has positions, and as one text it would cost the square of its length.
        for length, same in groupby([*map(len, texts), *[1] * rest]):
            runs.append(Run(start, n := len(list(same)), length))
            start += n * length
        return Row(_one_row([*texts, np.full(rest, pad_id)]), _one_row(positions), tuple(runs))


def _positions(text: np.ndarray, first: int) -> np.ndarray:
    """From `first` on; a model that begins behind the number of its padding does not count that token in a text."""
    if not first:
        return np.arange(len(text))
    counts = text != first - 1
    return np.cumsum(counts) * counts + first - 1


def _one_row(parts: Sequence[np.ndarray]) -> np.ndarray:
    return np.concatenate(parts).astype(np.int64)[None]


@contextmanager
def by_text(model: nn.Module, row: Row) -> Iterator[None]:
    """Within the context the transformers model attends within each text of the row alone."""
    _register()
    token, before = _runs.set(row.runs), model.config._attn_implementation
    model.config._attn_implementation = NAME
    try:
        yield
    finally:
        model.config._attn_implementation = before
        _runs.reset(token)


def _attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
    scaling: float | None = None, dropout: float = 0.0, **others: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """
    query, key, value: (1, heads, tokens, head_dim), the last two of fewer heads or as many. Returns (1, tokens, heads,
    head_dim). Raises NotByText for anything beside plain attention to all tokens of a text, or to those before.
    """
    odd = sorted(name for name, value in others.items() if value is not None and name not in HARMLESS)
    if odd or attention_mask is not None or dropout or len(query) > 1 or query.shape[2] != key.shape[2]:
        raise NotByText(f"attention with {', '.join(odd) or 'more than the tokens of one row'}")
    is_causal = others.get("is_causal")
    is_causal = getattr(module, "is_causal", False) if is_causal is None else is_causal
    found = query.new_empty(1, query.shape[2], query.shape[1], value.shape[3])
    for run in _runs.get():
        of_run = slice(run.start, run.start + run.n_texts * run.length)
        by_text = (
            each[0, :, of_run].unflatten(1, (run.n_texts, run.length)).transpose(0, 1) for each in (query, key, value)
        )
        part = scaled_dot_product_attention(
            *by_text, scale=scaling, is_causal=is_causal, enable_gqa=query.shape[1] != key.shape[1]
        )
        found[0, of_run] = part.transpose(1, 2).flatten(0, 1)
    return found, None


def _no_mask(*args: Any, local_size: int | None = None, use_vmap: bool = False, **others: Any) -> None:
    """
    A text is known by where it ends. Raises NotByText for windows and chunks, of which some models tell the mask alone,
    and for masks with a function of the model's own (use_vmap).
    """
    if local_size is not None or use_vmap:
        raise NotByText("a mask of more than what is before or padding")


@cache
def _register() -> None:
    # Not at import: transformers takes seconds, and commands have a --help.
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ALL_ATTENTION_FUNCTIONS.register(NAME, _attend)
    ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, _no_mask)


def first_positions(model: nn.Module) -> list[int]:
    """What a model may count the tokens of a text from: 0, or behind the number of its padding, as RoBERTa does."""
    tables = (module for name, module in model.named_modules() if name.endswith("position_embeddings"))
    after = {table.padding_idx + 1 for table in tables if getattr(table, "padding_idx", None) is not None}
    return [0, *sorted(after)]


def padded(states: Tensor, mask: np.ndarray) -> Tensor:
    """
    states: (tokens, d) of texts end to end. mask: (texts, width), 1 where a text's tokens are to stand. Returns (texts,
    width, d), zero elsewhere.
    """
    found = states.new_zeros(*mask.shape, states.shape[-1])
    found[torch.from_numpy(mask).bool()] = states
    return found
