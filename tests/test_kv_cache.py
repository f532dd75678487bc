import pytest
import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from src.models import kv_cache
from src.models.kv_cache import GrowingLayer, growing_cache
from tests.tiny_models import CONFIGS


@pytest.mark.parametrize("growth", [1, 3, 128])
def test_holds_what_the_concatenating_layer_holds(growth: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kv_cache, "GROWTH", growth)
    generator = torch.Generator().manual_seed(0)
    ours, theirs = GrowingLayer(), DynamicLayer()
    rows = 5
    for step, n_positions in enumerate([7, 1, 1, 4, 1, 1, 1]):
        states = [torch.randn(rows, 2, n_positions, dim, generator=generator) for dim in (8, 6)]
        for mine, reference in zip(ours.update(*states), theirs.update(*states), strict=True):
            assert torch.equal(mine, reference)
        assert ours.get_seq_length() == theirs.get_seq_length()
        assert ours.get_mask_sizes(1) == theirs.get_mask_sizes(1)
        if step in (1, 4):
            kept = torch.tensor([0, 2, 3] if rows == 5 else [2])
            rows = len(kept)
            ours.batch_select_indices(kept)
            theirs.batch_select_indices(kept)


@pytest.mark.parametrize("name", ["llama", "gemma3", "qwen3_next"])
def test_only_full_attention_layers_are_replaced(name: str) -> None:
    config = CONFIGS[name]()
    kinds = list(zip(growing_cache(config).layers, DynamicCache(config=config).layers, strict=True))
    for mine, stock in kinds:
        assert type(mine) is (GrowingLayer if type(stock) is DynamicLayer else type(stock))
    assert any(type(mine) is GrowingLayer for mine, _ in kinds)
