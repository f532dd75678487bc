import random
from dataclasses import replace

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, FalconMambaConfig, Mamba2Config, MambaConfig, PreTrainedConfig

from src.common.errors import InputError
from src.models.generation import decode_batch, left_padded, needs_equal_lengths
from src.models.types import GenerationRequest
from src.ops.metrics import token_uncertainty
from tests.steering_specs import spec
from tests.tiny_models import CONFIGS, tiny_model, tiny_multimodal

NAMES = [*CONFIGS, "multimodal"]
EOS = frozenset([2])


def build(name: str) -> nn.Module:
    return tiny_multimodal() if name == "multimodal" else tiny_model(name)


def some_requests(n: int = 6, temperature: float = 0.0, max_tokens: int = 10) -> list[GenerationRequest]:
    draw = random.Random(0)
    lengths = [draw.randrange(3, 40) for _ in range(n)]
    return [
        GenerationRequest(
            id=str(i),
            token_ids=tuple(draw.randrange(5, 49000) for _ in range(length)),
            max_tokens=max_tokens,
            temperature=temperature,
            seed=i,
        )
        for i, length in enumerate(lengths)
    ]


def decode(model: nn.Module, requests: list[GenerationRequest], eos: frozenset[int] = EOS) -> dict:
    rows, steps = {}, []
    decode_batch(
        model, requests, eos_ids=eos, pad_id=2, k=5, on_row=lambda r, why: rows.update({r.request.id: (r, why)}),
        on_tokens=steps.append,
    )  # fmt: skip
    assert sum(steps) == sum(len(row.tokens) for row, _ in rows.values())
    return rows


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("name", NAMES)
def test_a_row_does_not_depend_on_its_batch_mates(name: str, temperature: float) -> None:
    model = build(name)
    # Rows that leave the batch one after the other.
    requests = [replace(r, max_tokens=10 - int(r.id)) for r in some_requests(temperature=temperature)]
    if needs_equal_lengths(model):
        requests = [replace(r, token_ids=requests[0].token_ids) for r in requests]
    together = decode(model, requests)
    for request in reversed(requests):
        alone = decode(model, [request])[request.id][0]
        row = together[request.id][0]
        assert row.tokens == alone.tokens
        assert row.entropy == pytest.approx(alone.entropy, abs=1e-4)
        assert row.top_k_mass == pytest.approx(alone.top_k_mass, abs=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_greedy_tokens_and_metrics_equal_a_full_forward_pass(name: str) -> None:
    """The reference: no cache, no padding, one sequence, every position at once."""
    model = build(name)
    request = some_requests()[3]
    row = decode(model, some_requests() if not needs_equal_lengths(model) else [request])[request.id][0]
    ids = torch.tensor([[*request.token_ids, *row.tokens]])
    with torch.no_grad():
        logits = model(input_ids=ids).logits[0, len(request.token_ids) - 1 : -1]
    assert logits.argmax(-1).tolist() == row.tokens
    reference = token_uncertainty(logits, 5)
    assert row.entropy == pytest.approx(reference.entropy.tolist(), abs=1e-4)
    assert row.top_k_mass == pytest.approx(reference.top_k_mass.tolist(), abs=1e-5)


def test_every_end_of_sequence_token_stops_and_none_is_counted() -> None:
    model = tiny_model("llama")
    requests = some_requests(temperature=1.0, max_tokens=20)
    free = decode(model, requests, eos=frozenset())
    assert {why for _, why in free.values()} == {"length"}
    # Two tokens that two different rows really produce become ends of sequence.
    ends = frozenset([free["0"][0].tokens[4], free["1"][0].tokens[7]])
    stopped = decode(model, requests, eos=ends)
    for key, (row, why) in stopped.items():
        whole = free[key][0].tokens
        cut = next((i for i, token in enumerate(whole) if token in ends), None)
        assert row.tokens == whole[:cut]
        assert why == ("length" if cut is None else "stop")
        assert len(row.entropy) == len(row.top_k_mass) == len(row.tokens)
    assert [why for _, why in stopped.values()].count("stop") >= 2


def test_an_end_at_once_gives_an_empty_row() -> None:
    model = tiny_model("llama")
    requests = some_requests(3)
    first = decode(model, requests, eos=frozenset())["1"][0].tokens[0]
    row, why = decode(model, requests, eos=frozenset([first]))["1"]
    assert (row.tokens, row.entropy, row.top_k_mass, why) == ([], [], [], "stop")


def test_each_request_keeps_its_own_limit_temperature_and_seed() -> None:
    model = tiny_model("llama")
    base = some_requests(1, max_tokens=12)[0]
    mixed = [
        replace(base, id="greedy"),
        replace(base, id="short", max_tokens=3),
        replace(base, id="warm", temperature=1.0, seed=5),
        replace(base, id="same", temperature=1.0, seed=5),
        replace(base, id="other", temperature=1.0, seed=6),
    ]
    tokens = {key: row.tokens for key, (row, _) in decode(model, mixed).items()}
    assert tokens["short"] == tokens["greedy"][:3] and len(tokens["greedy"]) == 12
    assert tokens["warm"] == tokens["same"] != tokens["other"]
    assert tokens["warm"] != tokens["greedy"]


def test_entropy_is_of_the_untempered_distribution() -> None:
    model = tiny_model("llama")
    base = some_requests(1, max_tokens=1)[0]
    rows = decode(
        model, [replace(base, id="a"), replace(base, id="b", temperature=0.01), replace(base, id="c", temperature=3.0)]
    )
    assert rows["a"][0].entropy == rows["b"][0].entropy == rows["c"][0].entropy


def test_logits_that_are_no_numbers_raise_and_name_the_request() -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        model.lm_head.weight[7] = torch.nan
    with pytest.raises(InputError, match=r"request '0'.*token 0.*--dtype float32"):
        decode(model, some_requests(1))


def n_hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


@pytest.mark.parametrize("kind", ["none", "empty", "acting"])
def test_hooks_are_set_only_while_something_acts(kind: str) -> None:
    model = tiny_model("llama")
    one = {"none": (), "empty": spec(), "acting": spec({"op": "add", "coefficient": 1.0})}[kind]
    requests = [replace(r, interventions=one) for r in some_requests(3, max_tokens=4)]
    seen = []
    decode_batch(
        model, requests, eos_ids=frozenset(), pad_id=2, k=5, on_row=lambda r, why: None,
        on_tokens=lambda n: seen.append(n_hooks(model)),
    )  # fmt: skip
    assert len(seen) == 4 and {count > 0 for count in seen} == {kind == "acting"}
    assert n_hooks(model) == 0


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2", "qwen3_moe"])
def test_rows_under_different_specs_do_not_depend_on_one_another(name: str, temperature: float) -> None:
    """Rows end at different steps, so that the batch shrinks around those that go on."""
    model = tiny_model(name)
    specs = [(), spec({"op": "add", "coefficient": 4.0}), spec({"op": "scale", "coefficient": 3.0, "layer": 1})]
    requests = [
        replace(r, interventions=specs[i % 3], max_tokens=3 + 2 * (i % 4))
        for i, r in enumerate(some_requests(temperature=temperature))
    ]
    together = decode(model, requests)
    for request in requests:
        alone, row = decode(model, [request])[request.id][0], together[request.id][0]
        assert row.tokens == alone.tokens
        assert row.entropy == pytest.approx(alone.entropy, abs=1e-4)


def test_padding_stands_on_the_left() -> None:
    ids, mask = left_padded([(5, 6, 7), (8,)], pad_id=2, device=torch.device("cpu"))
    assert ids.tolist() == [[5, 6, 7], [2, 2, 8]]
    assert mask.tolist() == [[1, 1, 1], [0, 0, 1]]


@pytest.mark.parametrize("rope_type", ["longrope", "dynamic"])
def test_rotary_embeddings_of_the_longest_row_need_rows_of_one_length(rope_type: str) -> None:
    config = CONFIGS["llama"]()
    config.rope_parameters = {"rope_type": rope_type, "rope_theta": 10000.0, "factor": 2.0}
    model = tiny_model("llama")
    assert not needs_equal_lengths(model)
    model.config.rope_parameters = config.rope_parameters
    assert needs_equal_lengths(model)
    model.config.rope_parameters = {
        "full_attention": config.rope_parameters,
        "sliding_attention": {"rope_type": "default"},
    }
    assert needs_equal_lengths(model)


def test_recurrent_models_are_told_from_attention_only_ones() -> None:
    recurrent = {name for name in NAMES if needs_equal_lengths(build(name))}
    assert recurrent == {"qwen3_next"}


STATES = {"vocab_size": 300, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 8, "bos_token_id": 1,
          "eos_token_id": 2, "pad_token_id": 2}  # fmt: skip
STATE_SPACE = [
    MambaConfig(**STATES), FalconMambaConfig(**STATES), Mamba2Config(**STATES, num_heads=8, head_dim=8, n_groups=1)
]  # fmt: skip


@pytest.mark.parametrize("config", STATE_SPACE, ids=lambda config: config.model_type)
def test_models_that_would_ignore_our_cache_are_refused(config: PreTrainedConfig) -> None:
    """They would run each token without those before it."""
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    request = GenerationRequest(id="0", token_ids=(5, 6, 7), max_tokens=3)
    with pytest.raises(InputError, match=f"{config.model_type} models take no past_key_values"):
        decode(model, [request])
