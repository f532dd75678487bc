"""Interventions in whole models: identities over architectures, and what padding, caches and batch mates may not do."""

import random
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache

from src.common.errors import InputError
from src.common.interventions import Window
from src.common.resolved_interventions import ResolvedCondition, ResolvedSpec
from src.models.architectures import attention_writers, decoder_layers, mlp_writers
from src.models.cpu_linear import packed_linears
from src.models.generation import Batch, left_padded, needs_equal_lengths
from src.models.hooks import reading
from src.models.steering import call_positions, steered
from src.models.types import GenerationRequest
from src.ops.interventions import projection
from tests.steering_specs import same_bits, spec, unit
from tests.tiny_models import CONFIGS, tiny_model, tiny_multimodal

NAMES = [*CONFIGS, "multimodal"]
# Batch mates share the experts' matrix products, whose last bits depend on how many tokens there are.
DENSE = [name for name in NAMES if name not in ("mixtral", "qwen3_moe", "qwen3_next")]
D = torch.from_numpy(unit(0))


def build(name: str) -> nn.Module:
    return tiny_multimodal() if name == "multimodal" else tiny_model(name)


def prompts(*lengths: int) -> list[list[int]]:
    draw = random.Random(0)
    return [[draw.randrange(5, 49000) for _ in range(length)] for length in lengths]


def forward(model: nn.Module, rows: list[list[int]], specs: list[ResolvedSpec | None] | None = None) -> dict:
    """Logits and resid_post of all layers on left-padded rows, with explicit positions as a generating batch has."""
    ids, mask = left_padded(rows, 2, torch.device("cpu"))
    seen = {}
    places = {(i, "resid_post"): lambda h, i=i: seen.update({i: h}) for i in range(len(decoder_layers(model)))}
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    context = nullcontext() if specs is None else steered(model, specs, [len(row) for row in rows])
    with torch.inference_mode(), context, reading(model, places):
        seen["logits"] = model(input_ids=ids, attention_mask=mask, position_ids=positions).logits
    return {**seen, "mask": mask.bool()}


def alone(model: nn.Module, row: list[int], one: ResolvedSpec | None) -> dict:
    return forward(model, [row], [one])


