"""The tokens with which all sequences begin, system prompt and chat header as a rule, run through the model once."""

import inspect
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from src.models.generation import needs_equal_lengths

LEAST_TOKENS = 4
"""Of a prefix; running fewer by themselves saves nothing."""


def common_prefix(sequences: Sequence[Sequence[int]]) -> tuple[int, ...]:
    """The tokens with which all begin, at least one of each left over."""
    shortest = min(map(len, sequences)) - 1
    first = tuple(sequences[0])
    same = (i for i in range(shortest) if any(s[i] != first[i] for s in sequences))
    return first[: next(same, shortest)]


def can_share_prefix(model: nn.Module) -> bool:
    """
    Whether padding may stand between a prefix and what follows it: every layer attends to all tokens before, wherever
    they stand, and has their positions told. A window of so many places would count the padding.
    """
    layers = DynamicCache(config=model.config).layers
    return bool(layers) and all(type(each) is DynamicLayer for each in layers) and not needs_equal_lengths(model)


class SharedPrefix:
    """Keys and values of one prefix, of several rows where hooks make something else of each."""

    def __init__(self, model: nn.Module, token_ids: Sequence[int], n_rows: int = 1) -> None:
        """model: one of which `can_share_prefix` is true. What hooks do to the rows is in what is kept."""
        self.n_tokens = len(token_ids)
        self._config = model.config
        self._cache = DynamicCache(config=model.config)
        ids = torch.tensor([tuple(token_ids)] * n_rows, device=model.get_input_embeddings().weight.device)
        # No logits are read here.
        fewest = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
        model(input_ids=ids, past_key_values=self._cache, use_cache=True, **fewest)

    def cache(self, rows: Tensor) -> DynamicCache:
        """A new cache in which each row begins as the one of `rows`, int64 (rows of the batch,), does."""
        found = DynamicCache(config=self._config)
        for layer, own in zip(found.layers, self._cache.layers, strict=True):
            layer.update(own.keys[rows], own.values[rows])
        return found
