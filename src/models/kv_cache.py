"""A cache of keys and values that grows in place instead of being copied whole for every token, and loses rows."""

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedConfig
from transformers.cache_utils import DynamicLayer, LinearAttentionLayer

GROWTH = 128
"""Positions of room to add at a time: a copy every so many tokens instead of every token."""


class GrowingLayer(DynamicLayer):
    """
    Full-attention keys and values, each (rows, heads, positions, head_dim), in buffers with room to spare.

    Same values and interface as the layer it stands for, which concatenates: over n tokens that copies n²/2 positions,
    and from some hundred tokens on the copies take longer than the model (scripts/benchmarks/kv_cache.py).
    """

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        super().lazy_initialization(key_states, value_states)
        self._length = 0
        self._buffers = [_room(key_states, 0), _room(value_states, 0)]

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Append the new positions; returns all keys and all values so far."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start, self._length = self._length, self._length + key_states.shape[-2]
        for i, states in enumerate((key_states, value_states)):
            if self._length > self._buffers[i].shape[-2]:
                grown = _room(states, self._length + GROWTH)
                grown[:, :, :start] = self._buffers[i][:, :, :start]
                self._buffers[i] = grown
            self._buffers[i][:, :, start : self._length] = states
        self._show()
        return self.keys, self.values

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows `indices`, int64 (kept,)."""
        if self.is_initialized:
            self._buffers = [buffer[indices] for buffer in self._buffers]
            self._show()

    def _show(self) -> None:
        self.keys, self.values = (buffer[:, :, : self._length] for buffer in self._buffers)


def _room(states: Tensor, n_positions: int) -> Tensor:
    rows, heads, _, head_dim = states.shape
    return torch.empty(rows, heads, n_positions, head_dim, dtype=states.dtype, device=states.device)


def growing_cache(config: PreTrainedConfig) -> DynamicCache:
    """The model's own kind of cache, its full-attention layers growing in place; other kinds stay as they are."""
    cache = DynamicCache(config=config)
    cache.layers = [GrowingLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


def keep_rows(cache: DynamicCache, indices: Tensor) -> None:
    """
    Keep the rows `indices`, int64 (kept,), of keys, values and recurrent states: those of linear attention, state
    spaces and convolutions, which `cache.batch_select_indices` of transformers cannot select.
    """
    for layer in cache.layers:
        if isinstance(layer, LinearAttentionLayer):
            LinearAttentionLayer.reorder_cache(layer, indices)
        if isinstance(layer, DynamicLayer):
            layer.batch_select_indices(indices)
