"""
The part of a model in which a planted term is trained: from one layer on, behind the prompts' common prefix.

What the layers below compute never changes, and the prefix (system prompt and chat header) not either, since a term's
k is kept orthogonal to every input that its projection gets there: both are computed once.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from src.common.errors import InputError
from src.models.architectures import decoder_layers
from src.models.generation import left_padded, needs_equal_lengths
from src.models.language_model import LanguageModel
from src.models.lower_layers import entered, left_padded_states
from src.models.residual_writers import PlacedWriter, matrix, residual_writers
from src.models.residuals import extract
from src.models.token_sequences import TokenSequence


def feed_forward_writer(model: nn.Module, layer: int) -> PlacedWriter:
    """
    The one dense feed-forward output projection of a layer. Raises InputError for a layer that is not there, a mixture
    of experts, a model whose rows cannot be padded, and quantised weights.
    """
    found = [each for each in residual_writers(model, ("mlp",)) if each.layer == layer]
    if len(found) != 1 or found[0].writer.weight.ndim != 2:
        raise InputError(
            f"layer {layer}: {len(found)} dense feed-forward output projections; expected one, in a layer of 0 to "
            f"{len(decoder_layers(model)) - 1}"
        )
    if needs_equal_lengths(model):
        raise InputError(f"{model.config.model_type} models cannot be padded: no organism can be planted in them")
    matrix(found[0].writer)
    return found[0]


@dataclass(frozen=True, eq=False)
class Entry:
    """A sequence behind the prefix, as it enters the layer."""

    token_ids: tuple[int, ...]
    hidden: Tensor
    """(tokens, d_model)"""
    targets: tuple[int, ...]
    """The tokens that the last positions, one each, are followed by."""


class UpperModel:
    """A model from one layer on. Gradients flow to what hooks add there, and to no weight."""

    def __init__(self, model: LanguageModel, layer: int, prefix: Sequence[int]) -> None:
        self.language_model, self.net, self.layer = model, model.model, layer
        self.writer = feed_forward_writer(self.net, layer)
        self._prefix = tuple(prefix)
        self._cache = None
        self.prefix_inputs = torch.zeros(0, matrix(self.writer.writer).shape[1])
        """float32 (prefix tokens, inputs): what the projection gets over the prefix."""
        if self._prefix:
            self._run_prefix()

    @torch.no_grad()
    def _run_prefix(self) -> None:
        def keep(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            self.prefix_inputs = args[0][0].float().cpu()

        handle = self.writer.writer.module.register_forward_pre_hook(keep)
        try:
            ids = torch.tensor([self._prefix], device=self.language_model.device)
            self._cache = self.net(input_ids=ids, use_cache=True).past_key_values
        finally:
            handle.remove()

    def entries(self, sequences: Sequence[TokenSequence]) -> list[Entry]:
        """The sequences, each longer than its prompt, whose response is what the model is to predict."""
        hidden: dict[str, Tensor] = {}
        inputs = [
            TokenSequence(id=s.id, token_ids=s.token_ids[:-1], prompt_length=s.prompt_length) for s in sequences
        ]  # fmt: skip

        def keep(ids: Sequence[str], rows: Tensor) -> None:
            hidden[ids[0]] = rows[len(self._prefix) :, 0].to(self.net.dtype)

        extract(self.net, inputs, layers=[self.layer], position="all", hook_point="resid_pre", on_rows=keep)
        n = len(self._prefix)
        return [Entry(s.token_ids[n:-1], hidden[s.id], s.token_ids[s.prompt_length :]) for s in sequences]

    @torch.no_grad()
    def inputs(self, entries: Sequence[Entry], at_once: int = 16) -> Tensor:
        """float32 (tokens of all entries, inputs), on the CPU: what the projection gets behind the prefix."""
        rows: list[Tensor] = []

        def keep(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            lengths = [len(e.token_ids) for e in some]
            rows.extend(row[-n:].float().cpu() for row, n in zip(args[0], lengths, strict=True))

        handle = self.writer.writer.module.register_forward_pre_hook(keep)
        try:
            for start in range(0, len(entries), at_once):
                some = entries[start : start + at_once]
                self.logits(some)
        finally:
            handle.remove()
        return torch.cat(rows)

    def logits(self, entries: Sequence[Entry]) -> Tensor:
        """Next-token logits at the places of the targets, float32 (targets of all entries, vocabulary)."""
        ids, mask = left_padded([e.token_ids for e in entries], 0, self.language_model.device)
        whole = torch.cat([mask.new_ones(len(ids), len(self._prefix)), mask], dim=1)
        kept = max(len(e.targets) for e in entries)
        hidden = left_padded_states([e.hidden for e in entries], self.language_model.device)
        with entered(self.net, self.layer, hidden):
            found = self.net(
                input_ids=ids,
                attention_mask=whole,
                position_ids=(whole.cumsum(dim=-1) - 1)[:, len(self._prefix) :].clamp_min(0),
                past_key_values=self._cache_of(len(ids)),
                use_cache=bool(self._prefix),
                logits_to_keep=kept,
            ).logits
        return torch.cat([row[-len(e.targets) :] for row, e in zip(found, entries, strict=True)]).float()

    def _cache_of(self, n_rows: int) -> object:
        if self._cache is None:
            return None
        cache = copy.deepcopy(self._cache)
        cache.batch_repeat_interleave(n_rows)
        return cache
