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


def odd_configs() -> dict[str, Any]:
    from transformers import (
        CLIPTextConfig,
        LlamaConfig,
        ModernBertConfig,
        MPNetConfig,
        Phi3Config,
        PhimoeConfig,
        Qwen2MoeConfig,
    )  # fmt: skip

    groups = {"num_key_value_heads": 2}
    longrope = {"short_factor": [1.0] * 4, "long_factor": [4.0] * 4, "original_max_position_embeddings": 64}
    return {
        # Windows that attention is told of, and those that only its mask is told of: no short text would show them.
        "modernbert": ModernBertConfig(**SMALL, pad_token_id=0, local_attention=64, global_attn_every_n_layers=2),
        "phimoe": PhimoeConfig(**SMALL, **groups, sliding_window=30, num_local_experts=2, pad_token_id=0),
        "qwen2_moe": Qwen2MoeConfig(
            **SMALL, **groups, sliding_window=30, use_sliding_window=True, layer_types=["sliding_attention"] * 2,
            num_experts=2, num_experts_per_tok=1, moe_intermediate_size=32, shared_expert_intermediate_size=32,
            pad_token_id=0,
        ),
        # Relative positions in all of the row.
        "mpnet": MPNetConfig(**SMALL),
        # Frequencies by the longest text of the row.
        "dynamic": LlamaConfig(
            **SMALL, **groups, pad_token_id=0,
            rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0},
        ),
        "longrope": Phi3Config(
            **SMALL, **groups, pad_token_id=0, original_max_position_embeddings=64,
            rope_parameters={"rope_type": "longrope", "rope_theta": 10000.0, **longrope},
        ),
        # Refuses rows longer than its positions.
        "clip": CLIPTextConfig(**{**SMALL, "initializer_range": 0.02}, pad_token_id=0),
    }  # fmt: skip


@pytest.mark.parametrize("prompt_length", [0, 14, 25])
@pytest.mark.parametrize("name", ["modernbert", "phimoe", "qwen2_moe", "mpnet", "dynamic", "longrope", "clip"])
def test_models_whose_tokens_meet_elsewhere_keep_their_padding(tmp_path: Path, name: str, prompt_length: int) -> None:
    encoder = encoder_of(tmp_path, odd_configs()[name])
    encoder._prompt_length, attention = prompt_length, encoder._transformer.model.config._attn_implementation
    # A prompt that pooling leaves out must not leave all of a trial out.
    encoder._rest[0].include_prompt = False
    with encoder.computing():
        assert not encoder.leave_padding_out(trial_pieces(encoder.vocabulary_size))
        vectors = encoder.embed(_batch(encoder, pieces_of([40, 60])))
    assert np.isfinite(vectors).all() and encoder._prompt_length == prompt_length
    assert encoder._transformer.model.config._attn_implementation == attention


def test_compiled_models_keep_their_padding(tmp_path: Path) -> None:
    from transformers import BertConfig

    compiled = encoder_of(tmp_path / "bert", BertConfig(**SMALL))
    compiled.is_compiled = True
    assert not compiled.leave_padding_out(trial_pieces(compiled.vocabulary_size))


@pytest.fixture(scope="module")
def roberta(tmp_path_factory: pytest.TempPathFactory) -> TorchEncoder:
    encoder = encoder_of(tmp_path_factory.mktemp("roberta"), configs()["roberta"][0])
    with encoder.computing():
        assert encoder.leave_padding_out(trial_pieces(encoder.vocabulary_size))
    return encoder


def test_a_padding_token_within_a_text_is_counted_as_the_model_does(roberta: TorchEncoder) -> None:
    pieces = pieces_of([20, 30])
    pieces[0].token_ids[7] = pieces[1].token_ids[0] = 3
    with roberta.computing():
        found, plain = roberta.embed_unpadded(pieces, 64), roberta.embed(_batch(roberta, pieces))
    assert ((found * plain).sum(axis=1) > 1 - 1e-6).all()


def test_rows_may_be_filled_up_by_more_than_there_are_positions(roberta: TorchEncoder) -> None:
    pieces = pieces_of([50, 50])
    with roberta.computing():
        found, plain = roberta.embed_unpadded(pieces, 1024), roberta.embed(_batch(roberta, pieces))
    assert ((found * plain).sum(axis=1) > 1 - 1e-6).all()


def test_one_long_text_does_not_make_many_short_ones_wide(
    roberta: TorchEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    pieces, sizes = pieces_of([100, *[3] * 120, 50]), []
    monkeypatch.setattr(roberta, "_pooled", lambda features, own=roberta._pooled: sizes.append(
        features["token_embeddings"].shape[:2].numel()) or own(features))  # fmt: skip
    with roberta.computing():
        found = roberta.embed_unpadded(pieces, 512)
        alone = np.concatenate([roberta.embed(_batch(roberta, [each])) for each in pieces])
    assert ((found * alone).sum(axis=1) > 1 - 1e-6).all()
    # Padded to one width they were 122 × 100.
    assert sum(sizes) - sum(len(each.token_ids) for each in pieces) < 1000


@pytest.mark.parametrize("told", [{"local_size": 30}, {"use_vmap": True}])
def test_masks_of_more_than_padding_are_refused(told: dict[str, Any]) -> None:
    assert unpadded._no_mask(1, 2, local_size=None, use_vmap=False) is None
    with pytest.raises(NotByText):
        unpadded._no_mask(1, 2, **told)


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
    starts = [run.start for run in row.runs]
    assert sum(run.n_texts * run.length for run in row.runs) == sum(lengths) + rest
    assert starts == sorted(set(starts)) and starts[0] == 0
    mask = np.zeros((len(lengths), max(lengths)), dtype=np.int64)
    for each, length in zip(mask, lengths, strict=True):
        each[:length] = 1
    n = sum(lengths)
    back = padded(torch.from_numpy(row.input_ids[0, :n, None]), mask)[..., 0]
    for found, text in zip(back, texts, strict=True):
        assert found[: len(text)].tolist() == text.tolist() and not found[len(text) :].any()
    # A model with positions from 3 on has 2 for padding, which no text here holds.
    places = padded(torch.from_numpy(row.position_ids[0, :n, None]), mask)[..., 0]
    assert all(found[:n].tolist() == list(range(first, first + n)) for found, n in zip(places, lengths, strict=True))
    assert (row.position_ids[0, n:] == first).all()
