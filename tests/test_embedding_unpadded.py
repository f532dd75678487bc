"""Texts end to end in one row: the vectors of padded batches, and a refusal where that is not known."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from src.embedding import unpadded
from src.embedding.batching import batch_without_padding, stepped_tokens
from src.embedding.encoder import TorchEncoder
from src.embedding.records import Piece
from src.embedding.trial import trial_pieces
from src.embedding.unpadded import NotByText, Row, padded

VOCABULARY = 30522
SMALL = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
         "intermediate_size": 64, "max_position_embeddings": 128, "initializer_range": 0.3}  # fmt: skip


def encoder_of(
    folder: Path, config: Any, pooling: str = "mean", side: str = "right", dtype: torch.dtype = torch.float32
) -> TorchEncoder:
    """A sentence-transformers model of a random transformer, with the bundled tokenizer."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer
    from transformers import AutoModel, AutoTokenizer

    from src.models.bundled import bundled_folder

    torch.manual_seed(0)
    AutoModel.from_config(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(bundled_folder("bundled:minilm"), padding_side=side).save_pretrained(folder)
    first = Transformer(str(folder), max_seq_length=100)
    modules = [first, Pooling(config.hidden_size, pooling_mode=pooling), Normalize()]
    return TorchEncoder(SentenceTransformer(modules=modules, device="cpu"), dtype, 512)


def configs() -> dict[str, tuple[Any, dict[str, str]]]:
    from transformers import BertConfig, Qwen3Config, RobertaConfig

    groups = {"num_key_value_heads": 2, "head_dim": 8}
    return {
        "bert": (BertConfig(**SMALL), {}),
        # Its first position is behind the number of its padding.
        "roberta": (RobertaConfig(**SMALL, pad_token_id=3), {}),
        # Attends to what is before alone, with fewer heads of keys; read at the last token, padded on the left.
        "qwen3": (Qwen3Config(**SMALL, **groups), {"pooling": "lasttoken", "side": "left"}),
    }


def pieces_of(lengths: list[int], seed: int = 1) -> list[Piece]:
    draw = np.random.default_rng(seed)
    return [Piece(n, 0, draw.integers(5, 1000, length), truncated=False) for n, length in enumerate(lengths)]


@pytest.mark.parametrize("name", ["bert", "roberta", "qwen3"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_give_the_vectors_of_each_text_alone(tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    config, more = configs()[name]
    encoder = encoder_of(tmp_path, config, **more, dtype=dtype)
    pieces = pieces_of([3, 40, 1, 17, 100, 17, 9])
    with encoder.computing():
        assert encoder.leave_padding_out(trial_pieces(encoder.vocabulary_size))
        alone = np.concatenate([encoder.embed_unpadded([each], len(each.token_ids)) for each in pieces])
        plain = np.concatenate([encoder.embed(_batch(encoder, [each])) for each in pieces])
        together = encoder.embed_unpadded(pieces, 200)
    least = 1 - 1e-6 if dtype == torch.float32 else 0.999
    assert ((together * plain).sum(axis=1) >= least).all()
    assert ((together * alone).sum(axis=1) >= least).all()
    # The texts differ by much more than that.
    assert np.abs(np.triu(together @ together.T, 1)).max() < 0.99
    # Nothing of it stays on the model.
    assert encoder._transformer.model.config._attn_implementation == "sdpa"


def _batch(encoder: TorchEncoder, pieces: list[Piece]) -> Any:
    from src.embedding.encoder import Batch

    return Batch(pieces, max(len(each.token_ids) for each in pieces), encoder.pad_id, encoder.pads_left)


def test_models_whose_tokens_meet_elsewhere_keep_their_padding(tmp_path: Path) -> None:
    from transformers import BertConfig, ModernBertConfig, MPNetConfig

    # Attention within a window, which no short trial would show; attention by relative position of the whole row.
    window = ModernBertConfig(**SMALL, pad_token_id=0, local_attention=64, global_attn_every_n_layers=2)
    small = {name: value for name, value in SMALL.items() if name != "initializer_range"}
    for number, config in enumerate((window, MPNetConfig(**small, initializer_range=0.3))):
        encoder = encoder_of(tmp_path / str(number), config)
        with encoder.computing():
            assert not encoder.leave_padding_out(trial_pieces(encoder.vocabulary_size)), type(config)
    compiled = encoder_of(tmp_path / "bert", BertConfig(**SMALL))
    compiled.is_compiled = True
    assert not compiled.leave_padding_out(trial_pieces(compiled.vocabulary_size))


@pytest.mark.parametrize(
    "more", [{"sliding_window": 64}, {"softcap": 50.0}, {"dropout": 0.1}, {"attention_mask": torch.zeros(1, 1, 4, 4)}]
)
def test_attention_that_is_not_plain_is_refused(more: dict[str, Any]) -> None:
    states = torch.zeros(1, 2, 4, 8)
    with pytest.raises(NotByText):
        unpadded._attend(nn.Identity(), states, states, states, **{"attention_mask": None, **more})


@given(st.lists(st.integers(1, 512), min_size=1, max_size=60), st.integers(512, 2048))
def test_a_batch_without_padding_is_the_first_and_what_fits(lengths: list[int], budget: int) -> None:
    taken = batch_without_padding(lengths, budget)
    total = sum(lengths[index] for index in taken)
    assert taken[0] == 0 and taken == sorted(set(taken))
    assert total <= budget
    # Of what is left nothing would have fitted when it was its turn, so nothing fits now.
    left = [length for index, length in enumerate(lengths) if index not in set(taken)]
    assert all(total + length > budget for length in left)
    assert total <= stepped_tokens(total) <= 1.25 * total + 16


def test_rows_have_few_sizes() -> None:
    sizes = {stepped_tokens(n) for n in range(1, 1025)}
    assert sorted(sizes) == [*range(16, 129, 16), *range(160, 257, 32), *range(320, 513, 64), *range(640, 1025, 128)]


@given(st.lists(st.integers(1, 20), min_size=1, max_size=8), st.integers(0, 9), st.integers(0, 3))
def test_rows_and_back(lengths: list[int], rest: int, first: int) -> None:
    pieces = pieces_of(lengths)
    texts = [each.token_ids for each in pieces]
    row = Row.of(texts, sum(lengths) + rest, 7, first)
    assert row.input_ids.shape == row.position_ids.shape == (1, sum(lengths) + rest)
    assert row.ends[-1] == sum(lengths) + rest
    mask = np.zeros((len(lengths), max(lengths)), dtype=np.int64)
    for each, length in zip(mask, lengths, strict=True):
        each[:length] = 1
    back = padded(torch.from_numpy(row.input_ids)[..., None].float(), mask)[..., 0]
    for found, text in zip(back, texts, strict=True):
        assert found[: len(text)].tolist() == text.tolist() and not found[len(text) :].any()
    places = padded(torch.from_numpy(row.position_ids)[..., None].float(), mask)[..., 0]
    assert all(found[:n].tolist() == list(range(first, first + n)) for found, n in zip(places, lengths, strict=True))
