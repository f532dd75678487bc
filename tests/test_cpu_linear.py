import pytest
import torch
from torch import nn

from src.models.cpu_linear import packed_linears
from tests.tiny_models import tiny_model


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this build of PyTorch has no oneDNN")
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(1, 64), (3, 5, 64), (200, 64)])
def test_packed_products_equal_the_plain_ones(bias: bool, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(64, 96, bias=bias)
    x = torch.randn(shape)
    with torch.inference_mode():
        plain = linear(x)
        with packed_linears(linear) as n_packed:
            packed = linear(x)
    assert n_packed == 1
    assert packed.shape == plain.shape and torch.allclose(packed, plain, atol=1e-5)


def test_weights_edited_between_two_uses_are_seen_and_hooks_run() -> None:
    model = tiny_model("llama")
    ids = torch.arange(10, 20)[None]
    fired = []
    model.model.layers[0].mlp.down_proj.register_forward_hook(lambda *_: fired.append(1))
    with torch.inference_mode():
        with packed_linears(model):
            before = model(ids).logits
        model.model.layers[0].mlp.down_proj.weight.data.mul_(3)
        with packed_linears(model):
            after = model(ids).logits
        plain = model(ids).logits
    assert len(fired) == 3
    assert not torch.allclose(before, after, atol=1e-6)
    assert torch.allclose(after, plain, atol=1e-5)


def test_nothing_stays_behind_also_after_an_exception() -> None:
    model = tiny_model("llama")
    with torch.inference_mode(), pytest.raises(RuntimeError), packed_linears(model):
        raise RuntimeError
    assert not any("forward" in vars(module) for module in model.modules())


def test_half_precision_and_autograd_are_left_alone() -> None:
    with torch.inference_mode(), packed_linears(nn.Linear(4, 4).bfloat16()) as n_packed:
        assert n_packed == 0
    with packed_linears(nn.Linear(4, 4)) as n_packed:
        assert n_packed == 0
