"""Hook points: they are where they are said to be, they come off again, and none is silent."""

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, Gemma3nTextConfig

from src.common.directions_file import HOOK_POINTS
from src.common.errors import InputError
from src.models.architectures import attention, decoder_layers, mlp
from src.models.hooks import reading, replacing
from tests.steering_specs import same_bits
from tests.tiny_models import CONFIGS, tiny_model, tiny_multimodal

NAMES = [*CONFIGS, "multimodal"]
IDS = torch.randint(5, 49000, (2, 7), generator=torch.Generator().manual_seed(0))


def build(name: str) -> nn.Module:
    return tiny_multimodal() if name == "multimodal" else tiny_model(name)


def run(model: nn.Module, ids: Tensor = IDS) -> Tensor:
    with torch.inference_mode():
        return model(input_ids=ids).logits


def n_hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def first(output: Tensor | tuple) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


@pytest.mark.parametrize("name", NAMES)
def test_every_hook_point_reads_what_the_modules_pass_on(name: str) -> None:
    """Against direct hooks on the blocks and their parts, in every layer including the last."""
    model, seen, direct = build(name), {}, {}
    layers = decoder_layers(model)
    handles = []
    for i, layer in enumerate(layers):
        note = lambda key: lambda m, a, output: direct.update({key: first(output)})  # noqa: E731
        handles.append(layer.register_forward_hook(note((i, "resid_post"))))
        handles.append(attention(layer).register_forward_hook(note((i, "attn_out"))))
        handles.append(mlp(layer).register_forward_hook(note((i, "mlp_out"))))
    places = [(i, point) for i in range(len(layers)) for point in HOOK_POINTS]
    with reading(model, {place: lambda h, place=place: seen.update({place: h}) for place in places}):
        logits = run(model)
    for handle in handles:
        handle.remove()
    d_model = model.config.get_text_config().hidden_size
    assert {h.shape for h in seen.values()} == {(2, 7, d_model)}
    for place in places:
        if place[1] == "resid_pre":
            continue
        assert torch.equal(seen[place].reshape(-1), direct[place].reshape(-1)), place
    for i in range(1, len(layers)):
        assert torch.equal(seen[i, "resid_pre"], seen[i - 1, "resid_post"])
    assert same_bits(run(model), logits)


@pytest.mark.parametrize("name", ["llama", "qwen3", "mixtral"])
def test_a_block_adds_its_parts_to_what_enters(name: str) -> None:
    """resid_post = resid_pre + attn_out + mlp_out, where no norm stands behind the parts."""
    model, seen = build(name), {}
    with reading(model, {(1, p): lambda h, p=p: seen.update({p: h}) for p in HOOK_POINTS}):
        run(model)
    total = seen["resid_pre"] + seen["attn_out"] + seen["mlp_out"]
    torch.testing.assert_close(total, seen["resid_post"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_the_last_layer_is_read_before_the_final_norm(name: str) -> None:
    model, seen = build(name), {}
    last = len(decoder_layers(model)) - 1
    with reading(model, {(last, "resid_post"): lambda h: seen.update(h=h)}), torch.inference_mode():
        states = model(input_ids=IDS, output_hidden_states=True).hidden_states
    assert not torch.allclose(seen["h"], states[-1], atol=1e-3)
    with reading(model, {(0, "resid_post"): lambda h: seen.update(first=h)}):
        run(model)
    torch.testing.assert_close(seen["first"], states[1])


@pytest.mark.parametrize("point", HOOK_POINTS)
@pytest.mark.parametrize("name", NAMES)
def test_what_is_returned_goes_on_in_place_of_the_hidden_states(name: str, point: str) -> None:
    model, after = build(name), {}
    plain = run(model)
    noise = 3 * torch.randn(2, 7, 32, generator=torch.Generator().manual_seed(1))
    with replacing(model, {(1, point): lambda h: h + noise}), reading(model, {(1, point): lambda h: after.update(h=h)}):
        changed = run(model)
    assert not torch.allclose(changed, plain, atol=1e-3)
    before = {}
    with reading(model, {(1, point): lambda h: before.update(h=h)}):
        assert same_bits(run(model), plain)
    torch.testing.assert_close(after["h"], before["h"] + noise)
    with replacing(model, {(1, point): lambda h: None}):
        assert same_bits(run(model), plain)


class Broken(Exception):
    pass


def test_a_failing_hook_raises_and_leaves_none_behind() -> None:
    model = tiny_model("llama")
    before = n_hooks(model)

    def fail(hidden: Tensor) -> Tensor:
        raise Broken("here")

    with pytest.raises(Broken, match="here"), replacing(model, dict.fromkeys(((0, p) for p in HOOK_POINTS), fail)):
        assert n_hooks(model) > before
        run(model)
    assert n_hooks(model) == before


def test_an_exception_in_the_block_is_the_one_that_is_seen() -> None:
    model = tiny_model("llama")
    with pytest.raises(Broken), reading(model, {(0, "attn_out"): lambda h: None}):
        raise Broken
    assert n_hooks(model) == 0


@pytest.mark.parametrize("point", HOOK_POINTS)
def test_a_hook_that_never_ran_raises(point: str) -> None:
    model = tiny_model("llama")
    with pytest.raises(RuntimeError, match=f"{point} of layer 1 .*never ran"), reading(model, {(1, point): print}):
        pass
    assert n_hooks(model) == 0


@pytest.mark.parametrize("place", [(2, "resid_post"), (-1, "resid_post"), (0, "resid_mid")])
def test_a_place_that_the_model_lacks_is_refused(place: tuple[int, str]) -> None:
    model = tiny_model("llama")
    with pytest.raises(InputError, match=r"0 to 1|one of resid_pre"), reading(model, {place: print}):
        pass
    assert n_hooks(model) == 0


@pytest.mark.parametrize("point", HOOK_POINTS)
def test_several_residual_streams_are_refused(point: str) -> None:
    config = Gemma3nTextConfig(
        vocab_size=300, vocab_size_per_layer_input=300, hidden_size=32, hidden_size_per_layer_input=8,
        intermediate_size=[64, 64], num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
        num_kv_shared_layers=0, laurel_rank=4, activation_sparsity_pattern=[0.0, 0.0],
        layer_types=["sliding_attention", "full_attention"],
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with pytest.raises(InputError, match="several residual streams"), reading(model, {(0, point): print}):
        model(input_ids=torch.tensor([[5, 6, 7]]))
    assert n_hooks(model) == 0
