import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, MptConfig

from src.common.errors import InputError
from src.models import architectures
from tests.tiny_models import CONFIGS, tiny_model, tiny_multimodal

NAMES = [*CONFIGS, "multimodal"]


def build(name: str) -> nn.Module:
    return tiny_multimodal() if name == "multimodal" else tiny_model(name)


@pytest.mark.parametrize("name", NAMES)
def test_every_part_is_found_by_structure(name: str) -> None:
    model = build(name)
    layers = architectures.decoder_layers(model)
    assert len(layers) == model.config.get_text_config().num_hidden_layers
    hidden_size = model.config.get_text_config().hidden_size
    for layer in layers:
        writers = [*architectures.attention_writers(layer), *architectures.mlp_writers(layer)]
        assert len(writers) >= 2 and all(hidden_size in writer.weight.shape for writer in writers)


@pytest.mark.parametrize("name", NAMES)
def test_the_writers_are_all_that_a_layer_adds(name: str) -> None:
    """With every writer's weight (and bias) at zero a layer passes its input on unchanged."""
    model = build(name)
    ids = torch.arange(10, 20)[None]
    with torch.no_grad():
        for layer in architectures.decoder_layers(model):
            for writer in [*architectures.attention_writers(layer), *architectures.mlp_writers(layer)]:
                writer.weight.zero_()
                if getattr(writer.module, "bias", None) is not None:
                    writer.module.bias.zero_()
    seen = []
    handles = [
        layer.register_forward_hook(
            lambda module, args, output: seen.append((args[0], output[0] if isinstance(output, tuple) else output))
        )
        for layer in architectures.decoder_layers(model)
    ]
    with torch.no_grad():
        model(input_ids=ids)
    for handle in handles:
        handle.remove()
    assert len(seen) == len(handles)
    for before, after in seen:
        assert torch.equal(before, after)


@pytest.mark.parametrize("name", NAMES)
def test_the_final_norm_sees_the_last_layers_output(name: str) -> None:
    model = build(name)
    seen = {}
    last = architectures.decoder_layers(model)[-1]
    last.register_forward_hook(lambda m, a, output: seen.update(out=output[0] if isinstance(output, tuple) else output))
    architectures.final_norm(model).register_forward_hook(lambda m, args, output: seen.update(into=args[0]))
    with torch.no_grad():
        model(input_ids=torch.arange(10, 20)[None])
    assert torch.equal(seen["out"], seen["into"])


def test_experts_and_the_shared_expert_are_listed() -> None:
    layer = architectures.decoder_layers(tiny_model("qwen3_next"))[0]
    paths = {(writer.path, writer.parameter) for writer in architectures.mlp_writers(layer)}
    assert paths == {("mlp.experts", "down_proj"), ("mlp.shared_expert.down_proj", "weight")}


class Odd(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.strange_blocks = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])


def test_an_unknown_build_names_the_way_to_override_and_the_way_works() -> None:
    model = Odd()
    with pytest.raises(InputError, match=r"Odd.*tiller_layers_path.*strange_blocks \(2\)"):
        architectures.decoder_layers(model)
    model.tiller_layers_path = "strange_blocks"
    assert architectures.decoder_layers(model) is model.strange_blocks
    model.tiller_layers_path = "nowhere"
    with pytest.raises(InputError, match="'nowhere' is not a list of modules"):
        architectures.decoder_layers(model)
    with pytest.raises(InputError, match="no attention in Linear"):
        architectures.attention(model.strange_blocks[0])


def test_the_blocks_of_an_mpt_are_found() -> None:
    model = AutoModelForCausalLM.from_config(MptConfig(vocab_size=300, d_model=32, n_heads=4, n_layers=2))
    layers = architectures.decoder_layers(model)
    assert layers is model.transformer.blocks
    assert architectures.mlp(layers[0]) is layers[0].ffn
