"""Faster float32 matrix products on x86 CPUs by oneDNN: in generation on packed weights, in training backwards too."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import psutil
import torch
from torch import Tensor, nn

# Packing holds a second copy of the weights; a model that takes more than this share of free memory is left as it is.
MEMORY_SHARE = 0.4


@contextmanager
def packed_linears(model: nn.Module) -> Iterator[int]:
    """
    Within the context, float32 `nn.Linear` modules on the CPU compute through oneDNN; yields how many do.

    PyTorch sends float32 products to MKL, which is slow on AMD processors (scripts/benchmarks/cpu_linear.py measures
    how slow). The packed copies live only as long as the context, so that a weight edited between two generations is
    never stale; hooks on the modules run as before. Does nothing where oneDNN is missing, under autograd, for modules
    with a forward of their own, or when memory is short.
    """
    # PEFT's ParamWrapper changes the weight of the module within it anew for every call.
    changed = {id(inner) for m in model.modules() if type(m).__name__ == "ParamWrapper" for inner in m.modules()}
    linears = [m for m in model.modules() if _packable(m) and id(m) not in changed]
    if not torch.backends.mkldnn.is_available():
        linears = []
    wanted = sum(m.weight.numel() * m.weight.element_size() for m in linears)
    if torch.is_grad_enabled() or wanted > MEMORY_SHARE * psutil.virtual_memory().available:
        linears = []
    with _computing_by(linears, _PackedLinear):
        yield len(linears)


@contextmanager
def onednn_linears(model: nn.Module) -> Iterator[int]:
    """
    The same without a packed copy of the weights, for thousands of tokens at once, where laying them out anew each time
    costs nothing that can be measured.
    """
    linears = [m for m in model.modules() if _packable(m)]
    if torch.is_grad_enabled() or not torch.backends.mkldnn.is_available():
        linears = []
    with _computing_by(linears, _OneDnnLinear):
        yield len(linears)


@contextmanager
def frozen_linears(model: nn.Module) -> Iterator[int]:
    """
    The same for training: within the context `nn.Linear` modules whose weights take no gradient compute through oneDNN,
    backwards too.
    """
    linears = [m for m in model.modules() if _packable(m) and not m.weight.requires_grad]
    if not torch.backends.mkldnn.is_available():
        linears = []
    with _computing_by(linears, _FrozenLinear):
        yield len(linears)


@contextmanager
def _computing_by(linears: list[nn.Linear], make: Callable[[nn.Linear], Callable[[Tensor], Tensor]]) -> Iterator[None]:
    # A forward set on the instance wins over the class's and is removed again by deleting it.
    for linear in linears:
        linear.forward = make(linear)
    try:
        yield
    finally:
        for linear in linears:
            del linear.forward


def _packable(module: nn.Module) -> bool:
    if type(module) is not nn.Linear or "forward" in vars(module):
        return False
    return module.weight.device.type == "cpu" and module.weight.dtype == torch.float32


class _PackedLinear:
    def __init__(self, linear: nn.Linear) -> None:
        self.packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), None)
        self.bias = linear.bias

    def __call__(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")


class _OneDnnLinear:
    def __init__(self, linear: nn.Linear) -> None:
        self.linear = linear

    def __call__(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self.linear.weight, self.linear.bias, "none", [], "")


class _FrozenLinear:
    def __init__(self, linear: nn.Linear) -> None:
        self.linear = linear

    def __call__(self, x: Tensor) -> Tensor:
        return _FrozenProduct.apply(x, self.linear.weight, self.linear.bias)


class _FrozenProduct(torch.autograd.Function):
    """x·Wᵀ + b, whose W and b take no gradient."""

    @staticmethod
    def forward(context, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        context.weight = weight
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")

    @staticmethod
    def backward(context, gradient: Tensor) -> tuple[Tensor, None, None]:
        back = torch.ops.mkldnn._linear_pointwise(gradient.contiguous(), context.weight.t(), None, "none", [], "")
        return back, None, None
