import pytest
import torch
from torch import nn

from src.models.cpu_linear import frozen_linears, onednn_linears, packed_linears
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


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this build of PyTorch has no oneDNN")
def test_products_on_unpacked_weights_equal_the_plain_ones_and_see_edits() -> None:
    torch.manual_seed(0)
    linear, x = nn.Linear(64, 96), torch.randn(3, 200, 64)
    with torch.inference_mode():
        with onednn_linears(linear) as n:
            assert n == 1 and torch.allclose(linear(x), nn.functional.linear(x, linear.weight, linear.bias), atol=1e-5)
            linear.weight.data.mul_(3)
            assert torch.allclose(linear(x), nn.functional.linear(x, linear.weight, linear.bias), atol=1e-5)
        with onednn_linears(nn.Linear(4, 4).bfloat16()) as n:
            assert n == 0
    with onednn_linears(linear) as n:
        assert n == 0, "under autograd"
    assert "forward" not in vars(linear)


@pytest.mark.parametrize("bias", [True, False])
def test_gradients_through_frozen_products_are_the_plain_ones(bias: bool) -> None:
    torch.manual_seed(0)
    frozen, free = nn.Linear(64, 96, bias=bias).requires_grad_(False), nn.Linear(96, 8)
    net, x = nn.Sequential(frozen, free), torch.randn(3, 5, 64)

    def gradients() -> list[torch.Tensor]:
        net.zero_grad()
        inputs = x.clone().requires_grad_()
        net(inputs).square().sum().backward()
        return [inputs.grad, free.weight.grad.clone()]

    plain = gradients()
    with frozen_linears(net) as n:
        through = gradients()
    assert n == int(torch.backends.mkldnn.is_available()) and "forward" not in vars(frozen)
    assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(plain, through, strict=True))