EVERYTHING = {
    "add": spec({"op": "add", "coefficient": 3.0}),
    "relative": spec({"op": "add", "coefficient": 0.7, "relative": True, "layer": 1}),
    "ablate": spec({"op": "ablate", "coefficient": 1.0}),
    "scale": spec({"op": "scale", "coefficient": -3.0, "hook_point": "attn_out"}),
    "set": spec({"op": "set", "value": 4.0, "hook_point": "mlp_out", "layer": 1}),
    "cap": spec({"op": "cap", "hi": -1.0, "hook_point": "resid_pre"}),
    "several": spec(
        {"op": "ablate", "coefficient": 1.0}, {"op": "add", "coefficient": 2.0, "direction": unit(1)},
        {"op": "add", "coefficient": -1.0, "layer": 1},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_the_layers_output_is_what_the_operation_says(name: str) -> None:
    model, row = build(name), prompts(6)[0]
    for layer in range(2):
        plain = forward(model, [row])
        for op in ({"op": "ablate", "coefficient": 1.0}, {"op": "set", "value": 2.5}):
            moved = alone(model, row, spec({**op, "layer": layer}))
            wanted = op.get("value", 0.0)
            torch.testing.assert_close(projection(moved[layer][0], D), torch.full((6,), wanted), atol=1e-4, rtol=0)
            for before in range(layer):
                assert same_bits(moved[before], plain[before])
        moved = alone(model, row, spec({"op": "add", "coefficient": 3.0, "layer": layer}))
        torch.testing.assert_close(moved[layer], plain[layer] + 3 * D)
        assert not torch.allclose(moved["logits"], plain["logits"], atol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_ablating_what_every_writer_adds_equals_orthogonalised_weights(name: str) -> None:
    """Arditi et al. 2024, arXiv:2406.11717, §2.4: W ← W − d·dᵀ·W of the embedding and of all writers."""
    model, row = build(name), prompts(9)[0]
    everywhere = [("resid_pre", 0), *((point, layer) for layer in range(2) for point in ("attn_out", "mlp_out"))]
    by_hooks = spec(*({"op": "ablate", "coefficient": 1.0, "hook_point": p, "layer": i} for p, i in everywhere))
    logits = alone(model, row, by_hooks)["logits"]
    edited = build(name)
    untied = edited.get_output_embeddings()
    untied.weight = nn.Parameter(untied.weight.detach().clone())
    with torch.no_grad():
        for layer in decoder_layers(edited):
            for writer in [*attention_writers(layer), *mlp_writers(layer)]:
                orthogonalise_output(writer.weight, writer.module)
        for table in (m for m in edited.modules() if isinstance(m, nn.Embedding) and m.weight.shape[1] == 32):
            table.weight.sub_(table.weight @ D[:, None] * D)
    with torch.inference_mode():
        torch.testing.assert_close(logits, edited(input_ids=torch.tensor([row])).logits, atol=1e-4, rtol=0)
        assert not torch.allclose(logits, build(name)(input_ids=torch.tensor([row])).logits, atol=1e-4)


def orthogonalise_output(weight: Tensor, module: nn.Module) -> None:
    if type(module).__name__ == "Conv1D":
        weight.sub_(weight @ D[:, None] * D)
    else:
        weight.sub_(D[:, None] * (D @ weight)[..., None, :])
    if isinstance(getattr(module, "bias", None), Tensor):
        module.bias.sub_((module.bias @ D) * D)


@pytest.mark.parametrize("name", DENSE)
def test_unsteered_rows_are_bit_identical_to_a_run_without_hooks(name: str) -> None:
    model, rows = build(name), prompts(5, 9, 9, 3, 7)
    if needs_equal_lengths(model):
        rows = prompts(*[7] * 5)
    specs = [None, EVERYTHING["several"], spec(), EVERYTHING["set"], None]
    plain, mixed = forward(model, rows), forward(model, rows, specs)
    for key in (0, 1, "logits"):
        for row in (0, 2, 4):
            assert same_bits(mixed[key][row], plain[key][row])
    for row in (1, 3):
        assert not torch.allclose(mixed["logits"][row, -1], plain["logits"][row, -1], atol=1e-4)


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "qwen3_next"])
def test_unsteered_rows_among_experts_stay_to_rounding(name: str) -> None:
    model, rows = build(name), prompts(7, 7, 7)
    plain, mixed = forward(model, rows), forward(model, rows, [None, EVERYTHING["several"], None])
    for key in (0, 1, "logits"):
        torch.testing.assert_close(mixed[key][::2], plain[key][::2], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_without_an_intervention_nothing_changes_bit_for_bit(name: str) -> None:
    """Specs that are empty attach nothing; windows that no token enters leave every token alone."""
    model, rows = build(name), prompts(6, 6)
    plain = forward(model, rows)
    before = [len(m._forward_hooks) for m in model.modules()]
    with steered(model, [None, spec()], [6, 6]):
        assert [len(m._forward_hooks) for m in model.modules()] == before
    idle = spec({"op": "add", "coefficient": 5.0, "positions": "generated"})
    for specs in ([None, spec()], [idle, idle], [spec({"op": "add", "coefficient": 0.0})] * 2):
        assert same_bits(forward(model, rows, specs)["logits"], plain["logits"])


@pytest.mark.parametrize(
    "positions", ["all", "prompt", "last_prompt", Window(start=1, end=4), Window(start=-3, end=-1)]
)
@pytest.mark.parametrize("name", NAMES)
def test_left_padding_and_batch_mates_change_nothing(name: str, positions: str | Window) -> None:
    model, rows = build(name), prompts(5, 12, 8, 3)
    if needs_equal_lengths(model):
        rows = prompts(*[8] * 4)
    specs = [
        spec({"op": "add", "coefficient": 3.0, "positions": positions}), None,
        spec(
            {"op": "ablate", "coefficient": 1.0, "positions": positions, "layer": 1},
            {"op": "scale", "coefficient": 2.0},
        ),
        spec({"op": "cap", "hi": -0.5, "positions": positions, "hook_point": "attn_out"}),
    ]  # fmt: skip
    together = forward(model, rows, specs)
    for i, row in enumerate(rows):
        single = alone(model, row, specs[i])
        for key in (0, 1, "logits"):
            torch.testing.assert_close(together[key][i][together["mask"][i]], single[key][0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "positions", ["all", "prompt", "generated", "last_prompt", Window(start=-2), Window(start=6, end=9)]
)
@pytest.mark.parametrize("name", NAMES)
def test_a_cache_and_a_prompt_in_pieces_change_nothing(name: str, positions: str | Window) -> None:
    """The whole sequence at once, in pieces, and token by token give the same, the prompt being its first 7 tokens."""
    model, row = build(name), prompts(10)[0]
    one = spec(
        {"op": "add", "coefficient": 2.0, "positions": positions},
        {"op": "scale", "coefficient": 1.5, "layer": 1, "positions": positions, "hook_point": "mlp_out"},
    )
    whole = in_pieces(model, row, one, [10])
    plain = in_pieces(model, row, None, [10])
    assert not torch.allclose(whole, plain, atol=1e-4)
    assert "linear_attention" in (getattr(model.config, "layer_types", None) or []) or torch.allclose(
        in_pieces(model, row, one, [3, 3, 2, 2]), whole, atol=1e-4
    )
    torch.testing.assert_close(in_pieces(model, row, one, [7, 1, 1, 1]), whole, atol=1e-4, rtol=1e-4)


def test_padding_is_left_alone_and_so_is_the_models_own_tensor() -> None:
    """A reader that came first keeps the hidden states as they were before steering."""
    model, rows = tiny_model("llama"), prompts(4, 9)
    specs = [
        spec({"op": "add", "coefficient": 5.0}, {"op": "ablate", "coefficient": 1.0, "hook_point": "resid_pre"})
    ] * 2
    plain, first = forward(model, rows), {}
    with reading(model, {(0, p): lambda h, p=p: first.update({p: h}) for p in ("resid_pre", "resid_post")}):
        after = forward(model, rows, [spec({"op": "add", "coefficient": 5.0})] * 2)
        assert same_bits(first["resid_post"], plain[0])
        padding = ~after["mask"]
        assert padding.sum() == 5
        assert same_bits(after[0][padding], plain[0][padding])
        forward(model, rows)
        entering = first["resid_pre"]
        forward(model, rows, specs)
        assert same_bits(first["resid_pre"], entering)


@pytest.mark.parametrize("kind", ["position_ids", "mask", "both"])
def test_the_positions_of_a_call_are_those_of_its_tokens(kind: str) -> None:
    """Left-padded rows of 3, 8 and 5 tokens in pieces of 4, 1, 3: with what each call brings."""
    model, cache = tiny_model("llama"), DynamicCache(config=tiny_model("llama").config)
    ids, mask = left_padded(prompts(3, 8, 5), 2, torch.device("cpu"))
    true, start = torch.where(mask > 0, mask.cumsum(-1) - 1, -1), 0
    for size in (4, 1, 3):
        part = slice(start, start + size)
        given = {"position_ids": true[:, part].clamp_min(0)} if kind != "mask" else {}
        given |= {"attention_mask": mask[:, : part.stop]} if kind != "position_ids" else {}
        given["past_key_values"] = cache
        positions, seen = call_positions(model, (ids[:, part],), given)
        known = torch.where(seen > 0, positions, -1) if seen is not None else positions
        assert torch.equal(known, true[:, part] if seen is not None else true[:, part].clamp_min(0))
        model(input_ids=ids[:, part], **given)
        start += size
    # Without either, tokens follow what the cache holds; embeddings may stand for tokens.
    positions, seen = call_positions(model, (), {"inputs_embeds": torch.zeros(3, 2, 32), "past_key_values": cache})
    assert positions.tolist() == [[8, 9]] * 3 and seen is None
    with pytest.raises(RuntimeError, match="neither input_ids nor inputs_embeds"):
        call_positions(model, (), {})
    with pytest.raises(RuntimeError, match=r"position_ids of shape \(3, 1, 4\)"):
        call_positions(model, (ids[:, :4],), {"position_ids": torch.zeros(3, 1, 4)})


def in_pieces(model: nn.Module, row: list[int], one: ResolvedSpec | None, sizes: list[int]) -> Tensor:
    """Logits of all positions, with nothing but the cache to tell the positions."""
    cache, logits, start = DynamicCache(config=model.config), [], 0
    with torch.inference_mode(), steered(model, [one], [7]):
        for size in sizes:
            piece = torch.tensor([row[start : start + size]])
            logits.append(model(input_ids=piece, past_key_values=cache, use_cache=True).logits)
            start += size
    return torch.cat(logits, dim=1)


@pytest.mark.parametrize("which", EVERYTHING)
@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2", "opt"])
def test_a_window_acts_on_its_tokens_only(name: str, which: str) -> None:
    """At the layer acted on, tokens outside the window keep their bits (later layers mix them)."""
    model, row = build(name), prompts(8)[0]
    operations = EVERYTHING[which].operations
    layer, point = operations[0].layer, operations[0].hook_point
    window = spec(*[{**vars(o), "positions": Window(start=-4, end=6)} for o in operations if o.layer == layer])
    hidden = {}
    for key, one in (("plain", None), ("window", window)):
        note = {(layer, point): lambda h, key=key: hidden.update({key: h[0]})}
        with torch.inference_mode(), steered(model, [one], [8]), reading(model, note):
            model(input_ids=torch.tensor([row]))
    assert same_bits(hidden["plain"][:4], hidden["window"][:4])
    assert same_bits(hidden["plain"][6:], hidden["window"][6:])
    assert (hidden["plain"][4:6] != hidden["window"][4:6]).any(dim=-1).all()


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2", "opt", "qwen3"])
def test_generation_in_a_batch_that_shrinks_equals_one_row_at_a_time(name: str) -> None:
    model = build(name)
    rows = prompts(5, 11, 7, 4, 9)
    requests = [
        GenerationRequest(id=str(i), token_ids=tuple(row), max_tokens=3 + 2 * (i % 3)) for i, row in enumerate(rows)
    ]
    specs = [None, EVERYTHING["add"], EVERYTHING["several"], EVERYTHING["set"], EVERYTHING["relative"]]
    together = generate(model, requests, specs)
    for request, one in zip(requests, specs, strict=True):
        single = generate(model, [request], [one])
        assert together[request.id][0] == single[request.id][0]
        assert together[request.id][1] == pytest.approx(single[request.id][1], abs=1e-4)
    plain = generate(model, requests, [None] * 5)
    assert together["0"] == plain["0"]
    assert [together[str(i)][1] != plain[str(i)][1] for i in range(1, 5)] == [True] * 4


def generate(model: nn.Module, requests: list[GenerationRequest], specs: list[ResolvedSpec | None]) -> dict:
    """Row id → (tokens, entropies), rows leaving the batch as they end."""
    batch, done = Batch(model, requests, 2, 5), {}
    lengths = [len(r.token_ids) for r in requests]
    with torch.inference_mode(), packed_linears(model), steered(model, specs, lengths) as steering:
        while batch.rows:
            before = list(batch.rows)
            for row, _ in batch.step(frozenset()):
                done[row.request.id] = (row.tokens, row.entropy)
            steering.keep([i for i, row in enumerate(before) if any(row is kept for kept in batch.rows)])
    return done


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_generate_of_transformers_is_steered_too(name: str) -> None:
    model, rows = build(name), prompts(5, 9)
    ids, mask = left_padded(rows, 2, torch.device("cpu"))
    arguments = {
        "attention_mask": mask,
        "max_new_tokens": 5,
        "do_sample": False,
        "eos_token_id": None,
        "pad_token_id": 2,
    }
    requests = [GenerationRequest(id=str(i), token_ids=tuple(row), max_tokens=5) for i, row in enumerate(rows)]
    specs = [EVERYTHING["several"], EVERYTHING["relative"]]
    with steered(model, specs, [5, 9]):
        tokens = model.generate(input_ids=ids, **arguments)[:, 9:].tolist()
    ours = generate(model, requests, specs)
    assert tokens == [ours["0"][0], ours["1"][0]]


def test_operations_of_one_layer_act_in_their_order() -> None:
    model, row = tiny_model("llama"), prompts(6)[0]
    ablate, add = {"op": "ablate", "coefficient": 1.0}, {"op": "add", "coefficient": 2.0}
    added_last, added_first = alone(model, row, spec(ablate, add)), alone(model, row, spec(add, ablate))
    torch.testing.assert_close(projection(added_last[0][0], D), torch.full((6,), 2.0), atol=1e-5, rtol=0)
    torch.testing.assert_close(projection(added_first[0][0], D), torch.zeros(6), atol=1e-5, rtol=0)


@pytest.mark.parametrize(("layer", "point"), [(1, "resid_post"), (0, "resid_post"), (1, "resid_pre"), (0, "attn_out")])
def test_a_condition_acts_on_the_tokens_that_fulfil_it(layer: int, point: str) -> None:
    """The condition is read before anything is done at its layer, be it by this entry or by an earlier one."""
    model, rows = tiny_model("llama"), prompts(30, 30)
    probe, p = torch.from_numpy(unit(5)), {}
    with torch.inference_mode(), reading(model, {(layer, point): lambda h: p.update(x=projection(h, probe))}):
        model(input_ids=torch.tensor(rows))
    threshold = p["x"].median().item()
    where = {"layer": layer, "hook_point": point, "direction": unit(5)}
    above = ResolvedCondition(**where, above=threshold, below=None)
    below = ResolvedCondition(**where, above=None, below=threshold)
    plain = forward(model, rows)[1]
    moves = {"op": "add", "coefficient": 9.0, "layer": 1, "direction": unit(5)}
    moved = forward(model, rows, [spec({**moves, "condition": above}), spec({**moves, "condition": below})])[1]
    expected = torch.stack([p["x"][0] > threshold, p["x"][1] < threshold])
    assert expected.any() and not expected.all()
    torch.testing.assert_close(moved[expected], plain[expected] + 9 * probe)
    assert same_bits(moved[~expected], plain[~expected])
    # Two entries under one condition act on the same tokens, though the first moves what the condition reads.
    conditional = {**moves, "condition": below}
    twice = forward(model, rows, [None, spec(conditional, conditional)])[1]
    torch.testing.assert_close(twice[1][expected[1]], plain[1][expected[1]] + 18 * probe)
    assert same_bits(twice[1][~expected[1]], plain[1][~expected[1]]) and same_bits(twice[0], plain[0])
    # An entry without a condition in the same round acts all the same.
    mixed = forward(model, rows, [spec(moves), spec(conditional)])[1]
    torch.testing.assert_close(mixed[0], plain[0] + 9 * probe)
    assert same_bits(mixed[1][~expected[1]], plain[1][~expected[1]])


def test_long_batches_are_changed_in_groups_with_the_same_result(monkeypatch: pytest.MonkeyPatch) -> None:
    model, rows = tiny_model("llama"), prompts(20, 13, 17)
    specs = [EVERYTHING["several"], EVERYTHING["cap"], EVERYTHING["relative"]]
    whole = forward(model, rows, specs)["logits"]
    monkeypatch.setattr("src.models.steering.MAX_ELEMENTS_AT_ONCE", 32 * 7)
    torch.testing.assert_close(forward(model, rows, specs)["logits"], whole)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_keeps_its_dtype_and_untouched_rows_their_bits(dtype: torch.dtype) -> None:
    model, rows = tiny_model("llama").to(dtype), prompts(6, 6)
    plain, mixed = forward(model, rows), forward(model, rows, [EVERYTHING["several"], None])
    assert mixed[0].dtype == dtype
    assert same_bits(mixed["logits"][1], plain["logits"][1])
    assert not torch.equal(mixed["logits"][0], plain["logits"][0])


class Broken(Exception):
    pass


def n_hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def test_no_hook_stays_after_an_exception() -> None:
    model = tiny_model("llama")
    with pytest.raises(Broken), steered(model, [EVERYTHING["several"]], [3]):
        assert n_hooks(model) > 0
        raise Broken
    assert n_hooks(model) == 0
    with pytest.raises(RuntimeError, match="never ran"), steered(model, [EVERYTHING["several"]], [3]):
        pass
    assert n_hooks(model) == 0


def test_a_layer_that_a_call_skips_is_noticed() -> None:
    """A first call runs all layers, a second one without the last: the end of the context tells."""
    model, ids = tiny_model("llama"), torch.tensor(prompts(4))
    one = spec({"op": "add", "coefficient": 1.0, "layer": 1})
    with pytest.raises(RuntimeError, match="resid_post of layer 1 did not run"), steered(model, [one], [4]):
        model(input_ids=ids)
        kept, model.model.layers = model.model.layers, model.model.layers[:1]
        model(input_ids=ids)
    model.model.layers = kept
    assert n_hooks(model) == 0


def test_calls_that_do_not_fit_the_rows_raise() -> None:
    model, ids = tiny_model("llama"), torch.tensor(prompts(4, 4))
    one = EVERYTHING["add"]
    with pytest.raises(RuntimeError, match="on 1 rows; call keep"), steered(model, [one], [4]):
        model(input_ids=ids)
    with pytest.raises(RuntimeError, match="does not show padding"), steered(model, [one, None], [4, 4]):
        model(input_ids=ids, attention_mask=torch.zeros(2, 1, 4, 4))
    mask = torch.ones(2, 4, dtype=torch.long)
    with pytest.raises(RuntimeError, match="mask over 4 positions for 4 cached"), steered(model, [one] * 2, [4, 4]):
        cache = model(input_ids=ids, use_cache=True).past_key_values
        model(input_ids=ids[:, :1], attention_mask=mask, past_key_values=cache)
    with pytest.raises(RuntimeError, match="outside a forward call"), steered(model, [one, None], [4, 4]):
        model.model(input_ids=ids)
    with pytest.raises(RuntimeError, match="ran twice"), steered(model, [one, None], [4, 4]):
        model(input_ids=ids)
        model.model(input_ids=ids)
    assert n_hooks(model) == 0


def test_vectors_of_another_width_and_layers_beyond_the_model_are_refused() -> None:
    model = tiny_model("llama")
    wide = spec({"op": "ablate", "coefficient": 1.0, "direction": unit(0, 48)})
    with pytest.raises(InputError, match=r"width 48 at resid_post of layer 0.*32"), steered(model, [wide], [3]):
        pass
    deep = spec({"op": "ablate", "coefficient": 1.0, "layer": 2})
    with pytest.raises(InputError, match="layer 2; the model's layers are 0 to 1"), steered(model, [deep], [3]):
        pass


def test_the_windows_count_as_documented() -> None:
    window = lambda positions, length: spec({"op": "ablate", "positions": positions}).operations[0].window(length)  # noqa: E731
    assert [window(name, 5) for name in ("all", "prompt", "generated", "last_prompt")] == [
        (0, None), (0, 5), (5, None), (4, 5),
    ]  # fmt: skip
    assert window(Window(start=-1), 5) == (4, None)
    assert window(Window(start=-3, end=-1), 5) == (2, 4)
    assert window(Window(start=-9, end=7), 5) == (0, 7)
    assert window(Window(start=2, end=-1), 2) == (2, 1)
    drawn = random.Random(0)
    for _ in range(300):
        start, end, length = drawn.randrange(-9, 9), drawn.randrange(-9, 9), drawn.randrange(1, 8)
        if end == 0 or ((start < 0) == (end < 0) and start >= end):
            with pytest.raises(ValueError, match="hold no position"):
                Window(start=start, end=end)
            continue
        low, high = window(Window(start=start, end=end), length)
        tokens = np.arange(12)
        reference = (tokens >= (start if start >= 0 else length + start)) & (
            tokens < (end if end >= 0 else length + end)
        )
        assert ((tokens >= low) & (tokens < high)).tolist() == reference.tolist()
