"""
The layers below a changed one, left out: what they compute is known from the unchanged model.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

from src.models.architectures import decoder_layers
from src.models.hooks import Location, reading, replacing


@contextmanager
def entered(model: nn.Module, layer: int, hidden: Tensor) -> Iterator[None]:
    """Within the context the layers below `layer` do nothing, and `hidden` (rows, columns, d_model) enters it."""
    with replacing(model, {(layer, "resid_pre"): lambda _: hidden}), ExitStack() as stack:
        for block in decoder_layers(model)[:layer]:
            # A forward set on the instance wins over the class's; what places layers on devices sets one, too.
            if "forward" in vars(block):
                stack.callback(setattr, block, "forward", block.forward)
            else:
                stack.callback(delattr, block, "forward")
            block.forward = _unchanged
        yield


def _unchanged(hidden_states: Tensor, *args: object, **kwargs: object) -> Tensor:
    return hidden_states


def left_padded_states(states: Sequence[Tensor], device: torch.device) -> Tensor:
    """States (tokens, d_model) of several sequences as (rows, longest, d_model), each ending in the last column."""
    longest = max(map(len, states))
    found = states[0].new_zeros(len(states), longest, states[0].shape[1])
    for row, each in zip(found, states, strict=True):
        row[longest - len(each) :] = each
    return found.to(device)


@dataclass
class LowerStates:
    """What enters some layers of the unchanged model, of some sequences behind a prefix of all."""

    layers: tuple[int, ...]
    n_prefix: int
    states: dict[tuple[int, str], Tensor] = field(default_factory=dict)
    """Layer, sequence id → (tokens behind the prefix, d_model), of the model's dtype, on its device."""
    can_enter: bool = True
    """Whether the layers hand on one tensor and nothing beside it, as far as was seen."""

    def layer_for(self, first: int) -> int | None:
        """The highest kept layer at or below `first`, the lowest one that is changed."""
        return max((layer for layer in self.layers if layer <= first), default=None)

    @contextmanager
    def keeping(self, model: nn.Module, lengths: Mapping[str, int]) -> Iterator[None]:
        """
        Within the context a forward call of left-padded rows, whose tokens behind the prefix `lengths` counts by
        sequence id in their order, is kept.
        """

        def keep(layer: int, hidden: Tensor) -> None:
            for row, (name, n) in zip(hidden, lengths.items(), strict=True):
                self.states[layer, name] = row[-n:].clone()

        def look(module: nn.Module, args: tuple, output: object) -> None:
            self.can_enter = self.can_enter and isinstance(output, Tensor)

        handle = decoder_layers(model)[0].register_forward_hook(look)
        try:
            with reading(model, {Location(layer, "resid_pre"): partial(keep, layer) for layer in self.layers}):
                yield
        finally:
            handle.remove()

    def entering(self, layer: int, names: Sequence[str], device: torch.device) -> Tensor:
        """What enters `layer`, (rows, longest, d_model)."""
        return left_padded_states([self.states[layer, name] for name in names], device)
